"""Random asymmetric inputs, calls by cell, and the table of tolerances."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

import fusedrnn as fr
from fusedrnn import reference
from fusedrnn.cells import CELLS, Cell

# Largest error against float64 on the inputs as rounded, relative to the scale of the
# expected array. Gradients sum over T·B terms.
TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}

PARAMETERS = reference.Parameters._fields
NAMES = ("x", *PARAMETERS[:4], "h0", "c0")


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


# What a call may be asked for, beside masks. `OPTIONS` of a cell: the names it knows.
OPTIONS = {
    "projection": "c",
    "peephole": "c",
    "clip": "h",
    "cell_clip": "c",
    "layer_norm": "n",
    "zoneout": "h",
    "zoneout in inference": "h",
    "recurrent_dropout": "h",
    "weight_dropout": "h",
    "return_cells": "c",
    "trace": "h",
    "bptt": "h",
    "recompute": "h",
}


def options_of(cell: Cell) -> list[str]:
    """The options that a cell knows: c those of an LSTM, n those of cells with gates."""
    kinds = "h" + "c" * ("c" in cell.states) + "n" * (len(cell.gates) > 1)
    return [name for name, kind in OPTIONS.items() if kind in kinds]


def with_options(
    cell: Cell, sizes: Sizes, names: Iterable[str], dtype: Any = np.float64, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The array arguments of an op called with these options, and its other arguments."""
    rng = np.random.default_rng([seed, *sizes])
    T, H = sizes.T, sizes.H
    values = arguments(cell, sizes, np.float64, seed)
    given: dict[str, Any] = {"seed": 2**40 + seed, "training": True}
    for name in names:
        if name == "projection":
            R = H // 2 + 1
            values["weight_hr"] = rng.normal(size=(R, H)) / np.sqrt(H)
            values["weight_hh"] = values["weight_hh"][:, :R].copy()
            values["h0"] = values["h0"][:, :R].copy()
        elif name == "peephole":
            values["weight_ch"] = rng.normal(size=len(cell.peepholes) * H) / 2
        elif name == "layer_norm":
            for which in ("gamma_ih", "gamma_hh"):
                values[which] = 0.7 + rng.random(len(cell.gates) * H) / 2
            if "c" in cell.states:
                values["gamma_c"] = 0.5 + rng.random(H)
                values["beta_c"] = rng.normal(size=H) / 4
        elif name == "clip":
            given["clip"] = 0.8
        elif name == "cell_clip":
            given["cell_clip"] = 0.5
        elif name.startswith("zoneout"):
            given["zoneout"] = (0.25, 0.4) if "c" in cell.states else 0.25
            given["training"] &= name == "zoneout"
        elif name.endswith("dropout"):
            given[name] = 0.3
        elif name == "bptt":
            given[name] = max(T // 3, 1)
        elif name in MASKS:
            given |= masks(name, sizes, seed)
        else:
            given[name] = True
    return {k: None if v is None else v.astype(dtype) for k, v in values.items()}, given


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
    """The functional op of a cell, the arguments that select it bound."""
    return functools.partial(getattr(module, cell.op + suffix), **cell.arguments)


def cotangents(results: tuple[Any, ...], seed: int = 1) -> list[np.ndarray]:
    """Gradients of an op's results, of which a trace has none."""
    rng = np.random.default_rng(seed)
    arrays = [r for r in results if not isinstance(r, dict)]
    return [rng.normal(size=r.shape).astype(r.dtype) for r in arrays]


def present(gradients: Any) -> list[Any]:
    """Those that there are."""
    return [g for g in gradients if g is not None]


def pulled(cell: Cell, pullback: Any, weights: list[np.ndarray]) -> Any:
    """The gradients, by name and without those that there are none of."""
    names = ["dy", *(f"d{letter}_n" for letter in cell.states), "d_cells"]
    given = dict(zip(names, weights, strict=False))
    return {k: v for k, v in pullback(**given)._asdict().items() if v is not None}


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


def pairwise(columns: list[list[Any]], seed: int = 0) -> list[tuple[Any, ...]]:
    """Few rows in which every pair of values of two columns stands together (AETG's greedy)."""
    rng = np.random.default_rng(seed)
    left = {
        (i, a, j, b)
        for (i, first), (j, second) in itertools.combinations(enumerate(columns), 2)
        for a in range(len(first))
        for b in range(len(second))
    }
    rows = []
    while left:
        best: tuple[int, list[int]] = (-1, [])
        for _ in range(30):
            i, a, j, b = sorted(left)[rng.integers(len(left))]
            row = [int(rng.integers(len(c))) for c in columns]
            row[i], row[j] = a, b
            for k in rng.permutation(len(columns)):
                if k in (i, j):
                    continue
                gains = []
                for value in range(len(columns[k])):
                    row[k] = value
                    gains.append(len(covered(row) & left))
                row[k] = int(np.argmax(gains))
            best = max(best, (len(covered(row) & left), row))
        rows.append(tuple(c[v] for c, v in zip(columns, best[1], strict=True)))
        left -= covered(best[1])
    return rows


def covered(row: list[int]) -> set[tuple[int, int, int, int]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def matrix(name: str) -> list[tuple[Any, ...]]:
    """Options on or off, and direction, dtype, shape and threads, in all pairs."""
    flags = [n for n in options_of(CELLS[name]) if n != "zoneout in inference"]
    columns = [
        *([None, flag] for flag in [*flags, *MASKS[:2]]),
        [False, True],
        ["float32", "float64"],
        [Sizes(5, 3, 4, 7), Sizes(4, 40, 7, 50), Sizes(40, 13, 3, 16), Sizes(9, 1, 6, 33)],
        [1, 2, 3],
    ]
    return pairwise(columns)


CASES = [(name, row) for name in CELLS for row in matrix(name)]
CASE_IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
