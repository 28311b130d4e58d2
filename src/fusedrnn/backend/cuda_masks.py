"""Calls with a mask on an NVIDIA GPU: arrays without the steps that rows do not take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .cuda_arguments import part_of

if TYPE_CHECKING:
    from .._cuda import View
    from .cuda import Device


@dataclass(frozen=True)
class Steps:
    """The steps that the rows of a call take; a call with a mask becomes one with lengths.

    Each row of the batch then is a sequence without gaps: its k-th step is at time k. Sequences
    are (T, B, n), with `directions` directions side by side. The host reads no values.

    Attributes
    ----------
    lengths: (B,), the number of steps of each row. resets: (T, B), of these steps, or None.
    tables: (4, T, B), the time of each step, the step of each time, and the step whose y is
        repeated at each time, forward and in reverse; -1 for none.
    reverse: whether a single direction runs from the last step to the first.
    """

    on: Device
    lengths: View
    resets: View | None
    tables: View
    directions: int
    reverse: bool

    @classmethod
    def of(
        cls,
        on: Device,
        mask: View,
        lengths: View | None,
        resets: View | None,
        directions: int,
        reverse: bool,
    ) -> Steps:
        """Return the steps of a mask (T, B), which end at lengths if these are given."""
        T, B = mask.shape
        of_steps = None if resets is None else on.scratch((T, B), "bool")
        outputs = on.scratch((4, T, B), "int32"), on.scratch((B,), "int32"), of_steps
        on._cuda.take_steps(mask, lengths, resets, *outputs, on.stream)
        on._keep(mask, lengths, resets)
        return cls(on, outputs[1], of_steps, outputs[0], directions, reverse)

    def on_stream(self, on: Device) -> Steps:
        """Return the same steps for calls on another stream."""
        if on is self.on:
            return self
        on._use(self.lengths, self.resets, self.tables)
        return replace(self, on=on)

    def compact(self, a: View | None) -> View | None:
        """Return a sequence whose steps are at the first times; None stays None."""
        if a is None:
            return None
        to = self.on.see(self.on.empty(a.shape, a.dtype))
        self._move(a, 0, None, to)
        return to

    def spread(self, a: Any) -> Any:
        """Return a compact sequence, or gates (T, B, gates, H), with steps at their own times.

        At the other times it is 0.
        """
        compact = self.on.see(a)
        result = self.on.empty(compact.shape, compact.dtype)
        to = self.on.see(result)
        if compact.ndim == 3:
            self._move(compact, 1, None, to)
        else:
            for k in range(compact.shape[2]):
                self._move(compact[:, :, k], 1, None, to[:, :, k])
        return result

    def repeat_into(self, a: View, h0: View | None, to: View) -> None:
        """Write y from compact y, with h of the unchanged state where no step is taken.

        h0 is (directions, B, R), or None for zeros.
        """
        for d, table in enumerate(self._repeated()):
            start = None if h0 is None else h0[d]
            self._move(self._part(a, d), table, start, self._part(to, d))

    def gather_gradient(self, dy: View | None, repeats: bool) -> View | None:
        """Return the gradient of the compact y from that of the user's y."""
        if dy is None or not repeats:
            return self.compact(dy)
        to = self.on.see(self.on.empty(dy.shape, dy.dtype))
        for d, table in enumerate(self._repeated()):
            self._sum(dy, d, table, self._part(to, d), None)
        return to

    def add_to_start(self, dy: View | None, repeats: bool, dh0: View) -> None:
        """Add the gradient of repeated h0 to dh0, (directions, B, R)."""
        if dy is not None and repeats:
            for d, table in enumerate(self._repeated()):
                self._sum(dy, d, table, None, dh0[d])

    def _part(self, a: View, d: int) -> View:
        part: View = part_of(a, d, a.shape[-1] // self.directions, self.directions)
        return part

    def _repeated(self) -> list[int]:
        """Return the table of repeated steps of each direction."""
        return [3 if self._is_reverse(d) else 2 for d in range(self.directions)]

    def _is_reverse(self, d: int) -> bool:
        return self.reverse or d == 1

    def _move(self, a: View, table: int, initial: View | None, to: View) -> None:
        self.on._cuda.move_rows(a, self.tables[table], initial, to, self.on.stream)
        self.on._keep(a, initial)

    def _sum(self, dy: View, d: int, table: int, to: View | None, start: View | None) -> None:
        where = self.tables[table], self._is_reverse(d)
        self.on._cuda.sum_repeated(self._part(dy, d), *where, to, start, self.on.stream)
        self.on._keep(dy)
