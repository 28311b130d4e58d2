"""Our kernels inside onnxruntime, as a provider: which nodes they run, and their layers."""

from __future__ import annotations

import logging
import re
import threading
from typing import Any, Literal, get_args

from .. import _cpu
from .._version import __version__
from ..backend.cpu import HOST
from ..convert import from_onnx
from ..reference import Options
from ..weights import PRECISIONS

ProviderPrecision = Literal["float32", "int8", "bfloat16", "float16"]

NAME = "FusedRNNExecutionProvider"
OLDEST = (1, 24, 4)
_LIBRARY = "fusedrnn"
_log = logging.getLogger("fusedrnn.onnx")
_lock = threading.Lock()


def add_provider(session_options: Any, precision: ProviderPrecision = "float32") -> None:
    """Let sessions of onnxruntime run their LSTM, GRU and RNN nodes on our kernels.

    The model stays as it is, and all other nodes stay with onnxruntime. So do recurrent nodes
    that `fusedrnn.convert.from_onnx` refuses, or whose weights are not constant; the logger
    "fusedrnn.onnx" then says which and why, as a warning. The kernels run on threads of their
    own, `fusedrnn.get_num_threads()` of them.

    Parameters
    ----------
    session_options: an ``onnxruntime.SessionOptions``. Its threads no longer spin when they
        have no work (``session.intra_op.allow_spinning``), because they would spin on the cores
        that the kernels need. Leave out the argument providers of the session.
    precision: "float32" leaves the weights as they are, float32 or float64. "int8", "bfloat16"
        and "float16" are those of `fusedrnn.LSTM.quantize`; nodes of float64 then stay with
        onnxruntime.

    Raises
    ------
    ImportError: onnxruntime is missing, older than 1.24.4 or built without such providers.
    TypeError, ValueError: an argument of a wrong type or value. Each is raised before
    session_options changes.

    >>> import numpy as np, onnx, onnxruntime, fusedrnn as fr, fusedrnn.onnx
    >>> node = fr.convert.to_onnx(fr.GRU(3, 4, rng=0))[0]
    >>> weights = {"W": node.W, "R": node.R, "B": node.B}
    >>> value = onnx.helper.make_tensor_value_info
    >>> graph = onnx.helper.make_graph(
    ...     [onnx.helper.make_node("GRU", ["X", "W", "R", "B"], ["Y"], **node.attributes)],
    ...     "model",
    ...     [value("X", onnx.TensorProto.FLOAT, ["T", "B", 3])],
    ...     [value("Y", onnx.TensorProto.FLOAT, ["T", 1, "B", 4])],
    ...     [onnx.numpy_helper.from_array(a, name) for name, a in weights.items()],
    ... )
    >>> opset = onnx.helper.make_opsetid("", 17)
    >>> model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    >>> options = onnxruntime.SessionOptions()
    >>> fusedrnn.onnx.add_provider(options)
    >>> session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    >>> session.get_providers()
    ['FusedRNNExecutionProvider', 'CPUExecutionProvider']
    >>> session.run(["Y"], {"X": np.zeros((5, 2, 3), np.float32)})[0].shape
    (5, 1, 2, 4)
    """
    onnxruntime = _onnxruntime()
    if not isinstance(session_options, onnxruntime.SessionOptions):
        raise TypeError(
            "session_options must be an onnxruntime.SessionOptions, got "
            f"{type(session_options).__name__}"
        )
    _check(precision)
    with _lock:  # a name can be registered once
        devices = _devices(onnxruntime)
        if not devices:
            onnxruntime.register_execution_provider_library(_LIBRARY, _cpu.__file__)
            devices = _devices(onnxruntime)
    session_options.add_provider_for_devices(devices, {"precision": precision})
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")


def _onnxruntime() -> Any:
    """Return the package, which must have providers from libraries."""
    try:
        import onnxruntime
    except ModuleNotFoundError as missing:
        if missing.name != "onnxruntime":
            raise
        raise ImportError(
            "add_provider needs onnxruntime 1.24.4 or newer: pip install onnxruntime"
        ) from missing
    version = onnxruntime.__version__
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
        raise ImportError(f"add_provider needs onnxruntime 1.24.4 or newer, got {version}")
    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise ImportError(
            f"add_provider needs an onnxruntime that can load providers, and this build of "
            f"{version} cannot"
        )
    return onnxruntime


def _devices(onnxruntime: Any) -> list[Any]:
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == NAME]


def _check(precision: str) -> None:
    known = get_args(ProviderPrecision)
    if precision not in known:
        names = ", ".join(f'"{name}"' for name in known)
        raise ValueError(f"precision must be one of {names}, got {precision!r}")


def _compile(
    name: str,
    op_type: str,
    weights: dict[str, Any],
    attributes: dict[str, Any],
    precision: str,
) -> tuple[_cpu.Layers, Options] | None:
    """Return a node's layers and their options, or None if the node stays with onnxruntime.

    Onnxruntime calls this, once to ask and once for the result, while a session is made.
    A weight is None if it is not constant or has another type than float32 and float64.
    """
    _check(precision)
    try:
        for weight, value in weights.items():
            if value is None:
                raise ValueError(f"{weight} is not a constant of float32 or float64")
        layer = from_onnx(op_type, **weights, **attributes)
        if precision in PRECISIONS:
            layer = layer.quantize(precision)
    except (TypeError, ValueError) as why:
        _log.warning("%s node %r stays with onnxruntime: %s", op_type, name, why)
        return None
    return HOST.layers(layer._spec, layer._all_parameters()), layer._options


_cpu.set_onnxruntime_compiler(_compile, __version__)
