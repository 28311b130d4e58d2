"""A layer in one direction: steps over time, masks, options of a whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import constant, like, module_of, zeros
from .cells import Cell, Step, mixed
from .narrow import Bfloat16Parameters, is_bfloat16, widened
from .random import RECURRENT, WEIGHTS, ZONEOUT, drawn, dropped
from .types import Array, Gradients, Grads, Options, Parameters, State


@dataclass
class Run:
    """The results of `run`.

    Attributes
    ----------
    y: every h. state: the final one. cells: every c, of an LSTM.
    gates: every gate by its letter, each (T, B, H).
    pullback: (dy, d state, d cells), None for zeros, to `Grads`.
    """

    y: Array
    state: State
    pullback: Callable[..., Grads]
    cells: Array | None = None
    gates: dict[str, Array] = field(default_factory=dict)


def run(
    cell: Cell,
    x: Array,
    parameters: Parameters,
    state: Sequence[Array | None],
    lengths: npt.ArrayLike | None = None,
    resets: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
    reverse: bool = False,
    options: Options | None = None,
) -> Run:
    """Run `cell` over x.

    A row takes the steps t < length at which its mask is true. At the other times its state
    does not change, y, cells and gates are 0, and x, dy and d_cells are ignored; with
    `options.repeats`, y is h of the unchanged state there. The result of a row is that of the
    steps it takes, one after the other: random masks and the chunks of bptt count only these.
    The state is set to 0 before each step at which resets is true. x of bfloat16 is computed
    as `reference.narrow` defines.
    """
    if is_bfloat16(x):
        wide = Bfloat16Parameters(*map(widened, parameters))
        masks = (lengths, resets, mask, reverse)
        return _rounded(run(cell, widened(x), wide, state, *masks, options), x.dtype)
    p, o = parameters, options or Options()
    where = module_of(x).where
    T, batch, dtype = len(x), x.shape[1:-1], x.dtype
    B, H = (batch or (1,))[0], p.weight_ih.shape[0] // len(cell.gates)
    R = H if p.weight_hr is None else len(p.weight_hr)
    start: State = tuple(
        zeros(x, *batch, width) if s is None else s
        for s, width in zip(state, (R, H), strict=False)
    )
    zero = 0.0
    times = range(T)[:: -1 if reverse else 1]
    times_of_rows = like(x, np.arange(T).reshape(T, *[1] * (x.ndim - 1)))
    ends = like(x, T if lengths is None else lengths)[..., None]
    taken = times_of_rows < ends
    if mask is not None:
        taken = taken & like(x, mask)[..., None]
        times_of_rows = taken.cumsum(0) - 1  # the number of a step among those that are taken
        ends = taken.sum(0)
    reset = taken & (False if resets is None else like(x, resets)[..., None])
    cut = reset  # where no gradient of the state passes
    if o.bptt:
        boundary = times_of_rows + reverse
        cut = reset | ((boundary % o.bptt == 0) & (boundary > 0) & (boundary < ends))
    x = where(taken, x, zero)

    rows = np.arange(B).reshape(batch)
    h_mask: Any = 1.0
    weight_mask: Any = 1.0
    if o.training and o.recurrent_dropout:
        h_mask = dropped(RECURRENT, 0, rows, R, o.recurrent_dropout, o, x)
    if o.training and o.weight_dropout:
        weight_rows = np.arange(len(p.weight_hh))
        weight_mask = dropped(WEIGHTS, 0, weight_rows, R, o.weight_dropout, o, x)
        p = p._replace(weight_hh=p.rounded(p.weight_hh * weight_mask))

    def drawn_keeps(number: int) -> tuple[Any, ...]:
        words = 4 // len(cell.states)
        time = np.full(batch, number)
        return tuple(
            like(x, drawn(ZONEOUT, words, words * n, time, rows, width, o.zoneout[n], o))
            for n, (_, width) in enumerate(zip(cell.states, (R, H), strict=False))
        )

    draws = o.training and any(o.zoneout)
    if draws and mask is not None:
        each = zip(*map(drawn_keeps, range(T)), strict=True)
        of_numbers = [module_of(x).stack(of_state) for of_state in each]  # (T, B, units)

    def keep(t: int) -> tuple[Any, ...]:
        if not draws:
            return o.zoneout
        if mask is None:
            return drawn_keeps(t)
        number = times_of_rows[t, ..., 0].clip(0)  # a step that is not taken has no mask
        at = (number, like(x, rows)) if batch else number
        return tuple(keeps[at] for keeps in of_numbers)

    current = start
    steps: list[tuple[State, Step]] = []
    outputs: dict[str, list[Any]] = {}
    for t in times:
        # The results of rows that take no step are dropped; zeros keep NaN out of gradients.
        old = tuple(where(taken[t] & ~reset[t], s, zero) for s in current)
        if o.bptt:
            old = tuple(where(cut[t], constant(s), s) for s in old)
        step = cell.step(x[t], old[0] * h_mask, old, p, o)
        (h, *c), keeps = step.state, keep(t)
        if p.weight_hr is not None:
            h = p.rounded(h) @ p.weight_hr.T
        new = tuple(mixed(k, s, n) for k, s, n in zip(keeps, old, (h, *c), strict=False))
        current = tuple(where(taken[t], n, s) for n, s in zip(new, current, strict=True))
        steps.append((old, step))
        step_outputs = dict(zip(("y", "cells"), current, strict=False)) | step.gates
        for name, value in step_outputs.items():
            otherwise = value if name == "y" and o.repeats else zero
            outputs.setdefault(name, []).append(where(taken[t], value, otherwise))
    by_time = slice(None, None, -1 if reverse else 1)

    def over_time(name: str, width: int) -> Any:
        values = outputs.get(name)
        stack = module_of(x).stack
        return stack(values[by_time]) if values else zeros(x, T, *batch, width)

    y = over_time("y", R)
    cells = over_time("cells", H) if "c" in cell.states else None
    gates = {letter: over_time(letter, H) for letter in cell.gates}

    def pullback(
        dy: Array | None = None,
        d_final: Sequence[Array | None] | None = None,
        d_cells: Array | None = None,
    ) -> Grads:
        d_ends = d_final or [None] * len(start)
        d: State = tuple(
            np.zeros_like(s) if g is None else g for s, g in zip(start, d_ends, strict=True)
        )
        dx = np.zeros(x.shape, dtype)
        into = {k: np.zeros_like(v) for k, v in p._asdict().items() if v is not None}
        for n, t in reversed(list(enumerate(times))):
            old, step = steps[n]
            d_outputs = (dy, d_cells if cells is not None else None)
            d_new = tuple(
                g if more is None else g + np.where(taken[t] | is_read, more[t], zero)
                for g, more, is_read in zip(d, d_outputs, (o.repeats, False), strict=False)
            )
            keeps = keep(t)
            dh, *dc = (
                np.where(taken[t], mixed(k, zero, g), zero)
                for k, g in zip(keeps, d_new, strict=False)
            )
            if p.weight_hr is not None:
                m, dh = p.rounded(step.state[0]), p.rounded(dh)
                into["weight_hr"] += np.atleast_2d(dh).T @ np.atleast_2d(m)
                dh = dh @ p.weight_hr
            d_x, dh_dropped, direct = step.pull((dh, *dc), into)
            dx[t] = np.where(taken[t], d_x, zero)
            dh_direct = np.zeros_like(old[0]) if p.weight_hr is not None else direct[0]
            d_old = (dh_direct + dh_dropped * h_mask, *direct[1:])
            d_old = tuple(
                mixed(k, g, zero) + before
                for k, g, before in zip(keeps, d_new, d_old, strict=False)
            )
            d_old = tuple(np.where(cut[t], zero, g) for g in d_old)
            d = tuple(np.where(taken[t], g, same) for g, same in zip(d_old, d_new, strict=True))
        into["weight_hh"] = into["weight_hh"] * weight_mask
        return Grads(dx, h0=d[0], c0=d[1] if len(d) > 1 else None, **_by_name(into))

    return Run(y, current, pullback, cells, gates)


def _rounded(of: Run, dtype: Any) -> Run:
    """Return a run whose y, gates and dx are of bfloat16."""

    def pullback(dy: Any = None, d_final: Any = None, d_cells: Any = None) -> Grads:
        found = of.pullback(widened(dy), d_final, d_cells)
        return found._replace(x=found.x.astype(dtype))

    gates = {letter: gate.astype(dtype) for letter, gate in of.gates.items()}
    return Run(of.y.astype(dtype), of.state, pullback, of.cells, gates)


def _by_name(into: Gradients) -> dict[str, Any]:
    return {name: into.get(name) for name in Parameters._fields}
