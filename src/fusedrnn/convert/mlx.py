"""Weights of MLX: our matrices and order of gates, and one bias, with another one for n."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..reference import Parameters
from . import cells


def from_mlx(*layers: Any, **options: Any) -> Any:
    """Return a layer with the parameters of one or several layers of MLX.

    Parameters
    ----------
    layers: in the order in which they run, each the dict that ``parameters()`` returns of an
        mlx.nn.LSTM (Wx, Wh, bias), GRU (Wx, Wh, b, bhn) or RNN (Wxh, Whh, bias); or a tuple of
        a forward and a backward one.
    options: arguments of our layer. It takes x as MLX does, (B, T, I), unless
        batch_first=False.

    Returns
    -------
    An `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`.

    Raises
    ------
    TypeError, ValueError: parameters of another layer, or of a wrong type or shape.

    >>> import numpy as np
    >>> from fusedrnn import convert
    >>> convert.from_mlx({"Wx": np.ones((16, 3)), "Wh": np.ones((16, 4))})
    LSTM(3, 4, bias=False, batch_first=True, dtype=float64)
    """
    op, found = cells.read(layers, _cell)
    return cells.build(op, found, **{"batch_first": True, **options})


def to_mlx(layer: Any) -> list[Any]:
    """Return a layer's weights by the names of MLX's parameters.

    Parameters
    ----------
    layer: an `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`, or a module of torch.nn or
        `fusedrnn.torch`.

    Returns
    -------
    A dict of arrays for each layer; with two directions a tuple of two dicts.

    Raises
    ------
    TypeError, ValueError: layer is none of these, or has an option that MLX lacks.

    >>> import fusedrnn as fr
    >>> from fusedrnn import convert
    >>> sorted(convert.to_mlx(fr.GRU(3, 4))[0])
    ['Wh', 'Wx', 'b', 'bhn']
    """
    op, found, _ = cells.cells_of(layer, "MLX")
    return [cells.unpaired([_parameters(op, cell) for cell in of_layer]) for of_layer in found]


def _cell(of: str, given: Any) -> tuple[str, Parameters]:
    """Return the op and the parameters of one cell."""
    named = dict(given) if isinstance(given, Mapping) else {}
    of_rnn = "Wxh" in named
    matrices = ("Wxh", "Whh") if of_rnn else ("Wx", "Wh")
    known = {*matrices, "bias"} if of_rnn else {*matrices, "bias", "b", "bhn"}
    if not set(matrices) <= set(named) <= known:
        got = ", ".join(map(str, named)) or type(given).__name__
        raise ValueError(f"the parameters{of} must be a dict of an LSTM, GRU or RNN, got {got}")
    R = cells.floats(f"{matrices[1]}{of}", named[matrices[1]], "(gates*H, H)", None, None)
    rows, H = R.shape
    op = "rnn" if of_rnn else cells.op_of(f"{matrices[1]}{of}", rows, H)
    cells.floats(f"{matrices[1]}{of}", R, f"({rows}, H)", len(cells.GATES[op]) * H, H)
    W = cells.floats(f"{matrices[0]}{of}", named[matrices[0]], f"({rows}, I)", rows, None)
    name = "b" if op == "gru" else "bias"
    b_ih = named.get(name)
    if b_ih is not None:
        b_ih = cells.floats(f"{name}{of}", b_ih, f"({rows},)", rows)
    b_hh, bhn = None, named.get("bhn") if op == "gru" else None
    if bhn is not None:
        b_hh = np.zeros(rows, R.dtype)
        b_hh[-H:] = cells.floats(f"bhn{of}", bhn, f"({H},)", H)
    return op, Parameters(W, R, b_ih, b_hh)


def _parameters(op: str, cell: Parameters) -> dict[str, Any]:
    matrices = ("Wxh", "Whh") if op == "rnn" else ("Wx", "Wh")
    found = dict(zip(matrices, (cell.weight_ih.copy(), cell.weight_hh.copy()), strict=True))
    if cell.bias_ih is None:
        return found
    if op != "gru":
        return found | {"bias": cell.bias_ih + cell.bias_hh}
    of_n = 2 * cell.weight_hh.shape[1]
    bias = cell.bias_ih.copy()
    bias[:of_n] += cell.bias_hh[:of_n]
    return found | {"b": bias, "bhn": cell.bias_hh[of_n:].copy()}
