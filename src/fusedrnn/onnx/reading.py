"""The recurrent nodes of a model as layers of ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import inliner

from ..convert import from_onnx
from .constants import NotConstantError, Scope

_OPERATORS = ("LSTM", "GRU", "RNN")
_OLDEST, _FIRST_OF_LAYOUT = 7, 14  # in version 7 the operators got the inputs that they have
_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
_ATTRIBUTES = {
    "activation_alpha",
    "activation_beta",
    "activations",
    "clip",
    "direction",
    "hidden_size",
    "input_forget",
    "layout",
    "linear_before_reset",
}
_ONLY_OF = {"input_forget": "LSTM", "linear_before_reset": "GRU"}
# Recurrent operators of onnxruntime's own, by their name.
_OF_OTHERS = ("AttnLSTM", "DynamicQuantizeLSTM")


class Found(NamedTuple):
    """The result of `layers`; it prints as text.

    Attributes
    ----------
    layers: the layers, by the names of their nodes.
    states: the initial states of nodes for which they are constant and not 0, in the form that
        the layer takes, by the same names.
    refused: the reasons why other recurrent nodes cannot be layers, by their names.
    """

    layers: dict[str, Any]
    states: dict[str, Any]
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name}: {layer}" for name, layer in self.layers.items()]
        return "\n".join(
            lines + [f"{name}: refused, {why}" for name, why in self.refused.items()]
        )


def layers(model: str | os.PathLike[str] | bytes | onnx.ModelProto) -> Found:
    """Return every LSTM, GRU and RNN node of a model of ONNX as a layer.

    Nodes within the bodies of If, Loop and Scan and within functions are found, too. Weights
    may be initializers, constants, or joined from these by operators like Concat. A node
    becomes one layer; see `fusedrnn.convert.from_onnx` for its attributes. A layer's y is
    (T, B, D*H), the node's Y is (T, D, B, H); with layout=1 they are (B, T, D*H) and
    (B, T, D, H).

    Parameters
    ----------
    model: the path of a file, its bytes, or the model itself, of operators' version 7 or newer.

    Returns
    -------
    The layers by the names of their nodes, or of their first output if they have none; behind
    the name of the node around them, for bodies. Print it.

    Raises
    ------
    FileNotFoundError: there is no such file. TypeError: model is none of these. ValueError: it
        is not a model of ONNX, has an unknown version, or has no recurrent node.

    >>> import fusedrnn as fr, fusedrnn.onnx
    >>> fusedrnn.onnx.export(fr.GRU(3, 4), "gru.onnx")
    >>> print(fusedrnn.onnx.layers("gru.onnx"))
    gru_0: GRU(3, 4)
    """
    found = Found({}, {}, {})
    proto = load(model)
    try:
        most = 4 * proto.ByteSize()
    except EncodeError:  # of more than 2 GB, with weights in other files
        most = 2**32
    scope = Scope(proto.graph, None, opset_of(proto), most)
    for name, node, inner in _recurrent(proto.graph, scope, ""):
        name = _unique(name, found)
        try:
            found.layers[name], state = _layer(node, inner)
        except NotConstantError as why:
            found.refused[name] = f"its weights are not constants: {why}"
        except (ValueError, TypeError) as why:
            found.refused[name] = str(why)
        except RecursionError:
            found.refused[name] = "its weights are computed by too many operators"
        else:
            if state is not None:
                found.states[name] = state
    for function in proto.functions:  # that could not be inlined
        if any(is_recurrent(node) for node in nodes_of(function)):
            name = _unique(_text(function.name), found)
            found.refused[name] = "it is in a function with another version of operators"
    if not found.layers and not found.refused:
        raise ValueError("model must have an LSTM, GRU or RNN node, got none")
    return found


def load(model: Any) -> onnx.ModelProto:
    """Return a model of a path, bytes or a model, whose functions are inlined."""
    try:
        if isinstance(model, (str, os.PathLike)):
            if Path(model).is_dir():
                raise ValueError(f"model must be a file, got the folder {os.fspath(model)}")
            proto = onnx.load(model, format="protobuf")
        elif isinstance(model, (bytes, bytearray, memoryview)):
            proto = onnx.load_model_from_string(bytes(model))
        elif isinstance(model, onnx.ModelProto):
            proto = model
        else:
            raise TypeError(
                f"model must be a path, bytes or an onnx.ModelProto, got {type(model).__name__}"
            )
    except DecodeError as error:
        raise ValueError(f"model must be a model of ONNX: {error}") from None
    except onnx.checker.ValidationError as error:
        raise ValueError(f"model must have its external data beside it: {error}") from None
    if not proto.HasField("graph"):
        raise ValueError("model must be a model of ONNX, got one without a graph")
    if proto.functions:
        try:
            proto = inliner.inline_local_functions(proto)
        except Exception as error:
            raise ValueError(
                f"model must have functions that can be inlined: {error}"
            ) from None
    return proto


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's operators."""
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if len(versions) != 1 or not _OLDEST <= versions[0] <= newest:
        got = ", ".join(map(str, versions)) or "none"
        raise ValueError(
            f"model must have operators of ONNX of one version from {_OLDEST} to {newest}, got "
            f"{got}"
        )
    return int(versions[0])


def nodes_of(graph: Any) -> Iterator[onnx.NodeProto]:
    """Iterate over the nodes of a graph or function and of its bodies."""
    for node in graph.node:
        yield node
        for _, body in bodies_of(node):
            yield from nodes_of(body)


def bodies_of(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """Iterate over the graphs within a node, as If has them, with the attributes' names."""
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield _text(attribute.name), body


def is_recurrent(node: onnx.NodeProto) -> bool:
    """Return whether a node is a recurrent one of ONNX or of onnxruntime."""
    is_ours = node.op_type in _OPERATORS and node.domain in ("", "ai.onnx")
    return is_ours or node.op_type in _OF_OTHERS


def _recurrent(
    graph: onnx.GraphProto, scope: Scope, prefix: str
) -> Iterator[tuple[str, onnx.NodeProto, Scope]]:
    """Iterate over the recurrent nodes of a graph and its bodies, with their names."""
    for at, node in enumerate(graph.node):
        name = prefix + _text(node.name or next(iter(node.output), "") or f"node {at}")
        if is_recurrent(node):
            yield name, node, scope
        for attribute, body in bodies_of(node):
            inner = Scope(body, scope, scope.opset, scope.most)
            yield from _recurrent(body, inner, f"{name}/{attribute}/")


def _layer(node: onnx.NodeProto, scope: Scope) -> tuple[Any, Any]:
    """Return the layer of a node, and its initial state, None for one that varies or is 0."""
    if node.op_type not in _OPERATORS:
        raise ValueError(f"{node.op_type} of {node.domain} is not an operator of ONNX")
    attributes = _attributes(node, scope.opset)
    given = {n: name for n, name in zip(_INPUTS, node.input, strict=False) if name}
    if "W" not in given or "R" not in given:
        raise ValueError("it must have W and R")
    weights: dict[str, Any] = {n: scope.value(given[n]) for n in "WRBP" if n in given}
    layer = from_onnx(node.op_type, **weights, **attributes)
    names = ("initial_h", "initial_c")[: len(layer._cell.states)]
    try:
        states = [scope.value(given[name]) if name in given else None for name in names]
    except NotConstantError:
        return layer, None
    known = [a for a in states if a is not None]
    if not any(a.any() for a in known):
        return layer, None
    whole = [np.zeros_like(known[0]) if a is None else a for a in states]
    if attributes.get("layout"):
        whole = [a.swapaxes(0, 1) for a in whole]
    return layer, tuple(whole) if len(whole) > 1 else whole[0]


def _attributes(node: onnx.NodeProto, opset: int) -> dict[str, Any]:
    """Return a node's attributes as arguments of `from_onnx`."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        name = _text(attribute.name)
        is_known = name in _ATTRIBUTES and _ONLY_OF.get(name, node.op_type) == node.op_type
        if not is_known or (name == "layout" and opset < _FIRST_OF_LAYOUT):
            raise ValueError(f"{node.op_type} of version {opset} has no attribute {name}")
        try:
            value = onnx.helper.get_attribute_value(attribute)
        except ValueError as error:
            raise ValueError(f"its attribute {name} is broken: {error}") from None
        is_list = isinstance(value, (list, tuple))
        found[name] = list(map(_text, value)) if is_list else _text(value)
    return found


def _text(value: Any) -> Any:
    """Return bytes as text; protobuf returns bytes also for a name that is not UTF-8."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _unique(name: str, found: Found) -> str:
    """Return a name that no other node has."""
    count, unique = 2, name
    while unique in found.layers or unique in found.refused:
        count, unique = count + 1, f"{name} ({count})"
    return unique
