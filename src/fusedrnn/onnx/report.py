"""What a file of ONNX has for us, as text: the command `fusedrnn convert`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from ..config import get_isa
from ..files import UserError
from .reading import layers, load, opset_of


def report(path: Path) -> str:
    """Return a model's recurrent nodes, and which of them our kernels can run.

    Raises
    ------
    UserError: the file cannot be read, is not a model of ONNX, or has no recurrent node.
    """
    try:
        model = load(path)
        found = layers(model)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: {why}") from None
    count = sum(1 for _ in _all_nodes(model.graph))
    recurrent = len(found.layers) + len(found.refused)
    lines = [
        f"{path.name}: {count} nodes, operators of version {opset_of(model)}",
        f"{len(found.layers)} of {recurrent} recurrent nodes run on the kernels of fusedrnn "
        f"({get_isa()})",
    ]
    for name, layer in found.layers.items():
        size = sum(a.nbytes for a in layer.state_dict().values()) / 1e6
        lines += ["", name, f"  runs as {layer!r}, {size:.2f} MB of weights"]
        if name in found.states:
            lines += ["  with an initial state that is a constant other than 0"]
    for name, why in found.refused.items():
        lines += ["", name, f"  does not run here: {why}"]
    if found.layers:
        lines += [
            "",
            "In Python:",
            f"  layers = fusedrnn.onnx.layers({str(path)!r}).layers",
        ]
    return "\n".join(lines)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Iterate over the nodes of a graph and of its bodies."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _all_nodes(body)
