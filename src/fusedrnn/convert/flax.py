"""Weights of Flax, of its linen and nnx APIs: one kernel (I, H) for each gate, or for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..reference import Array, Parameters
from . import cells

_APIS = ("linen", "nnx", "nnx_optimized")
_INNER = ("params", "cell")


def from_flax(*layers: Any, **options: Any) -> Any:
    """Return a layer with the parameters of one or several cells of Flax.

    Parameters
    ----------
    layers: in the order in which they run, each the parameters of an LSTMCell,
        OptimizedLSTMCell, GRUCell or SimpleCell of flax.linen or flax.nnx, of an RNN of one, or
        of a Bidirectional; or a tuple of a forward and a backward cell. In linen they are the
        dict that ``init`` returns, in nnx ``nnx.to_pure_dict(nnx.state(module))``.
    options: arguments of our layer, as activation, where the cells have other activations than
        the default ones. The layer takes x as flax's RNN does, (B, T, I), unless
        batch_first=False.

    No layer of ours computes a SimpleCell with residual=True, and the parameters of such a cell
    look like any other's: do not convert it.

    Returns
    -------
    An `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`. Its states are (h, c), where Flax has
    (c, h).

    Raises
    ------
    TypeError, ValueError: parameters of another cell, or of a wrong type or shape.

    >>> import numpy as np
    >>> from fusedrnn import convert
    >>> dense_i, dense_h = {"kernel": np.ones((3, 16))}, {"kernel": np.ones((4, 16))}
    >>> convert.from_flax({"dense_i": dense_i, "dense_h": dense_h})
    LSTM(3, 4, bias=False, batch_first=True, dtype=float64)
    """
    op, found = cells.read(layers, _cell, _directions)
    return cells.build(op, found, **{"batch_first": True, **options})


def to_flax(layer: Any, api: str = "linen") -> list[Any]:
    """Return a layer's weights as the parameters of cells of Flax.

    Parameters
    ----------
    layer: an `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`, or a module of torch.nn or
        `fusedrnn.torch`.
    api: "linen"; "nnx", or "nnx_optimized" for the parameters of nnx.OptimizedLSTMCell. In nnx
        ``nnx.replace_by_pure_dict(state, …)`` puts them into the state of a module.

    Returns
    -------
    A dict for each layer; with two directions a tuple of two dicts.

    Raises
    ------
    TypeError, ValueError: layer is none of these, or has an option that Flax lacks, or an
        unknown API. In nnx a GRUCell has no bias b_hn, which must be 0 then.

    >>> import fusedrnn as fr
    >>> from fusedrnn import convert
    >>> sorted(convert.to_flax(fr.GRU(3, 4))[0])
    ['hn', 'hr', 'hz', 'in', 'ir', 'iz']
    """
    if api not in _APIS:
        raise ValueError(f"api must be one of {', '.join(_APIS)}, got {api!r}")
    offered = ("activation", "recurrent_activation", "nonlinearity", "identity")
    op, found, _ = cells.cells_of(layer, "Flax", *offered)
    return [cells.unpaired([_parameters(op, api, c) for c in of_layer]) for of_layer in found]


def _directions(layer: Any) -> tuple[Any, ...]:
    """Return the parameters of the cells of one layer."""
    layer = _unwrapped(layer)
    if isinstance(layer, Mapping) and "forward_rnn" in layer and "backward_rnn" in layer:
        return layer["forward_rnn"], layer["backward_rnn"]
    return cells.pair(layer)


def _unwrapped(layer: Any) -> Any:
    while isinstance(layer, Mapping):
        inner = [layer[name] for name in _INNER if name in layer]
        if not inner:
            break
        layer = inner[0]
    return layer


def _cell(of: str, parameters: Any) -> tuple[str, Parameters]:
    """Return the op and the parameters of one cell."""
    parameters = _unwrapped(parameters)
    if not isinstance(parameters, Mapping):
        raise TypeError(f"the parameters{of} must be a dict, got {type(parameters).__name__}")
    given = {str(k).rstrip("_"): v for k, v in parameters.items() if isinstance(v, Mapping)}
    given.pop("rngs", None)
    if set(given) == {"dense_i", "dense_h"}:
        (W, b_ih), (R, b_hh) = (_dense(f"{k}{of}", given[k]) for k in ("dense_i", "dense_h"))
        op = cells.op_of(f"the kernel of dense_h{of}", R.shape[1], len(R))
        return op, Parameters(W.T, R.T, b_ih, b_hh)
    if set(given) == {"i", "h"}:
        (W, b_ih), (R, b_hh) = (_dense(f"{k}{of}", given[k]) for k in "ih")
        return "rnn", Parameters(W.T, R.T, b_ih, b_hh)
    for op in ("lstm", "gru"):
        gates = cells.GATES[op]
        if set(given) == {side + gate for side in "ih" for gate in gates}:
            sides = [[_dense(f"{s}{g}{of}", given[s + g]) for g in gates] for s in "ih"]
            (W, b_ih), (R, b_hh) = (
                _joined(f"{s}*{of}", side) for s, side in zip("ih", sides, strict=True)
            )
            return op, Parameters(W.T, R.T, b_ih, b_hh)
    raise ValueError(
        f"the parameters{of} must be those of an LSTMCell, OptimizedLSTMCell, GRUCell or "
        f"SimpleCell, got the names {', '.join(given) or 'of nothing'}"
    )


def _dense(name: str, parameters: Mapping[str, Any]) -> tuple[Array, Array | None]:
    """Return kernel and bias, or None for no bias."""
    kernel = cells.floats(
        f"the kernel of {name}", parameters.get("kernel"), "(in, out)", None, None
    )
    bias = parameters.get("bias")
    if bias is not None:
        bias = cells.floats(f"the bias of {name}", bias, "(out,)", kernel.shape[1])
    return kernel, bias


def _joined(name: str, dense: list[tuple[Array, Array | None]]) -> tuple[Array, Array | None]:
    """Return one kernel and bias of all gates."""
    kernels, biases = zip(*dense, strict=True)
    if len({kernel.shape for kernel in kernels}) > 1:
        shapes = ", ".join(str(kernel.shape) for kernel in kernels)
        raise ValueError(f"the kernels of {name} must have equal shapes, got {shapes}")
    if all(bias is None for bias in biases):
        return np.concatenate(kernels, 1), None
    zeros = np.zeros(kernels[0].shape[1], kernels[0].dtype)
    return np.concatenate(kernels, 1), np.concatenate(
        [zeros if b is None else b for b in biases]
    )


def _parameters(op: str, api: str, cell: Parameters) -> dict[str, Any]:
    """Return one cell's parameters in the form of an API."""
    gates = cells.GATES[op]
    H = len(cell.weight_hh) // len(gates)
    b_ih, b_hh = cells.biases_of(cell)
    # Flax has one bias per gate, of an LSTM on the side of h, and another one for n.
    of_h = np.zeros_like(b_hh)
    if op == "gru":
        of_h[2 * H :] = b_hh[2 * H :]
    biases = (of_h, b_ih + b_hh) if op == "lstm" else (b_ih + b_hh - of_h, of_h)
    has_bias = (op != "lstm", op == "lstm")
    sides = list(zip("ih", (cell.weight_ih, cell.weight_hh), biases, has_bias, strict=True))
    is_joined = api == "nnx_optimized" or (api == "nnx" and op != "lstm")
    if is_joined:
        if of_h.any():
            raise ValueError(
                "layer must not have a bias_hh of n other than 0, which flax.nnx.GRUCell lacks"
            )
        return {
            f"dense_{side}": {"kernel": w.T.copy(), **({"bias": b} if has else {})}
            for side, w, b, has in sides
        }
    found: dict[str, Any] = {}
    for side, w, b, has in sides:
        for k, gate in enumerate(gates):
            rows = slice(k * H, (k + 1) * H)
            name = side if op == "rnn" else side + gate
            name = "if_" if (name, api) == ("if", "nnx") else name
            found[name] = {"kernel": w[rows].T.copy()}
            if has or name == "hn":
                found[name]["bias"] = b[rows].copy()
    return found
