"""Modules on our kernels that replace the recurrent modules of torch.nn.

>>> import torch, fusedrnn.torch as ft
>>> model = torch.nn.Sequential(torch.nn.LSTM(3, 4))
>>> print(ft.swap(model))
0: LSTM(3, 4)
"""

from .modules import GRU, LSTM, RNN
from .narrow import Quantized, quantize
from .steps import GRUCell, LSTMCell, RNNCell
from .swapping import Swapped, restore, swap

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "Quantized",
    "RNNCell",
    "Swapped",
    "quantize",
    "restore",
    "swap",
]
