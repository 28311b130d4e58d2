"""Conversion of a `torch.nn.utils.rnn.PackedSequence` to a padded batch and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class _Take(torch.autograd.Function):
    """Select rows of a matrix, none of them twice, so that the derivative needs no sums."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(a)
        return a.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        return _place(d, *ctx.saved_tensors, ctx.count), None


class _Place(torch.autograd.Function):
    """Place rows in a matrix of `count` rows, the others 0."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, rows: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(rows)
        return a.new_zeros((count, a.shape[1])).index_copy_(0, rows, a)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        return _take(d, *ctx.saved_tensors), None, None


_take: Any = _Take.apply
_place: Any = _Place.apply


class Layout(NamedTuple):
    """The positions of packed data's rows in a padded batch.

    Attributes
    ----------
    T, B: the longest length, and the number of sequences, which are sorted longest first.
    lengths: (B,). rows: the indices into (T*B, …), in the order of the packed data.
    """

    T: int
    B: int
    lengths: Tensor
    rows: Tensor

    @classmethod
    def of(cls, packed: PackedSequence) -> Layout:
        """Return the layout of packed data, from its batch sizes."""
        sizes = packed.batch_sizes
        T, B = len(sizes), int(sizes[0])
        is_there = sizes[:, None] > torch.arange(B, device=sizes.device)
        rows = is_there.flatten().nonzero().squeeze(1)
        return cls(T, B, is_there.sum(0), rows.to(packed.data.device))

    def pad(self, data: Tensor) -> Tensor:
        """Return packed data as a padded batch (T, B, …), padding being 0."""
        placed: Tensor = _place(data, self.rows, self.T * self.B)
        return placed.view(self.T, self.B, *placed.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """Return the rows of a padded batch as packed data."""
        taken: Tensor = _take(padded.flatten(0, 1), self.rows)
        return taken
