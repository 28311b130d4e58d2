"""Modules for inference whose weights have 8 or 16 bits."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, library, nn

from .. import _cpu
from ..backend import Spec
from ..backend.cpu import HOST
from ..options import PLAIN
from ..parameters import SCALES
from ..reference import Narrow, Parameters
from ..reference.narrow import DTYPES, NarrowPrecision
from ..weights import WEIGHTS, check_precision, narrow_weight
from .base import Recurrent, check_dense, in_onnx_export
from .call import Call, Inputs, Maybe, parse
from .kernels import checked_masks, follow_threads
from .modules import GRU, LSTM, RNN, Masks, _Layers, _Made
from .steps import GRUCell, LSTMCell, RNNCell, _Step
from .swapping import as_ours, check_model, kind_of, listed, replace_modules
from .transfer import changed_by_others, transfer_hooks, transfer_own

# Calls


def _layers_of(call: Call, I: int, weights: Sequence[Tensor]) -> _cpu.Layers:
    """Return compiled layers with the weights of all layers and directions."""
    D, each, H = call.directions, len(weights) // call.count, 0
    every = []
    assert call.weights is not None
    for at in range(call.count):
        arrays = [w.numpy() for w in weights[at * each : (at + 1) * each]]
        found: dict[str, Any] = dict(zip(call.kinds, arrays, strict=True))
        scales = {
            name: found.pop(scale, None) for name, scale in zip(WEIGHTS, SCALES, strict=True)
        }
        for name in WEIGHTS:
            if name in found:
                values = found[name].view(DTYPES[call.weights])
                bits = call.x_bits if name == "weight_ih" and at < D else 8
                found[name] = Narrow(call.weights, values, scales[name], bits)
        every.append(Parameters(**found))
        H = found["weight_ih"].shape[0] // len(call.cell.gates)
    R = every[0].weight_hh.shape[1]
    return HOST.layers(Spec(call.cell, I, H, R, call.layers, D), every)


# Packed layers of calls from graphs, the least recently used first.
_MOST_KEPT = 64
_kept: OrderedDict[Any, _cpu.Layers] = OrderedDict()


def _identity(weights: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return what changes if a weight is changed in place or replaced."""
    return tuple([(w.data_ptr(), w._version) for w in weights])


def _kept_layers(call: Call, I: int, weights: Sequence[Tensor]) -> _cpu.Layers:
    key = (call.text[0], I, _identity(weights))
    layers = _kept.pop(key, None)
    if layers is None:
        layers = _layers_of(call, I, weights)
    _kept[key] = layers
    while len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return layers


def _run(
    layers: _cpu.Layers,
    call: Call,
    x: Tensor,
    h0: Maybe,
    c0: Maybe,
    lengths: Maybe,
    resets: Maybe,
    mask: Maybe,
) -> list[Tensor]:
    """Return y, h_n, c_n, cells and trace; those that the call does not have are empty."""
    follow_threads()

    def array(a: Maybe) -> Any:
        return None if a is None else a.detach().contiguous().numpy()

    h, c = array(h0), array(c0)
    state = (h, c) if call.has_c and (h is not None or c is not None) else h
    x = x.detach()
    if x.stride(-1) != 1:
        x = x.contiguous()
    lengths, resets, mask = checked_masks(x, lengths, resets, mask)
    masks = (array(lengths), array(resets), array(mask))
    results = layers.forward(x.numpy(), state, *masks, call.options, None, False)
    if results is None:
        raise ValueError("tensors must be on the CPU and have the sizes and dtype of x")
    y, ends, *others = results
    made = [y, *(ends if call.has_c else (ends, None))]
    made.append(others.pop(0) if call.options.return_cells else None)
    made.append(others.pop(0) if call.options.trace else None)
    return [torch.empty(0) if a is None else torch.from_numpy(a) for a in made]


def _infer(
    layers: str,
    asked: str,
    x: Tensor,
    h0: Maybe,
    c0: Maybe,
    weights: Sequence[Tensor],
    *masks: Maybe,
) -> list[Tensor]:
    call = parse(layers, asked)
    return _run(_kept_layers(call, x.shape[-1], weights), call, x, h0, c0, *masks)


def _fake_infer(
    layers: str, asked: str, x: Tensor, h0: Maybe, c0: Maybe, weights: Any, *_: Any
) -> list[Tensor]:
    call = parse(layers, asked)
    shapes = call.output_shapes(call.sizes(Inputs(x, h0, c0, weights)), False)
    return [x.new_empty((0,) if shape is None else shape) for shape in shapes]


infer = library.custom_op(
    "fusedrnn::infer",
    _infer,
    mutates_args=(),
    schema="(str layers, str asked, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, "
    "Tensor? lengths, Tensor? resets, Tensor? mask) -> Tensor[]",
)
infer.register_fake(_fake_infer)


# Modules


class _NarrowModule(Recurrent):
    """The part that all modules with narrow weights share. All parameters are buffers."""

    weights: NarrowPrecision
    x_bits: int
    _is_narrow = True

    @classmethod
    def of(cls, module: Recurrent, weights: NarrowPrecision, x_bits: int) -> _NarrowModule:
        """Return a module with the weights of one of ours."""
        new = object.__new__(cls)
        nn.Module.__init__(new)
        of_module = ("_plain", "_saving", *new.__dict__)
        new.__dict__.update({k: v for k, v in module.__dict__.items() if k not in of_module})
        new.weights, new.x_bits = weights, x_bits
        transfer_own(module, new)
        for name in module._names:
            value = module._get(name).detach().cpu()
            if value.dtype in (torch.bfloat16, torch.float16):
                value = value.float()
            if name.partition("_l")[0] not in WEIGHTS:
                new.register_buffer(name, value.clone())
                continue
            narrow = narrow_weight(name, value.numpy(), weights, 8)
            # PyTorch converts float buffers to another dtype, but not integers.
            values = narrow.values if weights == "int8" else narrow.values.view(np.int16)
            new.register_buffer(name, torch.from_numpy(values))
            if narrow.scale is not None:
                scale = name.replace("weight", "scale")
                new.register_buffer(scale, torch.from_numpy(narrow.scale))
        new._set_names(module)
        new.training = module.training
        transfer_hooks(module, new)
        return new

    @functools.cached_property
    def _options_of_calls(self) -> bool:
        """Whether calls have options, as a clip, even if the user asks for none."""
        return parse(self._together).options != PLAIN

    def _set_names(self, module: Recurrent) -> None:
        """Set the names of all buffers, as a call takes them, and the call's description."""
        call, self._names = parse(module._together), []
        each = len(module._names) // call.count
        for at in range(0, len(module._names), each):
            group = module._names[at : at + each]
            scales = [name.replace("weight", "scale") for name in group]
            self._names += group + [s for s in scales if s in self._buffers and s not in group]
        self._together = self._describe(layers=call.layers, directions=call.directions)

    @property
    def _draws(self) -> bool:
        """Whether a call would draw random masks, which narrow weights do not support."""
        return self.training and (self._is_random or getattr(self, "dropout", 0) > 0)

    def _kinds(self) -> list[str]:
        kinds = super()._kinds()
        if self.weights == "int8":
            kinds += [kind.replace("weight", "scale") for kind in kinds if kind in WEIGHTS]
        return kinds

    def _describe(self, **more: Any) -> str:
        return super()._describe(weights=self.weights, x_bits=self.x_bits, **more)

    def _beyond_torch(self) -> dict[str, Any]:
        return super()._beyond_torch() | {"weights": self.weights}

    def _layers(self, weights: Sequence[Tensor]) -> _cpu.Layers:
        """Return the packed layers, which are made again when a weight changes."""
        key = _identity(weights)
        kept = self.__dict__.get("_packed")
        if kept is None or kept[0] != key:
            call = parse(self._together)
            kept = (key, _layers_of(call, self.input_size, weights))
            self.__dict__["_packed"] = kept
        layers: _cpu.Layers = kept[1]
        return layers

    def _infer_unchecked(self, x: Any, hx: Any, is_step: bool) -> Any:
        """Run a call without options on unchecked tensors.

        x is (T, B, I) or (T, I), or (B, I) for a step. Return y as an array and a list of
        states, or None if an argument needs checks or the call must be recorded.
        """
        given = (x, *(hx if isinstance(hx, tuple) else () if hx is None else (hx,)))
        if torch.compiler.is_compiling() or any(type(a) is not Tensor for a in given):
            return None
        if torch.is_grad_enabled() and any(a.requires_grad for a in given):
            return None
        if self._draws or self._options_of_calls:
            return None
        kept, buffers = self.__dict__.get("_packed"), self._buffers
        weights: list[Any] = [buffers.get(name) for name in self._names]
        if kept is None or any(w is None for w in weights):
            return None
        if kept[0] != _identity(weights):
            return None
        try:
            first, *others = (a.numpy()[None] if is_step else a.numpy() for a in given)
        except (TypeError, RuntimeError):  # on a GPU, or a pending conjugation
            return None
        follow_threads()
        state = tuple(others) if len(others) > 1 else others[0] if others else None
        results = kept[1].forward(first, state, None, None, None, PLAIN, None, False)
        if results is None:
            return None
        y, ends = results
        ends = ends if self._is_pair else (ends,)
        return y, [torch.from_numpy(s) for s in ends]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_packed"}

    def _weights(self, names: Sequence[str]) -> list[Tensor]:
        weights = [self._get(name) for name in names]
        for name, w in zip(names, weights, strict=True):
            if w.device.type != "cpu":
                raise RuntimeError(
                    f"{name} must be on the CPU, because a module with {self.weights} weights "
                    f"runs there, got one on {w.device}"
                )
            if name.partition("_l")[0] not in WEIGHTS and w.dtype != torch.float32:
                raise RuntimeError(f"{name} must be torch.float32, got {w.dtype}")
        return weights

    def _get(self, name: str) -> Tensor:
        found = getattr(self, name)
        if not isinstance(found, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(found).__name__}")
        return found

    def _check_like_weights(self, name: str, a: Any, like: Tensor, error: type) -> None:
        if not isinstance(a, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(a).__name__}")
        check_dense(name, a)
        if a.device.type != "cpu":
            raise RuntimeError(f"{name} must be on the CPU like the weights, got {a.device}")
        if a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise error(
                f"{name} must be torch.float32 with {self.weights} weights, got {a.dtype}"
            )

    def _call(
        self, asked: str, x: Tensor, state: Sequence[Maybe], *masks: Maybe
    ) -> list[Tensor]:
        """Return y, h_n, c_n, cells and trace in the dtype of x."""
        if in_onnx_export():
            from ..convert.cells import check_options  # which few calls need

            check_options(self, "ONNX")
        if self._draws:
            raise RuntimeError(
                f"a module with {self.weights} weights is for inference: call eval() first"
            )
        weights = self._weights(self._names)
        dtype = x.dtype
        x = x.float()
        h0, c0 = (None if s is None else s.float() for s in (*state, None)[:2])
        tensors = [a for a in (x, h0, c0) if a is not None]
        recorded = torch.is_grad_enabled() and any(a.requires_grad for a in tensors)
        if recorded or torch.compiler.is_compiling() or type(x) is not Tensor:
            made = infer(self._together, asked, x, h0, c0, weights, *masks)
        else:
            call = parse(self._together, asked)
            made = _run(self._layers(weights), call, x, h0, c0, *masks)
        return made if dtype == torch.float32 else [a.to(dtype) for a in made]

    def extra_repr(self) -> str:
        """Return the sizes, the arguments that differ from their defaults, and the weights."""
        bits = ", x_bits=8" if self.x_bits == 8 else ""
        return f"{super().extra_repr()}, weights={self.weights}{bits}"


class _NarrowLayers(_NarrowModule, _Layers):
    def _try_unchecked(self, input: Any, hx: Any) -> tuple[Any, ...] | None:
        if not isinstance(input, Tensor) or input.dim() not in (2, 3):
            return None
        turns = self.batch_first and input.dim() == 3
        made = self._infer_unchecked(input.transpose(0, 1) if turns else input, hx, False)
        if made is None:
            return None
        y, ends = torch.from_numpy(made[0]), made[1]
        y = y.transpose(0, 1) if turns else y
        return y, tuple(ends) if self._is_pair else ends[0]

    def _run(
        self,
        x: Tensor,
        state: tuple[Any, ...],
        masks: Masks,
        weights: list[Tensor],
        kept: dict[str, Any],
        seed: int | None,
        layout: Any = None,
    ) -> _Made:
        if kept["bptt"] is not None or kept["recompute"]:
            raise TypeError("bptt and recompute are for gradients, which narrow weights lack")
        words = {n: kept[n] for n in ("return_cells", "trace", "masked_output")}
        asked = self._asked((), **words)
        y, h_n, c_n, cells, trace = self._call(asked, x, state, *masks)
        final = [h_n, c_n][: 1 + self._is_pair]
        gates = self._gates([trace]) if kept["trace"] else {}
        return _Made(y, final, cells, gates)


class _NarrowStep(_NarrowModule, _Step):
    def _try_unchecked(self, input: Any, hx: Any) -> Any:
        if not isinstance(input, Tensor) or input.dim() != 2:
            return None
        made = self._infer_unchecked(input, hx, True)
        if made is None:
            return None
        ends = [s[0] for s in made[1]]
        return tuple(ends) if self._is_pair else ends[0]

    def _compute(
        self, layers: str, asked: str, *tensors: Any, wide_states: bool = False
    ) -> tuple[Tensor, ...]:
        x, h0, c0, _weights, *masks, _seed = tensors
        made = self._call("", x, (h0, c0), *masks)
        return (*made, made[-1])


class NarrowLSTM(_NarrowLayers, LSTM):
    """`LSTM` with narrow weights; `quantize` makes it."""


class NarrowGRU(_NarrowLayers, GRU):
    """`GRU` with narrow weights; `quantize` makes it."""


class NarrowRNN(_NarrowLayers, RNN):
    """`RNN` with narrow weights; `quantize` makes it."""


class NarrowLSTMCell(_NarrowStep, LSTMCell):
    """`LSTMCell` with narrow weights; `quantize` makes it."""


class NarrowGRUCell(_NarrowStep, GRUCell):
    """`GRUCell` with narrow weights; `quantize` makes it."""


class NarrowRNNCell(_NarrowStep, RNNCell):
    """`RNNCell` with narrow weights; `quantize` makes it."""


_NARROW: dict[type[nn.Module], Any] = {
    LSTM: NarrowLSTM,
    GRU: NarrowGRU,
    RNN: NarrowRNN,
    LSTMCell: NarrowLSTMCell,
    GRUCell: NarrowGRUCell,
    RNNCell: NarrowRNNCell,
}


class Quantized(NamedTuple):
    """The result of `quantize`; it prints as text.

    Attributes
    ----------
    model: a copy of the model with narrow weights.
    replaced: its new modules, by their names.
    kept: the reasons why recurrent modules were not replaced, by their names.

    >>> import torch, fusedrnn.torch as ft
    >>> done = ft.quantize(torch.nn.ModuleList([torch.nn.GRU(3, 4)]), "bfloat16")
    >>> list(done.replaced), done.kept
    (['0'], {})
    """

    model: nn.Module
    replaced: dict[str, nn.Module]
    kept: dict[str, str]

    def __str__(self) -> str:
        return listed(self.replaced, self.kept) or "no recurrent module"


def quantize(
    model: nn.Module, weights: NarrowPrecision, x_bits: int | None = None
) -> Quantized:
    """Return a copy of a model for inference, its recurrent weights in a narrow precision.

    It replaces every nn.LSTM, nn.GRU, nn.RNN, their cells and those of `fusedrnn.torch`, where
    ``torch.ao.quantization.quantize_dynamic`` replaced LSTM and GRU, and leaves everything else
    as it is. The new modules run on the CPU; they take the same calls, return the dtype of x,
    and have no gradients. In state_dict int8 weights are int8 with float32 scales, and those
    of 16 bits are int16, the bits.

    Parameters
    ----------
    model: a module; it is copied.
    weights, x_bits: as for `fusedrnn.LSTM.quantize`.

    Raises
    ------
    TypeError: model is not a module, or a weight is float64. ValueError: an unknown name, or a
        weight that is not finite or beyond the range of the precision.

    >>> import torch, fusedrnn.torch as ft
    >>> from torch import nn
    >>> model = nn.ModuleDict({"encoder": nn.GRU(3, 4), "head": nn.Linear(4, 1)})
    >>> done = ft.quantize(model, "int8")
    >>> print(done)
    encoder: NarrowGRU(3, 4, weights=int8)
    >>> y, h_n = done.model["encoder"](torch.zeros(5, 2, 3))
    """
    check_model(model)
    precision, bits = check_precision(weights, x_bits)

    def make(old: nn.Module) -> nn.Module | str | None:
        ours: Any = old if isinstance(old, Recurrent) else as_ours(old)
        if ours is None or isinstance(ours, str):
            return ours
        kind = kind_of(ours, _NARROW)
        if kind is None:
            return f"{type(old).__name__} is a subclass"
        why = changed_by_others(ours)
        new: nn.Module | str = why or kind.of(ours, precision, bits)
        return new

    copy = deepcopy(model)
    alone = make(copy)
    if isinstance(alone, nn.Module):
        return Quantized(alone, {"": alone}, {})
    return Quantized(copy, *replace_modules(copy, make))
