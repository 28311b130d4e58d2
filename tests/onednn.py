"""oneDNN's RNN primitives, called through its C interface; an oracle for the conversions.

`pip install onednn-cpu-gomp` or Debian's libdnnl has the library.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

_CPU, _FLOAT32, _INFERENCE, _IN_ORDER = 1, 3, 96, 1
_DIRECTIONS = {"forward": 1, "reverse": 2, "bidirectional": 3}
_ACTIVATIONS = {"relu": 0x20, "tanh": 0x21}
_SRC, _DST, _WEIGHTS, _BIAS = 1, 17, 33, 41


class _Argument(ctypes.Structure):
    _fields_ = [("index", ctypes.c_int), ("memory", ctypes.c_void_p)]


def load() -> Any:
    """Return oneDNN's library of version 3, or None if there is none."""
    names = [str(Path(sys.prefix) / "lib" / "libdnnl.so.3"), ctypes.util.find_library("dnnl")]
    for name in filter(None, names):
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(found, "dnnl_memory_desc_create_with_strides"):
            return found
    return None


def run(
    kind: str,
    x: np.ndarray,
    weights: dict[str, np.ndarray],
    direction: str = "forward",
    activation: str = "tanh",
) -> np.ndarray:
    """Return dst_layer (T, B, D*R) of a primitive whose states begin with zeros.

    `weights` has the names that `fusedrnn.convert.from_onednn` takes.
    """
    dnnl = load()
    engine, stream = ctypes.c_void_p(), ctypes.c_void_p()

    def call(name: str, *arguments: Any) -> None:
        status = getattr(dnnl, f"dnnl_{name}")(*arguments)
        if status:
            raise RuntimeError(f"dnnl_{name} failed with status {status}")

    call("engine_create", ctypes.byref(engine), _CPU, ctypes.c_size_t(0))
    call("stream_create", ctypes.byref(stream), engine, _IN_ORDER)

    def describe(a: np.ndarray | None) -> Any:
        if a is None:
            return None
        found, ints = ctypes.c_void_p(), ctypes.c_int64 * 12
        strides = ints(*(s // a.itemsize for s in a.strides))
        call(
            "memory_desc_create_with_strides",
            ctypes.byref(found), a.ndim, ints(*a.shape), _FLOAT32, strides,
        )  # fmt: skip
        return found

    D = 1 + (direction == "bidirectional")
    W, R = (np.ascontiguousarray(weights[n]) for n in ("weights_layer", "weights_iter"))
    width = R.shape[2]
    y = np.zeros((*x.shape[:2], D * width), np.float32)
    named = {_SRC: x, _WEIGHTS: W, _WEIGHTS + 1: R, _DST: y}
    optional = {"bias": _BIAS, "weights_peephole": 35, "weights_projection": 36}
    for name, index in optional.items():
        if name in weights:
            named[index] = np.ascontiguousarray(weights[name])
    peephole, projection = (describe(named.get(index)) for index in (35, 36))
    src, w, r, dst = (describe(named[index]) for index in (_SRC, _WEIGHTS, _WEIGHTS + 1, _DST))
    bias = describe(named.get(_BIAS))
    way, primitive = _DIRECTIONS[direction], ctypes.c_void_p()
    head = [ctypes.byref(primitive), engine, _INFERENCE]
    if kind == "lstm":
        states = (None, None)
        call(
            "lstm_forward_primitive_desc_create",
            *head, way, src, *states, w, r, peephole, projection, bias, dst, *states, 0, None,
        )  # fmt: skip
    elif kind == "vanilla_rnn":
        numbers = (ctypes.c_float(0), ctypes.c_float(0))
        call(
            "vanilla_rnn_forward_primitive_desc_create",
            *head, _ACTIVATIONS[activation], way, src, None, w, r, bias, dst, None, 0, *numbers,
            None,
        )  # fmt: skip
    else:
        call(
            f"{kind}_forward_primitive_desc_create",
            *head, way, src, None, w, r, bias, dst, None, 0, None,
        )  # fmt: skip
    made = ctypes.c_void_p()
    call("primitive_create", ctypes.byref(made), primitive)
    arguments = (_Argument * len(named))()
    for argument, (index, a) in zip(arguments, named.items(), strict=True):
        memory = ctypes.c_void_p()
        pointer = ctypes.c_void_p(a.ctypes.data)
        call("memory_create", ctypes.byref(memory), describe(a), engine, pointer)
        argument.index, argument.memory = index, memory
    call("primitive_execute", made, stream, len(named), arguments)
    call("stream_wait", stream)
    return y
