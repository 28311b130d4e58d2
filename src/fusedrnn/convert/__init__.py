"""Weights of other libraries as layers of ours, and back.

``from_torch``, ``from_keras``, ``from_onnx``, ``from_flax``, ``from_haste``, ``from_mlx``,
``from_onednn`` and ``from_cudnn`` return an `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`
that computes what the other library computes. ``to_torch`` and so on return a layer's weights
in the form that the other library reads; they refuse a layer with an option that it lacks. None
of the libraries needs to be installed, except PyTorch for `to_torch`.

Weights are arrays of NumPy or of anything that ``numpy.asarray`` reads; 16-bit floats become
float32. The layers have the dtype of the weights. Further keyword arguments of ``from_…``, as
batch_first or dtype, are those of our layers.
"""

from .cudnn import from_cudnn, to_cudnn
from .flax import from_flax, to_flax
from .haste import from_haste, to_haste
from .keras import from_keras, to_keras
from .mlx import from_mlx, to_mlx
from .onednn import from_onednn, to_onednn
from .onnx import from_onnx, to_onnx
from .torch import from_torch, to_torch

__all__ = [
    "from_cudnn",
    "from_flax",
    "from_haste",
    "from_keras",
    "from_mlx",
    "from_onednn",
    "from_onnx",
    "from_torch",
    "to_cudnn",
    "to_flax",
    "to_haste",
    "to_keras",
    "to_mlx",
    "to_onednn",
    "to_onnx",
    "to_torch",
]
