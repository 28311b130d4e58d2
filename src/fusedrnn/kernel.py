"""One layer in one direction: allocate what the compiled kernel writes, and call it.

Everything here is checked already: arrays have one dtype, x is (T, B, I), states are
(B, H). Strides are free. T = 0 and B = 0, which the kernels never see, end here, as do
times beyond the longest row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

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


# Up to this many rows the kernels read the weights as they are: packing costs more.
FEW_ROWS = 4


def pack(
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


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an uninitialised array, its memory reused where fresh pages would be costly."""
    large = math.prod(shape) * dtype.itemsize >= LARGE_ARRAY
    return allocate(shape, dtype) if large else np.empty(shape, dtype)


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


NO_MASKS = Masks(None, None)


def forward(
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
    h0, c0 = state if len(state) == 2 else (state[0], None)
    h_n, c_n = final if len(final) == 2 else (final[0], None)
    weights.forward(_rows(x), h0, c0, lengths, resets, reverse, y, h_n, c_n, saved)
    return saved


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
    ) -> tuple[Array, Array, Array, Array]:
        """Write dx and the initial state's gradient; return those of the parameters."""
        x, y = self.x, self.y
        (_, B, I), H = x.shape, y.shape[-1]
        T, lengths, resets = self.masks.within(len(x))
        if len(x) > T:
            dx[T:] = 0
            x, y, dx, dy = x[:T], y[:T], dx[:T], None if dy is None else dy[:T]
        dtype = x.dtype
        gates_H = len(self.cell.gates) * H
        shapes = ((gates_H, I), (gates_H, H), (gates_H,), (gates_H,))
        if T == 0 or B == 0:
            for d0, dn in zip(d_state, d_final, strict=True):
                d0[...] = 0 if dn is None else dn
            dW, dR, db_ih, db_hh = (np.zeros(shape, dtype) for shape in shapes)
            return dW, dR, db_ih, db_hh
        dW, dR, db_ih, db_hh = (empty(shape, dtype) for shape in shapes)
        h0, c0 = self.state if len(self.state) == 2 else (self.state[0], None)
        dh_n, dc_n = d_final if len(d_final) == 2 else (d_final[0], None)
        dh0, dc0 = d_state if len(d_state) == 2 else (d_state[0], None)
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
