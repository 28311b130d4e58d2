"""Precisions, plans and the GPU as a place of a check, for the tests of the CUDA backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from helpers import MASKS, TOLERANCE, Place, Sizes, factor_of_rounding, op

from fusedrnn import cuda
from fusedrnn.cells import Cell

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda.is_available(), reason=f"no GPU to test on: {cuda.status()}"),
]
EMULATED = cuda.status().startswith("emulator")

PRECISIONS = [row.removesuffix(" on GPU") for row in TOLERANCE if row.endswith(" on GPU")]
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


def mode(precision: str) -> str:
    """The argument `precision` of an op."""
    return "tf32" if precision == "tf32" else "exact"


class Gpu(Place):
    """The GPU, or its emulator, in a precision; states are at least float32."""

    def __init__(self, precision: str) -> None:
        self.row, self.precision = f"{precision} on GPU", precision
        self.dtype = storage(precision)
        self.state_dtype = "float64" if precision == "float64" else "float32"

    def put(self, name: str, value: np.ndarray) -> cuda.Array:
        return cuda.array(value, self.dtype_of(name))

    def call(self, cell: Cell, suffix: str, **arguments: Any) -> Any:
        return op(cell, suffix)(**arguments, precision=mode(self.precision))

    def factor(self, cell: Cell, options: Iterable[str]) -> float:
        factor = factor_of_rounding(cell, options)
        # Below 1e-5 no rounding of these inputs crosses a jump.
        crosses = min(factor, 3) * TOLERANCE[self.row].results > 1e-5
        return factor if crosses else min(factor, 3)


def put(values: dict[str, Any], precision: str) -> dict[str, Any]:
    """The arguments of an op on the GPU."""
    masks = {k: v for k, v in values.items() if k in MASKS}
    return Gpu(precision).put_all({k: v for k, v in values.items() if k not in MASKS}) | masks


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a.numpy(), e.numpy())


def choose_plan(**choices: Any) -> None:
    """Choose a plan; skip where no plan is like that."""
    exchange = choices.pop("exchange", None)
    cuda._module().wish(exchange=-1 if exchange is None else EXCHANGES[exchange], **choices)


def exists(cell: Cell, precision: str, sizes: Sizes) -> bool:
    """Whether there is a plan that meets the choices, forward and backward."""
    with contextlib.suppress(RuntimeError):
        explain(cell, sizes, precision)
        explain(cell, sizes, precision, backward=True)
        return True
    return False


def explain(cell: Cell, sizes: Sizes, precision: str, backward: bool = False) -> dict[str, Any]:
    return cuda.explain(cell.name, *sizes, storage(precision), mode(precision), backward)
