"""Weights of Haste: transposed matrices, gates i g f o and z r n."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..reference import Parameters
from . import cells

_GATES = {"lstm": "igfo", "gru": "zrn"}


def from_haste(*layers: Any, **options: Any) -> Any:
    """Return a layer with the parameters of one or several layers of Haste.

    Parameters
    ----------
    layers: in the order in which they run, each a mapping from the names of Haste's parameters
        to arrays, as ``dict(module.named_parameters())``: kernel (I, gates·H),
        recurrent_kernel (H, gates·H), bias (gates·H,), a GRU's recurrent_bias (3·H,), and
        gamma (2, 4·H), gamma_h (H,), beta_h (H,) of a LayerNormLSTM; or a tuple of two for
        both directions.
    options: arguments of our layer, as zoneout: ``(p, 0.0)`` for Haste's zoneout=p of an LSTM,
        p of a GRU.

    Returns
    -------
    An `fusedrnn.LSTM` or `fusedrnn.GRU`. Haste's LayerNormGRU normalises all gates together,
    which our GRU does not, so that it is refused.

    Raises
    ------
    TypeError, ValueError: parameters of another layer, or of a wrong type or shape.

    >>> import numpy as np
    >>> from fusedrnn import convert
    >>> shapes = {"kernel": (3, 16), "recurrent_kernel": (4, 16), "bias": (16,)}
    >>> convert.from_haste({name: np.ones(shape) for name, shape in shapes.items()})
    LSTM(3, 4, dtype=float64)
    """
    op, found = cells.read(layers, _cell)
    return cells.build(op, found, **options)


def to_haste(layer: Any) -> list[Any]:
    """Return a layer's weights by the names of Haste's parameters.

    Parameters
    ----------
    layer: an `fusedrnn.LSTM` or `fusedrnn.GRU`, or a module of torch.nn or `fusedrnn.torch`.

    Returns
    -------
    A dict of arrays for each layer; with two directions a tuple of two dicts.

    Raises
    ------
    TypeError, ValueError: layer is none of these, or has an option that Haste lacks.

    >>> import fusedrnn as fr
    >>> from fusedrnn import convert
    >>> sorted(convert.to_haste(fr.GRU(3, 4))[0])
    ['bias', 'kernel', 'recurrent_bias', 'recurrent_kernel']
    """
    op, found, layer = cells.cells_of(layer, "Haste", "zoneout", "layer_norm")
    if op == "rnn" or (op == "gru" and layer.layer_norm):
        raise ValueError(f"layer must be one that Haste has, got {layer!r}")
    return [cells.unpaired([_parameters(op, cell) for cell in of_layer]) for of_layer in found]


def _cell(of: str, given: Any) -> tuple[str, Parameters]:
    """Return the op and the parameters of one cell."""
    if not isinstance(given, Mapping) or not {"kernel", "recurrent_kernel", "bias"} <= set(
        given
    ):
        names = (
            ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        )
        raise ValueError(
            f"the parameters{of} must be a dict with kernel, recurrent_kernel and bias, got "
            f"{names}"
        )
    recurrent = cells.floats(
        f"recurrent_kernel{of}", given["recurrent_kernel"], "(H, gates*H)", None, None
    )
    H, rows = recurrent.shape
    op = cells.op_of(f"recurrent_kernel{of}", rows, H)
    if op == "rnn" or ("gamma" in given and op == "gru"):
        kind = "a LayerNormGRU, whose norms we do not have" if op == "gru" else "another one"
        raise ValueError(f"the parameters{of} must be those of an LSTM or GRU, got {kind}")
    order = (_GATES[op], cells.GATES[op])
    kernel = cells.floats(f"kernel{of}", given["kernel"], f"(I, {rows})", None, rows)

    def vector(name: str, length: int) -> Any:
        return cells.floats(f"{name}{of}", given.get(name), f"({length},)", length)

    parameters = {
        "weight_ih": cells.reorder(kernel, *order, -1).T,
        "weight_hh": cells.reorder(recurrent, *order, -1).T,
        "bias_ih": cells.reorder(vector("bias", rows), *order),
    }
    if op == "gru":
        parameters["bias_hh"] = cells.reorder(vector("recurrent_bias", rows), *order)
    if "gamma" in given:
        gamma = cells.floats(f"gamma{of}", given["gamma"], f"(2, {rows})", 2, rows)
        parameters["gamma_ih"], parameters["gamma_hh"] = (
            cells.reorder(a, *order) for a in gamma
        )
        parameters["gamma_c"], parameters["beta_c"] = vector("gamma_h", H), vector("beta_h", H)
    return op, Parameters(**parameters)


def _parameters(op: str, cell: Parameters) -> dict[str, Any]:
    order = (cells.GATES[op], _GATES[op])
    b_ih, b_hh = cells.biases_of(cell)
    found = {
        "kernel": cells.reorder(cell.weight_ih, *order).T.copy(),
        "recurrent_kernel": cells.reorder(cell.weight_hh, *order).T.copy(),
    }
    if op == "gru":
        found["bias"] = cells.reorder(b_ih, *order)
        found["recurrent_bias"] = cells.reorder(b_hh, *order)
    else:
        found["bias"] = cells.reorder(b_ih + b_hh, *order)
    if cell.gamma_ih is not None:
        found["gamma"] = np.stack(
            [cells.reorder(a, *order) for a in (cell.gamma_ih, cell.gamma_hh)]
        )
        found["gamma_h"], found["beta_h"] = cell.gamma_c.copy(), cell.beta_c.copy()
    return found
