"""The options of calls and layers: names, defaults, checks."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import numpy.typing as npt

from . import checks
from .cells import Cell
from .reference import Activation, Array, Nonlinearity, Options, Parameters

MaskedOutput = Literal["zero", "last"]
# A name of `reference.ACTIVATIONS`, or a tuple of a name and numbers.
ActivationLike = str | tuple[Any, ...]


class CommonOptions(TypedDict, total=False):
    """Keyword arguments of every op, with and without a pullback."""

    lengths: npt.ArrayLike | None
    resets: npt.ArrayLike | None
    mask: npt.ArrayLike | None
    masked_output: MaskedOutput
    reverse: bool
    activation: ActivationLike
    clip: float | None
    zoneout: float | tuple[float, float]
    recurrent_dropout: float
    weight_dropout: float
    training: bool
    seed: int | None
    trace: bool
    precision: str


class RNNOptions(CommonOptions, total=False):
    """Keyword arguments of `rnn` and `rnn_vjp`."""

    nonlinearity: Nonlinearity


class GRUOptions(CommonOptions, total=False):
    """Keyword arguments of `gru` and `gru_vjp`."""

    reset_after: bool
    recurrent_activation: ActivationLike
    gamma_ih: Array | None
    gamma_hh: Array | None


class LSTMOptions(CommonOptions, total=False):
    """Keyword arguments of `lstm` and `lstm_vjp`."""

    coupled_gates: bool
    recurrent_activation: ActivationLike
    cell_clip: float | None
    return_cells: bool
    weight_hr: Array | None
    weight_ch: Array | None
    gamma_ih: Array | None
    gamma_hh: Array | None
    gamma_c: Array | None
    beta_c: Array | None


# The options of layers, in the order in which their repr shows them.
DEFAULTS: dict[str, Any] = {
    "reset_after": True,
    "coupled_gates": False,
    "peephole": False,
    "layer_norm": False,
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "clip": None,
    "cell_clip": None,
    "zoneout": 0.0,
    "recurrent_dropout": 0.0,
    "weight_dropout": 0.0,
}


OWN_ACTIVATIONS = {n: DEFAULTS[n] for n in ("activation", "recurrent_activation")}
_NUMBERS = ("recurrent_dropout", "weight_dropout")
_FLAGS = ("return_cells", "trace", "recompute")
_LSTM_ONLY = ("cell_clip", "return_cells")
PLAIN = Options()
_TRAINING = Options(training=True)


def check_options(
    cell: Cell, arguments: Mapping[str, Any], training: bool = False, is_vjp: bool = True
) -> Options:
    """Check a cell's options that are not arrays; `training` is the default of that option."""
    if not arguments:
        return _TRAINING if training else PLAIN
    known = ["clip", "zoneout", *_NUMBERS, "training", "seed", "trace", "masked_output"]
    known += ["activation", *cell.reference.activations]
    if is_vjp:
        known += ["bptt", "recompute"]
    if "c" in cell.states:
        known += _LSTM_ONLY
    for name in arguments:
        if name not in known:
            why = ", which only an LSTM has" if name in _LSTM_ONLY else ""
            raise TypeError(f"{cell.op} has no option {name!r}{why}")
    get = arguments.get
    clip, cell_clip = (checks.bound(n, get(n)) for n in ("clip", "cell_clip"))
    zoneout = checks.zoneout(get("zoneout", 0.0), len(cell.states))
    state_dropout, weight_dropout = (checks.probability(n, get(n, 0.0)) for n in _NUMBERS)
    training = checks.flag("training", get("training", training))
    seed = checks.seed(get("seed"))
    bptt = 0 if get("bptt") is None else checks.positive("bptt", get("bptt"))
    cells, trace, recompute = (checks.flag(n, get(n, False)) for n in _FLAGS)
    drawn = (zoneout, state_dropout, weight_dropout, training, 0, 0)
    output = checks.choice("masked_output", get("masked_output", "zero"), ("zero", "last"))
    phi, phi_gate = (_activation(cell, n, get(n, own)) for n, own in OWN_ACTIVATIONS.items())
    flags = (cells, trace, recompute, output == "last")
    options = Options(clip, cell_clip, *drawn, bptt, *flags, phi, phi_gate)
    return with_seed(options, seed) if options.is_random else options


def _activation(cell: Cell, name: str, value: Any) -> Activation | None:
    """Return an activation, or None for the cell's own."""
    own = OWN_ACTIVATIONS[name]
    if isinstance(value, str) and value == own:
        return None
    found = checks.activation(name, value)
    if found == checks.activation(name, own):
        return None
    if name not in cell.reference.activations:
        raise ValueError(
            f'{name} must be "tanh", the default, with '
            f'nonlinearity="{cell.arguments["nonlinearity"]}", got {value!r}'
        )
    return found


def with_seed(options: Options, seed: int | None) -> Options:
    """Return the options with this seed; None draws one."""
    return options._replace(seed=secrets.randbits(64) if seed is None else seed)


def asked_of_call(options: Options) -> list[str]:
    """Return the options for which a call on the CPU needs the kernels with options."""
    o = options
    in_use = {
        "clip": o.clip < math.inf,
        "cell_clip": o.cell_clip < math.inf,
        "activation": o.activation is not None,
        "recurrent_activation": o.recurrent_activation is not None,
        "zoneout": any(o.zoneout),
        "recurrent_dropout": o.training and o.recurrent_dropout > 0,
        "return_cells": o.return_cells,
        "trace": o.trace,
        "recompute": o.recompute,
    }
    return [name for name, is_used in in_use.items() if is_used]


def asked_of_layer(cell: Cell, parameters: Parameters, on_cpu: bool) -> list[str]:
    """Return the features of a layer for which every call needs the kernels with options."""
    in_use = {
        "proj_size": parameters.weight_hr is not None,
        "layer_norm": parameters.gamma_ih is not None,
        "reset_after=False": cell.resets_before,
        "peephole": parameters.weight_ch is not None and on_cpu,
        "coupled_gates": cell.is_coupled and on_cpu,
    }
    return [name for name, is_used in in_use.items() if is_used]
