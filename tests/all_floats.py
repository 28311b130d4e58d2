"""σ and tanh at every float32: the largest error, and whether they ever go back.

    python tests/all_floats.py              # every instruction set of this machine
    python tests/all_floats.py avx2 neon    # these: a minute each, portable ten

All of the 2^32 arguments are computed, so the bounds are proved for the processor that runs
this, not sampled. An error is measured against float64, in ULP of float32 at the exact value:
NumPy's exp and tanh are off by a few ULP of float64, and the formulas below cancel nothing, so
a figure is right to 1e-7. Exact values below the smallest normal number may be flushed to 0.

The neighbour of a float is the next bit pattern, so the difference of the bit patterns of two
results is the step between them in ULP. The script fails if an error exceeds 3 ULP, if a step
goes back, or if a sign, a limit or a NaN is wrong.
"""

from __future__ import annotations

import sys
import time

import numpy as np

import fusedrnn as fr
from fusedrnn import _cpu

ALLOWED = 3  # ULP
CHUNK = 1 << 15
# Bit patterns; from 128 on both functions are their limits in float32.
SIGN, INFINITY, FLAT, ONE = 0x80000000, 0x7F800000, 0x43000000, 0x3F800000
INT32_MIN = np.int32(-(2**31))
TINY = float(np.finfo(np.float32).tiny)
# At 0, -0, inf and -inf.
LIMITS = {"sigmoid": [0.5, 0.5, 1.0, 0.0], "tanh": [0.0, -0.0, 1.0, -1.0]}


def exact(name: str, x: np.ndarray) -> np.ndarray:
    """Return the exact value in float64; σ without cancellation on either side."""
    if name == "tanh":
        return np.tanh(x)
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def errors(y: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The errors in ULP, 0 where a flushed result is right."""
    power = (expected.view(np.int64) & (0x7FF << 52)).view(np.float64)  # 2^⌊log2 |expected|⌋
    error = np.abs(y - expected)
    if power.min() < TINY:
        error[(power < TINY) & (error <= TINY)] = 0
        np.maximum(power, TINY, out=power)
    error /= power
    error *= 2.0**23
    return error


def check(name: str) -> list[str]:
    """Return what is wrong with a function on the active ISA; print the largest error."""
    began = time.process_time()
    worst, worst_at = 0.0, 0.0
    steps_back, furthest, furthest_at = 0, 0, 0.0
    wrong = []
    x = np.array([0.0, -0.0, np.inf, -np.inf], np.float32)
    limits = np.array(LIMITS[name], np.float32)
    if _cpu.elementwise(name, x).tobytes() != limits.tobytes():
        wrong.append("a limit at ±0 or ±inf")
    for sign in (0, SIGN):
        last: list[int] = []
        is_negative = name == "tanh" and sign > 0
        falls = name == "sigmoid" and sign > 0  # with growing |x|
        for first in range(0, SIGN, CHUNK):
            x = (np.arange(CHUNK, dtype=np.uint32) + np.uint32(sign + first)).view(np.float32)
            y = _cpu.elementwise(name, x)
            if first >= INFINITY:
                if not np.isnan(y[first == INFINITY :]).all():
                    wrong.append("a NaN that is lost")
                continue
            if first >= FLAT:
                if (y != limits[2 + (sign > 0)]).any():
                    wrong.append(f"another value than its limit from {x[0]:.9g} on")
                continue
            error = errors(y, exact(name, x.astype(np.float64)))
            at = int(np.argmax(error))
            if not error[at] <= worst:
                worst, worst_at = float(error[at]), float(x[at])

            size = y.view(np.int32)
            if is_negative:
                size = size ^ INT32_MIN
            if size.min() < 0 or size.max() > ONE:
                wrong.append(f"a result beyond 1 or of the wrong sign from {x[0]:.9g} on")
            step = np.diff(size, prepend=last)
            last = size[-1:]
            furthest_here = -step.max() if falls else step.min()
            if furthest_here < 0:
                step = -step if falls else step
                steps_back += int((step < 0).sum())
                if furthest_here < furthest:
                    furthest = int(furthest_here)
                    furthest_at = float(x[int(np.argmin(step)) - (len(step) == CHUNK)])
    if not worst <= ALLOWED:
        wrong.append(f"an error above {ALLOWED} ULP")
    back = "no step back"
    if steps_back:
        back = f"{steps_back} steps back, up to {-furthest} ULP (after {furthest_at:.9g})"
        wrong.append(back)
    print(
        f"{fr.get_isa():8}  {name:7}  at most {worst:.4f} ULP off (at {worst_at:.9g}), {back}"
        f"  [{time.process_time() - began:.0f} s]",
        flush=True,
    )
    return wrong


def main(names: list[str]) -> int:
    faults = []
    for isa in names or [n for n, runs in _cpu.isas().items() if runs and "_" not in n]:
        fr.set_isa(isa)
        for name in LIMITS:
            faults += [f"{isa}: {name} has {fault}" for fault in dict.fromkeys(check(name))]
    print("\n".join(faults) or "every float32 is right")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
