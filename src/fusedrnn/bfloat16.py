"""bfloat16 in NumPy, which is the dtype of the package ml_dtypes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _cpu


@cache
def bfloat16() -> np.dtype[Any]:
    """Return NumPy's dtype for bfloat16; raise ImportError without the package for it."""
    try:
        from ml_dtypes import bfloat16 as scalar
    except ImportError:
        raise ImportError(
            'dtype "bfloat16" needs the package ml_dtypes on the CPU, install it with: '
            'pip install "fusedrnn[bfloat16]"'
        ) from None
    dtype: np.dtype[Any] = np.dtype(scalar)
    _cpu.set_bfloat16(dtype)
    return dtype


def host_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """Return NumPy's dtype of a name or type."""
    return bfloat16() if isinstance(dtype, str) and dtype == "bfloat16" else np.dtype(dtype)


def is_bfloat16(dtype: Any) -> bool:
    """Return whether a dtype, or its name, is bfloat16, and let the kernels know it."""
    return str(dtype) == "bfloat16" and bfloat16() is not None
