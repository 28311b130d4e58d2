"""What a table of shapes does not show, one short table each.

python bench/properties.py                 all of them, some 4 minutes
python bench/properties.py growth gemm     some

scaling    two threads against one, in turn, every shape of cases.py
growth     time against T and B: what doubling costs
float64    speed against float32
denormals  a state that decays through denormals against one that does not
load       2 threads while another process keeps one of two cores busy
memory     peak memory of a training step in a process of its own, against torch's
gemm       what W·x, dx and dW add to a call, against OpenBLAS's sgemm of the same shapes
overhead   a streaming call from Python against its kernel
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import fusedrnn as fr
from fusedrnn.bench.cases import CELLS, SHAPES
from fusedrnn.bench.race import seconds_of
from fusedrnn.reference import Options

Rows = Iterator[tuple[Any, ...]]


def best(run: Callable[[], Any], seconds: float = 0.4) -> float:
    """Return the least time of a call within about that many seconds, after one call."""
    run()
    least, begin = np.inf, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return float(least)


def median(run: Callable[[], Any], calls: int) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def inference(cell: str, T: int, B: int, I: int, H: int, dtype: Any = np.float32) -> Callable:
    rng = np.random.default_rng(0)
    layer = getattr(fr, cell)(I, H, dtype=dtype, rng=rng)
    x = rng.normal(size=(T, B, I)).astype(dtype)
    return lambda: layer(x)


def training(cell: str, T: int, B: int, I: int, H: int, dtype: Any = np.float32) -> Callable:
    rng = np.random.default_rng(0)
    layer = getattr(fr, cell)(I, H, dtype=dtype, rng=rng)
    x = rng.normal(size=(T, B, I)).astype(dtype)
    dy = rng.normal(size=(T, B, H)).astype(dtype)

    def run() -> None:
        _, pullback = layer.vjp(x)
        pullback(dy)

    return run


def scaling() -> Rows:
    yield "cell", "mode", "T, B, I, H", "ms on one", "ms on two", "one / two (quartiles)"

    def seconds(run: Callable[[], Any], threads: int, calls: int) -> float:
        fr.set_num_threads(threads)
        run()
        return seconds_of(run, calls)

    for cell in CELLS:
        for mode in (inference, training):
            for shape in SHAPES.values():
                run = mode(cell, *shape)
                calls = max(1, round(0.005 / seconds(run, 1, 1)))
                rounds = [[seconds(run, n, calls) for n in (1, 2)] for _ in range(11)]
                one, two = np.median(rounds, axis=0) * 1e3
                low, ratio, high = np.percentile([a / b for a, b in rounds], [25, 50, 75])
                yield (
                    cell,
                    mode.__name__,
                    ", ".join(map(str, shape)),
                    f"{one:.3f}",
                    f"{two:.3f}",
                    f"{ratio:.2f} ({low:.2f}–{high:.2f})",
                )
    fr.set_num_threads(0)


def growth() -> Rows:
    fr.set_num_threads(1)
    yield "cell", "mode", "grows", "from", "to", "ms from", "ms to", "a doubling costs"
    grown = {
        "T": [(T, 1, 16, 64) for T in (1000, 10_000, 100_000)],
        "B": [(50, B, 64, 128) for B in (8, 16, 64, 256)],
    }
    for cell in CELLS:
        for mode in (inference, training):
            for name, shapes in grown.items():
                times = [best(mode(cell, *shape)) for shape in shapes]
                at = "TB".index(name)
                for i in range(1, len(shapes)):
                    factor = shapes[i][at] / shapes[i - 1][at]
                    doubling = (times[i] / times[i - 1]) ** (1 / np.log2(factor))
                    ms = [f"{t * 1e3:.2f}" for t in times[i - 1 : i + 1]]
                    ends = (shapes[i - 1][at], shapes[i][at])
                    yield cell, mode.__name__, name, *ends, *ms, f"{doubling:.2f}"


def float64() -> Rows:
    fr.set_num_threads(1)
    yield "cell", "mode", "T, B, I, H", "float32 ms", "float64 ms", "float64's speed"
    for cell in CELLS:
        for mode in (inference, training):
            for shape in ((100, 1, 256, 256), (100, 8, 128, 256), (50, 64, 512, 512)):
                single, double = (
                    best(mode(cell, *shape, dtype)) for dtype in (np.float32, np.float64)
                )
                yield (
                    cell,
                    mode.__name__,
                    ", ".join(map(str, shape)),
                    f"{single * 1e3:.2f}",
                    f"{double * 1e3:.2f}",
                    f"{single / double:.2f}",
                )


def denormals() -> Rows:
    """The input is 0 and the biases let the state decay; a second layer's lets it stay."""
    yield "cell", "mode", "last |h|", "decaying ms", "normal ms", "ratio"
    for name in ("LSTM", "GRU"):
        for mode in ("inference", "training"):
            times = []
            for bias in (-3.0, 3.0):
                layer = getattr(fr, name)(16, 128, rng=0)
                gate = slice(128, 256)  # f or z, which keep the state where they are 1
                b = np.zeros_like(layer.bias_ih_l0)
                b[gate] = bias
                layer.bias_ih_l0, layer.bias_hh_l0 = b, np.zeros_like(b)
                layer.weight_hh_l0 = layer.weight_hh_l0 * 0.01
                x = np.zeros((400, 8, 16), np.float32)
                start = np.full((1, 8, 128), 1e-30, np.float32)
                state = (start, start) if name == "LSTM" else start
                last = np.abs(layer(x, state)[0][-1]).max()
                dy = np.full((400, 8, 128), 1e-30, np.float32)

                run = partial(layer, x, state)
                if mode == "training":
                    run = partial(
                        lambda vjp, x, state, dy: vjp(x, state)[1](dy), layer.vjp, x, state, dy
                    )
                times.append((best(run), last))
            (decaying, last), (normal, _) = times
            yield (
                name,
                mode,
                f"{last:.0e}",
                f"{decaying * 1e3:.3f}",
                f"{normal * 1e3:.3f}",
                f"{decaying / normal:.2f}",
            )


def load() -> Rows:
    yield "T, B, I, H", "quiet ms", "loaded ms", "ratio", "slowest loaded call ms"
    fr.set_num_threads(2)
    for shape in ((100, 1, 256, 256), (100, 8, 128, 256), (50, 64, 512, 512)):
        run = inference("LSTM", *shape)
        run()
        calls = max(10, int(0.7 / best(run, 0.1)))
        quiet = median(run, calls)
        burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.3)
            times = [median(run, 1) for _ in range(calls)]
        finally:
            burner.kill()
            burner.wait()
        loaded = float(np.median(times))
        yield (
            ", ".join(map(str, shape)),
            f"{quiet * 1e3:.2f}",
            f"{loaded * 1e3:.2f}",
            f"{loaded / quiet:.2f}",
            f"{max(times) * 1e3:.2f}",
        )
    fr.set_num_threads(0)


MEMORY = """
import pathlib, sys
import numpy as np
T, B, I, H = 100, 32, 128, 256
x, dy = np.ones((T, B, I), np.float32), np.ones((T, B, H), np.float32)
def status(name):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
cell = sys.argv[2]
if sys.argv[1] == "torch":
    import torch
    torch.set_num_threads(1)
    def step(T, B, I, H, x, dy):
        layer = getattr(torch.nn, cell)(I, H)
        x = torch.from_numpy(x).requires_grad_()
        layer(x)[0].backward(torch.from_numpy(dy))
else:
    import fusedrnn as fr
    fr.set_num_threads(1)
    def step(T, B, I, H, x, dy):
        parameters = getattr(fr, cell)(I, H).state_dict().values()
        getattr(fr, cell.lower() + "_vjp")(x, *parameters)[1](dy)
step(2, 2, 2, 2, x[:2, :2, :2].copy(), dy[:2, :2, :2].copy())  # what loading a library takes
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
step(T, B, I, H, x, dy)
print(status("VmHWM") - before)
"""


def memory() -> Rows:
    yield "cell", "fusedrnn MB", "torch MB", "ratio"
    for cell in CELLS:
        ours, theirs = (
            float(
                subprocess.run(
                    [sys.executable, "-c", MEMORY, library, cell],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for library in ("fusedrnn", "torch")
        )
        yield cell, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"


def gemm() -> Rows:
    """The time of a call with I features less that with 1, against sgemm with K or N less 1."""
    import scipy_openblas32

    folder = pathlib.Path(scipy_openblas32.get_lib_dir())
    blas = ctypes.CDLL(str(next(folder.glob("libscipy_openblas*.so"))))
    blas.scipy_openblas_set_num_threads(1)
    fr.set_num_threads(1)

    def sgemm(M: int, N: int, K: int, transposed: bool) -> Callable[[], None]:
        """C = A·B, or Aᵀ·B as in dW."""
        rng = np.random.default_rng(0)
        a = rng.normal(size=(K, M) if transposed else (M, K)).astype(np.float32)
        b = rng.normal(size=(K, N)).astype(np.float32)
        c = np.empty((M, N), np.float32)
        args = [101, 112 if transposed else 111, 111, M, N, K, ctypes.c_float(1)]
        args += [a.ctypes.data_as(ctypes.c_void_p), a.shape[1]]
        args += [b.ctypes.data_as(ctypes.c_void_p), N, ctypes.c_float(0)]
        args += [c.ctypes.data_as(ctypes.c_void_p), N]

        def run(keep: Any = (a, b, c)) -> None:
            blas.scipy_cblas_sgemm(*args)

        return run

    yield "T, B, I, H", "product", "ours ms", "sgemm ms", "sgemm's time / ours", "GFLOP/s"
    for T, B, I, H in ((100, 32, 513, 256), (50, 64, 513, 512), (25, 128, 1025, 1024)):
        rows, K, columns = T * B, I - 1, 4 * H
        narrow, wide = ((T, B, i, H) for i in (1, I))
        forward = [best(inference("LSTM", *s), 1.5) for s in (narrow, wide)]
        both = [best(training("LSTM", *s), 1.5) for s in (narrow, wide)]
        ours = {
            "W·x": forward[1] - forward[0],
            "dx, dW": (both[1] - both[0]) - (forward[1] - forward[0]),
        }
        theirs = {
            "W·x": best(sgemm(rows, columns, K, False), 1.5),
            "dx, dW": best(sgemm(rows, K, columns, False), 1.5)
            + best(sgemm(columns, K, rows, True), 1.5),
        }
        for name, seconds in ours.items():
            flops = 2 * rows * K * columns * (1 if name == "W·x" else 2)
            yield (
                f"{T}, {B}, {I}, {H}",
                name,
                f"{seconds * 1e3:.2f}",
                f"{theirs[name] * 1e3:.2f}",
                f"{theirs[name] / seconds:.2f}",
                f"{flops / seconds / 1e9:.0f}",
            )
    fr.set_num_threads(0)


def overhead() -> Rows:
    """T = 1, B = 1; the kernel's part is a call of the binding with its arrays at hand."""
    yield "cell", "H", "call µs", "kernel and binding µs", "beyond them µs"
    fr.set_num_threads(1)
    for cell in CELLS:
        for H in (64, 128, 512):
            layer = getattr(fr, cell)(H, H, rng=0)
            x = np.ones((1, 1, H), np.float32)
            _, state = layer(x)
            compiled = layer._packed["layers"]
            given = (x, state, None, None, Options(), None, False)
            calls = {
                "call": lambda layer=layer, x=x, state=state: layer(x, state),
                "kernel": lambda compiled=compiled, given=given: compiled.forward(*given),
            }
            call, kernel = (best(lambda f=f: [f() for _ in range(100)]) for f in calls.values())
            yield (
                cell,
                H,
                *(f"{seconds * 1e4:.2f}" for seconds in (call, kernel, call - kernel)),
            )
    fr.set_num_threads(0)


PROPERTIES = (scaling, growth, float64, denormals, load, memory, gemm, overhead)


def main() -> None:
    names = {run.__name__: run for run in PROPERTIES}
    unknown = [name for name in sys.argv[1:] if name not in names]
    if unknown:
        sys.exit(f"properties must be of {', '.join(names)}, got {', '.join(unknown)}")
    print(
        f"{os.cpu_count()} CPUs · {fr.show_config('dict')['isa']} · fusedrnn {fr.__version__}"
    )
    for name in sys.argv[1:] or names:
        print(f"\n### {name}\n")
        for line, row in enumerate(names[name]()):
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            if line == 0:
                print("|---" * len(row) + "|")


if __name__ == "__main__":
    main()
