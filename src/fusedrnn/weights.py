"""Weights of one layer that are kept, packed, from call to call, and in a narrow precision."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from . import checks
from .reference import Array, Narrow, Parameters, narrowed
from .reference.narrow import NarrowPrecision

PRECISIONS: tuple[NarrowPrecision, ...] = get_args(NarrowPrecision)
WEIGHTS = ("weight_ih", "weight_hh", "weight_hr")
MOST_ELEMENTS = 2**17  # of a row: 127² times as many fit in 32 bits


def check_precision(weights: Any, x_bits: Any) -> tuple[NarrowPrecision, int]:
    """Check the arguments of `quantize`; return the precision and the bits of a layer's x."""
    if weights not in PRECISIONS:
        known = ", ".join(f'"{name}"' for name in PRECISIONS)
        raise ValueError(f"weights must be one of {known}, got {weights!r}")
    if x_bits is None:
        return weights, 16 if weights == "int8" else 0
    if weights != "int8":
        raise ValueError(f'x_bits must be None with "{weights}" weights, got {x_bits}')
    x_bits = checks.integer("x_bits", x_bits, 0, 64)
    if x_bits not in (8, 16):
        raise ValueError(f"x_bits must be 8 or 16, got {x_bits}")
    return weights, x_bits


def narrow_weight(name: str, weight: Array, weights: NarrowPrecision, x_bits: int) -> Narrow:
    """Return a weight in a narrow precision; raise an error if it is not finite."""
    if weight.dtype != np.float32:
        raise TypeError(f"{name} must be float32 to be quantised, got {weight.dtype}")
    finite(name, weight)
    if weights == "int8" and weight.shape[1] > MOST_ELEMENTS:
        raise ValueError(
            f"{name} must have at most {MOST_ELEMENTS} columns for int8, got {weight.shape}"
        )
    with np.errstate(over="ignore"):
        narrow = narrowed(weight, weights, x_bits)
    if weights != "int8":
        beyond = ~np.isfinite(narrow.widened())
        if beyond.any():
            raise ValueError(
                f"{name} must be within the range of {weights}, got {weight[beyond][0]}"
            )
    return narrow


def finite(name: str, array: Array) -> None:
    """Check that all elements of an array are finite."""
    wrong = ~np.isfinite(array)
    if wrong.any():
        raise ValueError(f"{name} must be finite, got {array[wrong][0]}")


def bits_of(value: Any) -> Any:
    """Return an array of ml_dtypes' bfloat16 as its bits, and anything else as it is."""
    dtype = getattr(value, "dtype", None)
    if isinstance(value, np.ndarray) and dtype is not None and dtype.name == "bfloat16":
        return value.view(np.uint16)
    return value


def stored(name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    """Check a stored array of a layer with narrow weights, and return it."""
    array = checks.as_array(name, bits_of(value))
    if array.dtype != dtype:
        kind = "uint16, the bits of bfloat16," if dtype == np.uint16 else str(dtype)
        raise TypeError(f"{name} must be {kind} like the layer's, got {array.dtype}")
    finite(name, array)
    if name.startswith("scale") and (array < 0).any():
        raise ValueError(f"{name} must not be negative, got {array.min()}")
    if dtype == np.uint16:
        beyond = array & 0x7F80 == 0x7F80
        if beyond.any():
            raise ValueError(f"{name} must be finite, got the bits {array[beyond][0]:#06x}")
    if dtype == np.int8 and (array == -128).any():
        raise ValueError(f"{name} must be from -127 to 127, got -128")
    return array


class Weights:
    """The weights of one layer in one direction, which the ops take in place of arrays.

    The first call packs them, and later calls use the same packing. In a narrow precision,
    products read half or a quarter of the bytes, and there are no gradients. x must be on the
    CPU.

    Parameters
    ----------
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch, gamma_ih, gamma_hh, gamma_c,
        beta_c: the arguments of the op.
    weights: None for the dtype of weight_ih, or the precision of the weights: "int8",
        "bfloat16" or "float16" (`fusedrnn.LSTM.quantize`).
    x_bits: with "int8", the bits of an element of x in the products: 16, or 8 for less
        work and about twice the error.

    Raises
    ------
    TypeError, ValueError: an argument of a wrong type, dtype or value. The op checks shapes.

    >>> import numpy as np, fusedrnn as fr
    >>> rng = np.random.default_rng(0)
    >>> W, R = (rng.uniform(-1, 1, (16, n)).astype(np.float32) for n in (3, 4))
    >>> weights = fr.Weights(W, R, weights="int8")
    >>> weights
    Weights(weight_ih (16, 3), weight_hh (16, 4), weights="int8")
    >>> y, h_n, c_n = fr.lstm(np.ones((5, 2, 3), np.float32), weights)
    """

    def __init__(
        self,
        weight_ih: npt.ArrayLike,
        weight_hh: npt.ArrayLike,
        bias_ih: npt.ArrayLike | None = None,
        bias_hh: npt.ArrayLike | None = None,
        *,
        weights: NarrowPrecision | None = None,
        x_bits: int | None = None,
        **others: npt.ArrayLike | None,
    ) -> None:
        unknown = [name for name in others if name not in Parameters._fields[4:]]
        if unknown:
            raise TypeError(f"Weights has no argument {unknown[0]!r}")
        first = (weight_ih, weight_hh, bias_ih, bias_hh)
        values = dict(zip(Parameters._fields, first, strict=False))
        arrays: dict[str, Any] = {}
        for name, value in (values | others).items():
            if value is None and name not in WEIGHTS[:2]:
                continue
            array = np.array(checks.array(name, value), order="C")
            array.flags.writeable = False
            arrays[name] = array
        self.precision: NarrowPrecision | None = None
        if weights is None:
            if x_bits is not None:
                raise ValueError(f"x_bits must be None without weights, got {x_bits}")
        else:
            self.precision, x_bits = check_precision(weights, x_bits)
            for name in WEIGHTS:
                if name in arrays:
                    bits = x_bits if name == "weight_ih" else 8
                    arrays[name] = narrow_weight(name, arrays[name], self.precision, bits)
        self.parameters = Parameters(**arrays)
        self._layers: dict[Any, dict[Any, Any]] = {}

    def layers_of(self, cell: str, reverse: bool = False) -> dict[Any, Any]:
        """Return the cache of a cell's packed layers in one direction."""
        return self._layers.setdefault((cell, reverse), {})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layers": {}}

    def __repr__(self) -> str:
        present = {k: v for k, v in self.parameters._asdict().items() if v is not None}
        parts = [f"{name} {value.shape}" for name, value in present.items()]
        if self.precision:
            parts.append(f'weights="{self.precision}"')
        return f"Weights({', '.join(parts)})"
