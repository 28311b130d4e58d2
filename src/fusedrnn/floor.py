"""The least time that this machine's arithmetic and memory allow a layer on the CPU.

    forward   W·x  2·G·H·I·B·T FLOP at the peak of FMA, or one reading of W, and T times the
                   greater of
              R·h  2·G·H²·B FLOP at that peak and R's 4·G·H² bytes at the read rate of the
                   cache that they fit into, plus one barrier of the threads
    training  three times the FLOPs: backward reads R once a step, too, and dW, dR, dx are
              matmuls over all steps

Threads that own rows of the batch read all of R and need no barrier; threads that own units
read their share of R and meet at a barrier once per step. The floor is the smaller of the two
times. The pointwise part (σ, tanh), x, y and saved values count as free, so no implementation
reaches the floor of a narrow layer.

The rates are measured at the time of the call, beside the case, because a machine's clock
changes with time and load; each is the median of several short runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import _cpu
from .reference.narrow import NarrowPrecision
from .weights import PRECISIONS

ITEM_BYTES = {"int8": 1, "bfloat16": 2, "float16": 2}


def _rate(run: Callable[[int], float]) -> float:
    """Return the median units per second of 15 runs of 2 ms; run(rounds) returns its units."""
    rounds, seconds = 1, 0.0
    while seconds < 0.002:
        rounds *= 2
        begin = time.perf_counter()
        run(rounds)
        seconds = time.perf_counter() - begin
    measured = []
    for _ in range(15):
        begin = time.perf_counter()
        units = run(rounds)
        measured.append(units / (time.perf_counter() - begin))
    return float(np.median(measured))


def peak(single: bool = True) -> float:
    """Return the FLOP/s of one core's FMA units on the active ISA."""
    return _rate(lambda rounds: _cpu.probe_multiply_add(1000 * rounds, single))


def product_peak(weights: NarrowPrecision) -> float:
    """Return the operations/s of one core's unit for narrow weights on the active ISA."""
    number = 1 + PRECISIONS.index(weights)
    return _rate(lambda rounds: _cpu.probe_product(1000 * rounds, number))


def read_rate(size: int) -> float:
    """Return the bytes/s at which one core reads the same `size` bytes repeatedly."""
    a = _cpu.allocate((max(size // 4, 128) // 128 * 128,), np.dtype(np.float32))
    a[:] = 0

    def run(rounds: int) -> float:
        _cpu.probe_read(a, rounds)
        return float(rounds * a.nbytes)

    return _rate(run)


def meeting(threads: int) -> float:
    """Return the seconds that a barrier of so many threads takes."""

    def run(rounds: int) -> float:
        _cpu.probe_meetings(rounds, threads, False)
        return rounds

    return 1 / _rate(run) if threads > 1 else 0.0


def seconds(
    sizes: tuple[int, int, int, int],
    gates: int,
    training: bool = False,
    threads: int = 1,
    single: bool = True,
    recurrent: int | None = None,
    weights: NarrowPrecision | None = None,
    operands: int = 1,
) -> float:
    """Return the floor of a layer in one direction, sizes T, B, I, H, on the active ISA.

    `recurrent` is the number of weights that a step multiplies with the previous state; None
    stands for the G·H² of a plain cell. `weights` is a narrow precision, or None; W multiplies
    `operands` rows for each row of x.
    """
    T, B, I, H = sizes
    item = ITEM_BYTES[weights] if weights else 4 if single else 8
    recurrent = gates * H * H if recurrent is None else recurrent
    flops = (product_peak(weights) if weights else peak(single)) * threads
    W, R = item * gates * H * I, item * recurrent
    flops_W = 2 * gates * H * I * B * operands  # of one step, as flops_R
    flops_R = 2 * recurrent * B

    matmuls = (3 * flops_W + flops_R) * T if training else flops_W * T
    step = flops_R / flops
    cached = R if T > 1 else W + R  # bytes that are read repeatedly
    by_units = max(step, R / threads / read_rate(cached // threads)) + meeting(threads)
    by_rows = max(step, R / read_rate(cached)) if 1 < threads <= B else np.inf
    outside_loop = max(matmuls / flops, W / threads / read_rate((W + R) // threads))
    return float(outside_loop + T * (2 if training else 1) * min(by_rows, by_units))


def rates(threads: int) -> dict[str, Any]:
    """Measure "peak" FLOP/s and "reads" in bytes/s of one core, and "meeting" in seconds."""
    levels = {"L1": 16 << 10, "L2": 256 << 10, "L3": 8 << 20, "memory": 256 << 20}
    return {
        "threads": threads,
        "peak": peak(),
        "reads": {name: read_rate(size) for name, size in levels.items()},
        "meeting": meeting(threads),
    }


def summary(rates: Mapping[str, Any]) -> str:
    """Return `rates` in one line."""
    reads = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates["reads"].items())
    meet = f"; {rates['threads']} threads meet in {rates['meeting'] * 1e9:.0f} ns"
    return (
        f"FMA peak {rates['peak'] / 1e9:.0f} GFLOP/s a core; reads {reads} GB/s"
        f"{meet if rates['threads'] > 1 else ''}"
    )
