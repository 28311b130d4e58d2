"""Values that are narrower than float32, and the products with them.

Layers of bfloat16
------------------
x, y, the gates that backward reads, and the gradients dx and dy are bfloat16. Products multiply
bfloat16: an operand that is computed, as h', r h', da or what a projection reads, is rounded
first. Sums, biases, h, c, the states and the gradients of parameters are float32. Backward
reads h' as y has it. With LayerNorm the kernels save the normalised sums of a gate, rounded,
instead of the gate.

Weights for inference
---------------------
x and y are float32.

::

    float16    W x, each weight the nearest float16
    bfloat16   W x, each weight and each element of x the nearest bfloat16
    int8       s (Q q), and per row of x and step

               s_x = max |x| / 127     q = round(x / s_x)     W x = s s_x (Q q)

               with Q = round(W / s) and s = max |W| / 127 for each row of W

The rows that R multiplies, h' (or r h'), are quantised like x, from their own maximum in each
step. With x_bits=16, a layer's input is the sum of two such rows: q, and what q leaves of x,
round(254 · (x / s_x - q)), with the scale s_x / 254. Sums of products of integers are exact. A
maximum below 2**-100 counts as 0, for which q = 0. A row that is not finite gives NaN.

Rounding is to the nearest, ties to even. Quantisation computes in float32, as x and h are in
memory; everything else has the dtype of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .types import Array, Parameters

NarrowPrecision = Literal["int8", "bfloat16", "float16"]
DTYPES = {"int8": np.int8, "bfloat16": np.uint16, "float16": np.float16}  # in memory
_LEAST, _MOST = np.float32(2.0**-100), np.float32(127)
_PARTS = np.float32(254)  # of a quantum, which the second row of an input has


def to_bfloat16(a: Array) -> Array:
    """Return the bits of the nearest bfloat16 of finite float32 values, as uint16."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    """Return bfloat16, given as uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def is_bfloat16(a: Any) -> bool:
    """Return whether an array of NumPy is of bfloat16."""
    return isinstance(a, np.ndarray) and a.dtype.name == "bfloat16"


def widened(a: Any) -> Any:
    """Return an array of bfloat16 as float32, and anything else as it is."""
    return a.astype(np.float32) if is_bfloat16(a) else a


class Bfloat16Parameters(Parameters):
    """Parameters of a layer of bfloat16, as float32."""

    __slots__ = ()

    def rounded(self, a: Array) -> Array:
        """Return the nearest bfloat16; infinities and NaN stay."""
        nearest = from_bfloat16(to_bfloat16(a)).astype(a.dtype)
        return np.where(np.isfinite(a), nearest, a)

    def passes(self, inside: Any, value: Array, bounds: tuple[Any, Any]) -> Any:
        """Return where the saved value is within the bounds, both rounded."""
        if self.gamma_ih is not None:  # what is saved is not the clipped number
            return inside
        low, high = (self.rounded(np.asarray(bound, value.dtype)) for bound in bounds)
        return (low < self.rounded(value)) & (self.rounded(value) < high)


def quantised(rows: Array, operands: int = 1) -> list[tuple[Array, Array]]:
    """Return rows (…, K) as pairs of integers (…, K) and a scale (…, 1), which add up to them.

    >>> (q, s), = quantised(np.float32([[1.0, -0.5, 0.25]]))
    >>> q.astype(int), float(s[0, 0] * 127)
    (array([[127, -64,  32]]), 1.0)
    """
    rows = np.asarray(rows, np.float32)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        most = np.abs(rows).max(-1, keepdims=True)
        is_zero = most < _LEAST
        scale = np.where(np.isfinite(most), np.where(is_zero, 0, most / _MOST), np.nan)
        usable = np.isfinite(most) & ~is_zero
        inverse = np.where(usable, _MOST / most, 0).astype(np.float32)
        scaled = np.where(np.isfinite(rows), rows, 0) * inverse
    whole = np.rint(scaled)
    parts = [(whole, scale.astype(np.float32))]
    if operands == 2:
        parts.append((np.rint((scaled - whole) * _PARTS), (scale / _PARTS).astype(np.float32)))
    return parts


@dataclass(frozen=True, eq=False)
class Narrow:
    """A weight (rows, K) in a narrow precision; ``x @ weight.T`` is the product defined above.

    Attributes
    ----------
    precision: "int8", "bfloat16" or "float16".
    values: int8, the bits of bfloat16 as uint16, or float16.
    scale: of each row of int8 values, float32 (rows,), else None.
    x_bits: 16 where int8 values multiply a layer's input in two parts, else 8.
    """

    precision: str
    values: Array
    scale: Array | None = None
    x_bits: int = 8

    __array_ufunc__ = None  # so that NumPy leaves products to this class

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Narrow:
        scale = None if self.scale is None else self.scale[rows]
        return Narrow(self.precision, self.values[rows], scale, self.x_bits)

    def widened(self) -> Array:
        """Return the weight as float32."""
        if self.precision == "bfloat16":
            return from_bfloat16(self.values)
        values = self.values.astype(np.float32)
        return values if self.scale is None else values * self.scale[:, None]

    @property
    def T(self) -> _Transposed:
        """The right operand of a product."""
        return _Transposed(self)


@dataclass(frozen=True, eq=False)
class _Transposed:
    weight: Narrow

    __array_ufunc__ = None

    def __rmatmul__(self, x: Array) -> Array:
        w = self.weight
        if w.scale is None:
            rounded = from_bfloat16(to_bfloat16(x)) if w.precision == "bfloat16" else x
            product: Array = rounded.astype(x.dtype) @ w.widened().T.astype(x.dtype)
            return product
        total: Any = 0
        for integers, scale in quantised(x, w.x_bits // 8):
            # Below 2**53, sums of integers are exact in float64.
            sums = integers.astype(np.float64) @ w.values.T.astype(np.float64)
            total = total + sums.astype(x.dtype) * scale.astype(x.dtype) * w.scale
        result: Array = total.astype(x.dtype)
        return result


def narrowed(weight: Array, precision: NarrowPrecision, x_bits: int = 8) -> Narrow:
    """Return a finite weight (rows, K) of float32 in a narrow precision.

    >>> w = narrowed(np.float32([[0.5, -1.0], [0.1, 0.2]]), "int8")
    >>> w.values
    array([[  64, -127],
           [  64,  127]], dtype=int8)
    """
    if precision == "int8":
        ((values, scale),) = quantised(weight)
        return Narrow(precision, values.astype(np.int8), scale[:, 0], x_bits)
    if precision == "bfloat16":
        return Narrow(precision, to_bfloat16(weight))
    return Narrow(precision, weight.astype(np.float16))
