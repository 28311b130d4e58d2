"""Calls of our modules as nodes of ONNX, while `torch.onnx.export` traces a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..convert.cells import check_options
from ..convert.onnx import OFFERED, attributes_of, weights_of
from ..reference import Parameters
from .call import parse


def as_node(
    module: Any,
    layers: str,
    asked: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    _seed: Any,
) -> tuple[Tensor, ...]:
    """Return the results of `Recurrent._compute` as those of LSTM, GRU or RNN nodes.

    Raises
    ------
    ValueError: an option that ONNX lacks. RuntimeError: a call of another exporter, or an older
        PyTorch.
    """
    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.onnx.export needs dynamo=True for modules of fusedrnn.torch")
    if not hasattr(torch.onnx, "ops"):
        raise RuntimeError(
            f"torch.onnx.export needs torch 2.8 for modules of fusedrnn.torch, got "
            f"{torch.__version__}"
        )
    check_options(module, "ONNX", *OFFERED)
    call = parse(layers, asked)
    unknown = {
        "resets": resets is not None,
        "mask": mask is not None,
        "return_cells": call.options.return_cells,
        "trace": call.options.trace,
        "random masks of training mode": call.options.training,
    }
    for name, is_asked in unknown.items():
        if is_asked:
            raise ValueError(f"the call must not have {name}, which ONNX lacks")
    op, D, H = call.cell.op, call.directions, module.hidden_size
    each = len(call.kinds)
    cells = [
        Parameters(**dict(zip(call.kinds, weights[at * each :], strict=False)))
        for at in range(call.layers * D)
    ]
    one_way = "reverse" if call.reverse else "forward"
    attributes = attributes_of(op.upper(), module)
    attributes["direction"] = "bidirectional" if D == 2 else one_way
    T, B = x.shape[:2]
    count = len(call.cell.states)
    ends: list[list[Tensor]] = [[] for _ in range(count)]
    for n in range(call.layers):
        rows = slice(n * D, (n + 1) * D)
        W, R, bias, P = weights_of(op, cells[rows])
        starts = [None if a is None else a[rows] for a in (h0, c0)]
        inputs = [x, W, R, bias, None if lengths is None else lengths.int(), *starts, P]
        while inputs[-1] is None:
            inputs.pop()
        Y, *after = torch.onnx.ops.symbolic_multi_out(
            op.upper(),
            inputs,
            attributes,
            dtypes=[x.dtype] * (1 + count),
            shapes=[(T, D, B, H), *[(D, B, H)] * count],
        )
        x = Y.transpose(1, 2).flatten(2)
        for of_letter, end in zip(ends, after, strict=True):
            of_letter.append(end)
    h_n, *c_n = (a[0] if len(a) == 1 else torch.cat(a) for a in ends)
    none = x.new_empty(0)
    return (x, h_n, *(c_n or [none]), none, none, none)
