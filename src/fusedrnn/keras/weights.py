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
    is_gru = op_of(cell) == "gru"

    def read(variable: Any) -> Any:
        return exchange(value(variable)) if is_gru else value(variable)

    W, R = read(cell.kernel).T, read(cell.recurrent_kernel).T
    if cell.bias is None:
        return W, R, None, None
    bias = read(cell.bias)
    return (W, R, *bias) if bias.ndim == 2 else (W, R, bias, None)
