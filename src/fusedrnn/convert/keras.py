"""Weights of Keras 2 and 3: transposed matrices, gates i f c o and z r h."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..reference import Array, Parameters
from . import cells

_SAME_NAME = (
    "elu",
    "hard_sigmoid",
    "hard_tanh",
    "linear",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "softplus",
    "softsign",
    "tanh",
)
# Our activations by the names of Keras 3.
ACTIVATIONS: dict[str, Any] = {
    **{name: name for name in _SAME_NAME},
    "leaky_relu": ("leaky_relu", 0.2),
}
_OF_KERAS_2 = ACTIVATIONS | {"hard_sigmoid": ("hard_sigmoid", 0.2, 0.5)}
_GATES = {"lstm": "ifgo", "gru": "zrn", "rnn": "h"}
_OFFERED = (
    "reset_after",
    "activation",
    "recurrent_activation",
    "nonlinearity",
    "identity",
    "reverse",
)
_OPS = {"LSTM": "lstm", "GRU": "gru", "SimpleRNN": "rnn"}


def weights_of(
    op: str, kernel: Any, recurrent_kernel: Any, bias: Any, exchange: Callable[[Any], Any]
) -> tuple[Any, Any, Any, Any]:
    """Return weight_ih, weight_hh, bias_ih and bias_hh, None for a bias that does not exist.

    Keras has the transposed matrices. The gates of its GRU are in the order z r h where ours
    are r z n; those of an LSTM are in the same order. A single bias is our bias_ih.

    Parameters
    ----------
    exchange: exchanges the first and the second of three blocks along the last axis.
    """

    def read(a: Any) -> Any:
        return exchange(a) if op == "gru" else a

    W, R = read(kernel).T, read(recurrent_kernel).T
    if bias is None:
        return W, R, None, None
    bias = read(bias)
    return (W, R, *bias) if bias.ndim == 2 else (W, R, bias, None)


def exchanged(a: Array) -> Any:
    """Exchange the first and the second of three blocks along the last axis."""
    return cells.reorder(a, "zrn", "rzn", -1)


def from_keras(*layers: Any, cell: str | None = None, **options: Any) -> Any:
    """Return a layer with the weights of one or several layers of Keras.

    Parameters
    ----------
    layers: in the order in which they run, each an LSTM, GRU, SimpleRNN or Bidirectional of
        Keras 2 or 3, or the list that its ``get_weights()`` returns: kernel (I, gates·H),
        recurrent_kernel (H, gates·H), bias (gates·H,) or, of a GRU with reset_after, (2, 3·H);
        those of the forward and then of the backward layer for Bidirectional.
    cell: "lstm", "gru" or "rnn", for lists.
    options: arguments of our layer, as activation, for lists: a list does not tell. The layer
        takes x as Keras does, (B, T, I), unless batch_first=False.

    Returns
    -------
    An `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`. A GRU has reset_after as its bias has
    it; without a bias give reset_after=False where it applies.

    Raises
    ------
    TypeError, ValueError: an argument of a wrong type or shape; options that contradict the
        weights; a layer of Keras with an activation that we do not have, that goes backwards,
        or that joins its directions otherwise than merge_mode="concat".

    >>> import numpy as np
    >>> from fusedrnn import convert
    >>> rng = np.random.default_rng(0)
    >>> weights = [rng.normal(size=shape) for shape in ((3, 12), (4, 12), (2, 12))]
    >>> convert.from_keras(weights, cell="gru")
    GRU(3, 4, batch_first=True, dtype=float64)
    """
    if not layers:
        raise TypeError("layers must be at least one layer of Keras or list of its weights")
    found: list[list[Parameters]] = []
    of_layers: list[tuple[str, dict[str, Any]]] = []
    for n, layer in enumerate(layers):
        weights = layer
        if hasattr(layer, "get_weights"):
            of_layers.append(_arguments(n, layer))
            weights = layer.get_weights()
        elif not isinstance(layer, (list, tuple)):
            kind = type(layer).__name__
            raise TypeError(f"layer {n} must be one of Keras or a list of weights, got {kind}")
        if cell is None and not of_layers:
            raise TypeError('cell must be "lstm", "gru" or "rnn" for lists of weights')
        op = cells.check_op(of_layers[0][0] if cell is None else cell)
        if any(of_layer != (op, of_layers[0][1]) for of_layer in of_layers):
            raise ValueError(f"layers must have equal cells and options, layer {n} differs")
        found.append(_cells(op, n, len(layers), weights))
    implied = of_layers[0][1] if of_layers else {}
    biased = [c for of_layer in found for c in of_layer if c.bias_ih is not None]
    if op == "gru" and biased:
        rows = {c.bias_hh is not None for c in biased}
        if len(rows) > 1:
            raise ValueError("the biases of a GRU must all have shape (3*H,), or all (2, 3*H)")
        implied = cells.with_implied(implied, reset_after=rows.pop())
    options = {"batch_first": True, **cells.with_implied(options, **implied)}
    return cells.build(op, found, **options)


def to_keras(layer: Any) -> list[list[Array]]:
    """Return a layer's weights as lists for ``set_weights`` of layers of Keras.

    Parameters
    ----------
    layer: an `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`, or a module of torch.nn or
        `fusedrnn.torch`.

    Returns
    -------
    A list for each layer, with the weights of Bidirectional if there are two directions. The
    layers of Keras need the same units, activations and reset_after, and use_bias=False if
    the layer has no bias.

    Raises
    ------
    TypeError, ValueError: layer is none of these, or has an option that Keras lacks.

    >>> import fusedrnn as fr
    >>> from fusedrnn import convert
    >>> [a.shape for a in convert.to_keras(fr.GRU(3, 4))[0]]
    [(3, 12), (4, 12), (2, 12)]
    """
    op, found, layer = cells.cells_of(layer, "Keras", *_OFFERED)
    order = (cells.GATES[op], _GATES[op])
    two_biases = op == "gru" and layer.reset_after
    results: list[list[Array]] = []
    for directions in found:
        results.append([])
        for c in directions:
            results[-1] += [
                cells.reorder(a, *order).T.copy() for a in (c.weight_ih, c.weight_hh)
            ]
            if layer.bias:
                biases = [cells.reorder(b, *order) for b in (c.bias_ih, c.bias_hh)]
                results[-1].append(np.stack(biases) if two_biases else biases[0] + biases[1])
    return results


def _cells(op: str, n: int, count: int, weights: Sequence[Any]) -> list[Parameters]:
    """Return the cells of one layer, whose directions follow from the number of arrays."""
    if len(weights) not in (2, 3, 4, 6):
        raise ValueError(
            f"the weights of layer {n} must be [kernel, recurrent_kernel] or [kernel, "
            f"recurrent_kernel, bias], twice for Bidirectional, got {len(weights)}"
        )
    each = 2 if len(weights) in (2, 4) else 3
    return [
        _cell(op, cells.where(n, d, count), *weights[d * each : (d + 1) * each])
        for d in range(len(weights) // each)
    ]


def _cell(op: str, of: str, kernel: Any, recurrent: Any, bias: Any = None) -> Parameters:
    G = len(_GATES[op])
    axis = f"{G}*H" if G > 1 else "H"
    recurrent = cells.floats(f"recurrent_kernel{of}", recurrent, f"(H, {axis})", None, None)
    rows = G * len(recurrent)
    cells.floats(f"recurrent_kernel{of}", recurrent, f"(H, {axis})", len(recurrent), rows)
    kernel = cells.floats(f"kernel{of}", kernel, f"(I, {axis}) = (I, {rows})", None, rows)
    if bias is not None:
        bias = cells.array(f"bias{of}", bias)
        shape = (2, rows) if bias.ndim == 2 and op == "gru" else (rows,)
        axes = f"({axis},) = ({rows},)" + f" or (2, {rows})" * (op == "gru")
        bias = cells.floats(f"bias{of}", bias, axes, *shape)
    return Parameters(*weights_of(op, kernel, recurrent, bias, exchanged))


def _arguments(n: int, layer: Any) -> tuple[str, dict[str, Any]]:
    """Return the op of a layer of Keras, and its options as arguments of ours."""
    if not hasattr(layer, "forward_layer"):
        return _of_one(n, layer, False)
    if layer.merge_mode != "concat":
        raise ValueError(
            f'layer {n} must have merge_mode="concat", as our layers join directions, got '
            f"{layer.merge_mode!r}"
        )
    forward = _of_one(n, layer.forward_layer, False)
    if forward != _of_one(n, layer.backward_layer, True):
        raise ValueError(f"layer {n} must have equal options in both directions")
    return forward


def _of_one(n: int, layer: Any, is_backward: bool) -> tuple[str, dict[str, Any]]:
    """Return the op and the options of a layer of one direction."""
    kinds = [kind for kind in type(layer).__mro__ if kind.__name__ in _OPS]
    if not kinds:
        raise TypeError(
            f"layer {n} must be an LSTM, GRU, SimpleRNN or Bidirectional of Keras, got "
            f"{type(layer).__name__}"
        )
    if layer.go_backwards != is_backward:
        raise ValueError(
            f"layer {n} must not have go_backwards=True, whose y is in the order of the steps: "
            "give its get_weights() and reverse=True, for y[t] that belongs to x[t]"
        )
    package = sys.modules[kinds[-1].__module__.partition(".")[0]]
    is_keras_2 = str(getattr(package, "__version__", "3")).startswith(("1.", "2."))
    known = _OF_KERAS_2 if is_keras_2 else ACTIVATIONS
    found: dict[str, Any] = {}
    for name in ("activation", "recurrent_activation"):
        if hasattr(layer, name):
            value = getattr(getattr(layer, name), "__name__", repr(getattr(layer, name)))
            if value not in known:
                raise ValueError(f"layer {n} must have an {name} that we have, got {value!r}")
            found[name] = known[value]
    if hasattr(layer, "reset_after"):
        found["reset_after"] = bool(layer.reset_after)
    return _OPS[kinds[-1].__name__], found
