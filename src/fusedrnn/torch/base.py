"""The base of our PyTorch modules: a cell's parameters, options and calls."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, fx, nn
from torch.nn import init
from torch.nn.utils import parametrize

from .. import _cpu, checks
from ..cells import CELLS
from ..options import DEFAULTS, OWN_ACTIVATIONS, ActivationLike, check_options
from . import ops
from .call import Call, describe, parse
from .kernels import follow_threads
from .transfer import CACHES, changed_by_others, converted


class RNNOptions(TypedDict, total=False):
    """Keyword arguments beyond torch.nn's; see `fusedrnn.LSTM`."""

    activation: ActivationLike
    clip: float | None
    zoneout: float | tuple[float, float]
    recurrent_dropout: float
    weight_dropout: float
    orthogonal: bool
    precision: str


class GRUOptions(RNNOptions, total=False):
    """Keyword arguments beyond torch.nn's; see `fusedrnn.GRU`."""

    reset_after: bool
    recurrent_activation: ActivationLike
    layer_norm: bool


class LSTMOptions(RNNOptions, total=False):
    """Keyword arguments beyond torch.nn's; see `fusedrnn.LSTM`."""

    peephole: bool
    coupled_gates: bool
    recurrent_activation: ActivationLike
    layer_norm: bool
    cell_clip: float | None
    forget_bias: float | None


_OPTIONS = DEFAULTS | {"forget_bias": None, "orthogonal": False, "precision": "exact"}


def of_cell(kind: Any) -> dict[str, Any]:
    """Return the options that a cell has, with their defaults."""
    return {n: value for n, value in _OPTIONS.items() if n in kind.__optional_keys__}


_OF_CALLS = (
    *OWN_ACTIVATIONS,
    "clip",
    "cell_clip",
    "zoneout",
    "recurrent_dropout",
    "weight_dropout",
)
_OF_INITIAL_VALUES = ("forget_bias", "orthogonal")
_HALVES = (torch.bfloat16, torch.float16)


def _as_plain(value: Any) -> Any:
    """Return a string, a number or several, perhaps NumPy's, for JSON."""
    if isinstance(value, (tuple, list)):
        return list(map(_as_plain, value))
    return value if isinstance(value, str) else float(value)


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise TypeError for an argument of another type, as torch.nn does."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} should be of type {kind.__name__}, got: {type(value).__name__}"
        )


def check_dense(name: str, a: Any) -> None:
    """Refuse a tensor whose elements have no strides: a sparse or nested one."""
    if isinstance(a, Tensor) and (a.is_nested or a.layout != torch.strided):
        kind = "nested" if a.is_nested else str(a.layout)
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")


class Recurrent(nn.Module):
    """The base of layers and single steps: a cell's parameters and options."""

    input_size: int
    hidden_size: int
    bias: bool
    _theirs: ClassVar[Any]  # the class of torch.nn that it replaces
    _is_narrow: ClassVar[bool] = False  # whether its weights have 8 or 16 bits
    _shown: ClassVar[dict[str, Any]]  # torch.nn's arguments, with their defaults
    _defaults: ClassVar[dict[str, Any]]  # the cell's options, with their defaults
    _names: list[str]  # the names of all parameters
    _together: str  # describes all layers to an operator

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        bias: bool,
        proj_size: int,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        check_kind("input_size", input_size, int)
        check_kind("hidden_size", hidden_size, int)
        check_kind("proj_size", proj_size, int)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero, got {size}")
        if not 0 <= proj_size < hidden_size:
            raise ValueError(
                f"proj_size must be from 0, for none, to hidden_size - 1 = {hidden_size - 1}, "
                f"got {proj_size}"
            )
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bool(bias)
        self.proj_size = proj_size
        self._cell = cell
        self._is_pair = len(CELLS[cell].states) > 1
        unknown = [name for name in options if name not in self._defaults]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}")
        self._options = dict(self._defaults) | dict(options)
        self._check_options(self._options)

    def _check_options(self, given: Mapping[str, Any]) -> None:
        for name in ("peephole", "layer_norm", "orthogonal"):
            checks.flag(name, given.get(name, False))
        if given["precision"] not in ("exact", "tf32"):
            raise ValueError(f'precision must be "exact" or "tf32", got {given["precision"]!r}')
        of_calls = {name: given[name] for name in _OF_CALLS if name in given}
        checked = check_options(CELLS[self._cell], of_calls | {"training": True, "seed": 0})
        self._is_random = checked.is_random
        if given.get("forget_bias") is not None:
            forget_bias = checks.number("forget_bias", given["forget_bias"])
            if not self.bias or given["coupled_gates"]:
                reason = "without a forget gate or a bias"
                raise ValueError(f"forget_bias must be None {reason}, got {forget_bias}")

    def _describe(self, **more: Any) -> str:
        """Return the string that describes layers of this cell and options to an operator."""
        given = {name: self._options.get(name, _OPTIONS[name]) for name in _OF_CALLS}
        asked = {n: _as_plain(v) for n, v in given.items() if v != _OPTIONS[n]}
        precision = self._options["precision"]
        return describe(self._cell, asked, self._kinds(), precision=precision, **more)

    def _kinds(self) -> list[str]:
        """Return the names of the parameters that each layer and direction has."""
        has = (self.proj_size, self.bias, self._has("peephole"), self._has("layer_norm"))
        return list(CELLS[self._cell].layer_shapes(1, 2, *has))

    def _has(self, option: str) -> bool:
        return bool(self._options.get(option, False))

    # Parameters

    @property
    def _width(self) -> int:
        """The number of units of h."""
        return self.proj_size or self.hidden_size

    def _add_parameters(self, suffix: str, I: int, **factory: Any) -> list[str]:
        """Register a cell's parameters; return their names."""
        has = (self.proj_size, self.bias, self._has("peephole"), self._has("layer_norm"))
        shapes = CELLS[self._cell].layer_shapes(I, self.hidden_size, *has)
        for kind, shape in shapes.items():
            value = torch.empty(shape.lengths, **factory)
            self.register_parameter(kind + suffix, nn.Parameter(value))
        return [kind + suffix for kind in shapes]

    def reset_parameters(self) -> None:
        """Draw new parameters, uniform in ±1/√H, from the same random numbers as torch.nn."""
        bound, H = self.hidden_size**-0.5, self.hidden_size
        forget_bias = self._options.get("forget_bias")
        for name, p in self.named_parameters():
            kind = name.rpartition(".")[2]
            if kind.startswith(("gamma", "beta")):
                init.constant_(p, float(kind.startswith("gamma")))
                continue
            init.uniform_(p, -bound, bound)
            if self._options["orthogonal"] and kind.startswith("weight_hh"):
                for block in p.detach().split(H):
                    init.orthogonal_(block)
            if forget_bias is not None and kind.startswith("bias"):
                init.constant_(p.detach()[H : 2 * H], forget_bias * kind.startswith("bias_ih"))

    def _get(self, name: str) -> Tensor:
        """Return a parameter, or the tensor that other code has put in its place."""
        p = self._parameters.get(name)
        if p is None:
            p = getattr(self, name)
            if p is None:
                raise TypeError(f"{name} must be a tensor, got None")
        return p

    def with_parameters(self, parameters: dict[str, Tensor]) -> Any:
        """Return a module that computes with other parameters and shares everything else.

        Unlike `torch.func.functional_call`, which sets the parameters of the module itself, it
        can be called on several threads at a time, and it takes microseconds.
        """
        self._plain, self._saving  # noqa: B018  # computed here once, not in each such module
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _parameters=parameters)
        return other

    def extra_repr(self) -> str:
        """Return the sizes and the arguments that differ from their defaults."""
        shown = [f"{self.input_size}, {self.hidden_size}"]
        defaults = self._shown | {"nonlinearity": "tanh"} | self._defaults
        for name, default in defaults.items():
            value = getattr(self, name, default)
            if value != default:
                shown.append(f"{name}={value}")
        return ", ".join(shown)

    # Calls

    @functools.cached_property
    def _saving(self) -> Call:
        """The description of a call without options that saves values for backward."""
        return parse(self._together, "save")

    @functools.cached_property
    def _plain(self) -> tuple[Call, _cpu.TensorLayers]:
        """The description and the compiled layers of a call without options on the CPU."""
        call = parse(self._together)
        return call, call.of_sizes(self.input_size, self.hidden_size, self._width)

    def _infer(self, input: Any, hx: Any, axes: int) -> Any:
        """Run a call without options or random masks on unchecked tensors.

        Return False if autograd must record the call, and None if an argument needs checks or
        a mode, transform or tracer must record it.
        """
        follow_threads()
        call, layers = self._plain
        weights = list(map(self._parameters.get, self._names))
        return layers.infer(input, hx, weights, axes, call.options)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {k: v for k, v in state.items() if k not in CACHES}

    # Other tools

    def _beyond_torch(self) -> dict[str, Any]:
        """Return the options that change what a call computes and that torch.nn lacks."""
        given = {n: self._options[n] for n in self._defaults if n not in _OF_INITIAL_VALUES}
        more = {name: value for name, value in given.items() if value != self._defaults[name]}
        if getattr(self, "nonlinearity", None) == "identity":
            more["nonlinearity"] = "identity"
        return more

    def _as_torch(self) -> nn.Module | str:
        """Return torch.nn's module with everything of this one, or why there is none."""
        more = [f"{name}={value}" for name, value in self._beyond_torch().items()]
        if more:
            return f"torch.nn.{self._theirs.__name__} has no {', '.join(more)}"
        kind = parametrize.type_before_parametrizations(self)
        if "_theirs" not in vars(kind):
            return changed_by_others(self) or f"{kind.__name__} is a subclass"
        return converted(self, self._theirs)

    def __prepare_scriptable__(self) -> nn.Module:
        """Return torch.nn's module, which `torch.jit.script` compiles in the place of this."""
        name, found = self._theirs.__name__, self._as_torch()
        if isinstance(found, str):
            raise TypeError(
                f"torch.jit.script cannot compile a fusedrnn.torch.{name}: {found}; "
                "torch.jit.trace, torch.export and torch.compile can. Modules of ours before "
                "it are torch.nn's now: fusedrnn.torch.swap(model) puts ours back"
            )
        warnings.warn(
            f"torch.jit.script compiles torch.nn.{name} in the place of fusedrnn.torch.{name}, "
            "and puts it into the model, too: fusedrnn.torch.swap(model) puts ours back",
            stacklevel=2,
        )
        return found

    @property
    def qconfig(self) -> Any:
        """The configuration that torch.ao.quantization has set."""
        if "qconfig" not in self.__dict__:
            raise AttributeError("qconfig")  # then nn.Module raises its own
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        """Warn that torch.ao.quantization, which sets this in every module, leaves ours."""
        if not self._is_narrow:
            warnings.warn(
                f"torch.ao.quantization does not change a fusedrnn.torch."
                f'{self._theirs.__name__}: fusedrnn.torch.quantize(model, "int8") does',
                stacklevel=2,
            )
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        if self.__dict__.pop("qconfig", self) is self:
            raise AttributeError("qconfig")

    def _as_leaf(self, proxy: fx.Proxy, *args: Any, **kwargs: Any) -> Any:
        """Return a call of this module as one node of the graph that torch.fx traces."""
        tracer: Any = proxy.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

    def _check_like_weights(self, name: str, a: Any, like: Tensor, error: type) -> None:
        if not isinstance(a, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(a).__name__}")
        check_dense(name, a)
        if a.device != like.device:
            raise RuntimeError(
                f"{name} must be on {like.device} like the parameters, got {a.device}"
            )
        if a.dtype != like.dtype and not _is_cast(like.device.type):
            way = "dequantize()" if a.is_quantized else f"to({like.dtype})"
            other = f", or the module by .to({a.dtype})" * a.is_floating_point()
            raise error(
                f"{name} must have the dtype of the parameters, {like.dtype}, got {a.dtype}: "
                f"convert it by .{way}{other}"
            )

    def _weights(self, names: Sequence[str]) -> list[Tensor]:
        """Return parameters, which must have the device and dtype of the first."""
        weights = [self._get(name) for name in names]
        first = weights[0]
        dtype, device = first.dtype, first.device
        for name, p in zip(names, weights, strict=True):
            if p.dtype != dtype or p.device != device:
                self._check_like_weights(name, p, first, RuntimeError)
        return weights

    def _split(self, hx: Any) -> dict[str, Any]:
        """Return the user's states by their names in error messages."""
        if hx is None:
            return {}
        if not self._is_pair:
            return {"hx": hx}
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            what = type(hx).__name__ + (
                f" of {len(hx)}" if isinstance(hx, (tuple, list)) else ""
            )
            raise TypeError(f"hx must be a pair (h_0, c_0), got {what}")
        return {"hx[0]": hx[0], "hx[1]": hx[1]}

    def _seed(self, seed: int | None) -> Tensor | None:
        """Return the seed of random masks as a tensor; None draws one from PyTorch."""
        given = checks.seed(seed)
        if not (self._is_random and self.training):
            return None
        if given is None:
            return torch.randint(2**63 - 1, (1,), device="cpu")
        signed = given - 2**64 if given >= 2**63 else given
        return torch.tensor([signed], device="cpu")

    def _asked(
        self,
        tensors: Iterable[Any],
        return_cells: bool = False,
        trace: bool = False,
        bptt: int | None = None,
        recompute: bool = False,
        masked_output: str = "zero",
    ) -> str:
        """Return the words that describe a call's options to an operator."""
        asked = "save" if _saves(tensors, self.training) else ""
        if self.training and self._is_random:
            asked += " training"
        flags = {"return_cells": return_cells, "trace": trace, "recompute": recompute}
        for name, value in flags.items():
            if value is not False and checks.flag(name, value):
                asked += f" {name}"
        if checks.choice("masked_output", masked_output, ("zero", "last")) == "last":
            asked += " repeat"
        if bptt is not None:
            asked += f" bptt={checks.positive('bptt', bptt)}"
        return asked

    def _compute(
        self, layers: str, asked: str, *tensors: Any, wide_states: bool = False
    ) -> tuple[Tensor, ...]:
        """Run the layers that `layers` describes on the tensors of `ops.Inputs`, x first.

        Under autocast on the CPU states stay float32 with `wide_states`, as those of torch.nn's
        cells do.
        """
        if in_onnx_export():
            from . import exporting  # which few calls need

            return exporting.as_node(self, layers, asked, *tensors)
        x, h0, c0, weights, *others = tensors
        dtype = _computed_in(x)
        if dtype is None:
            return _run(layers, asked, *tensors)
        kind, is_cast = x.device.type, _is_cast(x.device.type)
        result = dtype if is_cast else x.dtype
        if kind == "cpu" and dtype == torch.float16:
            dtype = torch.float32

        def read(a: Tensor) -> Tensor:
            rounds = kind == "cpu" and dtype == torch.bfloat16 and a.dtype == torch.float32
            return a if rounds else a.to(dtype)  # the kernels round float32 where they read it

        asked += " bfloat16" * (kind == "cpu" and dtype == torch.bfloat16)
        x, weights = read(x), list(map(read, weights))
        of_state = torch.promote_types(dtype, torch.float32)
        start = (None if a is None else a.to(of_state) for a in (h0, c0))
        with torch.autocast(kind, enabled=False):
            y, *states, trace, saved = _run(layers, asked, x, *start, weights, *others)
        if not (wide_states and is_cast and kind == "cpu"):
            states = [a.to(result) for a in states]
        return (y.to(result), *states, trace.to(result), saved)


def _run(layers: str, asked: str, *tensors: Any) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling():  # a graph holds strings, not a `Call`
        made: tuple[Tensor, ...] = ops.forward(layers, asked, *tensors)
        return made
    return ops.run_forward(parse(layers, asked), *tensors)


def _saves(tensors: Iterable[Any], training: bool) -> bool:
    """Return whether backward may follow."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and (training or not _is_exporting())
    return torch.is_grad_enabled() if ops.is_transformed() else ops.has_gradient(tensors)


def _is_cast(kind: str) -> bool:
    """Return whether autocast is enabled on a kind of device."""
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def is_half(x: Tensor) -> bool:
    """Return whether a tensor has 16 bits, of which the states within a call have more."""
    return x.dtype in _HALVES


def _in_onnx_export() -> bool:
    """Return whether `torch.onnx.export` traces the model."""
    return torch.onnx.is_in_onnx_export()


# The compiler takes torch.onnx's own function as false.
in_onnx_export: Any = torch.compiler.assume_constant_result(_in_onnx_export)


def _computed_in(x: Tensor) -> torch.dtype | None:
    """Return the dtype to compute in, or None if it is the dtype of all tensors."""
    kind = x.device.type
    if _is_cast(kind) and x.dtype != torch.float64:  # autocast does not change float64
        return torch.get_autocast_dtype(kind)
    return x.dtype if is_half(x) else None


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def _option(name: str) -> Any:
    return property(lambda self: self._options.get(name, _OPTIONS[name]))


for _name in _OPTIONS:
    setattr(Recurrent, _name, _option(_name))
