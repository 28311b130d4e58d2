"""The weights of Keras' cells as arguments of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_OPS = {"LSTMCell": "lstm", "GRUCell": "gru", "SimpleRNNCell": "rnn"}


def op_of(cell: Any) -> str:
    """Return the name of our op that computes a Keras cell."""
    return _OPS[type(cell).__name__]


def weights_of(
    cell: Any, value: Callable[[Any], Any], exchange: Callable[[Any], Any]
) -> tuple[Any, Any, Any, Any]:
    """Return weight_ih, weight_hh, bias_ih and bias_hh, None for a bias that does not exist.

    Keras has the transposed matrices. The gates of its GRU are in the order z r h where ours
    are r z n; those of an LSTM are in the same order. A single bias is our bias_ih.

    Parameters
    ----------
    value: returns the array of a Keras variable.
    exchange: exchanges the first and the second of three blocks along the last axis.
    """
    arrays = [
        None if v is None else value(v) for v in (cell.kernel, cell.recurrent_kernel, cell.bias)
    ]
    if op_of(cell) == "gru":
        arrays = [None if a is None else exchange(a) for a in arrays]
    kernel, recurrent_kernel, bias = arrays
    biases = bias if bias is not None and bias.ndim == 2 else (bias, None)
    return kernel.T, recurrent_kernel.T, biases[0], biases[1]
