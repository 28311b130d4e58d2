"""What the tests iterate over comes from the package's own lists, so a new cell, dtype or ISA
is covered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

import fusedrnn as fr
from fusedrnn import _cpu, checks
from fusedrnn.cells import CELLS, Cell


@pytest.fixture(params=list(CELLS))
def cell(request: pytest.FixtureRequest) -> Cell:
    return CELLS[request.param]


@pytest.fixture(params=[str(d) for d in checks.DTYPES])
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    return np.dtype(request.param)


@pytest.fixture(params=list(_cpu.isas()))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each compiled ISA that this CPU has, forced."""
    if not _cpu.isas()[request.param]:
        pytest.skip(f"this CPU has no {request.param}")
    before = fr.get_isa()
    fr.set_isa(request.param)
    yield request.param
    fr.set_isa(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    fr.set_num_threads(request.param)
    yield request.param
    fr.set_num_threads(0)


@pytest.fixture(autouse=True)
def _team(request: pytest.FixtureRequest) -> None:
    """Threads of ours, but in the tests of what runs on PyTorch's."""
    if "fusedrnn.torch" in sys.modules:
        from fusedrnn.torch import kernels

        if request.module.__name__.startswith("test_torch_"):
            kernels.share_team()
        else:
            _cpu.share_team("")
