"""`fusedrnn::forward` from the cell's definition, of which PyTorch has every derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import Parameters
from .call import Call, Inputs, Outputs, with_seed


def state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of states for x: at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def define(call: Call, *tensors: Any) -> Outputs:
    """Return the results of `forward` from operations of PyTorch, which has their derivatives.

    16-bit inputs are computed in float32, which states also have.
    """
    of_state = state_dtype(tensors[0])

    def wide(a: Any) -> Any:
        return a.to(of_state) if a is not None and a.is_floating_point() else a

    given = Inputs(*tensors)
    of_y = call.dtype(given)
    options, D = with_seed(call, given.seed), call.directions
    parameters = iter(map(wide, given.parameters))
    x, states = wide(given.x), [wide(a) for a in given[1 : 1 + len(call.cell.states)]]
    ends, traces = [], []
    for layer in range(call.layers):
        done = []
        for at in range(layer * D, (layer + 1) * D):
            of_pass = Parameters(**{kind: next(parameters) for kind in call.kinds})
            start = [None if a is None else a[at] for a in states]
            options = options._replace(where=call.options.where + at)
            reverse = call.reverse or at % D == 1
            masks = (given.lengths, given.resets, given.mask, reverse)
            run: Any = reference.run
            done.append(run(call.cell.reference, x, of_pass, start, *masks, options))
        x = torch.cat([of.y for of in done], -1)
        ends += [of.state for of in done]
        traces += [torch.stack(list(of.gates.values()), 2) for of in done]
    none = given.x.new_empty(0)
    h_n, *c_n = (torch.stack(of_letter) for of_letter in zip(*ends, strict=True))
    keeps_cells = call.options.return_cells
    return (
        x.to(of_y),
        h_n,
        c_n[0] if c_n else none,
        torch.cat([of.cells for of in done], -1) if keeps_cells else none,
        torch.stack(traces).to(of_y) if call.options.trace else none,
        none,
    )
