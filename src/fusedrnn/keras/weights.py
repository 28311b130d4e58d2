"""The weights of Keras' cells as arguments of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..convert import keras as convert

_OPS = {"LSTMCell": "lstm", "GRUCell": "gru", "SimpleRNNCell": "rnn"}


def op_of(cell: Any) -> str:
    """Return the name of our op that computes a Keras cell."""
    return _OPS[type(cell).__name__]


def weights_of(
    cell: Any, value: Callable[[Any], Any], exchange: Callable[[Any], Any]
) -> tuple[Any, Any, Any, Any]:
    """Return weight_ih, weight_hh, bias_ih and bias_hh, None for a bias that does not exist.

    Parameters
    ----------
    value: returns the array of a Keras variable.
    exchange: exchanges the first and the second of three blocks along the last axis.
    """
    bias = None if cell.bias is None else value(cell.bias)
    kernels = (value(cell.kernel), value(cell.recurrent_kernel))
    return convert.weights_of(op_of(cell), *kernels, bias, exchange)
