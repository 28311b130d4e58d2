"""What tests of the CUDA backend share: precisions, plans, a check against the reference."""

from __future__ import annotations

import contextlib
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
from helpers import (
    MASKS,
    Sizes,
    arguments,
    cotangents,
    op,
    pulled,
    spoil_padding,
    with_options,
)

from fusedrnn import cuda, reference
from fusedrnn.cells import Cell

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda.is_available(), reason=f"no GPU to test on: {cuda.status()}"),
]
EMULATED = cuda.status().startswith("emulator")

# The largest norm of an error against float64 on the inputs as rounded, relative to that of
# the expected array. The slope of relu jumps: where an h is rounded to 0 it is another. So
# does that of a clip.
TOLERANCE = {"float32": 2e-6, "float64": 1e-13, "tf32": 2e-3, "bfloat16": 2e-2, "float16": 3e-3}
PRECISIONS = list(TOLERANCE)
EXCHANGES = {"cluster": 0, "grid": 1, "step": 2}

# Around tiles of 8 rows and row groups of 32, groups of 8 and 16 units, blocks of depth of 32.
SHAPES = [
    Sizes(1, 1, 1, 1),
    Sizes(5, 3, 4, 7),
    Sizes(4, 13, 5, 40),
    Sizes(3, 37, 6, 70),
    Sizes(6, 9, 3, 33),
]
if not EMULATED:
    SHAPES += [Sizes(40, 16, 64, 256), Sizes(20, 100, 30, 768), Sizes(9, 65, 128, 1100)]


def storage(precision: str) -> str:
    return "float32" if precision == "tf32" else precision


def put(values: dict[str, Any], precision: str) -> dict[str, Any]:
    """The arguments of an op on the GPU; states are at least float32."""
    state = "float64" if precision == "float64" else "float32"
    return {
        k: v
        if v is None or k in MASKS
        else cuda.array(v, state if k in ("h0", "c0") else storage(precision))
        for k, v in values.items()
    }


def got(values: dict[str, Any]) -> dict[str, Any]:
    """The values as rounded, in float64."""
    return {
        k: v.numpy().astype(np.float64) if isinstance(v, cuda.Array) else v
        for k, v in values.items()
    }


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a.numpy(), e.numpy())


def norm_error(actual: np.ndarray, expected: np.ndarray) -> float:
    difference = np.linalg.norm(actual.astype(np.float64) - expected)
    # Of what nearly cancels, as a single dx may, the error is seen beside what does.
    return float(difference / max(np.linalg.norm(expected), 0.02 * expected.size**0.5, 1e-30))


def wish(**wishes: Any) -> None:
    """Choose a plan; skip where no plan is like that."""
    exchange = wishes.pop("exchange", None)
    cuda._module().wish(exchange=-1 if exchange is None else EXCHANGES[exchange], **wishes)


def exists(cell: Cell, precision: str, sizes: Sizes) -> bool:
    """Whether there is a plan that meets the wishes, forward and backward."""
    with contextlib.suppress(RuntimeError):
        explain(cell, sizes, precision)
        explain(cell, sizes, precision, backward=True)
        return True
    return False


def explain(cell: Cell, sizes: Sizes, precision: str, backward: bool = False) -> dict[str, Any]:
    mode = "tf32" if precision == "tf32" else "exact"
    return cuda.explain(cell.name, *sizes, storage(precision), mode, backward)


def check_against_reference(
    cell: Cell,
    sizes: Sizes,
    precision: str,
    reverse: bool = False,
    bias: bool = True,
    seed: int = 0,
    mask: dict[str, np.ndarray] | None = None,
    names: list[str] | None = None,
    factor: float = 1.0,
) -> None:
    mask = mask or {}
    if names is None:
        values, asked = arguments(cell, sizes, np.float64, seed, bias), {}
    else:
        values, asked = with_options(cell, sizes, names, np.float64, seed)
        mask = {k: asked.pop(k) for k in MASKS if k in asked}
    expected_x = put(values, precision)["x"].numpy().astype(np.float64)
    spoil_padding(values["x"], mask)
    given = put(values, precision)
    rounded = got(given) | {"x": expected_x} | mask | asked
    options = {"reverse": reverse, **mask, **asked}
    mode = {"precision": "tf32" if precision == "tf32" else "exact"}
    expected, expected_pullback = op(cell, "_vjp", reference)(**rounded, reverse=reverse)
    results, pullback = op(cell, "_vjp")(**given, **options, **mode)
    of_vjp = ("bptt", "recompute")
    inference = op(cell)(
        **given, **{k: v for k, v in options.items() if k not in of_vjp}, **mode
    )

    rows = cotangents(expected, seed)
    spoilt = [r.copy() for r in rows]
    for part in [spoilt[0], *spoilt[1 + len(cell.states) :]]:
        spoil_padding(part, mask)
    kinds = ("x", "h0", "c0")[: 1 + len(cell.states)]
    weights = [as_one(k, r, precision) for k, r in zip_longest(kinds, rows, fillvalue="c0")]
    spoilt = [as_one(k, r, precision) for k, r in zip_longest(kinds, spoilt, fillvalue="c0")]
    gradients = pulled(cell, pullback, spoilt)
    wide = [w.numpy().astype(np.float64) for w in weights]
    expected_gradients = pulled(cell, expected_pullback, wide)

    tolerance = TOLERANCE[precision] * factor
    jumps = cell.reference.jumps or "clip" in asked
    if jumps and tolerance > 1e-5:
        tolerance *= 30
    if cell.name == "lstm_coupled":  # da_i is of g - c', which may nearly cancel
        tolerance *= 2
    for n, (a, b, e) in enumerate(zip(results, inference, expected, strict=True)):
        for of_a, of_b, of_e in (
            zip(a.values(), b.values(), e.values(), strict=True)
            if isinstance(e, dict)
            else [(a, b, e)]
        ):
            np.testing.assert_array_equal(of_a.numpy(), of_b.numpy(), str(n))
            assert norm_error(of_b.numpy(), of_e) <= tolerance, n
            assert norm_error(of_a.numpy(), of_e) <= tolerance, n
        if not isinstance(e, dict):
            assert a.dtype == (storage(precision) if n == 0 else given["h0"].dtype)
    assert set(gradients) == set(expected_gradients)
    for name, e in expected_gradients.items():
        assert gradients[name].shape == e.shape, name
        assert norm_error(gradients[name].numpy(), e) <= tolerance, f"d{name}"


def as_one(name: str, value: np.ndarray, precision: str) -> cuda.Array:
    return put({name: value}, precision)[name]
