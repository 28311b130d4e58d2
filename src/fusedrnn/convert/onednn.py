"""Weights of oneDNN in its plain layouts: ldigo, ldgo, ldio; gates i f c o and u r o."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..reference import Array, Parameters
from . import cells

_GATES = {"lstm": "ifgo", "gru": "zrn", "lbr_gru": "zrn", "vanilla_rnn": "h"}
_OPS = {"lstm": "lstm", "gru": "gru", "lbr_gru": "gru", "vanilla_rnn": "rnn"}
_TENSORS = ("weights_layer", "weights_iter", "bias", "weights_peephole", "weights_projection")


def from_onednn(kind: str, *primitives: Mapping[str, Any], **options: Any) -> Any:
    """Return a layer with the weights of one or several RNN primitives of oneDNN.

    Parameters
    ----------
    kind: "lstm", "gru", "lbr_gru" (whose reset gate is applied after the matmul) or
        "vanilla_rnn".
    primitives: in the order in which they run, each a mapping from names to arrays in the plain
        layouts, L layers, D directions, G gates: weights_layer (L, D, I, G, H), weights_iter
        (L, D, H, G, H), bias (L, D, G, H), of lbr_gru (L, D, 4, H), weights_peephole
        (L, D, 3, H), weights_projection (L, D, H, R).
    options: arguments of our layer: reverse=True for unidirectional_right2left,
        nonlinearity="relu" for eltwise_relu. With two directions y is that of
        bidirectional_concat.

    Returns
    -------
    An `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`.

    Raises
    ------
    TypeError, ValueError: an unknown kind or name, or arrays of a wrong type or shape.

    >>> import numpy as np
    >>> from fusedrnn import convert
    >>> shapes = {"weights_layer": (1, 1, 3, 4, 5), "weights_iter": (1, 1, 5, 4, 5)}
    >>> convert.from_onednn("lstm", {name: np.ones(shape) for name, shape in shapes.items()})
    LSTM(3, 5, bias=False, dtype=float64)
    """
    if kind not in _OPS:
        raise ValueError(f"kind must be one of {', '.join(_OPS)}, got {kind!r}")
    if not primitives:
        raise TypeError("primitives must be the weights of at least one primitive")
    found = [of_layer for n, p in enumerate(primitives) for of_layer in _layers(kind, n, p)]
    if _OPS[kind] == "gru":
        options = cells.with_implied(options, reset_after=kind == "lbr_gru")
    return cells.build(_OPS[kind], found, **options)


def to_onednn(layer: Any) -> list[dict[str, Array]]:
    """Return a layer's weights in oneDNN's plain layouts, a primitive for each layer.

    Parameters
    ----------
    layer: an `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`, or a module of torch.nn or
        `fusedrnn.torch`.

    Returns
    -------
    Dicts of arrays by the names and with the shapes that `from_onednn` describes, L = 1.

    Raises
    ------
    TypeError, ValueError: layer is none of these, or has an option that oneDNN lacks.

    >>> import fusedrnn as fr
    >>> from fusedrnn import convert
    >>> {name: a.shape for name, a in convert.to_onednn(fr.GRU(3, 4))[0].items()}
    {'weights_layer': (1, 1, 3, 3, 4), 'weights_iter': (1, 1, 4, 3, 4), 'bias': (1, 1, 4, 4)}
    """
    offered = ("peephole", "proj_size", "reset_after", "nonlinearity", "reverse")
    op, found, layer = cells.cells_of(layer, "oneDNN", *offered)
    kind = {"lstm": "lstm", "rnn": "vanilla_rnn"}.get(op) or (
        "lbr_gru" if layer.reset_after else "gru"
    )
    return [_tensors(kind, of_layer) for of_layer in found]


def _layers(kind: str, n: int, given: Any) -> list[list[Parameters]]:
    """Return the cells of a primitive's layers and directions."""
    of, gates = f" of primitive {n}", _GATES[kind]
    if not isinstance(given, Mapping) or not {*_TENSORS[:2]} <= set(given) <= {*_TENSORS}:
        got = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"the weights{of} must be a dict of {', '.join(_TENSORS)}, got {got}")
    G, order = len(gates), (gates, cells.GATES[_OPS[kind]])
    W = cells.floats(
        f"weights_layer{of}",
        given["weights_layer"],
        f"(L, D, I, {G}, H)",
        None,
        None,
        None,
        G,
        None,
    )
    L, D, _, _, H = W.shape
    if D > 2:
        raise ValueError(f"weights_layer{of} must have one or two directions, got {D}")
    projection = given.get("weights_projection")
    if projection is not None:
        axes = f"(L, D, H, R) = ({L}, {D}, {H}, R)"
        projection = cells.floats(f"weights_projection{of}", projection, axes, L, D, H, None)
    width = H if projection is None else projection.shape[3]
    shape = (L, D, width, G, H)
    R = cells.floats(f"weights_iter{of}", given["weights_iter"], str(shape), *shape)
    bias, peephole = given.get("bias"), given.get("weights_peephole")
    if bias is not None:
        of_bias = (L, D, G + (kind == "lbr_gru"), H)
        bias = cells.floats(f"bias{of}", bias, str(of_bias), *of_bias)
    if peephole is not None:
        peephole = cells.floats(
            f"weights_peephole{of}", peephole, str((L, D, 3, H)), L, D, 3, H
        )

    def cell(at: tuple[int, int]) -> Parameters:
        def matrix(a: Array) -> Any:
            return cells.reorder(a.reshape(len(a), -1), *order, -1).T

        b_ih = b_hh = None
        if bias is not None:
            b_ih = cells.reorder(bias[at][:G].ravel(), *order)
        if bias is not None and kind == "lbr_gru":  # the fourth block is added to R_n h'
            b_hh = np.zeros_like(b_ih)
            b_hh[2 * H :] = bias[at][G]
        return Parameters(
            matrix(W[at]),
            matrix(R[at]),
            b_ih,
            b_hh,
            None if projection is None else projection[at].T,
            None if peephole is None else peephole[at].ravel(),
        )

    return [[cell((layer, d)) for d in range(D)] for layer in range(L)]


def _tensors(kind: str, directions: list[Parameters]) -> dict[str, Array]:
    gates, order = _GATES[kind], (cells.GATES[_OPS[kind]], _GATES[kind])
    G = len(gates)

    def stacked(arrays: list[Array]) -> Array:
        return np.stack(arrays)[None].copy()

    def matrix(a: Array) -> Any:
        return cells.reorder(a, *order).T.reshape(a.shape[1], G, -1)

    found = {
        "weights_layer": stacked([matrix(c.weight_ih) for c in directions]),
        "weights_iter": stacked([matrix(c.weight_hh) for c in directions]),
    }
    if directions[0].bias_ih is not None:
        biases = []
        for c in directions:
            H = len(c.bias_ih) // G
            inner = c.bias_hh[2 * H :] if kind == "lbr_gru" else None
            b = c.bias_ih + c.bias_hh
            if inner is not None:
                b[2 * H :] = c.bias_ih[2 * H :]
            blocks = cells.reorder(b, *order).reshape(G, H)
            biases.append(blocks if inner is None else np.concatenate([blocks, inner[None]]))
        found["bias"] = stacked(biases)
    if directions[0].weight_ch is not None:
        found["weights_peephole"] = stacked([c.weight_ch.reshape(3, -1) for c in directions])
    if directions[0].weight_hr is not None:
        found["weights_projection"] = stacked([c.weight_hr.T for c in directions])
    return found
