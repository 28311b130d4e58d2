"""Small checks of the CUDA backend, each in a process of its own; results go to a file.

python smoke.py RESULTS device                            what the GPU is
python smoke.py RESULTS math                              errors of σ and tanh
python smoke.py RESULTS EXCHANGE PRECISION DIRECTION      a layer against the reference
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import fusedrnn as fr
from fusedrnn import cuda, reference

EXCHANGES = {"cluster": 0, "grid": 1, "step": 2}
# ‖result - reference‖ / ‖reference‖
LIMITS = {"bfloat16": 3e-2, "float16": 5e-3, "tf32": 3e-3, "float32": 1e-5, "float64": 1e-12}
T, B, I, H = 20, 9, 5, 72


def append(results: Path, **line: Any) -> None:
    """Append a line."""
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def device() -> dict[str, Any]:
    """Describe the GPU; end with status 4 where there is none that can be used."""
    if not cuda.is_available():
        print(cuda.status())
        sys.exit(4)
    return {"status": cuda.status(), **cuda._module().device(0), "python": sys.version}


def ulps(actual: Any, expected: Any) -> float:
    """Return the largest error in units of the last place, of numbers that are normal."""
    spacing = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    normal = np.abs(expected) > 2.0**-126
    return float((np.abs(actual - expected) / spacing)[normal].max())


def math() -> dict[str, Any]:
    """Measure σ and tanh in float32 from -88 to 88."""
    width = 1024
    weights = np.linspace(-88, 88, width, dtype=np.float32)[:, None]
    x = np.geomspace(1e-6, 1, 64, dtype=np.float32)[:, None]
    sums = (x * weights.T).astype(np.float64)
    off = np.zeros((2 * width, 1), np.float32)
    # A state of 1 becomes z where n is 0.
    z, _ = fr.gru(
        cuda.array(x[None]),
        cuda.array(np.concatenate([off[:width], weights, off[:width]])),
        cuda.array(np.zeros((3 * width, width), np.float32)),
        h0=cuda.array(np.ones((len(x), width), np.float32)),
    )
    n, _ = fr.rnn(
        cuda.array(x[None]),
        cuda.array(weights),
        cuda.array(np.zeros((width, width), np.float32)),
    )
    return {
        "sigmoid ULP": ulps(z.numpy()[0], 1 / (1 + np.exp(-sums))),
        "tanh ULP": ulps(n.numpy()[0], np.tanh(sums)),
    }


def error(actual: Any, expected: Any) -> float:
    """Return ‖actual - expected‖ / ‖expected‖."""
    difference = actual.numpy().astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def layer(exchange: str, precision: str, direction: str) -> dict[str, Any]:
    """Compare an LSTM and a GRU with the reference, or find that they have no such plan."""
    dtype = "float32" if precision == "tf32" else precision
    state = "float64" if precision == "float64" else "float32"
    mode: Any = "tf32" if precision == "tf32" else "exact"
    worst: dict[str, float] = {}
    module = cuda._module()
    for cell, gates in (("lstm", 4), ("gru", 3)):
        rng = np.random.default_rng(0)

        def values(*shape: int, scale: float = 1.0, to: str = dtype) -> Any:
            return cuda.array(rng.normal(size=shape) * scale, to)  # noqa: B023

        arguments = {
            "x": values(T, B, I),
            "weight_ih": values(gates * H, I, scale=0.3),
            "weight_hh": values(gates * H, H, scale=0.1),
            "bias_ih": values(gates * H, scale=0.1),
            "bias_hh": values(gates * H, scale=0.1),
            "h0": values(B, H, to=state),
        }
        if cell == "lstm":
            arguments["c0"] = values(B, H, to=state)
        exact = {name: a.numpy().astype(np.float64) for name, a in arguments.items()}
        expected, expected_pullback = getattr(reference, f"{cell}_vjp")(**exact)
        kernel = module.Kernel(cell, precision, 0, 0)
        module.wish(exchange=EXCHANGES[exchange])
        backward = direction == "backward"
        if not kernel.plans(T, B, I, H, backward):
            continue
        if backward:
            module.wish()
        results, pullback = getattr(fr, f"{cell}_vjp")(**arguments, precision=mode)
        pairs = dict(zip(("y", "h_n"), zip(results, expected, strict=False), strict=False))
        if backward:
            dy = values(T, B, H)
            module.wish(exchange=EXCHANGES[exchange])
            gradients = pullback(dy)._asdict()
            wanted = expected_pullback(dy.numpy().astype(np.float64))._asdict()
            pairs = {k: (gradients[k], wanted[k]) for k in arguments}
        worst |= {f"{cell} {name}": error(a, e) for name, (a, e) in pairs.items()}
    module.wish()
    module.synchronize(0, 0)
    wrong = {name: e for name, e in worst.items() if not e < LIMITS[precision]}
    return {"worst": max(worst.values(), default=None), "wrong": wrong}


def main() -> int:
    """Do one task, append its result; return 1 if it is wrong."""
    results, *task = sys.argv[1:]
    begin = time.perf_counter()
    found = {"device": device, "math": math}.get(task[0], layer)(*task[len(task) == 1 :])
    seconds = round(time.perf_counter() - begin, 3)
    stage = "device" if task == ["device"] else "smoke"
    append(Path(results), stage=stage, task=" ".join(task), seconds=seconds, **found)
    print(found)
    return 1 if found.get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
