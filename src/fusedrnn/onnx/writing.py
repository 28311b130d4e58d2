"""A layer or a stream as a model of ONNX."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .. import __version__, checks
from ..convert import to_onnx
from ..convert.onnx import Node
from ..files import replacing
from ..stream import Stream

_OLDEST = 14  # in which LSTM, GRU, RNN, Squeeze and Split have the form that is written
_MOST_BYTES = 2**31 - 2**20  # of a file of ONNX


def export(
    layer: Any,
    path: str | os.PathLike[str],
    opset: int = 17,
    *,
    state: bool = True,
    lengths: bool = False,
) -> None:
    """Write a layer or a stream as a model of ONNX, which onnxruntime runs.

    The model's inputs and outputs have the names, shapes and meanings of a call of the layer,
    and T and B may be any: x, h0 and c0, lengths → y, h_n and c_n. That of a stream is one step
    of it: x (B, I) → y (B, H), with its batch size, and h0 and c0 may be left out for the state
    that the stream has now.

    Parameters
    ----------
    layer: an `fusedrnn.LSTM`, `fusedrnn.GRU`, `fusedrnn.RNN` or `fusedrnn.Stream`, or a module
        of torch.nn or `fusedrnn.torch`, of float32 or 16 bits, which become float32. Dropout
        is left out, as in inference.
    path: the file to write. It is replaced as a whole, or not at all.
    opset: the version of ONNX's operators, from 14.
    state: whether the model of a layer has inputs h0 and c0; otherwise they are 0.
    lengths: whether it has an input lengths, (B,) of int32, which becomes sequence_lens.

    Raises
    ------
    TypeError, ValueError: an argument of a wrong type or value, or a layer with an option that
        ONNX lacks; no file is written then. OSError: the file cannot be written.

    >>> import numpy as np, onnxruntime, fusedrnn as fr, fusedrnn.onnx
    >>> lstm = fr.LSTM(3, 4, rng=0)
    >>> fusedrnn.onnx.export(lstm, "lstm.onnx", state=False)
    >>> x = np.ones((5, 2, 3), np.float32)
    >>> y, h_n, c_n = onnxruntime.InferenceSession("lstm.onnx").run(None, {"x": x})
    >>> bool(np.allclose(y, lstm(x)[0], atol=1e-5))
    True
    """
    newest = onnx.defs.onnx_opset_version()
    opset = checks.integer("opset", opset, _OLDEST, newest)
    stream = layer if isinstance(layer, Stream) else None
    if stream is not None and (
        not checks.flag("state", state) or checks.flag("lengths", lengths)
    ):
        raise ValueError("state must be True and lengths False for a Stream")
    nodes = to_onnx(layer if stream is None else stream.layer)
    if nodes[0].W.dtype != np.float32:
        raise TypeError(
            "layer must be float32, because runtimes of ONNX have no float64: convert it by "
            'to("cpu", "float32")'
        )
    size = sum(
        a.nbytes for node in nodes for a in (node.W, node.R, node.B, node.P) if a is not None
    )
    if size > _MOST_BYTES:
        raise ValueError(f"layer must have less than 2 GB of weights, got {size / 1e9:.1f} GB")
    graph = _Graph(
        nodes, layer, stream, checks.flag("lengths", lengths), checks.flag("state", state)
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        graph.build(),
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="fusedrnn",
        producer_version=__version__,
    )
    with replacing(path) as temporary:
        onnx.save_model(model, temporary)


class _Graph:
    """The graph of a layer: its nodes, initializers, inputs and outputs."""

    def __init__(
        self,
        nodes: list[Node],
        layer: Any,
        stream: Stream | None,
        lengths: bool,
        state: bool,
    ) -> None:
        self._recurrent = nodes
        self._stream = stream
        self._lengths, self._state = lengths, state
        self._batch_first = getattr(
            layer if stream is None else stream.layer, "batch_first", False
        )
        first = nodes[0]
        self._dtype = first.W.dtype
        self._letters = "hc" if first.op_type == "LSTM" else "h"
        self._D, self._H = first.R.shape[0], first.R.shape[2]
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def build(self) -> onnx.GraphProto:
        """Return the graph."""
        x, lengths = self._input_x(), ""
        if self._lengths:
            lengths = "lengths"
            info = helper.make_tensor_value_info(lengths, onnx.TensorProto.INT32, ["B"])
            self._inputs.append(info)
        count, D = len(self._recurrent), self._D
        starts = [self._input_state(letter) for letter in self._letters] if self._state else []
        ends: list[list[str]] = [[] for _ in self._letters]
        for n, of_layer in enumerate(self._recurrent):
            x, *after = self._add_layer(n, of_layer, x, lengths, [s[n] for s in starts])
            for names, name in zip(ends, after, strict=True):
                names.append(name)
        self._output_y(x)
        for letter, names in zip(self._letters, ends, strict=True):
            self._output_state(letter, names, count * D)
        name = f"fusedrnn {self._recurrent[0].op_type}"
        return helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, self._initializers
        )

    def _add(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def _constant(self, name: str, value: Any) -> str:
        self._initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _value(self, name: str, shape: list[Any]) -> onnx.ValueInfoProto:
        kind = helper.np_dtype_to_tensor_dtype(self._dtype)
        return helper.make_tensor_value_info(name, kind, shape)

    def _sequence(self, width: int) -> list[Any]:
        """Return the shape of x or y in the user's layout."""
        if self._stream is not None:
            batch = self._stream.batch_size
            return [width] if batch is None else [batch, width]
        return ["B", "T", width] if self._batch_first else ["T", "B", width]

    def _input_x(self) -> str:
        """Add x; return the name of x as (T, B, I)."""
        self._inputs.append(self._value("x", self._sequence(self._recurrent[0].W.shape[2])))
        if self._stream is not None:
            axes = [0, 1] if self._stream.batch_size is None else [0]
            return self._add("Unsqueeze", ["x", self._constant("x_axes", axes)], "x_steps")
        if self._batch_first:
            return self._add("Transpose", ["x"], "x_steps", perm=[1, 0, 2])
        return "x"

    def _has_batch(self) -> bool:
        return self._stream is None or self._stream.batch_size is not None

    def _state_shape(self, count: int) -> list[Any]:
        batch: list[Any] = ["B"] if self._stream is None else [self._stream.batch_size]
        return [count, *(batch if self._has_batch() else ()), self._H]

    def _input_state(self, letter: str) -> list[str]:
        """Add an initial state; return the names of its parts of each layer."""
        name, count = f"{letter}0", len(self._recurrent)
        self._inputs.append(self._value(name, self._state_shape(count * self._D)))
        if self._stream is not None:  # the default value
            state = self._stream.state
            of_letter = state["hc".index(letter)] if isinstance(state, tuple) else state
            self._constant(name, np.asarray(of_letter, self._dtype))
        if not self._has_batch():
            axes = self._constant(f"{name}_axes", [1])
            name = self._add("Unsqueeze", [name, axes], f"{name}_rows")
        if count == 1:
            return [name]
        parts = [f"{letter}0_l{n}" for n in range(count)]
        sizes = self._constant(f"{letter}0_sizes", [self._D] * count)
        self._nodes.append(helper.make_node("Split", [name, sizes], parts, axis=0))
        return parts

    def _add_layer(
        self, n: int, node: Node, x: str, lengths: str, states: list[str]
    ) -> list[str]:
        """Add a recurrent node; return the names of y (T, B, D*H) and of the last states."""
        name = f"{node.op_type.lower()}_{n}"
        weights = {"W": node.W, "R": node.R, "B": node.B, "P": node.P}
        named = {
            kind: "" if a is None else self._constant(f"{name}_{kind}", a)
            for kind, a in weights.items()
        }
        inputs = [x, named["W"], named["R"], named["B"], lengths]
        inputs += [*states, *[""] * (2 - len(states)), named["P"]]
        while not inputs[-1]:
            inputs.pop()
        outputs = [f"{name}_{what}" for what in ("Y", *(f"{s}_n" for s in self._letters))]
        self._nodes.append(
            helper.make_node(node.op_type, inputs, outputs, name=name, **node.attributes)
        )
        Y, *after = outputs
        if self._D == 1:
            y = self._add("Squeeze", [Y, self._constant(f"{name}_axes", [1])], f"{name}_y")
        else:
            turned = self._add("Transpose", [Y], f"{name}_turned", perm=[0, 2, 1, 3])
            shape = self._constant(f"{name}_shape", [0, 0, self._D * self._H])
            y = self._add("Reshape", [turned, shape], f"{name}_y")
        return [y, *after]

    def _output_y(self, y: str) -> None:
        """Add y in the user's layout."""
        self._outputs.append(self._value("y", self._sequence(self._D * self._H)))
        if self._stream is not None:
            axes = [0] if self._has_batch() else [0, 1]
            self._add("Squeeze", [y, self._constant("y_axes", axes)], "y")
        elif self._batch_first:
            self._add("Transpose", [y], "y", perm=[1, 0, 2])
        else:
            self._add("Identity", [y], "y")

    def _output_state(self, letter: str, names: list[str], count: int) -> None:
        """Add the state after the last step."""
        name = f"{letter}_n"
        self._outputs.append(self._value(name, self._state_shape(count)))
        if self._has_batch():
            self._add("Concat", names, name, axis=0)
        else:
            rows = self._add("Concat", names, f"{name}_rows", axis=0)
            self._add("Squeeze", [rows, self._constant(f"{name}_axes", [1])], name)
