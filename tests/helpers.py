"""Random asymmetric inputs, calls by cell, and the table of tolerances."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import fusedrnn as fr
from fusedrnn.cells import Cell

# Largest error against float64 on the inputs as rounded, relative to the scale of the
# expected array. Gradients sum over T·B terms.
TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}

NAMES = ("x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "h0", "c0")


class Sizes(NamedTuple):
    T: int
    B: int
    I: int
    H: int


def arguments(
    cell: Cell, sizes: Sizes, dtype: Any = np.float64, seed: int = 0, bias: bool = True
) -> dict[str, np.ndarray]:
    """Every array argument of an op, scaled so that no recurrence explodes."""
    rng = np.random.default_rng([seed, *sizes])
    T, B, I, H = sizes
    rows = len(cell.gates) * H
    values = {
        "x": rng.normal(size=(T, B, I)),
        "weight_ih": rng.normal(size=(rows, I)) / np.sqrt(I),
        "weight_hh": rng.normal(size=(rows, H)) * 0.6 / np.sqrt(H),
        "bias_ih": rng.normal(size=rows) / 2 if bias else None,
        "bias_hh": rng.normal(size=rows) / 2 if bias else None,
        "h0": rng.normal(size=(B, H)),
        "c0": rng.normal(size=(B, H)),
    }
    if "c" not in cell.states:
        del values["c0"]
    return {k: None if v is None else v.astype(dtype) for k, v in values.items()}


MASKS = ("lengths", "resets", "both")


def masks(kind: str, sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """Random lengths, 0 and T among them, and resets, a row in four at each time."""
    rng = np.random.default_rng([seed, *sizes])
    T, B, *_ = sizes
    lengths = rng.integers(0, T + 1, B)
    if B > 1:
        lengths[rng.permutation(B)[:2]] = T, 0
    both = {"lengths": lengths, "resets": rng.random((T, B)) < 0.25}
    return both if kind == "both" else {kind: both[kind]}


def spoil_padding(a: np.ndarray, masks: dict[str, np.ndarray]) -> None:
    """Write NaN and inf to (T, B, …) where no step is taken: none of them may be read."""
    for b, length in enumerate(masks.get("lengths", ())):
        a[length:, b] = np.nan
        a[length:, b, ::2] = -np.inf


def op(cell: Cell, suffix: str = "", module: Any = fr) -> Any:
    """The functional op of a cell, its options bound: lstm, gru_vjp, rnn of a nonlinearity."""
    name, _, nonlinearity = cell.name.partition("_")
    function = getattr(module, name + suffix)
    if not nonlinearity:
        return function
    return lambda *args, **kwargs: function(*args, nonlinearity=nonlinearity, **kwargs)


def cotangents(results: tuple[np.ndarray, ...], seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=r.shape).astype(r.dtype) for r in results]


def double(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v is None else v.astype(np.float64) for k, v in values.items()}


def assert_close(actual: Any, expected: Any, dtype: Any, what: str) -> None:
    """Compare with the tolerance of `dtype`."""
    if expected is None or actual is None:
        assert actual is expected, what
        return
    expected = np.asarray(expected)
    assert actual.shape == expected.shape, what
    assert actual.dtype == dtype, what
    if expected.size == 0:
        return
    scale = 1 + np.abs(expected).max()
    error = np.abs(actual - expected).max() / scale
    assert error <= TOLERANCE[np.dtype(dtype)], f"{what}: error {error:.2e}"
