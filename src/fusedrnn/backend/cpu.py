"""The CPU: NumPy's arrays and the compiled kernels.

`_cpu.Layers` runs a whole call. `Host` only checks arguments and makes them contiguous where
the kernels need it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks
from .._cpu import Layers
from ..bfloat16 import is_bfloat16
from ..reference import Array, Narrow, Parameters
from . import Spec


def contiguous(a: Array) -> Array:
    """Return `a`, copied unless it is C-contiguous and aligned."""
    return np.ascontiguousarray(a) if a.flags.aligned else a.copy()


def _rows(a: Array) -> Array:
    """Return `a`, copied unless its rows are contiguous and aligned."""
    if a.flags.c_contiguous and a.flags.aligned:
        return a
    whole = all(s % a.itemsize == 0 for s in a.strides)
    if a.flags.aligned and whole and (a.strides[-1] == a.itemsize or a.shape[-1] == 1):
        return a
    return contiguous(a)


def _stored(p: Parameters) -> tuple[Parameters, tuple[list[Array | None], int]]:
    """Return narrow weights as arrays, their scales, and the operands of a row of x."""
    weights = {name: getattr(p, name) for name in ("weight_ih", "weight_hh", "weight_hr")}
    values = {name: w and w.values for name, w in weights.items()}
    scales = [w and w.scale for w in weights.values()]
    return p._replace(**values), (scales, max(p.weight_ih.x_bits // 8, 1))


class Host:
    """The CPU."""

    def __str__(self) -> str:
        return "cpu"

    def array(
        self, name: str, value: Any, dtype: np.dtype[Any] | None = None, whole: bool = False
    ) -> Array:
        """Return an array, of `dtype` unless that is None, contiguous if `whole`."""
        a = checks.array(name, value, dtype)
        return contiguous(a) if whole else _rows(a) if a.ndim else a

    def state_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype of states for x of `dtype`: at least float32."""
        return np.dtype(np.float32) if is_bfloat16(dtype) else dtype

    def state(self, name: str, value: Any, dtype: np.dtype[Any]) -> Array:
        """Return a state or its gradient."""
        like = "the states of x" if is_bfloat16(getattr(value, "dtype", None)) else "x"
        return contiguous(checks.array(name, value, dtype, like))

    def lengths(self, value: Any, T: int, batch: tuple[int, ...]) -> Array:
        """Return the rows' lengths; `batch` is (B,), or () for x (T, I)."""
        return checks.lengths(value, T, batch)

    def flags(self, name: str, value: Any, expected: tuple[int, ...], axes: str) -> Array:
        """Return resets or a mask, shaped as x without its last axis."""
        return checks.flags(name, value, expected, axes)

    def check_mask(self, mask: Array, lengths: Array, time_axis: int) -> None:
        """Check that a mask is false from the rows' lengths on."""
        checks.fits(mask, lengths, time_axis)

    def output(self, out: Any, shape: tuple[int, ...], axes: str, used: list[Any]) -> Array:
        """Return the array that y is written into; `used` is what the op reads, x first."""
        y = checks.output(out, shape, axes, used[0])
        if any(a is not None and np.may_share_memory(y, a) for a in used):
            raise ValueError("out must not lie within the memory of another argument")
        return y

    def layers(
        self, spec: Spec, parameters: list[Parameters], cache: dict[Any, Any] | None = None
    ) -> Layers:
        """Return layers with the parameters of each layer and direction."""
        if cache is not None and "layers" in cache:
            cached: Layers = cache["layers"]
            return cached
        s = spec
        axes = (s.batch_first, s.layered, s.reverse)
        scales = []
        if isinstance(parameters[0].weight_ih, Narrow):
            parameters, scales = zip(*map(_stored, parameters), strict=True)
        layers = Layers(s.cell.name, parameters, s.directions, s.dropout, *axes, scales)
        if cache is None:
            return layers
        # If threads pack at the same time, all use what the first one kept, as later calls do.
        kept: Layers = cache.setdefault("layers", layers)
        return kept

    def now(self) -> Host:
        """Return the backend for a later call."""
        return self


HOST = Host()
