"""The command `fusedrnn convert`: a text about the recurrent nodes of a file of ONNX."""

from __future__ import annotations

from pathlib import Path

from ..config import get_isa
from ..files import UserError
from .reading import layers, load, nodes_of, opset_of


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
    count = sum(1 for _ in nodes_of(model.graph))
    recurrent = len(found.layers) + len(found.refused)
    lines = [
        f"{path.name}: {count} nodes, operators of version {opset_of(model)}",
        f"{len(found.layers)} of {recurrent} recurrent nodes can be layers and run on the "
        f"kernels of fusedrnn ({get_isa()})",
    ]
    for name, layer in found.layers.items():
        size = sum(a.nbytes for a in layer.state_dict().values()) / 1e6
        lines += ["", name, f"  runs as {layer!r}, {size:.2f} MB of weights"]
        if name in found.states:
            lines += ["  with an initial state that is a constant other than 0"]
    for name, why in found.refused.items():
        lines += ["", name, f"  cannot be a layer: {why}"]
    if found.layers:
        lines += [
            "",
            "In Python:",
            f"  layers = fusedrnn.onnx.layers({str(path)!r}).layers",
        ]
    return "\n".join(lines)
