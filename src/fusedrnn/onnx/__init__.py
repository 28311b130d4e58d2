"""Models of ONNX: their recurrent nodes as layers of ours, and our layers as models."""

try:
    import onnx as _onnx  # noqa: F401
except ModuleNotFoundError as missing:
    if missing.name != "onnx":
        raise
    raise ModuleNotFoundError(
        'fusedrnn.onnx needs onnx: pip install "fusedrnn[onnx]"', name="onnx"
    ) from missing

from .provider import add_provider
from .reading import Found, layers
from .writing import export

__all__ = ["Found", "add_provider", "export", "layers"]
