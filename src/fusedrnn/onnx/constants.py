"""The constant values of a model: initializers, and what operators make of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

Array = np.ndarray[Any, Any]
# The operators by which exporters join weights. Their results are at most as large as their
# inputs together, but for Gather.
_OPERATORS = (
    "Cast",
    "Concat",
    "Constant",
    "DequantizeLinear",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)


class NotConstantError(Exception):
    """A value that is not a constant, or made by other operators; the message says which."""


class Scope:
    """The values of a graph and of the graphs around it.

    Attributes
    ----------
    opset: the version of ONNX's operators.
    most: the number of elements that a value may have: four for each byte of the model, whose
        constants are all that a value is made of, and may have 4 bits.
    """

    def __init__(
        self, graph: onnx.GraphProto, outer: Scope | None, opset: int, most: int
    ) -> None:
        self.opset, self.most = opset, most
        self._outer = outer
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._sparse = {tensor.values.name for tensor in graph.sparse_initializer}
        self._nodes = {name: node for node in graph.node for name in node.output if name}
        self._inputs = {value.name for value in graph.input}
        self._known: dict[str, Array] = {}

    def value(self, name: str) -> Array:
        """Return the constant value of a name.

        Raises
        ------
        NotConstantError: it is not constant. ValueError: it is broken.
        """
        if name not in self._known:
            self._known[name] = self._compute(name)
        return self._known[name]

    def _compute(self, name: str) -> Array:
        if name in self._initializers:
            return read(self._initializers[name])
        if name in self._nodes:
            return self._evaluate(self._nodes[name], name)
        if name in self._sparse:
            raise NotConstantError(f"{name} is a sparse initializer")
        if name in self._inputs:
            raise NotConstantError(f"{name} is an input of its graph")
        if self._outer is None:
            raise ValueError(f"nothing in the model computes {name}")
        return self._outer.value(name)

    def _evaluate(self, node: onnx.NodeProto, name: str) -> Array:
        is_onnx = node.domain in ("", "ai.onnx")
        if not is_onnx or node.op_type not in _OPERATORS:
            raise NotConstantError(f"{name} is computed by {node.op_type}")
        inputs = {n: self.value(n) for n in node.input if n}
        count = self._count(node, inputs)
        if count > self.most:
            raise ValueError(f"{name} would have {count} elements, more than {self.most}")
        try:
            results: Any = ReferenceEvaluator(self._model(node, name, inputs)).run(
                [name], inputs
            )
        except Exception as error:
            raise ValueError(f"{name} cannot be computed by {node.op_type}: {error}") from None
        return np.asarray(results[0])

    def _count(self, node: onnx.NodeProto, inputs: dict[str, Array]) -> int:
        """Return how many elements a node's results have at most."""
        sizes = [inputs[n].size for n in node.input if n]
        data = inputs.get(next(iter(node.input), ""))
        if node.op_type != "Gather" or data is None:
            return sum(sizes)
        axis = sum(a.i for a in node.attribute if a.name == "axis")
        along = data.shape[axis] if -data.ndim <= axis < data.ndim else 1
        return data.size // max(along, 1) * math.prod(sizes[1:])

    def _model(
        self, node: onnx.NodeProto, output: str, inputs: dict[str, Array]
    ) -> onnx.ModelProto:
        """Return a model of one node."""
        helper = onnx.helper
        infos = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), None)
            for n, a in inputs.items()
        ]
        graph = helper.make_graph([node], "constant", infos, [onnx.ValueInfoProto(name=output)])
        # The evaluator has DequantizeLinear from version 19 on, whose results are the same.
        opset = max(self.opset, 21) if node.op_type == "DequantizeLinear" else self.opset
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def read(tensor: onnx.TensorProto) -> Array:
    """Return a tensor's values.

    Raises
    ------
    ValueError: the tensor is broken, or its values are in another file.
    """
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ValueError(f"{tensor.name} is stored in another file: give the model as a path")
    try:
        return numpy_helper.to_array(tensor)
    except Exception as error:
        raise ValueError(f"{tensor.name} is broken: {error}") from None
