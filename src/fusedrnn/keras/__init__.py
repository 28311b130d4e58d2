"""Keras 3 layers on our kernels that replace LSTM, GRU and SimpleRNN of `keras.layers`.

Keras' backend must be torch or NumPy; the latter computes without gradients, as in Keras.

>>> import keras, fusedrnn.keras as fk
>>> model = keras.Sequential([keras.layers.LSTM(4, name="lstm")])
>>> print(fk.swap(model))
lstm: LSTM(4)
"""

from ._backend import check_backend

check_backend()

from .layers import GRU, LSTM, SimpleRNN  # noqa: E402
from .swapping import Swapped, load_model, restore, save_model, swap  # noqa: E402

__all__ = [
    "GRU",
    "LSTM",
    "SimpleRNN",
    "Swapped",
    "load_model",
    "restore",
    "save_model",
    "swap",
]
