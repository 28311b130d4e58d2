"""Weights of PyTorch, whose names, shapes and order of gates are ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..parameters import ARGUMENTS, on_host
from ..reference import Array, Parameters
from ..reference.narrow import widened
from . import cells

_KINDS = "|".join(Parameters._fields)
_NAME = re.compile(rf"({_KINDS})(?:_l(\d+)(_reverse)?)?")
_ARGUMENTS = ("batch_first", "dropout", "nonlinearity")
_MODULES = (
    "torch.nn.modules.rnn",
    "fusedrnn.torch.modules",
    "fusedrnn.torch.narrow",
    "fusedrnn.torch.steps",
)
_OF_TRAINING = ("forget_bias", "orthogonal", "precision")  # options that change no result


def from_torch(
    source: Any, *, prefix: str = "", cell: str | None = None, **options: Any
) -> Any:
    """Return a layer with the weights of a PyTorch module or of a state_dict.

    Parameters
    ----------
    source: an nn.LSTM, nn.GRU, nn.RNN, one of their cells, or one of `fusedrnn.torch`, whose
        arguments the layer gets, too; or a mapping from names to tensors or arrays, as a
        state_dict.
    prefix: the beginning of the names of a state_dict, as "encoder.lstm."; names that begin
        otherwise are ignored.
    cell: "lstm", "gru" or "rnn" of a state_dict; None takes it from the shapes.
    options: further arguments of the layer, as batch_first, or nonlinearity="relu".

    Returns
    -------
    An `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`.

    Raises
    ------
    TypeError, ValueError: source is none of these, or a subclass or a module with forward
        hooks, which may compute something else; weights of a wrong shape, or names that do not
        belong to a layer.

    >>> import torch
    >>> from fusedrnn import convert
    >>> convert.from_torch(torch.nn.LSTM(3, 4, num_layers=2, batch_first=True))
    LSTM(3, 4, num_layers=2, batch_first=True)
    """
    return read("source", source, prefix, cell, **options)


def read(
    name: str, source: Any, prefix: str = "", cell: str | None = None, **options: Any
) -> Any:
    """Return a layer as `from_torch` does; `name` is the argument's in error messages."""
    if isinstance(source, Mapping):
        keys = {str(key): value for key, value in source.items()}
        named = {k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)}
        if not named:
            raise ValueError(f"{name} must have names that begin with {prefix!r}, got none")
        given: dict[str, Any] = {}
    else:
        if prefix or cell is not None:
            raise ValueError("prefix and cell must be left out with a module")
        cell, named, given = _of_module(name, source)
    found = _parse(name, prefix, named)
    first = found[0][0]
    H = (first.weight_hh if first.weight_hr is None else first.weight_hr).shape[1]
    if cell is None:
        op = cells.op_of(f"{prefix}weight_hh", len(first.weight_hh), H)
    else:
        op = cells.check_op(cell)
    return cells.build(op, found, **{**given, **options})


def to_torch(layer: Any) -> dict[str, Any]:
    """Return a layer's weights as tensors by the names of torch.nn's modules.

    The result can be loaded by ``load_state_dict`` of a module with the same sizes and options:
    one of torch.nn or, if the layer has options that torch.nn lacks, of `fusedrnn.torch`.

    Parameters
    ----------
    layer: an `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`.

    Returns
    -------
    A dict of tensors on the CPU, copies of the weights.

    Raises
    ------
    TypeError, ValueError: layer is none of these, has narrow weights, or runs in reverse alone,
        which PyTorch's modules do not.

    >>> import torch, fusedrnn as fr
    >>> from fusedrnn import convert
    >>> module = torch.nn.GRU(3, 4)
    >>> module.load_state_dict(convert.to_torch(fr.GRU(3, 4)))
    <All keys matched successfully>
    """
    import torch

    offered = [n for n in ARGUMENTS if n not in ("reverse", "weights", "x_bits")]
    _, _, layer = cells.cells_of(layer, "PyTorch", *offered, "identity")
    arrays = {name: widened(on_host(p)) for name, p in layer.state_dict().items()}
    return {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}


def _parse(name: str, prefix: str, named: Mapping[str, Any]) -> list[list[Parameters]]:
    """Return the parameters of each layer and direction from tensors by their names."""
    found: dict[tuple[int, int], dict[str, Array]] = {}
    for key, value in named.items():
        match = _NAME.fullmatch(key)
        if match is None:
            why = "" if prefix else ": give the prefix of the names of one module"
            raise ValueError(
                f"{name} must have the parameters of one module, as weight_ih_l0, got {key!r}"
                f"{why}"
            )
        kind, layer, reverse = match.groups()
        of_cell = found.setdefault((int(layer or 0), bool(reverse)), {})
        if kind in of_cell:
            raise ValueError(f"{name} must have {kind} of a layer once, got {key!r}, too")
        is_matrix = kind in ("weight_ih", "weight_hh", "weight_hr")
        axes = "(rows, columns)" if is_matrix else "(rows,)"
        lengths = (None,) * (1 + is_matrix)
        of_cell[kind] = cells.floats(f"{prefix}{key}", value, axes, *lengths)
    D = 1 + any(direction for _, direction in found)
    expected = [(n, d) for n in range(-(-len(found) // D)) for d in range(D)]
    is_whole = sorted(found) == expected
    if not is_whole or not all({"weight_ih", "weight_hh"} <= set(of) for of in found.values()):
        raise ValueError(
            f"{name} must have weight_ih and weight_hh of every layer and direction, got "
            f"{', '.join(named)}"
        )
    return [[Parameters(**found[n, d]) for d in range(D)] for n in range(len(found) // D)]


def _of_module(name: str, module: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the cell of a module, its weights by name, and the arguments of our layer."""
    kind = type(module)
    if hasattr(module, "parametrizations"):
        kind = kind.__bases__[0]
    op = kind.__name__.removeprefix("Narrow").removesuffix("Cell").lower()
    if kind.__module__ not in _MODULES or op not in cells.LAYERS:
        also = "fusedrnn" if name == "layer" else "a state_dict"
        raise TypeError(
            f"{name} must be an LSTM, GRU or RNN of torch.nn or fusedrnn.torch, no subclass, "
            f"or {also}, got {kind.__name__}"
        )
    if getattr(module, "weights", None):
        raise ValueError(
            f"{name} must have weights of its dtype, got {module.weights} weights: convert the "
            "module that you quantised"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(
            f"{name} must have no forward hooks, which may change its results: remove them, or "
            "give its state_dict()"
        )
    given = {n: getattr(module, n) for n in _ARGUMENTS if hasattr(module, n)}
    if getattr(module, "num_layers", 1) == 1:
        given.pop("dropout", None)  # which torch.nn allows there
    given |= {k: v for k, v in getattr(module, "_options", {}).items() if k not in _OF_TRAINING}
    own = ("peephole", "layer_norm")  # follow from the weights
    names = getattr(module, "_names", None) or getattr(module, "_flat_weights_names", None)
    if names is None:
        names = [n for n in Parameters._fields[:4] if getattr(module, n, None) is not None]
    named = {n: getattr(module, n) for n in names}
    return op, named, {k: v for k, v in given.items() if k not in own}
