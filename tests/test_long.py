"""Errors do not grow with the length of a sequence.

    python tests/test_long.py    # the table of a million steps: a minute

An error is measured against float64 with the same numbers, relative to 1 + the largest value:
the largest in the `first` and in the `last` tenth of a sequence, and in the whole (`most`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

import fusedrnn as fr
from fusedrnn import bfloat16

T, TENTHS = 20_000, 10
# c of the last layer sums over some 150 steps. Its recurrent weights are small: otherwise its
# states depend on their start without end, and no two roundings stay together.
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LSTM": (fr.LSTM, {}),
    "GRU": (fr.GRU, {}),
    "RNN": (fr.RNN, {}),
    "LSTM, two layers": (fr.LSTM, {"num_layers": 2}),
    "LSTM, forget bias 5": (fr.LSTM, {"forget_bias": 5.0}),
}
# The largest error of any tenth by precision.
ALLOWED = {"float32": 5e-6, "bfloat16": 5e-2, "int8": 3e-2, "float16": 2e-3}


class Errors(NamedTuple):
    first: float
    last: float
    most: float


def layers_of(name: str, precision: str) -> tuple[Any, Any]:
    """A layer of some precision, and one of float64 with its weights as they were before."""
    kind, arguments = LAYERS[name]
    base = kind(3, 16, rng=1, dtype="float32", **arguments)
    exact = kind(3, 16, rng=1, dtype="float64", **arguments)
    if "forget_bias" in arguments:
        base.weight_hh_l0 = base.weight_hh_l0 / 20
    exact.load_state_dict({k: v.astype(np.float64) for k, v in base.state_dict().items()})
    if precision == "bfloat16":
        layer = kind(3, 16, rng=1, dtype="bfloat16", **arguments)
        dtype = bfloat16.bfloat16()
        layer.load_state_dict({k: v.astype(dtype) for k, v in base.state_dict().items()})
        return layer, exact
    return base if precision == "float32" else base.quantize(precision), exact


def input_of(steps: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(steps, 2, 3)).astype(np.float32)


def errors(actual: Any, expected: np.ndarray) -> Errors:
    scale = 1 + np.abs(expected).max()
    error = np.abs(np.asarray(actual).astype(np.float64) - expected) / scale
    tenths = [float(part.max()) for part in np.array_split(error, TENTHS)]
    return Errors(tenths[0], tenths[-1], max(tenths))


def forward_errors(name: str, precision: str, steps: int) -> dict[str, Errors]:
    """The errors of y and, of one layer, of every c."""
    layer, exact = layers_of(name, precision)
    x = input_of(steps)
    asked = {"return_cells": True} if "c" in layer._cell.states else {}
    given = x.astype(bfloat16.bfloat16()) if precision == "bfloat16" else x
    actual, expected = layer(given, **asked), exact(x.astype(np.float64), **asked)
    found = {"y": errors(actual[0], expected[0])}
    if asked:
        found["c"] = errors(actual[2], expected[2])
    return found


def gradient_errors(name: str, steps: int, **asked: Any) -> dict[str, Errors | float]:
    """The errors of dx by tenths, and the largest of a parameter's gradient in its norm."""
    layer, exact = layers_of(name, "float32")
    x = input_of(steps)
    dy = np.random.default_rng(6).normal(size=(steps, 2, 16)).astype(np.float32)
    actual = layer.vjp(x, **asked)[1](dy)
    expected = exact.vjp(x.astype(np.float64), **asked)[1](dy.astype(np.float64))
    of_parameters = [
        np.linalg.norm(actual.parameters[k] - e) / np.linalg.norm(e)
        for k, e in expected.parameters.items()
    ]
    return {"dx": errors(actual.x, expected.x), "parameters": float(max(of_parameters))}


def check_no_drift(found: Errors, allowed: float) -> None:
    assert found.most <= allowed
    assert found.last <= 3 * found.first


@pytest.mark.parametrize("precision", ALLOWED)
@pytest.mark.parametrize("name", LAYERS)
def test_states_do_not_drift(name: str, precision: str) -> None:
    """The errors of y and c late in a sequence are those of its beginning."""
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    for found in forward_errors(name, precision, T).values():
        check_no_drift(found, ALLOWED[precision])


@pytest.mark.parametrize("asked", [{}, {"bptt": 100, "recompute": True}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_do_not_drift(name: str, asked: dict[str, Any]) -> None:
    """So are those of dx, and those of the parameters' sums over all steps stay small."""
    found = gradient_errors(name, T, **asked)
    check_no_drift(found["dx"], 2e-5)
    assert found["parameters"] <= 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_a_long_sequence_in_parts(name: str) -> None:
    """Chunks by their states, and a stream, have the bits of one call."""
    layer, _ = layers_of(name, "float32")
    x = input_of(T)
    whole, end = layer(x)
    state, at = None, 0
    while at < T:
        length = 1 + at % 7919
        y, state = layer(x[at : at + length], state)
        np.testing.assert_array_equal(y, whole[at : at + length])
        at += length
    np.testing.assert_array_equal(state, end)
    stream = fr.Stream(layer, 2)
    for t in range(5000):
        y = stream.step(x[t])
    np.testing.assert_array_equal(y, whole[4999])


def main() -> None:
    row = "{:22}{:10}{:12}{:>10}{:>10}{:>10}".format
    print(row("layer", "precision", "", "first", "last", "most"))
    for name in LAYERS:
        for precision in ALLOWED:
            for what, found in forward_errors(name, precision, 10**6).items():
                print(row(name, precision, what, *(f"{e:.1e}" for e in found)), flush=True)
        for asked in ({}, {"bptt": 10**5}, {"bptt": 100}):
            found = gradient_errors(name, 10**6, **asked)
            what = f"dx, bptt={asked['bptt']}" if asked else "dx"
            print(row(name, "float32", what, *(f"{e:.1e}" for e in found["dx"])), flush=True)
            print(row(name, "float32", "parameters", "", "", f"{found['parameters']:.1e}"))


if __name__ == "__main__":
    main()
