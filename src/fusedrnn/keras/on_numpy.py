"""Calls of the kernels with the arrays of Keras' NumPy backend, forward only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

import fusedrnn

from ..convert.keras import exchanged
from .weights import op_of, weights_of

Array = np.ndarray[Any, Any]


def run(
    cell: Any, x: Array, states: list[Array], options: Mapping[str, Any]
) -> tuple[Array, list[Array]]:
    """Run a Keras cell over x (B, T, I); return all outputs (B, T, units) and the last states.

    `options` are those of our ops.
    """
    weights = weights_of(cell, ops.convert_to_tensor, exchanged)
    dtype = _computed_in(weights[0].dtype)
    of_states = np.float32 if dtype.name == "bfloat16" else dtype
    arrays = [a if a is None else a.astype(dtype, copy=False) for a in weights]
    start = [state.astype(of_states, copy=False) for state in states]
    steps = x.astype(dtype, copy=False).swapaxes(0, 1)
    given = dict(options)
    if "mask" in given:
        given["mask"] = given["mask"].T
    if "seed" in given:
        given["training"] = True
    op = getattr(fusedrnn, op_of(cell))
    y, *ends = op(steps, *arrays, *start, **given)
    return y.swapaxes(0, 1), ends


def _computed_in(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which the kernels compute: float16 is computed in float32."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype
