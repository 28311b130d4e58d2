"""One layer in one direction on the CPU: read, allocate and call the compiled kernels.

`Host` is what an op or a layer asks; `device.Device` is the same for a GPU. Calls have
checked arguments: arrays have one dtype, x is (T, B, I), states are (B, H). Strides are
free. T = 0 and B = 0, which the kernels never see, end here, as do times beyond the longest
row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import checks
from ._cpu import LARGE_ARRAY, Weights, allocate
from .cells import Cell
from .reference import Array


def contiguous(a: Array) -> Array:
    """Return `a`, copied unless it is C-contiguous and aligned."""
    return np.ascontiguousarray(a) if a.flags.aligned else a.copy()


def _rows(a: Array) -> Array:
    """Return `a`, copied unless its rows are contiguous and aligned."""
    whole = all(s % a.itemsize == 0 for s in a.strides)
    if a.flags.aligned and whole and (a.strides[-1] == a.itemsize or a.shape[-1] == 1):
        return a
    return contiguous(a)


def h_and_c(state: Sequence[Any]) -> tuple[Any, Any]:
    """Return h and c of a cell's state or the like, None for the c that it has not."""
    h, *c = state
    return h, c[0] if c else None


# Up to this many rows the kernels read the weights as they are: packing costs more.
FEW_ROWS = 4


class Masks(NamedTuple):
    """Which steps rows take, None for all, and where their state starts anew."""

    lengths: Array | None  # (B,) intp
    resets: Array | None  # (T, B)

    def within(self, T: int) -> tuple[int, Array | None, Array | None]:
        """Return the time at which the longest row ends, and both masks up to there."""
        if self.lengths is not None:
            T = int(self.lengths.max(initial=0))
        resets = self.resets
        return T, self.lengths, None if resets is None else np.ascontiguousarray(resets[:T])


@dataclass(frozen=True)
class Tape:
    """What the training forward of one layer in one direction leaves to its backward."""

    cell: Cell
    weights: Weights  # packed for backward
    x: Array
    state: tuple[Array, ...]
    masks: Masks
    reverse: bool
    y: Array
    saved: Array | None

    def backward(
        self,
        dy: Array | None,
        d_final: tuple[Array | None, ...],
        dx: Array,
        d_state: tuple[Array, ...],
        adds: bool = False,
    ) -> tuple[Array, Array, Array, Array]:
        """Write dx (or add it, if `adds`) and the initial state's gradient.

        Return the gradients of the parameters.
        """
        if adds:
            own = HOST.empty(dx.shape, dx.dtype)
            d_parameters = self.backward(dy, d_final, own, d_state)
            dx += own
            return d_parameters
        x, y = self.x, self.y
        _, B, I = x.shape
        T, lengths, resets = self.masks.within(len(x))
        if len(x) > T:
            dx[T:] = 0
            x, y, dx, dy = x[:T], y[:T], dx[:T], None if dy is None else dy[:T]
        dtype = x.dtype
        shapes = self.cell.parameter_shapes(I, y.shape[-1])
        if T == 0 or B == 0:
            for d0, dn in zip(d_state, d_final, strict=True):
                d0[...] = 0 if dn is None else dn
            dW, dR, db_ih, db_hh = (np.zeros(shape, dtype) for shape in shapes)
            return dW, dR, db_ih, db_hh
        dW, dR, db_ih, db_hh = (HOST.empty(shape, dtype) for shape in shapes)
        h0, c0 = h_and_c(self.state)
        dh_n, dc_n = h_and_c(d_final)
        dh0, dc0 = h_and_c(d_state)
        self.weights.backward(
            _rows(x),
            h0,
            c0,
            lengths,
            resets,
            self.reverse,
            y,
            self.saved,
            None if dy is None else _rows(dy),
            None if dh_n is None else contiguous(dh_n),
            None if dc_n is None else contiguous(dc_n),
            dx,
            dW,
            dR,
            db_ih,
            db_hh,
            dh0,
            dc0,
        )
        return dW, dR, db_ih, db_hh


class Host:
    """The CPU and NumPy's arrays."""

    def __str__(self) -> str:
        return "cpu"

    def array(
        self, name: str, value: Any, dtype: np.dtype[Any] | None = None, whole: bool = False
    ) -> Array:
        """Return `value` as an array, of `dtype` where that is given; strides are free."""
        return checks.array(name, value, dtype)

    def state(self, name: str, value: Any, dtype: np.dtype[Any], copy: bool = False) -> Array:
        """Return a state or its gradient, contiguous; a copy if asked for."""
        state = checks.array(name, value, dtype)
        return state.copy() if copy else contiguous(state)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Make a state that was not given."""
        return np.zeros(shape, dtype)

    def lengths(self, value: Any, T: int, batch: tuple[int, ...]) -> Array:
        """Return the rows' lengths, (B,)."""
        return checks.lengths(value, T, batch).reshape(-1)

    def resets(self, value: Any, expected: tuple[int, ...], axes: str) -> Array:
        """Return the resets."""
        return checks.resets(value, expected, axes)

    def masks(self, lengths: Array | None, resets: Array | None) -> Masks:
        """Return both, for time-major resets."""
        return Masks(lengths, resets)

    def output(self, out: Any, shape: tuple[int, ...], axes: str, used: list[Any]) -> Array:
        """Check the array that y is written into: x is the first of what the op reads."""
        y = checks.output(out, shape, axes, used[0])
        if any(a is not None and np.may_share_memory(y, a) for a in used):
            raise ValueError("out must not lie within the memory of another argument")
        return y

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Make an uninitialised array, of used memory where fresh pages would be costly."""
        large = math.prod(shape) * dtype.itemsize >= LARGE_ARRAY
        return allocate(shape, dtype) if large else np.empty(shape, dtype)

    def see(self, made: Array) -> Array:
        """Return what the kernels see of an array that `empty` made."""
        return made

    def give(self, made: Array) -> Array:
        """Return what the user gets of it."""
        return made

    def freeze(self, y: Array) -> None:
        """Keep what backward reads from changes."""
        y.flags.writeable = False

    def now(self) -> Host:
        """Return itself: there is one CPU."""
        return self

    def check_may_keep(self) -> None:
        """Do nothing: what is packed here stays."""

    def state_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype of states for x of `dtype`."""
        return dtype

    def pack(
        self,
        cell: Cell,
        weight_ih: Array,
        weight_hh: Array,
        bias_ih: Array | None,
        bias_hh: Array | None,
        forward: Weights | None = None,
        borrow: bool = False,
    ) -> Weights:
        """Pack parameters for a forward or, given the weights of that, for its backward.

        `borrow` keeps the weights as they are, for few rows.
        """
        return Weights(
            cell.name,
            contiguous(weight_ih),
            contiguous(weight_hh),
            None if bias_ih is None else contiguous(bias_ih),
            None if bias_hh is None else contiguous(bias_hh),
            forward is not None,
            None if forward is None else forward.isa,
            borrow,
        )

    def forward(
        self,
        weights: Weights,
        x: Array,
        state: tuple[Array, ...],
        masks: Masks,
        reverse: bool,
        y: Array,
        final: tuple[Array, ...],
        save: bool = False,
    ) -> Array | None:
        """Write y and the final state; return what backward needs beside them, if `save`."""
        T, lengths, resets = masks.within(len(x))
        B = x.shape[1]
        if len(x) > T:
            y[T:] = 0
            x, y = x[:T], y[:T]
        if T == 0 or B == 0:
            for end, start in zip(final, state, strict=True):
                end[...] = start
            return None
        saved = None
        if save and weights.saved_size:
            saved = allocate((T, B, weights.saved_size), x.dtype)
        h0, c0 = h_and_c(state)
        h_n, c_n = h_and_c(final)
        weights.forward(_rows(x), h0, c0, lengths, resets, reverse, y, h_n, c_n, saved)
        return saved

    def tape(self, *recorded: Any) -> Tape:
        """Return what leads back from a training forward; see `Tape`."""
        return Tape(*recorded)


HOST = Host()
