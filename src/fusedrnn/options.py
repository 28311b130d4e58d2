"""What a call may be asked for beside its arrays: names, checks, what it comes to."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypedDict

import numpy.typing as npt

from . import checks
from .cells import Cell
from .reference import Array, Nonlinearity, Options, Parameters


class CommonOptions(TypedDict, total=False):
    """Of every op, with and without a pullback."""

    lengths: npt.ArrayLike | None
    resets: npt.ArrayLike | None
    reverse: bool
    clip: float | None
    zoneout: float | tuple[float, float]
    recurrent_dropout: float
    weight_dropout: float
    training: bool
    seed: int | None
    trace: bool
    precision: str


class RNNOptions(CommonOptions, total=False):
    """Of `rnn` and `rnn_vjp`."""

    nonlinearity: Nonlinearity


class GRUOptions(CommonOptions, total=False):
    """Of `gru` and `gru_vjp`."""

    reset_after: bool
    gamma_ih: Array | None
    gamma_hh: Array | None


class LSTMOptions(CommonOptions, total=False):
    """Of `lstm` and `lstm_vjp`."""

    coupled_gates: bool
    cell_clip: float | None
    return_cells: bool
    weight_hr: Array | None
    weight_ch: Array | None
    gamma_ih: Array | None
    gamma_hh: Array | None
    gamma_c: Array | None
    beta_c: Array | None


# Of a layer, in the order in which it shows them.
DEFAULTS: dict[str, Any] = {
    "reset_after": True,
    "coupled_gates": False,
    "peephole": False,
    "layer_norm": False,
    "clip": None,
    "cell_clip": None,
    "zoneout": 0.0,
    "recurrent_dropout": 0.0,
    "weight_dropout": 0.0,
}


@dataclass(frozen=True)
class Request:
    """Checked options of a cell, and which results are wanted."""

    options: Options = Options()  # noqa: RUF009 — frozen
    return_cells: bool = False
    trace: bool = False
    recompute: bool = False

    @cached_property
    def is_random(self) -> bool:
        """Whether random numbers decide."""
        o = self.options
        return o.training and (any(o.zoneout) or o.recurrent_dropout + o.weight_dropout > 0)

    @property
    def drops_weights(self) -> bool:
        """Whether R is another in this call."""
        return self.options.training and self.options.weight_dropout > 0

    def at(self, where: int) -> Request:
        """Return the same with random numbers of its own."""
        if not self.is_random or where == self.options.where:
            return self
        return replace(self, options=replace(self.options, where=where))

    def with_seed(self, seed: int | None) -> Request:
        """Return the same with a seed, drawn for None."""
        seed = secrets.randbits(64) if seed is None else seed
        return replace(self, options=replace(self.options, seed=seed))

    def beyond_plain(self, on_cpu: bool) -> list[str]:
        """Return what the plain kernels do not do, so that those with options run."""
        return self._beyond_cpu if on_cpu else []

    @cached_property
    def _beyond_cpu(self) -> list[str]:
        o = self.options
        asked = {
            "clip": o.clip < math.inf,
            "cell_clip": o.cell_clip < math.inf,
            "zoneout": any(o.zoneout),
            "recurrent_dropout": o.training and o.recurrent_dropout > 0,
            "return_cells": self.return_cells,
            "trace": self.trace,
            "recompute": self.recompute,
        }
        return [name for name, is_asked in asked.items() if is_asked]


def beyond_plain(cell: Cell, parameters: Parameters, on_cpu: bool) -> list[str]:
    """Return what the plain kernels do not do of a cell, whatever a call asks for."""
    has = {
        "proj_size": parameters.weight_hr is not None,
        "layer_norm": parameters.gamma_ih is not None,
        "reset_after=False": cell.resets_before,
        "peephole": parameters.weight_ch is not None and on_cpu,
        "coupled_gates": cell.is_coupled and on_cpu,
    }
    return [name for name, is_so in has.items() if is_so]


PLAIN = Request()
_TRAINING = Request(Options(training=True))

_NUMBERS = ("recurrent_dropout", "weight_dropout")
_LSTM_ONLY = ("cell_clip", "return_cells")


def check_options(
    cell: Cell, given: Mapping[str, Any], training: bool = False, is_vjp: bool = True
) -> Request:
    """Check the options of a cell that are not arrays; `training` is what is not given."""
    if not given:
        return _TRAINING if training else PLAIN
    known = ["clip", "zoneout", *_NUMBERS, "training", "seed", "trace"]
    if is_vjp:
        known += ["bptt", "recompute"]
    if "c" in cell.states:
        known += _LSTM_ONLY
    for name in given:
        if name not in known:
            why = ": that of an LSTM" if name in _LSTM_ONLY else ""
            raise TypeError(f"{cell.op} has no option {name!r}{why}")
    get = given.get
    bounds = {n: checks.bound(n, get(n)) for n in ("clip", "cell_clip")}
    zoneout = checks.zoneout(get("zoneout", 0.0), len(cell.states))
    numbers = {n: checks.probability(n, get(n, 0.0)) for n in _NUMBERS}
    training = checks.flag("training", get("training", training))
    seed = checks.seed(get("seed"))
    bptt = 0 if get("bptt") is None else checks.positive("bptt", get("bptt"))
    wanted = {n: checks.flag(n, get(n, False)) for n in ("return_cells", "trace", "recompute")}
    request = Request(
        Options(
            bounds["clip"],
            bounds["cell_clip"],
            zoneout,
            numbers["recurrent_dropout"],
            numbers["weight_dropout"],
            training=training,
            bptt=bptt,
        ),
        **wanted,
    )
    return request.with_seed(seed) if request.is_random else request
