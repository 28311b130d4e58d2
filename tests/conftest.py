"""What the tests iterate over comes from the package's own lists, so a new cell, dtype or ISA
is covered at once.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator

# Tests run side by side (pytest -n auto), one on each core: what is not about threads computes
# on one, since threads that wait for a core they share take several times as long.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# Calls keep all their threads, also those whose cores another test uses.
os.environ.setdefault("FUSEDRNN_FIXED_THREADS", "1")

# Keras reads its backend when it is imported, which a page of the documentation may do first.
os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

import fusedrnn as fr  # noqa: E402
from fusedrnn import _cpu, checks  # noqa: E402
from fusedrnn.cells import CELLS, Cell  # noqa: E402


@pytest.fixture(params=list(CELLS))
def cell(request: pytest.FixtureRequest) -> Cell:
    return CELLS[request.param]


@pytest.fixture(params=[str(d) for d in checks.DTYPES])
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    return np.dtype(request.param)


def force_isa(name: str) -> Iterator[str]:
    if not _cpu.isas()[name]:
        pytest.skip(f"this CPU has no {name}")
    before = fr.get_isa()
    fr.set_isa(name)
    yield name
    fr.set_isa(before)


# The names with an underscore add units for narrow weights to the vectors of another ISA.
VECTORS = [name for name in _cpu.isas() if "_" not in name]


@pytest.fixture(params=VECTORS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each compiled ISA that this CPU has, forced."""
    yield from force_isa(request.param)


@pytest.fixture(params=list(_cpu.isas()))
def isa_with_units(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each compiled ISA with each set of units for narrow weights."""
    yield from force_isa(request.param)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> int:
    fr.set_num_threads(request.param)
    return request.param


@pytest.fixture(params=list(zip(VECTORS, itertools.cycle([5, 2, 1]))), ids=str)
def isa_on_threads(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each ISA, each on one number of threads: another test shows that it changes no bit."""
    isa, threads = request.param
    fr.set_num_threads(threads)
    yield from force_isa(isa)


GPU_SECONDS = 30


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Limit the time of a test on a GPU, which a fault of the kernels may make endless."""
    plugins = config.pluginmanager
    has_limits = plugins.hasplugin("timeout") or plugins.hasplugin("pytest_timeout")
    if not has_limits or fr.cuda.status().startswith("emulator"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.timeout(GPU_SECONDS, method="thread"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End the process of a test that lost the GPU: there every later call fails.

    pytest-xdist starts another process for the tests that are left.
    """
    if item.get_closest_marker("gpu") is None or not fr.cuda.is_available():
        return
    try:
        fr.cuda._module().synchronize(0, 0)
    except RuntimeError as failure:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"{item.nodeid}: {failure}", returncode=1)


@pytest.fixture(autouse=True)
def _default_threads() -> Iterator[None]:
    """The number of threads that a test sets is its own."""
    yield
    fr.set_num_threads(0)


@pytest.fixture(autouse=True)
def _team(request: pytest.FixtureRequest) -> None:
    """Kernels run on threads of our own, but on PyTorch's in the tests of fusedrnn.torch."""
    if "fusedrnn.torch" in sys.modules:
        from fusedrnn.torch import kernels

        if request.module.__name__.startswith("test_torch_"):
            kernels.share_team()
        else:
            _cpu.share_team("")
