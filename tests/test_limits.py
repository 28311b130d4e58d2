"""Calls use no more threads than the process may, compute with fewer, and end when asked to."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedrnn as fr
from fusedrnn import _cpu, machine

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
UNIX = pytest.mark.skipif(sys.platform == "win32", reason="interval timers of Unix")


# As many threads as the process may use

V1_OF_2_5 = (("quota", "250000"), ("period", "100000"))


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        # A container may see the path that its group has outside.
        ("0::/docker/a1", {"cpu.max": "50000 100000"}, 0.5),
        (
            "0::/a/b",
            {"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000", "cpu.max": "max 1"},
            2.0,
        ),
        ("0::/a", {"unified/a/cpu.max": "100000 50000"}, 2.0),
        (
            "5:memory:/m\n4:cpu,cpuacct:/c\n0::/",
            {f"cpu,cpuacct/c/cpu.cfs_{name}_us": us for name, us in V1_OF_2_5},
            2.5,
        ),
        ("4:cpu:/c", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:cpuset:/", {"cpu.max": "100000 100000"}, None),
        ("0::/", {"cpu.max": "not a number"}, None),
        ("", {}, None),
    ],
)
def test_quota_of_control_groups(
    tmp_path: Path, groups: str, files: dict[str, str], quota: float | None
) -> None:
    """The quota is that of the strictest group, in both versions of control groups."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine.quota(tmp_path) == quota
    assert machine.quota(tmp_path / "none") is None


def test_quota_limits_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota of one processor leaves one thread, unless the user sets another number."""
    assert machine.quota() is None or fr.get_num_threads() <= math.ceil(machine.quota() or 0)
    before = fr.get_num_threads()
    try:
        _cpu.set_quota(1)
        assert machine.cores() == 1
        fr.set_num_threads(0)
        assert fr.get_num_threads() == 1
        fr.set_num_threads(3)
        assert fr.get_num_threads() == 3
    finally:
        _cpu.set_quota(math.ceil(machine.quota() or 0))
        fr.set_num_threads(before)


@LINUX
@pytest.mark.parametrize(
    ("environment", "allowed"),
    [
        ({"OMP_NUM_THREADS": "64"}, len(getattr(os, "sched_getaffinity", lambda _: [0])(0))),
        ({"OMP_NUM_THREADS": "64", "OMP_THREAD_LIMIT": "1"}, 1),
        ({"OMP_NUM_THREADS": "1"}, 1),
    ],
)
def test_threads_beyond_the_processors(environment: dict[str, str], allowed: int) -> None:
    """No more threads than processors are used, whatever is asked for, and info says so."""
    code = (
        "import fusedrnn as fr; fr.show_config(); print(fr.get_num_threads());"
        "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]);"
        "import time; time.sleep(1.1); print(fr.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    *_, imported, pinned = done.stdout.split()
    assert int(imported) == (allowed if machine.quota() is None else fr.get_num_threads())
    assert int(pinned) == 1  # an affinity mask that is set later counts too
    assert f"{environment['OMP_NUM_THREADS']} asked for by OpenMP" in done.stdout
    if "OMP_THREAD_LIMIT" in environment:
        assert "1 by OMP_THREAD_LIMIT" in done.stdout


NO_THREADS = """
import os, resource, sys, threading
import numpy as np
import fusedrnn as fr

layer = fr.LSTM(32, 64, bidirectional=True, rng=0)
x = np.random.default_rng(1).normal(size=(40, 16, 32)).astype(np.float32)

def train():
    (y, state), pullback = layer.vjp(x)
    return [y, *state, *pullback(np.cos(y))[0]]

def flat(results):
    return np.concatenate([np.ravel(a) for a in results if a is not None])

fr.set_num_threads(1)
expected = flat(train())
fr.set_num_threads(int(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
if os.geteuid() == 0:
    os.setuid(65534)
try:
    threading.Thread(target=print).start()
    print("the system makes threads")
except RuntimeError:
    print((flat(train()) == expected).all())
"""


@LINUX
@pytest.mark.parametrize(("library", "threads"), [("numpy", 2), ("numpy", 5), ("torch", 2)])
def test_no_thread_to_be_had(library: str, threads: int) -> None:
    """A call computes alone, with the same bits, where the system makes no more threads.

    PyTorch's OpenMP would end the process.
    """
    code = NO_THREADS
    if library == "torch":
        pytest.importorskip("torch")
        code = code.replace("as fr\n", "as fr, fusedrnn.torch\n")
    command = [sys.executable, "-c", code, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if "makes threads" in done.stdout:
        pytest.skip("RLIMIT_NPROC does not bind here")
    assert done.stdout.split() == ["True"], done.stderr


# Signals during a call of a second, which a slow machine lets take longer

SIZES = (500, 4, 16, 768)  # T, B, I, H
FORMS = [({}, 1), ({"bidirectional": True}, 2), ({"num_layers": 2}, 2), ({"num_layers": 2}, 5)]


def long_call(options: dict[str, Any]) -> tuple[Any, np.ndarray]:
    T, B, I, H = SIZES
    layer = fr.LSTM(I, H // len(options or "1"), rng=0, **options)
    return layer, np.random.default_rng(1).normal(size=(T, B, I)).astype(np.float32)


@pytest.fixture
def alarm() -> Iterator[Callable[[Callable[[], object], float, float], None]]:
    """Let a function run as the handler of a signal, after some seconds and then repeatedly."""
    before = signal.getsignal(signal.SIGALRM)

    def start(handle: Callable[[], object], seconds: float, interval: float = 0) -> None:
        signal.signal(signal.SIGALRM, lambda *_: handle())
        signal.setitimer(signal.ITIMER_REAL, seconds, interval)

    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


class Alarm(Exception):
    """The exception of a handler; that of Ctrl-C would end the tests."""


def interrupt() -> None:
    raise Alarm


def repeat(call: Callable[[], object]) -> None:
    while True:
        call()


@UNIX
@pytest.mark.parametrize(("options", "threads"), FORMS, ids=str)
def test_an_exception_of_a_handler_ends_a_call(
    options: dict[str, Any], alarm: Any, threads: int
) -> None:
    """An exception of a handler ends a call between two steps; the layer computes as before."""
    fr.set_num_threads(threads)
    layer, x = long_call(options)
    expected = layer(x[:5])[0]
    (y, _), pullback = layer.vjp(x)
    for call in (lambda: layer(x), lambda: pullback(y)):
        alarm(interrupt, 0.02)
        with pytest.raises(Alarm):
            repeat(call)
        np.testing.assert_array_equal(layer(x[:5])[0], expected)


@UNIX
@pytest.mark.parametrize(("options", "threads"), FORMS, ids=str)
def test_a_handler_may_call_layers(options: dict[str, Any], alarm: Any, threads: int) -> None:
    """A handler runs within a call, in the caller's floating-point mode, and may itself call.

    Neither changes the other's results.
    """
    fr.set_num_threads(threads)
    layer, x = long_call(options)
    (expected, _), pullback = layer.vjp(x)
    dy = np.cos(expected)
    dx = pullback(dy)[0]
    other = fr.GRU(16, 128, rng=2)
    of_other = other(x[:9])[0]
    agrees = []

    def handle() -> None:
        agrees.append((other(x[:9])[0] == of_other).all())
        agrees.append(np.float32(1e-30) * np.float32(1e-10) > 0)  # a denormal number
        fr.release_memory()

    for call, results in ((lambda: layer(x)[0], expected), (lambda: pullback(dy)[0], dx)):
        agrees.clear()
        alarm(handle, 0.02, 0.02)
        while not agrees:
            np.testing.assert_array_equal(call(), results)
        assert all(agrees)


@UNIX
def test_an_exception_ends_a_call_of_pytorch(alarm: Any) -> None:
    """An exception of a handler leaves a call and a backward pass of PyTorch's modules."""
    torch = pytest.importorskip("torch")
    ft = pytest.importorskip("fusedrnn.torch")
    T, B, I, H = SIZES
    module = ft.GRU(I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    expected = module(x[:5])[0]
    y = module(x)[0]
    calls = (lambda: module(x), lambda: torch.autograd.grad(y.sum(), x, retain_graph=True))
    for call in calls:
        alarm(interrupt, 0.02)
        with pytest.raises(Alarm):
            repeat(call)
    assert torch.equal(module(x[:5])[0], expected)
