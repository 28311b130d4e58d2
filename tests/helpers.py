"""The table of tolerances, random asymmetric inputs, and the check against the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

import fusedrnn as fr
from fusedrnn import reference
from fusedrnn.cells import Cell

# Tolerances


def largest_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of an element, relative to 1 + the largest expected element."""
    return float(np.abs(actual - expected).max() / (1 + np.abs(expected).max()))


def norm_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the error, relative to the norm of what is expected.

    A value that nearly cancels, as a single dx may, is measured against its terms.
    """
    scale = max(np.linalg.norm(expected), 0.02 * expected.size**0.5, 1e-30)
    return float(np.linalg.norm(actual - expected) / scale)


class Limits(NamedTuple):
    """The largest errors that tests allow, as `error` measures them."""

    results: float
    gradients: float  # sums over T·B terms
    error: Callable[[np.ndarray, np.ndarray], float] = largest_error


# Expected values are computed in float64 from the inputs as rounded, by the reference, by
# PyTorch or by hand. The name of a row is the dtype of what is tested and where it ran.
TOLERANCE = {
    "float64": Limits(1e-13, 1e-12),
    "float32": Limits(5e-6, 2e-5),
    # Layers of bfloat16 on the CPU, whose products round their operands.
    "bfloat16": Limits(1e-2, 2e-2, norm_error),
    # The same against the reference with the same roundings, of which a few fall otherwise.
    "bfloat16 rounded alike": Limits(4e-3, 1e-2, norm_error),
    # PyTorch's modules on a CPU compute in float32 what they take and return in float16.
    "float16": Limits(2e-3, 2e-3),
    # The σ and tanh of onnxruntime are rational approximations.
    "onnxruntime": Limits(1e-6, 1e-6),
    # Keras rounds most products of float64 to float32.
    "Keras in float64": Limits(5e-6, 2e-5),
    # The losses of a training in float64, to which each step adds its rounding.
    "training": Limits(1e-10, 1e-10),
    # Kernels on a GPU, or on its emulator.
    "float64 on GPU": Limits(1e-13, 1e-13, norm_error),
    # There σ is within 8 ULP.
    "float32 on GPU": Limits(2e-6, 4e-6, norm_error),
    "tf32 on GPU": Limits(2e-3, 2e-3, norm_error),
    "bfloat16 on GPU": Limits(2e-2, 2e-2, norm_error),
    "float16 on GPU": Limits(3e-3, 3e-3, norm_error),
    # The same call on a GPU and on the CPU: each has its own rounding errors.
    "float64 on both": Limits(1e-12, 1e-11, norm_error),
    "float32 on both": Limits(1e-5, 1e-5, norm_error),
}


def dtype_of(a: Any) -> str:
    """The name of the dtype of an array of NumPy, PyTorch or ours on a GPU."""
    return str(a.dtype).removeprefix("torch.")


def as_double(a: Any) -> np.ndarray:
    """The values of any array, in float64 (or complex) on the host."""
    if hasattr(a, "detach"):
        a = a.detach().cpu().double()
    a = a.numpy() if hasattr(a, "numpy") else np.asarray(a)
    return a if a.dtype.kind == "c" else a.astype(np.float64)


def assert_close(
    actual: Any,
    expected: Any,
    row: Any = None,
    what: str = "",
    gradient: bool = False,
    factor: float = 1,
) -> None:
    """Compare arrays, or lists of them, by a row of `TOLERANCE`: that of their dtype if None.

    Without a row actual must have expected's dtype, with "float64" or "float32" that one.
    """
    if expected is None or actual is None:
        assert actual is expected, what
        return
    if isinstance(expected, (list, tuple)):
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, row, what, gradient, factor)
        return
    if row is None:
        row = dtype_of(expected)
    elif not isinstance(row, str):
        row = np.dtype(row).name
    assert row not in ("float64", "float32") or dtype_of(actual) == row, what
    a, e = as_double(actual), as_double(expected)
    assert a.shape == e.shape, what
    if e.size == 0:
        return
    limits = TOLERANCE[row]
    error = limits.error(a, e)
    limit = factor * (limits.gradients if gradient else limits.results)
    assert error <= limit, f"{what}: error {error:.2e} > {limit:.0e}"


# Inputs

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
    "activation": "a",
    "recurrent_activation": "a",
}


def options_of(cell: Cell) -> list[str]:
    """The options that a cell knows: c those of an LSTM, n those of cells with gates, a those
    that the cell declares.
    """
    kinds = "h" + "c" * ("c" in cell.states) + "n" * (len(cell.gates) > 1)
    declared = cell.reference.activations
    return [name for name, kind in OPTIONS.items() if kind in kinds or name in declared]


def with_options(
    cell: Cell,
    sizes: Sizes,
    names: Iterable[str],
    dtype: Any = np.float64,
    seed: int = 0,
    bias: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The array arguments of an op called with these options, and its other arguments."""
    rng = np.random.default_rng([seed, *sizes])
    T, H = sizes.T, sizes.H
    values = arguments(cell, sizes, np.float64, seed, bias)
    options: dict[str, Any] = {"seed": 2**40 + seed, "training": True}
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
            options["clip"] = 0.8
        elif name == "cell_clip":
            options["cell_clip"] = 0.5
        elif name == "activation":
            options[name] = "softsign"
        elif name == "recurrent_activation":
            options[name] = ("tanh", 0.5, 0.9)
        elif name.startswith("zoneout"):
            options["zoneout"] = (0.25, 0.4) if "c" in cell.states else 0.25
            options["training"] &= name == "zoneout"
        elif name.endswith("dropout"):
            options[name] = 0.3
        elif name == "bptt":
            options[name] = max(T // 3, 1)
        elif name in MASKS:
            options |= masks(name, sizes, seed)
        else:
            options[name] = True
    if "lengths" in options and "mask" in options:
        options["mask"] &= np.arange(T)[:, None] < options["lengths"]
    return {k: None if v is None else v.astype(dtype) for k, v in values.items()}, options


MASKS = ("lengths", "resets", "both", "mask", "mask last")


def masks(kind: str, sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    """Random lengths, 0 and T among them, resets, a row in four at each time, and masks with
    padding on both sides and gaps.
    """
    rng = np.random.default_rng([seed, *sizes])
    T, B, *_ = sizes
    lengths = rng.integers(0, T + 1, B)
    if B > 1:
        lengths[rng.permutation(B)[:2]] = T, 0
    both = {"lengths": lengths, "resets": rng.random((T, B)) < 0.25}
    if kind.startswith("mask"):
        mask = rng.random((T, B)) < rng.choice([0.0, 0.4, 0.8, 1.0], B, p=[0.1, 0.4, 0.4, 0.1])
        mask[: T // 3, ::3] = False
        return {"mask": mask} | ({"masked_output": "last"} if kind == "mask last" else {})
    return both if kind == "both" else {kind: both[kind]}


def taken_steps(a: np.ndarray, masks: dict[str, Any]) -> np.ndarray:
    """Which steps (T, B) are taken."""
    taken = np.ones(a.shape[:2], bool)
    if masks.get("lengths") is not None:
        taken &= np.arange(len(a))[:, None] < masks["lengths"]
    return taken if masks.get("mask") is None else taken & masks["mask"]


def spoil_padding(a: np.ndarray, masks: dict[str, Any]) -> None:
    """Write NaN and inf to (T, B, …) where no step is taken: none of them may be read."""
    taken = taken_steps(a, masks)
    a[~taken] = np.nan
    a[..., ::2][~taken] = -np.inf


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
    by_argument = dict(zip(names, weights, strict=False))
    return {k: v for k, v in pullback(**by_argument)._asdict().items() if v is not None}


def double(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v is None else as_double(v) for k, v in values.items()}


# The check against the reference


class Place:
    """The place of a check: an op on NumPy's arrays of a dtype, on the CPU.

    `row` is that of `TOLERANCE`; results have `dtype`, states `state_dtype`.
    """

    STATES = ("h0", "c0", "h_n", "c_n", "dh_n", "dc_n", "cells", "d_cells")

    def __init__(self, dtype: Any) -> None:
        self.row = self.dtype = self.state_dtype = np.dtype(dtype).name

    def dtype_of(self, name: str) -> str:
        return self.state_dtype if name in self.STATES else self.dtype

    def put(self, name: str, value: np.ndarray) -> Any:
        """The argument or gradient of that name as an array of this place."""
        return value.astype(self.dtype_of(name))

    def put_all(self, values: dict[str, Any]) -> dict[str, Any]:
        return {k: None if v is None else self.put(k, v) for k, v in values.items()}

    def call(self, cell: Cell, suffix: str, **arguments: Any) -> Any:
        """Call a cell's op (suffix "") or its vjp ("_vjp")."""
        return op(cell, suffix)(**arguments)

    def factor(self, cell: Cell, options: Iterable[str]) -> float:
        """By how much the tolerance is wider for this cell with these options."""
        return 1


def factor_of_rounding(cell: Cell, options: Iterable[str]) -> float:
    """By how much the tolerance of results that are rounded is wider with these options."""
    factor = 3.0 if len(set(options) & set(OPTIONS)) > 1 else 1.0
    # The slope of relu jumps: where an h is rounded to 0 it is another. So do those of the
    # clips.
    if cell.reference.jumps or {"clip", "cell_clip"} & set(options):
        factor *= 30
    if cell.name == "lstm_coupled":  # da_i is of g - c', which may nearly cancel
        factor *= 2
    return factor


class Bfloat16(Place):
    """Arrays of bfloat16 on the CPU; states are float32."""

    def __init__(self) -> None:
        self.row = self.dtype = "bfloat16"
        self.state_dtype = "float32"

    def factor(self, cell: Cell, options: Iterable[str]) -> float:
        return factor_of_rounding(cell, options)


def by_name(cell: Cell, results: tuple[Any, ...]) -> dict[str, Any]:
    """An op's results by their names, the gates of a trace by theirs."""
    names = ["y", *(f"{letter}_n" for letter in cell.states), "cells"]
    arrays = [r for r in results if not isinstance(r, dict)]
    gates = [r for r in results if isinstance(r, dict)]
    return dict(zip(names, arrays, strict=False)) | (gates[0] if gates else {})


def check_against_reference(
    cell: Cell,
    sizes: Sizes,
    place: Any,
    options: Iterable[str] = (),
    *,
    masks: dict[str, np.ndarray] | None = None,
    reverse: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> None:
    """An op's results and gradients agree with the reference, its results in inference with
    those in training, bit for bit.

    `place` is a `Place`, or a dtype for the CPU. `options` are names of `OPTIONS` and `MASKS`.
    """
    place = place if isinstance(place, Place) else Place(place)
    arrays, asked = with_options(cell, sizes, options, seed=seed, bias=bias)
    if set(options) <= set(MASKS):
        del asked["seed"], asked["training"]
    asked |= {"reverse": reverse, **(masks or {})}
    spoil_padding(arrays["x"], asked)
    inputs = place.put_all(arrays)
    expected, expected_pullback = op(cell, "_vjp", reference)(**double(inputs), **asked)
    results, pullback = place.call(cell, "_vjp", **inputs, **asked)
    in_inference = {k: v for k, v in asked.items() if k not in ("bptt", "recompute")}
    inference = by_name(cell, place.call(cell, "", **inputs, **in_inference))

    row, factor = place.row, place.factor(cell, options)
    actual, wanted = by_name(cell, results), by_name(cell, expected)
    assert list(actual) == list(inference) == list(wanted)
    for name, e in wanted.items():
        assert dtype_of(actual[name]) == place.dtype_of(name), name
        assert_close(actual[name], e, row, name, factor=factor)
        np.testing.assert_array_equal(
            as_double(actual[name]),
            as_double(inference[name]),
            f"{name}: training and inference differ",
        )

    names = ["dy", *(f"d{letter}_n" for letter in cell.states), "d_cells"]
    weights = dict(zip(names, cotangents(expected, seed), strict=False))
    for name in {"dy", "d_cells"} & set(weights):
        if name != "dy" or asked.get("masked_output") != "last":
            spoil_padding(weights[name], asked)
    weights = place.put_all(weights)
    gradients = pulled(cell, pullback, list(weights.values()))
    wanted = pulled(cell, expected_pullback, list(double(weights).values()))
    assert set(gradients) == set(wanted)
    for name, e in wanted.items():
        assert_close(gradients[name], e, row, f"d{name}", gradient=True, factor=factor)


def check_layers_against_reference(
    layer: Any, x: np.ndarray, dropout: float = 0.0, seed: int = 0, **asked: Any
) -> None:
    """A bidirectional layer of two in training, y and every gradient, agrees with four runs of
    the reference, put together by hand. `asked` are options and masks.
    """
    masks = {k: asked[k] for k in MASKS if k in asked}
    (y, _), pullback = layer.vjp(x, **masks, seed=seed)
    dy = np.random.default_rng(seed).normal(size=y.shape).astype(y.dtype)
    gradients = pullback(dy)

    cell, p = layer._cell, double(layer.state_dict())
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    suffixes = [["l0", "l0_reverse"], ["l1", "l1_reverse"]]
    below, dropped, pullbacks = as_double(x), 1.0, {}
    for l in range(2):
        if l and dropout:
            dropped = reference.dropout(below, dropout, seed=seed, where=0)
            below = below * dropped
        sides = []
        for d, suffix in enumerate(suffixes[l]):
            results, pullbacks[suffix] = reference.op(
                cell.reference,
                below,
                [p[f"{name}_{suffix}"] for name in names],
                [None] * len(cell.states),
                where=2 * l + d,
                reverse=d == 1,
                seed=seed,
                **asked,
            )
            sides.append(results[0])
        below = np.concatenate(sides, -1)
    assert_close(y, below, x.dtype, "y")

    d_above = as_double(dy)
    for l in (1, 0):
        d_x = 0.0
        for suffix, half in zip(suffixes[l], np.split(d_above, 2, -1), strict=True):
            of_run = pullbacks[suffix](half)
            d_x = d_x + of_run.x
            for name in names:
                actual, what = gradients.parameters[f"{name}_{suffix}"], f"d{name}_{suffix}"
                assert_close(actual, getattr(of_run, name), x.dtype, what, gradient=True)
        d_above = d_x * dropped if l else d_x
    assert_close(gradients.x, d_above, x.dtype, "dx", gradient=True)
