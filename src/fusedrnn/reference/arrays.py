"""Functions that work on NumPy's arrays and on PyTorch's tensors."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def module_of(a: Any) -> Any:
    """Return a's module, numpy or torch, whose functions have the same names here."""
    return np if isinstance(a, (np.ndarray, np.generic)) else sys.modules["torch"]


def like(a: Any, values: Any, dtype: Any = None) -> Any:
    """Return values as an array of a's kind, on a's device."""
    if module_of(a) is np:
        return np.asarray(values, dtype)
    return module_of(a).as_tensor(values, dtype=dtype, device=a.device)


def zeros(a: Any, *shape: int) -> Any:
    """Return zeros of a's kind and dtype."""
    return np.zeros(shape, a.dtype) if module_of(a) is np else a.new_zeros(shape)


def constant(a: Any) -> Any:
    """Return a as a number that nothing is derived from, by autograd or by a complex step."""
    return a.real if module_of(a) is np else a.detach()


def blocks(a: Any, count: int) -> list[Any]:
    """Split the last axis into equal parts."""
    n = a.shape[-1] // count
    return [a[..., k * n : (k + 1) * n] for k in range(count)]
