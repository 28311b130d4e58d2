"""Fused LSTM, GRU and RNN kernels, forward and backward, for NumPy."""

from . import (
    _interpreter,  # noqa: F401  (first: it refuses subinterpreters)
    cuda,
    reference,
)
from ._version import __version__
from .config import (
    get_isa,
    get_num_threads,
    limit_threads,
    release_memory,
    select_isa_from_environment,
    set_isa,
    set_num_threads,
    show_config,
)
from .functional import gru, gru_vjp, lstm, lstm_vjp, rnn, rnn_vjp
from .layers import GRU, LSTM, RNN
from .stream import Stream
from .weights import Weights

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Stream",
    "Weights",
    "__version__",
    "cuda",
    "get_isa",
    "get_num_threads",
    "gru",
    "gru_vjp",
    "lstm",
    "lstm_vjp",
    "reference",
    "release_memory",
    "rnn",
    "rnn_vjp",
    "set_isa",
    "set_num_threads",
    "show_config",
]

select_isa_from_environment()
limit_threads()
