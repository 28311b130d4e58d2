"""Checks of the lengths, resets and masks of a module's call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import ops
from .base import check_dense


def _as_tensor(name: str, a: Any) -> Tensor:
    """Return a tensor; arrays are copied, because PyTorch warns of those that are read-only."""
    if isinstance(a, Tensor):
        check_dense(name, a)
        return a
    checks.unmasked(name, a)
    try:
        return torch.tensor(a)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(a).__name__
        raise TypeError(f"{name} must be a tensor, got {kind}: {error}") from None


def checked_lengths(lengths: Any, B: Any, unbatched: bool) -> Tensor:
    """Return lengths as a tensor (B,) of integers; raise TypeError or ValueError for others."""
    found = _as_tensor("lengths", lengths)
    dtype = found.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {dtype}")
    if unbatched and found.numel() == 1:
        found = found.reshape(1)
    if found.shape != (B,):
        raise ValueError(f"lengths must have shape (B,) = ({B},), got {tuple(found.shape)}")
    return found if found.dtype == torch.int32 else found.to(torch.int64)


def checked_flags(name: str, value: Any, expected: tuple[Any, ...]) -> Tensor:
    """Return resets or a mask as a tensor of bool; raise TypeError or ValueError for others."""
    found = _as_tensor(name, value)
    if found.dtype.is_complex:
        raise TypeError(f"{name} must be bool or numbers that are 0 or 1, got {found.dtype}")
    if found.shape != expected:
        raise ValueError(
            f"{name} must have the shape of input without its last axis, {expected}, "
            f"got {tuple(found.shape)}"
        )
    if found.dtype == torch.bool:
        return found
    flags = found != 0
    if _can_check(found) and bool((found != flags).any()):
        wrong = found[found != flags][0]
        raise ValueError(f"{name} must be bool or numbers that are 0 or 1, got {wrong}")
    return flags


def _can_check(a: Tensor) -> bool:
    """Return whether a tensor's values can be read, without waiting for a GPU."""
    return a.is_cpu and not torch.compiler.is_compiling() and not ops.is_transformed()
