"""Properties that a table of cases does not show: the suite "properties", one table each.

scaling    two threads against one, alternating without rests
growth     time against T and B: what doubling costs
float64    speed against float32
denormals  a state that decays through denormal numbers against one that does not
load       two threads while another process uses one of two cores, or a part of it
processes  two processes side by side, with two threads each, against one after the other
threads    more threads than there are cores
interrupt  how long a call goes on after Ctrl-C
memory     peak memory of a training step in a process of its own, against torch's
soak       memory of a process that trains on ever changing shapes
gemm       what W·x, dx and dW add to a call, against OpenBLAS's sgemm of the same shapes
calls      microseconds of a step of one row, in the forms that a call may have
modules    the same through PyTorch's modules, beside NumPy's layer and torch.nn
team       two threads of our own or PyTorch's, after an operation on PyTorch's
keras      fit and predict of a Keras model on our layers against Keras' own
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fusedrnn as fr

from .cases import CELLS, SHAPES, Case
from .contenders import Inputs, ours
from .forms import BOTH
from .race import quartiles, seconds_of
from .tables import Table, with_spread

Rows = Iterator[tuple[Any, ...]]


def _least(run: Callable[[], Any], seconds: float = 0.4) -> float:
    """Return the least time of a call within about that many seconds, after one call."""
    run()
    least, begin = np.inf, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        least = min(least, seconds_of(run, 1))
    return float(least)


def _run(cell: str, mode: str, sizes: tuple[int, ...], dtype: str = "float32") -> Any:
    """Return the run of a case; the number of threads stays as it is."""
    T, B, I, H = sizes
    case = Case(cell, "", (T, B, I, H), mode, fr.get_num_threads(), dtype)
    return ours(case, Inputs.of(case))


def _text(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))


def scaling() -> Rows:
    """Compare two threads with one, without rests between calls."""
    yield "cell", "mode", "T, B, I, H", "ms on one", "ms on two", "one / two (quartiles)"
    for cell, mode, sizes in itertools.product(CELLS, BOTH, SHAPES.values()):
        run, rounds = _run(cell, mode, sizes), []
        calls = max(1, round(0.005 / _least(run, 0.01)))
        for _ in range(11):
            times = []
            for count in (1, 2):
                fr.set_num_threads(count)
                run()
                times.append(seconds_of(run, calls))
            rounds.append(times)
        one, two = np.median(rounds, axis=0) * 1e3
        ratio = with_spread(quartiles([a / b for a, b in rounds]))
        yield cell, mode, _text(sizes), f"{one:.3f}", f"{two:.3f}", ratio


def growth() -> Rows:
    """Measure what a doubling of T or B costs, one thread."""
    fr.set_num_threads(1)
    yield "cell", "mode", "grows", "from", "to", "ms from", "ms to", "a doubling costs"
    grown = {
        "T": [(T, 1, 16, 64) for T in (1000, 10_000, 100_000)],
        "B": [(50, B, 64, 128) for B in (8, 16, 64, 256)],
    }
    for cell, mode, (name, shapes) in itertools.product(CELLS, BOTH, grown.items()):
        times = [_least(_run(cell, mode, sizes)) for sizes in shapes]
        at = "TB".index(name)
        for (before, after), (a, b) in zip(
            itertools.pairwise(times), itertools.pairwise(shapes), strict=True
        ):
            doubling = (after / before) ** (1 / np.log2(b[at] / a[at]))
            ms = (f"{before * 1e3:.2f}", f"{after * 1e3:.2f}")
            yield cell, mode, name, a[at], b[at], *ms, f"{doubling:.2f}"


def float64() -> Rows:
    """Compare float64 with float32, one thread."""
    fr.set_num_threads(1)
    yield "cell", "mode", "T, B, I, H", "float32 ms", "float64 ms", "float64's speed"
    shapes = ((100, 1, 256, 256), (100, 8, 128, 256), (50, 64, 512, 512))
    for cell, mode, sizes in itertools.product(CELLS, BOTH, shapes):
        single, double = (_least(_run(cell, mode, sizes, d)) for d in ("float32", "float64"))
        ms = (f"{single * 1e3:.2f}", f"{double * 1e3:.2f}")
        yield cell, mode, _text(sizes), *ms, f"{single / double:.2f}"


def denormals() -> Rows:
    """Compare a state that decays through denormal numbers with one that the biases keep."""
    yield "cell", "mode", "last |h|", "decaying ms", "normal ms", "ratio"
    x = np.zeros((400, 8, 16), np.float32)
    start, dy = np.full((1, 8, 128), 1e-30, np.float32), np.full((400, 8, 128), 1e-30, "f")
    for name, mode in itertools.product(CELLS, BOTH):
        times, last = [], []
        for bias in (-3.0, 3.0):
            layer = getattr(fr, name)(16, 128, rng=0)
            b = np.zeros_like(layer.bias_ih_l0)
            b[128:256] = bias  # of f or z, which keep the state where they are 1
            layer.bias_ih_l0, layer.bias_hh_l0 = b, np.zeros_like(b)
            layer.weight_hh_l0 = layer.weight_hh_l0 * 0.01
            state = (start, start) if name == "LSTM" else start
            last.append(np.abs(layer(x, state)[0][-1]).max())
            run: Callable[[], Any] = partial(layer, x, state)
            if mode == "training":
                run = partial(lambda vjp, state: vjp(x, state)[1](dy), layer.vjp, state)
            times.append(_least(run))
        ms = [f"{t * 1e3:.3f}" for t in times]
        yield name, mode, f"{last[0]:.0e}", *ms, f"{times[0] / times[1]:.2f}"


# Two threads: T, B, I, H of a call
CONTENDED = ((100, 1, 256, 256), (100, 8, 128, 256), (50, 64, 512, 512), (20, 4, 64, 128))
PAUSE = 1.0  # seconds after which no call leaves out threads any more
# A process that computes for so many of 20 ms
BURNER = """
import time
while True:
    end = time.perf_counter() + {0} / 1000
    while time.perf_counter() < end: pass
    if {0} < 20: time.sleep(0.02 - {0} / 1000)
"""


def load() -> Rows:
    """Measure two threads while another process needs 2, 10 or 20 of 20 ms of one of two cores.

    The ratios are of means of calls. A core that is shared fairly runs half as fast, so 2 is
    the least ratio of threads that divide their work evenly.
    """
    parts = ("2 of 20 ms", "10", "20")
    yield "cell", "mode", "T, B, I, H", "quiet ms", *parts, "loaded ms", "slowest loaded ms"
    fr.set_num_threads(2)
    for cell, mode, sizes in itertools.product(("LSTM", "GRU"), BOTH, CONTENDED):
        run = _run(cell, mode, sizes)
        calls = max(20, int(1 / _least(run, 0.1)))
        time.sleep(PAUSE)
        quiet = np.mean([seconds_of(run, 1) for _ in range(calls)])
        ratios = []
        for part in (2, 10, 20):
            burner = subprocess.Popen([sys.executable, "-c", BURNER.format(part)])
            try:
                time.sleep(0.3)
                times = [seconds_of(run, 1) for _ in range(calls)]
            finally:
                burner.kill()
                burner.wait()
            ratios.append(f"{np.mean(times) / quiet:.2f}")
        ms = [f"{t * 1e3:.2f}" for t in (quiet, np.mean(times), max(times))]
        yield cell, mode, _text(sizes), ms[0], *ratios, *ms[1:]


def processes() -> Rows:
    """Compare two processes side by side, with two threads each, with one after the other."""
    yield "cell", "mode", "T, B, I, H", "ms of a call", "side by side / in turn (quartiles)"
    for cell, mode, sizes in itertools.product(("LSTM", "GRU"), BOTH, CONTENDED):
        code = f"from fusedrnn.bench import properties; properties.serve{cell, mode, sizes}"
        command = [sys.executable, "-c", code]
        pair = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        try:
            _seconds_of_processes(pair, 3)
            one = _seconds_of_processes(pair[:1], 20) / 20
            calls = max(5, int(0.3 / one))
            ratios = []
            for _ in range(5):
                time.sleep(PAUSE)
                in_turn = sum(_seconds_of_processes([process], calls) for process in pair)
                ratios.append(_seconds_of_processes(pair, calls) / in_turn)
        finally:
            for process in pair:
                process.kill()
                process.wait()
        yield cell, mode, _text(sizes), f"{one * 1e3:.2f}", with_spread(quartiles(ratios))


def serve(cell: str, mode: str, sizes: tuple[int, ...]) -> None:
    """Run a case as often as each line of standard input says, and answer with a line."""
    fr.set_num_threads(2)
    run = _run(cell, mode, sizes)
    for line in sys.stdin:
        seconds_of(run, int(line))
        print(flush=True)


def _seconds_of_processes(processes: list[subprocess.Popen[str]], calls: int) -> float:
    """Return how long processes that `serve` take for so many calls each."""
    begin = time.perf_counter()
    for process in processes:
        print(calls, file=process.stdin, flush=True)
    for process in processes:
        assert process.stdout
        process.stdout.readline()
    return time.perf_counter() - begin


def threads() -> Rows:
    """Measure more threads than there are cores, set by set_num_threads, mean of calls."""
    counts = (1, 2, 4, 16, 64)
    yield "cell", "T, B, I, H", *(f"{n} threads, ms" for n in counts)
    for cell, sizes in itertools.product(("LSTM", "GRU"), CONTENDED):
        run, times = _run(cell, "inference", sizes), []
        for count in counts:
            fr.set_num_threads(count)
            time.sleep(PAUSE)
            calls = max(3, int(0.3 / _least(run, 0.05)))
            times.append(f"{seconds_of(run, calls) * 1e3:.2f}")
        yield cell, _text(sizes), *times


def interrupt() -> Rows:
    """Measure how long a call of some seconds goes on after SIGINT, as Ctrl-C sends it."""
    yield "cell", "direction", "threads", "B", "ms of a step", "went on for ms (longest of 5)"
    for cell, count, B in itertools.product(CELLS, (1, 2), (1, 64)):
        T, I, H = 200_000 // B, 64, 512
        fr.set_num_threads(count)
        layer = getattr(fr, cell)(I, H, rng=0)
        x = np.broadcast_to(np.float32(0.5), (T, B, I))
        begin = time.perf_counter()
        (y, _), pullback = layer.vjp(x[: T // 8])
        of_step = (time.perf_counter() - begin) / (T // 8)
        runs = {"forward": partial(layer, x), "backward": partial(pullback, y)}
        for direction, run in runs.items():
            late = [_late(run) for _ in range(5)]
            ms = (f"{of_step * 1e3:.3f}", f"{max(late) * 1e3:.0f}")
            yield cell, direction, count, B, *ms


def _late(run: Callable[[], Any]) -> float:
    """Return the seconds between SIGINT, which comes during a run, and its end."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.05, send)
    timer.start()
    try:
        while True:
            run()
    except KeyboardInterrupt:
        return time.perf_counter() - sent[0]


def _in_process(*arguments: str) -> Iterator[str]:
    """Yield the lines that a process of `footprint.py` prints."""
    script = Path(__file__).with_name("footprint.py")
    command = [sys.executable, str(script), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield from (line.strip() for line in process.stdout)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")


def memory() -> Rows:
    """Measure the peak of a training step of shape "speech" above the memory before it."""
    yield "cell", "fusedrnn MB", "torch MB", "ratio"
    for cell in CELLS:
        mine, theirs = (
            float(next(_in_process("step", library, cell))) for library in ("fusedrnn", "torch")
        )
        yield cell, f"{mine:.1f}", f"{theirs:.1f}", f"{mine / theirs:.2f}"


def soak(seconds: float = 60.0) -> Rows:
    """Measure MB of a process that trains, T from 1 to 199, B from 1 to 16, LSTM and GRU."""
    parts = 6
    heads = [f"{seconds * n / parts:.0f} s" for n in range(1, parts + 1)]
    yield "threads of Python", "at the start, MB", *heads, "threads ended", "released"
    for count in (1, 8):
        yield count, *_in_process("soak", str(count), str(seconds), str(parts))


def gemm() -> Rows:
    """Compare what I features add to a call over one feature with sgemm of that product."""
    import scipy_openblas32

    folder = Path(scipy_openblas32.get_lib_dir())
    blas = ctypes.CDLL(str(next(folder.glob("libscipy_openblas*.so"))))
    blas.scipy_openblas_set_num_threads(1)
    fr.set_num_threads(1)

    def sgemm(M: int, N: int, K: int, transposed: bool) -> float:
        """Seconds of C = A·B, or Aᵀ·B as in dW."""
        rng = np.random.default_rng(0)
        a = rng.normal(size=(K, M) if transposed else (M, K)).astype(np.float32)
        b, c = rng.normal(size=(K, N)).astype(np.float32), np.empty((M, N), np.float32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (a, b, c)]
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        arguments = [101, 112 if transposed else 111, 111, M, N, K, one, pointers[0]]
        arguments += [a.shape[1], pointers[1], N, zero, pointers[2], N]
        return _least(lambda: blas.scipy_cblas_sgemm(*arguments), 1.5)

    yield "T, B, I, H", "product", "ours ms", "sgemm ms", "sgemm's time / ours", "GFLOP/s"
    for T, B, I, H in ((100, 32, 513, 256), (50, 64, 513, 512), (25, 128, 1025, 1024)):
        rows, K, columns = T * B, I - 1, 4 * H
        forward, both = (
            [_least(_run("LSTM", mode, (T, B, i, H)), 1.5) for i in (1, I)] for mode in BOTH
        )
        product = forward[1] - forward[0]
        mine = {"W·x": product, "dx, dW": both[1] - both[0] - product}
        theirs = {
            "W·x": sgemm(rows, columns, K, False),
            "dx, dW": sgemm(rows, K, columns, False) + sgemm(columns, K, rows, True),
        }
        for name, seconds in mine.items():
            flops = 2 * rows * K * columns * (1 if name == "W·x" else 2)
            ms = (f"{seconds * 1e3:.2f}", f"{theirs[name] * 1e3:.2f}")
            ratio, speed = theirs[name] / seconds, flops / seconds / 1e9
            yield _text((T, B, I, H)), name, *ms, f"{ratio:.2f}", f"{speed:.0f}"


def _microseconds(run: Callable[[], Any]) -> float:
    """Return the least time of a call, of many short batches."""
    calls = int(np.clip(0.002 / _least(run, 0.01), 1, 500))
    return min(seconds_of(run, calls) for _ in range(25)) * 1e6


def calls() -> Rows:
    """Measure calls of one row and step, one thread, I = H = 64 where no other is named."""
    fr.set_num_threads(1)
    names = ("LSTM", "GRU", "RNN")
    yield "µs of a call", *names
    by_cell = [small_calls(name) for name in names]
    for call in dict.fromkeys(itertools.chain(*by_cell)):
        yield call, *(f"{_microseconds(of[call]):.1f}" if call in of else "" for of in by_cell)


def small_calls(name: str, H: int = 64) -> dict[str, Callable[[], Any]]:
    """Return calls of one row and step, by name."""
    rng, cell = np.random.default_rng(0), getattr(fr, name)
    x = rng.normal(size=(1, 1, H)).astype(np.float32)
    layer, op = cell(H, H, rng=0), getattr(fr, name.lower())
    _, state = layer(x)
    stream = fr.Stream(cell(H, H, rng=0), batch_size=1)
    resets, lengths, row = np.zeros((1, 1), bool), np.ones(1, int), x[0, 0]

    def of(*arguments: Any, **options: Any) -> Callable[[], Any]:
        return partial(cell(H, H, *arguments, rng=0, **options), x)

    def reset() -> None:
        stream.reset([0])
        stream.step(x[0])

    parameters = list(layer.state_dict().values())
    calls: dict[str, Callable[[], Any]] = {
        "plain": partial(layer, x),
        "with its state": partial(layer, x, state),
        "two layers": of(2),
        "both directions": of(bidirectional=True),
        "batch_first": of(batch_first=True),
        "unbatched": partial(layer, row[None]),
        "resets": partial(layer, x, resets=resets),
        "lengths": partial(layer, x, lengths=lengths),
        "clip": of(clip=5.0),
        "zoneout": of(zoneout=0.1),
        "vjp": partial(layer.vjp, x),
        "vjp and pullback": lambda: layer.vjp(x)[1](x),
        "Stream.step": partial(stream.step, x[0]),
        "Stream.reset and step": reset,
        "op": partial(op, x, *parameters),
    }
    if name == "LSTM":
        calls |= {"peephole": of(peephole=True), "proj_size": of(proj_size=H // 2)}
    if H == 64:
        wide = small_calls(name, 256)
        calls |= {f"{call}, H = 256": wide[call] for call in ("plain", "op")}
    return calls


def modules() -> Rows:
    """Measure PyTorch modules, one thread: a call without gradients, then a training step."""
    import torch

    import fusedrnn.torch as ft

    fr.set_num_threads(1)
    torch.set_num_threads(1)
    yield (
        *("module", "T, B, I, H", "NumPy µs", "ours µs", "torch.nn µs"),
        *("ours, training", "torch.nn, training"),
    )

    def training(module: Any, x: Any) -> Callable[[], Any]:
        return lambda: module(x)[0].sum().backward()

    sizes = [(1, 1, H, H) for H in (32, 64, 128, 256, 512)] + [(20, 2, 16, 32)]
    for name, layers in (("LSTM", 1), ("GRU", 1), ("RNN", 1), ("LSTM", 2), ("GRU", 2)):
        for T, B, I, H in sizes if layers == 1 else sizes[1:2]:
            theirs = getattr(torch.nn, name)(I, H, layers)
            mine, layer = getattr(ft, name)(I, H, layers), getattr(fr, name)(I, H, layers)
            mine.load_state_dict(theirs.state_dict())
            x = torch.randn(T, B, I)
            with torch.no_grad():
                runs = [partial(layer, x.numpy()), partial(mine, x), partial(theirs, x)]
                times = [_microseconds(run) for run in runs]
            times += [_microseconds(training(module, x)) for module in (mine, theirs)]
            what = f"{name}, two layers" if layers == 2 else name
            yield what, _text((T, B, I, H)), *(f"{t:.1f}" for t in times)


def team() -> Rows:
    """Measure a GRU's training step after torch.relu of a million numbers, two threads."""
    import torch

    import fusedrnn.torch as ft
    from fusedrnn import _cpu
    from fusedrnn.torch import kernels

    torch.set_num_threads(2)
    fr.set_num_threads(2)
    T, B, I, H = SHAPES["weather"]
    gru, big = ft.GRU(I, H), torch.randn(1000, 1000)
    x, dy = torch.randn(T, B, I, requires_grad=True), torch.randn(T, B, H)
    yield "threads", "ms"
    for name, share in (
        ("of our own", partial(_cpu.share_team, "")),
        ("of PyTorch", kernels.share_team),
    ):
        share()
        times = []
        for _ in range(60):
            torch.relu(big)
            times.append(seconds_of(lambda: gru(x)[0].backward(dy), 1))
        yield name, f"{np.median(times) * 1e3:.1f}"


def keras() -> Rows:
    """Compare fit and predict of Keras models: Keras' time over ours, batches of B."""
    from .keras import rows

    yield from rows()


def provider() -> Rows:
    """Compare sessions of onnxruntime with our provider: its own time over theirs."""
    from .provider import rows

    yield from rows()


PROPERTIES: dict[str, Callable[[], Rows]] = {
    run.__name__: run
    for run in (
        scaling,
        growth,
        float64,
        denormals,
        load,
        processes,
        threads,
        interrupt,
        memory,
        soak,
        gemm,
        calls,
        modules,
        team,
        keras,
        provider,
    )
}


def measure(name: str, seconds: float | None = None) -> Table:
    """Return the table of a property; `seconds` is how long the soak lasts."""
    rows = soak(seconds) if name == "soak" and seconds else PROPERTIES[name]()
    try:
        columns = [str(cell) for cell in next(rows)]
        text = inspect.getdoc(PROPERTIES[name]) or ""
        return Table(name, columns, [[str(cell) for cell in row] for row in rows], [text])
    finally:
        fr.set_num_threads(0)
