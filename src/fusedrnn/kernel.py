"""One layer in one direction on the CPU: read, allocate and call the compiled kernels.

`Host` is what an op or a layer asks; `device.Device` is the same for a GPU. Calls have
checked arguments: arrays have one dtype, x is (T, B, I), states are (B, H). Strides are
free. T = 0 and B = 0, which the kernels never see, end here, as do times beyond the longest
row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import checks, reference
from ._cpu import LARGE_ARRAY, Options, Weights, allocate, drop
from .cells import Cell
from .options import PLAIN, Request
from .reference import Array, Parameters


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


# The parameters with a block for each gate, and how many those of peepholes have.
_BLOCKS = dict.fromkeys(
    ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "gamma_ih", "gamma_hh"), 3
) | {"weight_ch": 2}


def with_forget_gate(parameters: Parameters, insert: Callable[[Any, int], Any]) -> Parameters:
    """Return a coupled LSTM's parameters as an LSTM's, or gradients the other way.

    `insert` adds a block of zeros after the first of so many, or removes it, or says how large
    that makes a shape. The kernels do not look at the forget gate's.
    """
    changed = {
        name: insert(p, _BLOCKS[name])
        for name, p in parameters._asdict().items()
        if name in _BLOCKS and p is not None
    }
    return parameters._replace(**changed)


def _insert(a: Array, blocks: int) -> Array:
    H = len(a) // blocks
    return np.concatenate([a[:H], np.zeros((H, *a.shape[1:]), a.dtype), a[H:]])


def _remove(a: Array, blocks: int) -> Array:
    H = len(a) // (blocks + 1)
    return np.concatenate([a[:H], a[2 * H :]])


def _grow(shape: tuple[int, ...], blocks: int) -> tuple[int, ...]:
    return (shape[0] // blocks * (blocks + 1), *shape[1:])


def gradient_shapes(parameters: Parameters, wanted: Collection[str]) -> Parameters:
    """Return the shapes of the gradients of those parameters that are wanted."""
    shapes = {
        name: p.shape
        for name, p in parameters._asdict().items()
        if p is not None and name in wanted
    }
    return Parameters(*map(shapes.get, Parameters._fields))


@dataclass(slots=True)
class Problem:
    """One layer in one direction with checked arguments, its results yet to be written.

    Attributes
    ----------
    x: (T, B, I). state: h0 (B, R), and c0 (B, H) of an LSTM. y: (T, B, R).
    final: as state.
    row_wise: whether the plain kernels do not do; see `options.beyond_plain`.
    cells: every c, (T, B, H), or None. trace: every gate, (T, B, gates, H), or None.
    """

    cell: Cell
    x: Any
    state: tuple[Any, ...]
    masks: Any
    reverse: bool
    y: Any
    final: tuple[Any, ...]
    request: Request = PLAIN
    row_wise: bool = False
    cells: Any = None
    trace: Any = None


def told_options(request: Request, row_wise: bool) -> Options:
    """Return what the kernels are told of a request."""
    o = request.options
    return Options(row_wise, *values_of(o)) if row_wise or o.bptt else PLAIN_OPTIONS


def values_of(o: reference.Options) -> tuple[Any, ...]:
    """Return options in the order in which both backends are told."""
    masks = (*o.zoneout, o.recurrent_dropout, o.training, o.seed, o.where)
    return o.clip, o.cell_clip, *masks, o.bptt


PLAIN_OPTIONS = Options(False, math.inf, math.inf, 0.0, 0.0, 0.0, False, 0, 0, 0)


@dataclass(slots=True)
class Tape:
    """What the training forward of one layer in one direction leaves to its backward."""

    problem: Problem
    parameters: Parameters
    weights: Weights  # packed for backward
    forward_weights: Weights
    saved: Array | None

    def backward(
        self,
        dy: Array | None,
        d_final: tuple[Array | None, ...],
        d_cells: Array | None,
        dx: Array | None,
        d_state: tuple[Array, ...],
        adds: bool = False,
        wanted: Collection[str] = Parameters._fields,
    ) -> Parameters:
        """Write dx (or add it, if `adds`), if there is one, and the initial state's gradient.

        Return the gradients of the parameters that are wanted; others cost nothing.
        """
        if adds and dx is not None:
            own = HOST.empty(dx.shape, dx.dtype)
            d_parameters = self.backward(dy, d_final, d_cells, own, d_state, wanted=wanted)
            dx += own
            return d_parameters
        problem, request = self.problem, self.problem.request
        x, y, cells = problem.x, problem.y, problem.cells
        B = x.shape[1]
        T, lengths, resets = problem.masks.within(len(x))
        if len(x) > T:
            if dx is not None:
                dx[T:] = 0
            x, y = x[:T], y[:T]
            dx, dy, cells, d_cells = (
                None if a is None else a[:T] for a in (dx, dy, cells, d_cells)
            )
        is_empty = T == 0 or B == 0
        make = np.zeros if is_empty else HOST.empty
        coupled = problem.cell.is_coupled and not is_empty
        gradients = gradient_shapes(self.parameters, wanted)
        if coupled:
            gradients = with_forget_gate(gradients, _grow)
        gradients = Parameters(*[None if s is None else make(s, x.dtype) for s in gradients])
        if is_empty:
            for d0, dn in zip(d_state, d_final, strict=True):
                d0[...] = 0 if dn is None else dn
            return gradients
        h0, c0 = h_and_c(problem.state)
        dh_n, dc_n = h_and_c(d_final)
        dh0, dc0 = h_and_c(d_state)
        self.weights.backward(
            told_options(request, problem.row_wise),
            self.forward_weights,
            _rows(x),
            h0,
            c0,
            lengths,
            resets,
            problem.reverse,
            y,
            None if self.saved is None else self.saved[:T],
            cells,
            None if dy is None else _rows(dy),
            None if dh_n is None else contiguous(dh_n),
            None if dc_n is None else contiguous(dc_n),
            None if d_cells is None else _rows(d_cells),
            dx,
            list(gradients),
            dh0,
            dc0,
        )
        if coupled:
            gradients = with_forget_gate(gradients, _remove)
        if request.drops_weights and gradients.weight_hh is not None:
            HOST.drop_weights(gradients.weight_hh, request, gradients.weight_hh)
        return gradients


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
        parameters: Parameters,
        forward: Weights | None = None,
        borrow: bool = False,
        row_wise: bool = False,
    ) -> Weights:
        """Pack parameters for a forward or, given the weights of that, for its backward.

        `borrow` keeps the weights as they are, for few rows. `row_wise` changes nothing here.
        """
        if cell.is_coupled:
            parameters = with_forget_gate(parameters, _insert)
        arrays = [None if p is None else contiguous(p) for p in parameters]
        isa = None if forward is None else forward.isa
        return Weights(cell.name, arrays, forward is not None, isa, borrow)

    def drop(self, a: Array, p: float, seed: int, what: str, where: int, to: Array) -> None:
        """Write (T, B, n), some elements of its rows 0, into `to`, which may be itself."""
        drop(a, p, seed, what, where, to)

    def drop_weights(self, weight: Array, request: Request, to: Array | None = None) -> Array:
        """Return R as a call sees it, or mask its gradient in place."""
        made = np.empty_like(weight, order="C") if to is None else to
        o = request.options
        drop(contiguous(weight)[None], o.weight_dropout, o.seed, "weights", o.where, made[None])
        return made

    def with_weights_dropped(self, parameters: Parameters, request: Request) -> Parameters:
        """Return parameters as a call sees them."""
        if not request.drops_weights:
            return parameters
        return parameters._replace(weight_hh=self.drop_weights(parameters.weight_hh, request))

    def forward(self, weights: Weights, problem: Problem, save: bool = False) -> Array | None:
        """Write y and the final state; return what backward needs beside them, if `save`."""
        x, y, cells, trace = problem.x, problem.y, problem.cells, problem.trace
        T, lengths, resets = problem.masks.within(len(x))
        B = x.shape[1]
        if lengths is not None:
            for made in (cells, trace):
                if made is not None:
                    made[...] = 0
        if len(x) > T:
            y[T:] = 0
            x, y, cells, trace = (None if a is None else a[:T] for a in (x, y, cells, trace))
        if T == 0 or B == 0:
            for end, start in zip(problem.final, problem.state, strict=True):
                end[...] = start
            return None
        saved = None
        options = told_options(problem.request, problem.row_wise)
        size = weights.saved_size(options) if save else 0
        if size and not problem.request.recompute:
            saved = allocate((len(problem.x), B, size), x.dtype)
        h0, c0 = h_and_c(problem.state)
        h_n, c_n = h_and_c(problem.final)
        every = trace
        if trace is not None and problem.cell.is_coupled:
            every = np.zeros((T, B, 4, trace.shape[-1]), trace.dtype)
        weights.forward(
            options,
            _rows(x),
            h0,
            c0,
            lengths,
            resets,
            problem.reverse,
            y,
            h_n,
            c_n,
            None if saved is None else saved[:T],
            cells,
            every,
        )
        if trace is not every:
            trace[...] = every[:, :, [0, 2, 3]]
        return saved

    def tape(self, *recorded: Any) -> Tape:
        """Return what leads back from a training forward; see `Tape`."""
        return Tape(*recorded)


HOST = Host()
