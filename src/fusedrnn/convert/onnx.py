"""Weights of ONNX's LSTM, GRU and RNN nodes: gates i o f c and z r h, two joined biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import checks
from ..reference import ACTIVATIONS, Array, Parameters
from ..reference.arrays import module_of
from . import cells

_GATES = {"LSTM": "iofg", "GRU": "zrn", "RNN": "h"}
_FUNCTIONS_OF = {"LSTM": "fgh", "GRU": "fg", "RNN": "f"}
_DIRECTIONS = ("forward", "reverse", "bidirectional")
# ONNX's activations: our name of each, and its numbers alpha and beta, if any, with defaults;
# None for those that must be given, because onnxruntime's default is not the operator's.
_FUNCTIONS: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "Tanh": ("tanh", ()),
    "Sigmoid": ("sigmoid", ()),
    "Relu": ("relu", ()),
    "Affine": ("affine", (None, None)),
    "LeakyRelu": ("leaky_relu", (0.01,)),
    "ThresholdedRelu": ("thresholded_relu", (None,)),
    "ScaledTanh": ("tanh", (None, None)),
    "HardSigmoid": ("hard_sigmoid", (0.2, 0.5)),
    "Elu": ("elu", (1.0,)),
    "Softsign": ("softsign", ()),
    "Softplus": ("softplus", ()),
}
_BY_LOWER_CASE = {name.lower(): name for name in _FUNCTIONS}
_OF_OURS = {ours: name for name, (ours, _) in reversed(_FUNCTIONS.items())}
OFFERED = (
    "peephole",
    "coupled_gates",
    "activation",
    "recurrent_activation",
    "clip",
    "reset_after",
    "nonlinearity",
    "identity",
    "reverse",
)
_USUAL = {"activation": "tanh", "recurrent_activation": "sigmoid"}


class Node(NamedTuple):
    """The operator, weights and attributes of one node of ONNX.

    Attributes
    ----------
    op_type: "LSTM", "GRU" or "RNN".
    W, R, B, P: (D, gates*H, I), (D, gates*H, H), (D, 2*gates*H), (D, 3*H), with D directions;
        B and P may be None.
    attributes: those that differ from their defaults, and hidden_size.
    """

    op_type: str
    W: Array
    R: Array
    B: Array | None
    P: Array | None
    attributes: dict[str, Any]


def from_onnx(
    op_type: str,
    W: Any,
    R: Any,
    B: Any = None,
    P: Any = None,
    *,
    direction: str = "forward",
    hidden_size: int | None = None,
    linear_before_reset: int = 0,
    input_forget: int = 0,
    layout: int = 0,
    clip: float | None = None,
    activations: Sequence[str] | None = None,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    **options: Any,
) -> Any:
    """Return a layer with the weights and attributes of a node of ONNX.

    `fusedrnn.onnx.layers` calls it for every node of a model.

    Parameters
    ----------
    op_type: "LSTM", "GRU" or "RNN".
    W, R, B, P: (D, gates*H, I), (D, gates*H, H), (D, 2*gates*H), (D, 3*H), with D directions;
        None for no B or P.
    direction … activation_beta: the attributes of the node, with ONNX's defaults. A reverse
        direction becomes reverse=True, layout=1 batch_first=True, input_forget=1
        coupled_gates=True, linear_before_reset=0 reset_after=False.
    options: further arguments of the layer.

    Returns
    -------
    An `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`. Its y is (T, B, D*H), ONNX's Y is
    (T, D, B, H).

    Raises
    ------
    TypeError, ValueError: an argument of a wrong type, value or shape; activations that we do
        not have, as different ones for g and h.

    >>> import numpy as np
    >>> from fusedrnn import convert
    >>> convert.from_onnx("GRU", np.ones((1, 12, 3)), np.ones((1, 12, 4)), direction="reverse")
    GRU(3, 4, bias=False, reverse=True, reset_after=False, dtype=float64)
    """
    if op_type not in _GATES:
        raise ValueError(f"op_type must be LSTM, GRU or RNN, got {op_type!r}")
    if direction not in _DIRECTIONS:
        raise ValueError(
            f"direction must be one of {', '.join(_DIRECTIONS)}, got {direction!r}"
        )
    flags = {
        "linear_before_reset": linear_before_reset,
        "input_forget": input_forget,
        "layout": layout,
    }
    for name, value in flags.items():
        if value not in (0, 1):
            raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    op, D = op_type.lower(), 1 + (direction == "bidirectional")
    W, R, B, P = _checked(op_type, D, W, R, B, P)
    if hidden_size is not None and hidden_size != R.shape[2]:
        raise ValueError(f"hidden_size must be {R.shape[2]} as in R, got {hidden_size}")
    given: dict[str, Any] = {"reverse": direction == "reverse", "batch_first": bool(layout)}
    if op == "gru":
        given["reset_after"] = bool(linear_before_reset)
    if op == "lstm":
        given["coupled_gates"] = bool(input_forget)
    if clip:  # onnxruntime takes 0 for none
        given["clip"] = checks.number("clip", clip)
    given |= _activations(op_type, D, activations, activation_alpha, activation_beta)
    order = (_GATES[op_type], cells.gates_of(op, given))
    of_c = order[1].replace("g", "")
    found = []
    for d in range(D):
        parts = [W[d], R[d], *(np.split(B[d], 2) if B is not None else ())]
        peephole = None if P is None else cells.reorder(P[d], "iof", of_c)
        parts = [cells.reorder(a, *order) for a in parts]
        found.append(Parameters(*parts)._replace(weight_ch=peephole))
    return cells.build(op, [found], **cells.with_implied(options, **given))


def to_onnx(layer: Any) -> list[Node]:
    """Return a layer's weights and options as nodes of ONNX.

    `fusedrnn.onnx.export` writes them as a model.

    Parameters
    ----------
    layer: an `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`, or a module of torch.nn or
        `fusedrnn.torch`.

    Returns
    -------
    A `fusedrnn.convert.onnx.Node` for each layer, which has both directions. With coupled_gates
    the weights of f, which ONNX ignores, are 0.

    Raises
    ------
    TypeError, ValueError: layer is none of these, or has an option that ONNX lacks.

    >>> import fusedrnn as fr
    >>> from fusedrnn import convert
    >>> node = convert.to_onnx(fr.GRU(3, 4))[0]
    >>> node.op_type, node.W.shape, node.attributes
    ('GRU', (1, 12, 3), {'hidden_size': 4, 'linear_before_reset': 1})
    """
    op, found, layer = cells.cells_of(layer, "ONNX", *OFFERED)
    attributes = attributes_of(op.upper(), layer)
    return [Node(op.upper(), *weights_of(op, directions), attributes) for directions in found]


def weights_of(op: str, directions: Sequence[Parameters]) -> tuple[Any, Any, Any, Any]:
    """Return W, R, B and P of arrays or tensors of one layer; B and P may be None."""
    xp = module_of(directions[0].weight_hh)
    rows, H = directions[0].weight_hh.shape
    is_coupled = op == "lstm" and rows == 3 * H
    ours, theirs = cells.gates_of(op, {"coupled_gates": is_coupled}), _GATES[op.upper()]

    def blocks(a: Any, ours: str, theirs: str) -> Any:
        if is_coupled:  # the weights of f, which are not used
            a, ours = xp.concatenate([a, xp.zeros_like(a[: len(a) // len(ours)])]), f"{ours}f"
        return cells.reorder(a, ours, theirs)

    W, R = (
        xp.stack([blocks(getattr(c, kind), ours, theirs) for c in directions])
        for kind in ("weight_ih", "weight_hh")
    )
    B = P = None
    if directions[0].bias_ih is not None:
        pairs = [(c.bias_ih, c.bias_hh) for c in directions]
        B = xp.stack(
            [xp.concatenate([blocks(b, ours, theirs) for b in pair]) for pair in pairs]
        )
    if directions[0].weight_ch is not None:
        of_c = ours.replace("g", "")
        P = xp.stack([blocks(c.weight_ch, of_c, "iof") for c in directions])
    return W, R, B, P


def attributes_of(op_type: str, layer: Any) -> dict[str, Any]:
    """Return the attributes of the nodes of a layer or module."""
    found: dict[str, Any] = {"hidden_size": layer.hidden_size}
    is_bidirectional = getattr(layer, "bidirectional", False)
    if is_bidirectional or getattr(layer, "reverse", False):
        found["direction"] = "bidirectional" if is_bidirectional else "reverse"
    if layer.clip is not None:
        found["clip"] = float(layer.clip)
    if op_type == "GRU" and layer.reset_after:
        found["linear_before_reset"] = 1
    if op_type == "LSTM" and layer.coupled_gates:
        found["input_forget"] = 1
    return found | _spelled(op_type, 1 + is_bidirectional, layer)


def _checked(op_type: str, D: int, W: Any, R: Any, B: Any, P: Any) -> tuple[Any, ...]:
    """Return the weights as arrays, whose shapes must belong together."""
    G = len(_GATES[op_type])
    axis = f"{G}*H" if G > 1 else "H"
    R = cells.floats("R", R, f"(D, {axis}, H)", None, None, None)
    H = R.shape[2]
    R = cells.floats("R", R, f"({D}, {axis}, H) = {(D, G * H, H)}", D, G * H, H)
    W = cells.floats("W", W, f"({D}, {axis}, I) = ({D}, {G * H}, I)", D, G * H, None)
    if B is not None:
        B = cells.floats("B", B, f"({D}, 2*{axis}) = {(D, 2 * G * H)}", D, 2 * G * H)
    if P is not None and op_type != "LSTM":
        raise ValueError(f"P must be None, because {op_type} has no peepholes")
    if P is not None:
        P = cells.floats("P", P, f"({D}, 3*H) = {(D, 3 * H)}", D, 3 * H)
    return W, R, B, P


def _activations(
    op_type: str,
    D: int,
    names: Sequence[str] | None,
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
) -> dict[str, Any]:
    """Return a node's activations as arguments of a layer, without the usual ones."""
    if not names:
        return {}
    letters = _FUNCTIONS_OF[op_type]
    lists = {"activations": names, "activation_alpha": alphas, "activation_beta": betas}
    for name, value in lists.items():
        if value is not None and not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list, got {type(value).__name__}")
    if op_type == "RNN":
        names = names[:D]  # the operator's default has two for one direction, too
    if len(names) != D * len(letters):
        raise ValueError(
            f"activations must be {len(letters)} for each of {D} directions, got {list(names)}"
        )
    # A function takes the next alpha and beta, if it has such a number at all.
    left = [
        [checks.number(name, n) for n in lists[name] or ()]
        for name in ("activation_alpha", "activation_beta")
    ]
    found: list[Any] = []
    for name in names:
        known = _BY_LOWER_CASE.get(str(name).lower())
        if known is None:
            raise ValueError(
                f"activations must be among {', '.join(_FUNCTIONS)}, got {str(name)!r}"
            )
        ours, defaults = _FUNCTIONS[known]
        numbers = tuple(
            given.pop(0) if given else default
            for given, default in zip(left, defaults, strict=False)
        )
        if None in numbers:
            lacks = ("activation_alpha", "activation_beta")[numbers.index(None)]
            raise ValueError(f"{lacks} must have a number for {known}, got {list(names)}")
        is_plain = not numbers or (ours, numbers) == ("tanh", (1.0, 1.0))
        found.append(
            ours if is_plain else (ours, *(float(n) for n in numbers if n is not None))
        )
    each = [found[at : at + len(letters)] for at in range(0, len(found), len(letters))]
    if any(of_direction != each[0] for of_direction in each):
        raise ValueError(f"activations must be equal in both directions, got {list(names)}")
    of = dict(zip(letters, each[0], strict=True))
    if op_type == "RNN":
        nonlinearity = {"relu": "relu", ("affine", 1.0, 0.0): "identity"}.get(of["f"])
        return {"nonlinearity": nonlinearity} if nonlinearity else _unusual(activation=of["f"])
    if of.get("h", of["g"]) != of["g"]:
        raise ValueError(
            f"activations must be equal for g and h, as our layers have one for both, got "
            f"{list(names)}"
        )
    return _unusual(activation=of["g"], recurrent_activation=of["f"])


def _unusual(**activations: Any) -> dict[str, Any]:
    return {name: value for name, value in activations.items() if value != _USUAL[name]}


def _spelled(op_type: str, D: int, layer: Any) -> dict[str, Any]:
    """Return a layer's activations as attributes of a node, empty for the usual ones."""
    g = getattr(layer, "nonlinearity", "tanh")
    if g == "tanh":
        g = layer.activation
    f = getattr(layer, "recurrent_activation", "sigmoid")
    if (g, f) == ("tanh", "sigmoid"):
        return {}
    of = {"f": g, "g": g, "h": g} if op_type == "RNN" else {"f": f, "g": g, "h": g}
    names: list[str] = []
    numbers: tuple[list[float], list[float]] = ([], [])
    for letter in _FUNCTIONS_OF[op_type] * D:
        value = of[letter]
        name, given = (value, ()) if isinstance(value, str) else (value[0], value[1:])
        of_name = (*given, *ACTIVATIONS[name][0][len(given) :])
        if name == "tanh":
            of_name = () if of_name == (1.0, 1.0) else of_name
        known = "ScaledTanh" if name == "tanh" and of_name else _OF_OURS.get(name)
        if name in ("identity", "linear"):
            known, of_name = "Affine", (1.0, 0.0)
        if known is None:
            raise ValueError(f"layer must not have the activation {name!r}, which ONNX lacks")
        names.append(known)
        for values, number in zip(numbers, of_name, strict=False):
            values.append(float(number))
    of_numbers = zip(("activation_alpha", "activation_beta"), numbers, strict=True)
    return {"activations": names} | {name: values for name, values in of_numbers if values}
