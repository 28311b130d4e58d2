"""Calls of the kernels with the tensors of Keras' torch backend."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from keras import ops
from torch import Tensor

import fusedrnn.torch as ft

from .weights import op_of, weights_of

_MODULES: dict[str, Any] = {"lstm": ft.LSTM, "gru": ft.GRU, "rnn": ft.RNN}
_OF_CALLS = ("mask", "masked_output", "seed")


def run(
    cell: Any, x: Tensor, states: list[Tensor], options: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """Run a Keras cell over x (B, T, I); return all outputs (B, T, units) and the last states.

    `options` are those of our modules and of their calls.
    """
    W, R, *biases = weights_of(cell, ops.convert_to_tensor, _exchange)
    weights = {"weight_ih_l0": W.contiguous(), "weight_hh_l0": R.contiguous()}
    if biases[0] is not None:
        for name, bias in zip(("bias_ih_l0", "bias_hh_l0"), biases, strict=True):
            weights[name] = torch.zeros_like(biases[0]) if bias is None else bias
    of_module = {n: value for n, value in options.items() if n not in _OF_CALLS}
    of_call = {n: value for n, value in options.items() if n in _OF_CALLS}
    module = _kept_module(op_of(cell), R.shape[1], W.shape[1], cell.use_bias, **of_module)
    hx = tuple(state.unsqueeze(0) for state in states)
    layer = module.with_parameters(weights)
    y, ends = layer(x.to(W.dtype), hx if len(hx) > 1 else hx[0], **of_call)
    return y, [end.squeeze(0) for end in (ends if len(hx) > 1 else (ends,))]


def _exchange(a: Tensor) -> Tensor:
    first, second, third = a.chunk(3, -1)
    return torch.cat((second, first, third), -1)


@functools.lru_cache
def _module(op: str, units: int, inputs: int, bias: bool, **options: Any) -> Any:
    """Return a module of these sizes and options, whose parameters have no values."""
    return _MODULES[op](inputs, units, bias=bias, batch_first=True, device="meta", **options)


# A compiler would ignore the cache and make a module in each call.
_kept_module: Any = torch.compiler.disable(_module)
