"""The definition of every cell and option, in plain NumPy.

The compiled kernels are tested against this module and must agree with it; it is not fast. It
takes any floating or complex dtype, and `x` as (T, B, I) or (T, I). W and R stand for
`weight_ih` and `weight_hh`, x for the input of a step, h' and c' for the state before it,
a_x = W x + b_ih for the input part of the pre-activations and a_h = R h' + b_hh for the
recurrent part. Blocks of H rows belong to the gates in torch's order.

A step also returns its pullback, a function from the gradients of its results to those of its
arguments, which adds the parameters' gradients to a dict. The gradients are tested against
complex-step derivatives in tests/test_reference.py.

The forward also takes PyTorch's tensors, and autograd then records every operation:
`fusedrnn.torch` computes second and forward-mode derivatives that way. The gradients written
here are for NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .activations import ACTIVATIONS, Activation, activation_of, sigmoid
from .cells import (
    COUPLED_LSTM,
    GRU,
    GRU_RESET_BEFORE,
    LSTM,
    RNN,
    Cell,
)
from .layer import Run, run
from .narrow import Narrow, narrowed
from .random import dropout, philox
from .types import Array, Grads, Nonlinearity, Options, Parameters

__all__ = [
    "ACTIVATIONS",
    "COUPLED_LSTM",
    "GRU",
    "GRU_RESET_BEFORE",
    "LSTM",
    "RNN",
    "Activation",
    "Array",
    "Cell",
    "Grads",
    "Narrow",
    "Nonlinearity",
    "Options",
    "Parameters",
    "Run",
    "activation_of",
    "dropout",
    "gru",
    "gru_vjp",
    "lstm",
    "lstm_vjp",
    "narrowed",
    "op",
    "philox",
    "rnn",
    "rnn_vjp",
    "run",
    "sigmoid",
]

_PARAMETERS = Parameters._fields[4:]
_OPTIONS = ("clip", "cell_clip", "recurrent_dropout", "weight_dropout", "training", "bptt")
_MASKS = ("lengths", "resets", "mask", "reverse")


def op(
    cell: Cell,
    x: Array,
    weights: Sequence[Array | None],
    state: Sequence[Array | None],
    **arguments: Any,
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    """Run a cell with an op's keyword arguments; return its results and its pullback."""

    def take(names: Sequence[str]) -> dict[str, Any]:
        return {n: arguments.pop(n) for n in names if arguments.get(n) is not None}

    weight_ih, weight_hh, *biases = weights
    assert weight_ih is not None
    assert weight_hh is not None
    parameters = Parameters(weight_ih, weight_hh, *biases, **take(_PARAMETERS))
    zoneout = arguments.pop("zoneout", 0.0)
    pair = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    where = arguments.pop("where", 0)
    arguments = {"training": True} | arguments
    repeats = arguments.pop("masked_output", "zero") == "last"
    given = take(_OPTIONS) | take(["seed"])
    for name in ("activation", "recurrent_activation"):
        value = arguments.pop(name, None)
        if value is not None and not isinstance(value, Activation):
            value = activation_of(*((value,) if isinstance(value, str) else value))
        given[name] = value
    options = Options(**given, zoneout=pair, where=where, repeats=repeats)
    requested = [arguments.pop(name, False) for name in ("return_cells", "trace")]
    masks = take(_MASKS)
    arguments.pop("recompute", None)  # it changes no result
    unknown = [name for name, value in arguments.items() if value is not None]
    if unknown:
        raise TypeError(f"no such option: {', '.join(unknown)}")
    result = run(cell, x, parameters, state, **masks, options=options)
    extra = [
        value
        for value, is_requested in zip((result.cells, result.gates), requested, strict=True)
        if is_requested
    ]

    def pullback(
        dy: Array | None = None,
        dh_n: Array | None = None,
        dc_n: Array | None = None,
        d_cells: Array | None = None,
    ) -> Grads:
        return result.pullback(dy, (dh_n, dc_n)[: len(cell.states)], d_cells)

    return (result.y, *result.state, *extra), pullback


def lstm_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    coupled_gates: bool = False,
    **options: Any,
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    """Run an LSTM in NumPy and return its pullback: the definition of `fusedrnn.lstm_vjp`."""
    cell = COUPLED_LSTM if coupled_gates else LSTM
    return op(cell, x, (weight_ih, weight_hh, bias_ih, bias_hh), (h0, c0), **options)


def gru_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    reset_after: bool = True,
    **options: Any,
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    """Run a GRU in NumPy and return its pullback: the definition of `fusedrnn.gru_vjp`."""
    cell = GRU if reset_after else GRU_RESET_BEFORE
    return op(cell, x, (weight_ih, weight_hh, bias_ih, bias_hh), (h0,), **options)


def rnn_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    nonlinearity: Nonlinearity = "tanh",
    **options: Any,
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    """Run an RNN in NumPy and return its pullback: the definition of `fusedrnn.rnn_vjp`."""
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    return op(RNN[nonlinearity], x, weights, (h0,), **options)


def lstm(*args: Any, **options: Any) -> tuple[Any, ...]:
    """Run an LSTM in NumPy: the definition of `fusedrnn.lstm`, with the same arguments.

    >>> y, h_n, c_n = lstm(np.ones((5, 2, 3)), np.ones((16, 3)), np.ones((16, 4)))
    >>> y.shape, c_n.shape
    ((5, 2, 4), (2, 4))
    """
    return lstm_vjp(*args, **{"training": False} | options)[0]


def gru(*args: Any, **options: Any) -> tuple[Any, ...]:
    """Run a GRU in NumPy: the definition of `fusedrnn.gru`, with the same arguments."""
    return gru_vjp(*args, **{"training": False} | options)[0]


def rnn(*args: Any, **options: Any) -> tuple[Any, ...]:
    """Run an Elman RNN in NumPy: the definition of `fusedrnn.rnn`, with the same arguments."""
    return rnn_vjp(*args, **{"training": False} | options)[0]
