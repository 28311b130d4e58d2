"""Forms that a benchmark's layer may have beside the plain one: structures, masks, options.

A form is keyword arguments of the layer (those of `fusedrnn.LSTM`) and of its call. This module
needs the public interface alone, so that it also describes calls to older builds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Sizes = tuple[int, int, int, int]
BOTH = ("inference", "training")
ALL_CELLS = ("LSTM", "GRU", "RNN")


def _nothing(T: int, B: int) -> dict[str, Any]:
    return {}


def drawn_lengths(T: int, B: int) -> np.ndarray[Any, Any]:
    """Return lengths drawn evenly from 1…T, the same for the same sizes."""
    return np.random.default_rng(0).integers(1, T + 1, B)


def _resets(T: int, B: int) -> dict[str, Any]:
    return {"resets": np.random.default_rng(0).random((T, B)) < 0.05}


def _gaps(T: int, B: int) -> dict[str, Any]:
    return {"mask": np.random.default_rng(0).random((T, B)) < 0.5}


def _left_padding(T: int, B: int) -> dict[str, Any]:
    return {"mask": np.arange(T)[:, None] >= T - drawn_lengths(T, B)}


@dataclass(frozen=True)
class Form:
    """How a case differs from the plain layer.

    Attributes
    ----------
    layer: keyword arguments of the layer.
    call: returns keyword arguments of a call with T steps and B rows.
    cells, modes: for which the form exists.
    """

    layer: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[[int, int], dict[str, Any]] = _nothing
    cells: Sequence[str] = ALL_CELLS
    modes: Sequence[str] = BOTH


_LSTM, _GATED, _TRAINING = ("LSTM",), ("LSTM", "GRU"), ("training",)

# PyTorch and onnxruntime have these as well. "cell" is a module of a single step.
STRUCTURES = {
    "two-layers": Form({"num_layers": 2}),
    "both-directions": Form({"bidirectional": True}),
    "batch-first": Form({"batch_first": True}),
    "lengths": Form(call=lambda T, B: {"lengths": drawn_lengths(T, B)}),
    "cell": Form(),
}
OPTIONS = {
    "full-lengths": Form(call=lambda T, B: {"lengths": np.full(B, T)}),
    "resets": Form(call=_resets),
    "mask-gaps": Form(call=_gaps),
    "mask-left": Form(call=_left_padding),
    "relu": Form({"activation": "relu"}),
    "selu": Form({"activation": "selu"}),
    "softplus": Form({"activation": "softplus"}),
    "hard-sigmoid": Form({"recurrent_activation": "hard_sigmoid"}, cells=_GATED),
    "zoneout": Form({"zoneout": 0.1}),
    "recurrent-dropout": Form({"recurrent_dropout": 0.2}, modes=_TRAINING),
    "clip": Form({"clip": 3.0}),
    "peephole": Form({"peephole": True}, cells=_LSTM),
    "coupled-gates": Form({"coupled_gates": True}, cells=_LSTM),
    "cell-clip": Form({"cell_clip": 3.0}, cells=_LSTM),
    "return-cells": Form(call=lambda T, B: {"return_cells": True}, cells=_LSTM),
    "weight-dropout": Form({"weight_dropout": 0.2}, modes=_TRAINING),
    "all-regularisers": Form(
        {"zoneout": 0.1, "recurrent_dropout": 0.2, "weight_dropout": 0.2}, modes=_TRAINING
    ),
    "all-options": Form(
        {"zoneout": 0.1, "recurrent_dropout": 0.2, "clip": 3.0},
        lambda T, B: {"lengths": np.full(B, T)} | _resets(T, B),
        ("GRU", "RNN"),
    ),
    "all-LSTM-options": Form(
        {
            "zoneout": 0.1,
            "recurrent_dropout": 0.2,
            "clip": 3.0,
            "peephole": True,
            "coupled_gates": True,
            "cell_clip": 3.0,
        },
        lambda T, B: {"lengths": np.full(B, T), "return_cells": True} | _resets(T, B),
        _LSTM,
    ),
    "projection": Form({"proj_size": 0.5}, cells=_LSTM),  # a share of H
    "reset-before": Form({"reset_after": False}, cells=("GRU",)),
    "layer-norm": Form({"layer_norm": True}, cells=_GATED),
    "trace": Form(call=lambda T, B: {"trace": True}, cells=_GATED),
    "bptt-20": Form(call=lambda T, B: {"bptt": 20}, modes=_TRAINING),
    "recompute": Form(call=lambda T, B: {"recompute": True}, cells=_GATED, modes=_TRAINING),
}
FORMS = {"": Form()} | STRUCTURES | OPTIONS


def layer_arguments(form: str, H: int) -> dict[str, Any]:
    """Return the keyword arguments of a layer of H units in this form."""
    arguments = dict(FORMS[form].layer)
    if "proj_size" in arguments:
        arguments["proj_size"] = max(1, int(arguments["proj_size"] * H))
    return arguments
