"""Threads, forks, signals and the end of Python, while other threads compute.

FUSEDRNN_ROUNDS=200 repeats each of them so many times as often, to look for rare faults.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fusedrnn as fr
from fusedrnn import _cpu, cuda
from fusedrnn.backend import cpu

ROUNDS = int(os.environ.get("FUSEDRNN_ROUNDS", "1"))
SECONDS = 120 * ROUNDS  # after so many a process hangs
I, H = 11, 40
X = np.random.default_rng(0).normal(size=(12, 5, I)).astype(np.float32)
LENGTHS = np.array([12, 3, 0, 7, 12])
Arrays = list[np.ndarray]


def flat(results: Any) -> Arrays:
    """The arrays of nested results, in order."""
    if isinstance(results, np.ndarray):
        return [results]
    parts = results.values() if isinstance(results, dict) else results
    return [array for part in parts for array in flat(part)]


def make_layers() -> dict[str, Any]:
    """Layers of which nothing is packed; their parameters are always the same."""
    return {
        "lstm": fr.LSTM(I, H, 2, rng=1),
        "gru": fr.GRU(I, H, bidirectional=True, rng=2),
        "options": fr.LSTM(I, H, layer_norm=True, zoneout=0.1, proj_size=9, rng=3),
        "int8": fr.LSTM(I, H, rng=4).quantize("int8"),
        "weights": fr.Weights(*fr.GRU(I, H, rng=5).state_dict().values()),
    }


def differentiate(layer: Any) -> Arrays:
    """Results and gradients; another thread pulls back, at the same time as this one."""
    results, pullback = layer.vjp(X, lengths=LENGTHS, seed=7)
    y = results[0]
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        theirs = other.submit(pullback, y)
        ours = flat(pullback(y))
    assert all(map(np.array_equal, ours, flat(theirs.result())))
    return flat(results) + ours


def stream(layer: Any) -> Arrays:
    steps = fr.Stream(layer, len(X[0]))
    return [steps.step(x) for x in X] + flat(steps.state)


def fail(layer: Any) -> Arrays:
    with pytest.raises(ValueError, match="x must have shape"):
        layer(X[..., :-1])
    return []


JOBS: list[tuple[str, Callable[[Any], Arrays]]] = [
    ("lstm", lambda layer: flat(layer(X))),
    ("lstm", differentiate),
    ("lstm", stream),
    ("lstm", fail),
    ("gru", differentiate),
    ("options", differentiate),
    ("int8", lambda layer: flat(layer(X, lengths=LENGTHS))),
    ("weights", lambda weights: flat(fr.gru(X, weights))),
]


def change_settings(draw: random.Random, isas: list[str]) -> None:
    fr.set_num_threads(draw.randint(1, 3))
    fr.set_isa(draw.choice(isas))
    fr.release_memory()


def test_threads_share_layers_and_settings() -> None:
    """Threads that call the same layers, also for the first time, get the bits of one alone,
    while others pull back, fail, end, or change the ISA, the threads and the kept memory.
    """
    before = fr.get_isa()
    isas = [name for name, here in _cpu.isas().items() if here]
    expected = []
    for isa in isas:
        fr.set_isa(isa)
        layers = make_layers()
        expected.append([job(layers[name]) for name, job in JOBS])

    def work(layers: dict[str, Any], start: threading.Barrier, seed: int) -> None:
        draw = random.Random(seed)
        start.wait()
        for at in draw.sample(range(len(JOBS)), len(JOBS)):
            change_settings(draw, isas)
            name, job = JOBS[at]
            found = job(layers[name])
            assert any(all(map(np.array_equal, found, of_isa[at])) for of_isa in expected)

    try:
        for n in range(6 * ROUNDS):
            shared, start = make_layers(), threading.Barrier(6)
            with concurrent.futures.ThreadPoolExecutor(6) as threads:
                done = [threads.submit(work, shared, start, 6 * n + k) for k in range(6)]
            for each in done:
                each.result()
    finally:
        fr.set_isa(before)


def test_threads_that_pack_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """They use the same packed weights, which keep their instruction set."""
    layer, made = fr.LSTM(I, H, rng=0), cpu.Layers
    kept = []

    def pack(*arguments: Any) -> Any:
        monkeypatch.setattr(cpu, "Layers", made)
        layer(X)  # as another thread does meanwhile
        kept.append(layer._packed["layers"])
        return made(*arguments)

    monkeypatch.setattr(cpu, "Layers", pack)
    layer(X)
    assert layer._packed["layers"] is kept[0]


class Event:
    """Work on a stream of a GPU, which is done on the first stream and never on the others."""

    def __init__(self, device: int, stream: int) -> None:
        self.stream = stream

    @property
    def is_done(self) -> bool:
        time.sleep(1e-4)  # another thread runs
        return self.stream == 0


def test_threads_keep_the_arrays_of_unfinished_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """While several threads drop arrays of work that is done, none drops another's array."""
    held: deque[Any] = deque()
    monkeypatch.setattr(cuda, "_held", held)
    monkeypatch.setattr(cuda, "_module", lambda: types.SimpleNamespace(Event=Event))

    def work(thread: int) -> None:
        for stream in [0] * 20 + [1]:
            cuda._hold(thread, 0, stream)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, thread) for thread in range(4)]:
            done.result()
    assert sorted(thread for event, thread in held if event.stream) == [0, 1, 2, 3]


def test_signals_arrive_during_calls() -> None:
    """A signal's handler may call the layer that it interrupts, under a profiler too."""
    layer = fr.LSTM(I, 128, 2, rng=0)
    x = np.random.default_rng(1).normal(size=(200, 8, I)).astype(np.float32)
    fr.set_num_threads(2)
    expected, short = layer(x)[0], layer(x[:3])[0]
    handled: list[bool] = []
    is_over = False

    def handle(*_: Any) -> None:
        handled.append(np.array_equal(layer(x[:3])[0], short))
        if not is_over:
            signal.setitimer(signal.ITIMER_REAL, 3e-3)  # none during this: it may take longer

    before = signal.signal(signal.SIGALRM, handle)
    profiler = sys.getprofile()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-3)
        sys.setprofile(lambda *_: None)
        for _ in range(6 * ROUNDS):
            np.testing.assert_array_equal(layer(x)[0], expected)
    finally:
        is_over = True
        sys.setprofile(profiler)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled
    assert all(handled)


def encode(layer: Any, x: np.ndarray) -> np.ndarray:
    fr.set_num_threads(2)
    y: np.ndarray = layer(x)[0]
    return y


@pytest.mark.parametrize("start", multiprocessing.get_all_start_methods())
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_pool_of_processes(start: str) -> None:
    """Processes that are started in any way compute what their parent does."""
    layer = fr.LSTM(I, 96, 2, rng=0)
    expected = encode(layer, X)
    context = multiprocessing.get_context(start)
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        for y in pool.map(encode, [layer] * 8 * ROUNDS, [X] * 8 * ROUNDS):
            np.testing.assert_array_equal(y, expected)


# Each of the next functions runs in a process of its own.


def run_alone(name: str) -> str:
    """Run a function of this file in a process, which must not fail; return what it prints."""
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def start_computing(threads: int, stop: threading.Event) -> list[threading.Thread]:
    """Start threads that compute, each on two threads, until `stop` is set."""
    layer = fr.LSTM(I, 96, 2, rng=3)

    def compute() -> None:
        while not stop.is_set():
            results, pullback = layer.vjp(X)
            pullback(results[0])

    started = [threading.Thread(target=compute, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    return started


class Forks:
    """Forks that compute what their parent computes, in various ways."""

    def __init__(self) -> None:
        fr.set_num_threads(2)
        self.layer = fr.LSTM(I, 96, 2, rng=0)
        self.expected = self.compute()

    def compute(self) -> Arrays:
        results, pullback = self.layer.vjp(X)
        return flat(results) + flat(pullback(results[0]))

    def check(self) -> bool:
        return all(map(np.array_equal, self.compute(), self.expected))

    def fork(self, n: int, depth: int = 0) -> None:
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            return
        signal.alarm(100)  # ends a child that hangs
        stop = threading.Event()
        threads = start_computing(n % 3, stop)
        same = self.check()
        if depth < n % 2:
            self.fork(n, depth + 1)
        stop.set()
        for thread in threads:
            thread.join()
        in_main = threading.current_thread() is threading.main_thread()
        if n % 4 < 2 and in_main:
            sys.exit(not same)  # with all that Python does at its end
        os._exit(not same)


def fork_while_threads_compute() -> None:
    forks, stop, errors = Forks(), threading.Event(), []
    threads = start_computing(2, stop)
    rounds = range(6 * ROUNDS)

    def fork_often() -> None:
        try:
            for n in rounds:
                forks.fork(n)
        except AssertionError as error:
            errors.append(error)

    other = threading.Thread(target=fork_often)
    other.start()
    fork_often()
    for thread in (other, *threads):
        stop.set()
        thread.join()
    assert not errors


def end_while_threads_compute() -> None:
    fr.set_num_threads(2)
    start_computing(3, threading.Event())
    time.sleep(0.1)


def import_in_a_subinterpreter() -> None:
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    interpreters = importlib.import_module(name)
    source = "try: import fusedrnn\nexcept ImportError as error: print(error, flush=True)"
    interpreters.run_string(interpreters.create(), source)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_threads_compute() -> None:
    """Children that are forked from several threads while others compute do not hang, compute
    the same on threads of their own, fork further ones, and end in either way.
    """
    run_alone("fork_while_threads_compute")


def test_python_ends_while_threads_compute() -> None:
    """Python ends without a word while daemon threads are in calls."""
    for _ in range(2 * ROUNDS):
        run_alone("end_while_threads_compute")


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="no subinterpreters here")
def test_a_subinterpreter_is_refused() -> None:
    """An import in a subinterpreter says what to use instead, and does not hang."""
    assert "must be imported in the main interpreter" in run_alone("import_in_a_subinterpreter")


def test_free_threaded_python_stays_so() -> None:
    """An import does not switch the GIL on in a Python that has none."""
    if getattr(sys, "_is_gil_enabled", lambda: True)() and "t" not in sys.abiflags:
        pytest.skip("this Python has a GIL")
    command = [sys.executable, "-c", "import sys, fusedrnn; print(sys._is_gil_enabled())"]
    assert subprocess.check_output(command, text=True).strip() == "False"


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of a fork beside threads
    globals()[sys.argv[1]]()
