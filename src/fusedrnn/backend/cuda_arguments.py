"""The arguments of a call on an NVIDIA GPU, and views of arrays in the kernels' layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cells import Cell
from ..reference import Options, Parameters
from . import Spec

if TYPE_CHECKING:
    from .._cuda import View


# The parameters with blocks for gates, and the number of their blocks in a coupled LSTM.
_BLOCKS = dict.fromkeys(
    ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "gamma_ih", "gamma_hh"), 3
) | {"weight_ch": 2}


def with_forget_gate(parameters: Parameters, insert: Callable[[Any, int], Any]) -> Parameters:
    """Return a coupled LSTM's parameters with blocks for f, or their gradients without.

    `insert` takes an array and the number of its blocks, and adds a block of zeros after the
    first one or removes it. The kernels do not read the blocks of f.
    """
    changed = {
        name: insert(p, _BLOCKS[name])
        for name, p in parameters._asdict().items()
        if name in _BLOCKS and p is not None
    }
    return parameters._replace(**changed)


def h_and_c(state: Sequence[Any]) -> tuple[Any, Any]:
    """Return the two parts of a state or its gradient, None for c if the cell has no c."""
    h, *c = state
    return h, c[0] if c else None


def values_of(o: Options) -> tuple[Any, ...]:
    """Return options in the order in which the kernels take them."""
    masks = (*o.zoneout, o.recurrent_dropout, o.training, o.seed, o.where)
    activations = (a or (0.0,) * 5 for a in (o.activation, o.recurrent_activation))
    return o.clip, o.cell_clip, *masks, o.bptt, *activations


@dataclass(frozen=True)
class Problem:
    """The arguments of one layer in one direction, and the arrays for its results.

    Attributes
    ----------
    x: (T, B, I). state: h0 (B, R), and c0 (B, H) of an LSTM. y: (T, B, R).
    lengths: (B,) int32 or int64. resets: (T, B). final: the state after the last step.
    by_rows: whether a kernel takes each step row by row, because the persistent recurrences do
        not support all options.
    cells: every c, (T, B, H), or None. trace: every gate, (T, B, gates, H), or None.
    """

    cell: Cell
    x: Any
    state: tuple[Any, ...]
    lengths: View | None
    resets: View | None
    reverse: bool
    y: Any
    final: tuple[Any, ...]
    options: Options
    by_rows: bool
    cells: Any = None
    trace: Any = None


@dataclass(frozen=True)
class Weights:
    """A layer's parameters in one direction, packed for the forward or the backward."""

    cell: Cell
    parameters: Parameters
    packed: View | None  # None where steps go row by row
    stream: int  # the stream that packs them


def time_major(a: Any, spec: Spec) -> Any:
    """Return a sequence as (T, B, …)."""
    if a is None:
        return None
    if a.ndim == 2:
        return a[:, None]
    return a.swapaxes(0, 1) if spec.batch_first else a


def part_of(a: Any, direction: int, width: int, directions: int) -> Any:
    """Return one direction's part of a sequence that both share; None stays None."""
    if a is None or directions == 1:
        return a
    return a[..., direction * width : (direction + 1) * width]


def time_major_mask(mask: View | None, spec: Spec, unbatched: bool) -> View | None:
    """Return resets or a mask as (T, B)."""
    if mask is None:
        return None
    if unbatched:
        return mask[:, None]
    return mask.swapaxes(0, 1) if spec.batch_first else mask


def with_axes(state: View | None, spec: Spec, unbatched: bool) -> View | None:
    """Return a state as (layers·directions, B, n)."""
    if state is None:
        return None
    if not spec.layered:
        state = state[None]
    return state[:, None] if unbatched else state
