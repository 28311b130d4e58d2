"""The parts that all conversions share: gates, biases, checks of arrays, layers and cells.

A cell is here one layer in one direction, as `fusedrnn.reference.Parameters`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..layers import GRU, LSTM, RNN, _Layer
from ..parameters import ARGUMENTS, on_host
from ..reference import Array, Parameters
from ..reference.narrow import widened

Layer = LSTM | GRU | RNN
LAYERS: dict[str, Any] = {"lstm": LSTM, "gru": GRU, "rnn": RNN}
GATES = {"lstm": "ifgo", "gru": "rzn", "rnn": "h"}
_OP_OF_GATES = {4: "lstm", 3: "gru", 1: "rnn"}
# These change nothing in inference, or only the layout of x.
_HARMLESS = ("bias", "batch_first", "dropout", "recurrent_dropout", "weight_dropout")
_STRUCTURE = ("num_layers", "bidirectional")
_FROM_WEIGHTS = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "bidirectional",
    "proj_size",
    "peephole",
    "layer_norm",
)


# Arrays


def floats(name: str, value: Any, axes: str, *shape: int | None) -> Array:
    """Return an array of float32 or float64 of this shape, None for any length.

    `axes` describes the shape in the error message.
    """
    if value is None:
        raise TypeError(f"{name} must be an array of shape {axes}, got None")
    a = array(name, value)
    if a.dtype == np.float16:
        a = a.astype(np.float32)
    if a.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must have a floating-point dtype, got {a.dtype}")
    fits = a.ndim == len(shape) and all(
        length > 0 if expected is None else length == expected
        for length, expected in zip(a.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {axes}, got {a.shape}")
    return a


def array(name: str, value: Any) -> Array:
    """Return an array or tensor of any library as an array of NumPy; bfloat16 as float32."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if "bfloat16" in str(value.dtype) else value
        elif "mlx.core.bfloat16" in str(getattr(value, "dtype", "")):
            value = value.astype(sys.modules["mlx.core"].float32)
        a: Array = widened(np.asarray(value))
    except Exception as error:
        raise TypeError(f"{name} must be an array that NumPy can read: {error}") from None
    return a


def reorder(a: Any, theirs: str, ours: str, axis: int = 0) -> Any:
    """Return the blocks of the first axis, or of the last one (-1), in our order.

    `theirs` has a letter for each block; `ours` may have fewer letters. a may be a tensor.
    """
    order = [theirs.index(gate) for gate in ours]
    if axis == 0:
        return a.reshape(len(theirs), -1, *a.shape[1:])[order].reshape(-1, *a.shape[1:])
    *lead, columns = a.shape
    blocks = a.reshape(*lead, len(theirs), columns // len(theirs))
    return blocks[..., order, :].reshape(*lead, -1)


def op_of(name: str, rows: int, H: int) -> str:
    """Return the op whose weights have so many rows for H units."""
    op = _OP_OF_GATES.get(rows // H) if rows % H == 0 else None
    if op is None:
        raise ValueError(
            f"{name} must have 4*H (LSTM), 3*H (GRU) or H (RNN) elements along the gates with "
            f"H = {H}, got {rows}"
        )
    return op


def check_op(op: str) -> str:
    """Return the name of an op, in any case."""
    known = str(op).lower()
    if known not in LAYERS:
        raise ValueError(f'cell must be "lstm", "gru" or "rnn", got {op!r}')
    return known


# Layers from cells


def pair(cell: Any) -> tuple[Any, ...]:
    """Return the directions of one layer, which is one cell or a pair of them."""
    if not isinstance(cell, tuple):
        return (cell,)
    if len(cell) != 2:
        raise ValueError(f"a layer must be one cell or a pair of them, got {len(cell)}")
    return cell


def read(
    layers: Sequence[Any],
    cell: Callable[[str, Any], tuple[str, Parameters]],
    directions: Callable[[Any], tuple[Any, ...]] = pair,
) -> tuple[str, list[list[Parameters]]]:
    """Return the op and the cells of several layers.

    ``cell(words that tell it in an error message, weights)`` returns the op and the parameters
    of one cell, and ``directions(layer)`` its cells.
    """
    if not layers:
        raise TypeError("layers must be the weights of at least one layer")
    found = [
        [cell(where(n, d, len(layers)), weights) for d, weights in enumerate(directions(layer))]
        for n, layer in enumerate(layers)
    ]
    ops = {op for of_layer in found for op, _ in of_layer}
    if len(ops) > 1:
        raise ValueError(f"layers must be of one kind of cell, got {', '.join(sorted(ops))}")
    return ops.pop(), [[parameters for _, parameters in of_layer] for of_layer in found]


def where(layer: int, direction: int, count: int) -> str:
    """Return the words that tell a cell in an error message."""
    way = ("", " backward")[direction]
    return f" of layer {layer}{way}" if count > 1 or direction else ""


def build(op: str, cells: Sequence[Sequence[Parameters]], **options: Any) -> Any:
    """Return a layer of ours with the parameters of each layer and direction.

    A bias that only some of the cells have is 0 in the others.
    """
    every = [cell for directions in cells for cell in directions]
    directions = {len(of_layer) for of_layer in cells}
    if len(directions) != 1:
        raise ValueError("every layer must have the same number of directions")
    clash = [name for name in _FROM_WEIGHTS if name in options]
    if clash:
        raise TypeError(f"{clash[0]} follows from the weights and must be left out")
    first = every[0]
    for kind in Parameters._fields[4:]:
        if len({getattr(cell, kind) is None for cell in every}) > 1:
            raise ValueError(f"{kind} must be in every layer and direction, or in none")
    H = len(first.weight_hh) // len(gates_of(op, options))
    has_bias = any(cell.bias_ih is not None or cell.bias_hh is not None for cell in every)
    given: dict[str, Any] = {"bias": has_bias, "bidirectional": directions == {2}}
    if first.weight_hr is not None:
        given["proj_size"] = len(first.weight_hr)
    if first.weight_ch is not None:
        given["peephole"] = True
    if first.gamma_ih is not None:
        given["layer_norm"] = True
    dtype = np.result_type(*(a for cell in every for a in cell if a is not None))
    options = {"dtype": dtype, **options}
    layer = LAYERS[op](first.weight_ih.shape[1], H, len(cells), **given, **options)
    state: dict[str, Array] = {}
    for n, of_layer in enumerate(cells):
        for d, cell in enumerate(of_layer):
            parameters = cell._asdict()
            for name in ("bias_ih", "bias_hh") if has_bias else ():
                if parameters[name] is None:
                    parameters[name] = np.zeros(len(cell.weight_hh), dtype)
            end = f"l{n}" + "_reverse" * d
            state |= {f"{k}_{end}": a for k, a in parameters.items() if a is not None}
    try:
        layer.load_state_dict(state)
    except KeyError as error:
        raise ValueError(f"the weights must be those of a {layer!r}: {error.args[0]}") from None
    return layer


def with_implied(options: Mapping[str, Any], **implied: Any) -> dict[str, Any]:
    """Return options with those that follow from weights or attributes."""
    for name, value in implied.items():
        if name in options and options[name] != value:
            raise ValueError(
                f"{name} must be {value!r}, which follows from the weights or attributes, got "
                f"{options[name]!r}"
            )
    return {**options, **implied}


def gates_of(op: str, options: Mapping[str, Any]) -> str:
    """Return a letter for each block of rows of a weight."""
    return "igo" if options.get("coupled_gates") else GATES[op]


# Cells of layers


def cells_of(layer: Any, to: str, *offered: str) -> tuple[str, list[list[Parameters]], Layer]:
    """Return the op, the parameters of each layer and direction, and the layer of ours.

    Parameters
    ----------
    layer: one of ours, of `fusedrnn.torch` or of torch.nn.
    to: the name of the other library, for error messages.
    offered: the options that it has, beside layers and directions, and "identity" if it has
        that nonlinearity, too.
    """
    if not isinstance(layer, _Layer):
        from . import torch  # which imports this module

        layer = torch.read("layer", layer)
    if layer.weights:
        raise ValueError(
            f"layer must have weights of its dtype, got {layer.weights} weights: convert the "
            "layer that you quantised"
        )
    check_options(layer, to, *offered)
    arrays = {name: widened(on_host(p)) for name, p in layer.state_dict().items()}
    cells = []
    for n in range(layer.num_layers):
        ends = (f"_l{n}", f"_l{n}_reverse")[: 1 + layer.bidirectional]
        cells.append(
            [Parameters(**{k: arrays.get(k + end) for k in Parameters._fields}) for end in ends]
        )
    op = layer._cell.op
    return op, cells, layer


def check_options(layer: Any, to: str, *offered: str) -> None:
    """Check that a layer or module has no option that another library lacks."""
    for name, default in ARGUMENTS.items():
        value = getattr(layer, name, default)
        is_offered = name in (*_HARMLESS, *_STRUCTURE, *offered)
        if value == "identity" and name == "nonlinearity":  # many libraries have relu alone
            is_offered = "identity" in offered
        if value != default and not is_offered:
            raise ValueError(f"layer must not have {name}={value!r}, which {to} lacks")


def biases_of(cell: Parameters) -> tuple[Array, Array]:
    """Return both biases of a cell, zeros for one that it does not have."""
    zeros = np.zeros(len(cell.weight_hh), cell.weight_hh.dtype)
    b_ih, b_hh = (zeros if b is None else b for b in (cell.bias_ih, cell.bias_hh))
    return b_ih, b_hh


def unpaired(directions: list[Any]) -> Any:
    """Return the one item of a list, or a tuple of both."""
    return tuple(directions) if len(directions) == 2 else directions[0]
