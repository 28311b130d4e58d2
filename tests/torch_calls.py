"""Calls of PyTorch's operators: what the tests of them share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from helpers import Place, Sizes, options_of, with_options

from fusedrnn.cells import CELLS, Cell
from fusedrnn.reference import Grads, Parameters
from fusedrnn.torch import ops
from fusedrnn.torch.call import Inputs, describe, parse

SIZES = Sizes(4, 3, 3, 5)
# Of what takes PyTorch long for each step: to trace, and to differentiate twice.
FEW_STEPS = SIZES._replace(T=2)

# Every cell with every option alone, with masks, with all at once, and in reverse.
CASES = [
    (name, options)
    for name, cell in CELLS.items()
    for options in [
        *([o] for o in ["plain", *options_of(cell), "lengths", "resets", "mask", "reverse"]),
        ["mask last", "reverse"],
        [
            o
            for o in [*options_of(cell), "both", "mask last"]
            if o not in ("zoneout in inference", "bptt")
        ],
    ]
]


FLAGS = ("training", "return_cells", "trace", "recompute")


def call_of(cell: Cell, names: list[str], sizes: Sizes = SIZES) -> tuple[Any, Inputs]:
    """What is asked for, and the tensors of a call; floating ones need gradients."""
    known = [n for n in names if n not in ("plain", "reverse")]
    arrays, asked = with_options(cell, sizes, known)
    return call_with(cell, **arrays, **asked, reverse="reverse" in names)


def call_with(cell: Cell, *, reverse: bool, **given: Any) -> tuple[Any, Inputs]:
    """The same of an op's arguments."""
    given = {k: v for k, v in given.items() if v is not None}
    tensors = {
        name: torch.from_numpy(value)
        for name, value in given.items()
        if isinstance(value, np.ndarray)
    }
    for a in tensors.values():
        a.requires_grad_(a.is_floating_point())
    kinds = [kind for kind in Parameters._fields if kind in tensors]
    words = [n for n in FLAGS if given.get(n)] + ["save"]
    words += [f"bptt={value}" for name, value in given.items() if name == "bptt"]
    words += ["repeat"] if given.get("masked_output") == "last" else []
    others = (*FLAGS, "bptt", "seed", "masked_output", *tensors)
    options = {k: v for k, v in given.items() if k not in others}
    layers = describe(cell.name, options, kinds, reverse=reverse)
    state = [tensors[n][None] if n in tensors else None for n in ("h0", "c0")]
    inputs = Inputs(
        tensors["x"],
        *[None if s is None else s.detach().requires_grad_() for s in state],
        [tensors[kind] for kind in kinds],
        tensors.get("lengths"),
        tensors.get("resets"),
        tensors.get("mask"),
        torch.tensor([given.get("seed", 0)]),
    )
    return parse(layers, " ".join(words)), inputs


def smooth(call: Any, results: Any) -> tuple[Any, ...]:
    """Those that have gradients and are there."""
    return tuple(r for r, here in zip(results, call.has_results, strict=False) if here)


def leaves_of(tensors: Inputs) -> tuple[list[int], list[Any]]:
    at = [n for n, a in enumerate(tensors.smooth) if a is not None]
    return at, [tensors.smooth[n] for n in at]


def function_of(call: Any, tensors: Inputs, way: Any = ops.run_forward) -> Any:
    at, _ = leaves_of(tensors)

    def function(*values: Any) -> Any:
        changed = tensors.smooth
        for n, value in zip(at, values, strict=True):
            changed[n] = value
        return smooth(call, way(call, *changed[:3], changed[3:], *tensors[4:]))

    return function


class Operator(Place):
    """PyTorch's operator and its autograd on the CPU, for `check_against_reference`."""

    def call(self, cell: Cell, suffix: str, **arguments: Any) -> Any:
        call, tensors = call_with(cell, **arguments)
        if not suffix:
            layers, asked = call.text
            call, tensors = parse(layers, asked.replace("save", "")), detached(tensors)
        y, h_n, c_n, cells, trace, _ = ops.run_forward(call, *tensors)
        states = [h_n[0], c_n[0]] if call.has_c else [h_n[0], c_n]
        with_gradients = smooth(call, (y, *states, cells))
        gates = dict(zip(cell.gates, trace[0].unbind(2), strict=True)) if trace.numel() else {}
        results = (*with_gradients, gates)
        if not suffix:
            return results

        def pullback(**weights: np.ndarray) -> Grads:
            at, leaves = leaves_of(tensors)
            found = torch.autograd.grad(
                with_gradients, leaves, list(map(torch.from_numpy, weights.values()))
            )
            names = ["x", "h0", "c0", *call.kinds]
            gradients = dict.fromkeys(Grads._fields)
            for n, g in zip(at, found, strict=True):
                gradients[names[n]] = g[0] if names[n] in ("h0", "c0") else g
            return Grads(**gradients)

        return results, pullback


def by_operator(call: Any, *tensors: Any) -> Any:
    return ops.forward(*call.text, *tensors)


def detached(tensors: Inputs, dtype: Any = None) -> Inputs:
    """Tensors without gradients, and floating ones of another dtype."""

    def change(a: Any) -> Any:
        if a is None or not a.is_floating_point():
            return a
        return a.detach().to(dtype or a.dtype)

    of_first, parameters = map(change, tensors[:3]), list(map(change, tensors.parameters))
    return Inputs(*of_first, parameters, *tensors[4:])
