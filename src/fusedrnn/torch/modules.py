"""Modules in the place of torch.nn's: the same names, arguments, parameters and results.

What is not said here is as PyTorch's documentation says of the module of the same name. Options
of ours stay on the fused kernels, forward and backward.
"""

from __future__ import annotations

import json
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from .. import checks
from ..cells import CELLS
from ..functional import gru_cell, lstm_cell, rnn_cell
from ..options import DEFAULTS, check_options
from ..reference import Parameters
from . import ops
from .call import parse
from .kernels import compute_layer
from .packed import Layout

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RNNOptions(TypedDict, total=False):
    """Keyword arguments beyond torch.nn's; see `fusedrnn.LSTM`."""

    clip: float | None
    zoneout: float | tuple[float, float]
    recurrent_dropout: float
    weight_dropout: float
    orthogonal: bool
    precision: str


class GRUOptions(RNNOptions, total=False):
    """Keyword arguments beyond torch.nn's; see `fusedrnn.GRU`."""

    reset_after: bool
    layer_norm: bool


class LSTMOptions(RNNOptions, total=False):
    """Keyword arguments beyond torch.nn's; see `fusedrnn.LSTM`."""

    peephole: bool
    coupled_gates: bool
    layer_norm: bool
    cell_clip: float | None
    forget_bias: float | None


_OPTIONS = DEFAULTS | {"forget_bias": None, "orthogonal": False, "precision": "exact"}


def _of_cell(kind: Any) -> dict[str, Any]:
    """Return the options that a cell has, and what they are unless given."""
    return {n: value for n, value in _OPTIONS.items() if n in kind.__optional_keys__}


_TOLD = ("clip", "cell_clip", "zoneout", "recurrent_dropout", "weight_dropout")
_STATES = {Tensor, nn.Parameter, type(None)}
_HALVES = (torch.bfloat16, torch.float16)


def _as_floats(value: Any) -> Any:
    """Return a number or numbers, NumPy's or not, as JSON has them."""
    return list(map(float, value)) if isinstance(value, (tuple, list)) else float(value)


def _check_kind(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} should be of type {kind.__name__}, got: {type(value).__name__}"
        )


class _Recurrent(nn.Module):
    """What layers and single steps share: a cell's parameters and options."""

    input_size: int
    hidden_size: int
    bias: bool
    _shown: ClassVar[dict[str, Any]]  # defaults of arguments of torch.nn's
    _defaults: ClassVar[dict[str, Any]]  # of the options that the cell has

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
        _check_kind("input_size", input_size, int)
        _check_kind("hidden_size", hidden_size, int)
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
        told = {name: given[name] for name in _TOLD if name in given}
        request = check_options(CELLS[self._cell], told | {"training": True, "seed": 0})
        self._is_random = request.is_random
        if given.get("forget_bias") is not None:
            checks.number("forget_bias", given["forget_bias"])
            if not self.bias or given["coupled_gates"]:
                raise ValueError("forget_bias must be None without a forget gate or a bias")
        asked = {"cell": self._cell} | {
            name: value if name == "precision" else _as_floats(value)
            for name, value in given.items()
            if name in (*_TOLD, "precision") and value != _OPTIONS[name]
        }
        self._told = json.dumps(asked)[:-1]

    # Parameters

    @property
    def _width(self) -> int:
        """How many units h has."""
        return self.proj_size or self.hidden_size

    def _add_parameters(self, suffix: str, I: int, **factory: Any) -> list[str | None]:
        """Register a cell's parameters; return the names of all that `Parameters` has."""
        options = (self._options.get(name, False) for name in ("peephole", "layer_norm"))
        has = (self.proj_size, self.bias, *options)
        shapes = CELLS[self._cell].layer_shapes(I, self.hidden_size, *has)
        for kind, shape in shapes.items():
            value = torch.empty(shape.lengths, **factory)
            self.register_parameter(kind + suffix, nn.Parameter(value))
        return [kind + suffix if kind in shapes else None for kind in Parameters._fields]

    def reset_parameters(self) -> None:
        """Draw the parameters anew, uniform in ±1/√H, by the same numbers as torch.nn."""
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

    def _get(self, name: str | None) -> Tensor | None:
        """Return what an attribute is now: others may have put a tensor in its place."""
        if name is None:
            return None
        p = self._parameters.get(name)
        if p is None:
            p = getattr(self, name)
            if p is None:
                raise TypeError(f"{name} must be a tensor, got None")
        return p

    def extra_repr(self) -> str:
        """Return the arguments that were not left out."""
        shown = [f"{self.input_size}, {self.hidden_size}"]
        defaults = self._shown | {"nonlinearity": "tanh"} | self._defaults
        for name, default in defaults.items():
            value = getattr(self, name, default)
            if value != default:
                shown.append(f"{name}={value}")
        return ", ".join(shown)

    # Calls

    def _check_like_weights(self, name: str, a: Any, like: Tensor, error: type) -> None:
        if not isinstance(a, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(a).__name__}")
        if a.device != like.device:
            raise RuntimeError(
                f"{name} must be on {like.device} like the parameters, got {a.device}"
            )
        if a.dtype != like.dtype and not _is_cast(like.device.type):
            raise error(
                f"{name} must have the dtype of the parameters, {like.dtype}, got {a.dtype}: "
                f"convert it by .to({like.dtype}), or the module by .to({a.dtype})"
            )

    def _check_weights(self, names: list[str | None], weights: list[Any], like: Tensor) -> None:
        """Check that parameters are where and of the type that the first is."""
        for name, p in zip(names, weights, strict=True):
            if p is not None and (p.dtype != like.dtype or p.device != like.device):
                self._check_like_weights(str(name), p, like, RuntimeError)

    def _split(self, hx: Any) -> dict[str, Any]:
        """Return the states that a user gave, by their names."""
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
        """Return what random numbers depend on, drawn from PyTorch's for None."""
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
    ) -> str:
        """Return the end of the string that tells what a call is asked for."""
        asked = ""
        if _saves(tensors, self.training):
            asked += ', "save": true'
        if self.training and self._is_random:
            asked += ', "training": true'
        flags = {"return_cells": return_cells, "trace": trace, "recompute": recompute}
        for name, value in flags.items():
            if value is not False and checks.flag(name, value):
                asked += f', "{name}": true'
        if bptt is not None:
            asked += f', "bptt": {checks.positive("bptt", bptt)}'
        return asked + "}"

    def _compute(self, told: str, *tensors: Any) -> tuple[Tensor, ...]:
        """Run the cell over x (T, B, I), the first of the tensors of `ops.Inputs`."""
        x = tensors[0]
        dtype = _computed_in(x)
        if dtype is None:
            return ops.run_forward(told, *tensors)
        kind = x.device.type
        of_state = torch.promote_types(dtype, torch.float32)
        cast = [
            a
            if a is None or not a.is_floating_point()
            else a.to(of_state if 0 < i < 3 else dtype)
            for i, a in enumerate(tensors)
        ]
        result = dtype if _is_cast(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            *made, saved = ops.run_forward(told, *cast)
        return (*(a.to(result) for a in made), saved)


def _saves(tensors: Iterable[Any], training: bool) -> bool:
    """Whether backward may be asked for."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and (training or not _is_exporting())
    return torch.is_grad_enabled() if ops.is_transformed() else ops.has_gradient(tensors)


def _is_cast(kind: str) -> bool:
    """Whether autocast is at work on a kind of device."""
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def _computed_in(x: Tensor) -> torch.dtype | None:
    """Return the dtype to compute in if it may be another than that of all tensors."""
    kind = x.device.type
    if _is_cast(kind) and x.dtype != torch.float64:  # which autocast leaves alone
        return torch.float32 if kind == "cpu" else torch.get_autocast_dtype(kind)
    if x.dtype in _HALVES:
        return torch.float32 if kind == "cpu" else x.dtype
    return None


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def _option(name: str) -> Any:
    return property(lambda self: self._options.get(name, _OPTIONS[name]))


for _name in _OPTIONS:
    setattr(_Recurrent, _name, _option(_name))


class _Made(NamedTuple):
    """What layers made, time-major; every c and gate only if asked for."""

    y: Tensor
    final: list[Tensor]
    cells: Tensor
    gates: dict[str, Tensor]


class _Layers(_Recurrent):
    """A stack of layers in one or both directions."""

    mode: str
    _shown: ClassVar[dict[str, Any]] = {
        "proj_size": 0,
        "num_layers": 1,
        "bias": True,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
    }

    def __init__(
        self,
        mode: str,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: Any,
        dtype: torch.dtype | None,
        options: Mapping[str, Any],
    ) -> None:
        is_number = isinstance(dropout, numbers.Number) and not isinstance(dropout, bool)
        if not is_number or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability from 0 to 1, got {dropout!r}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"dropout is between layers: dropout={dropout} has no effect with num_layers=1",
                stacklevel=3,
            )
        _check_kind("bias", bias, bool)
        _check_kind("batch_first", batch_first, bool)
        super().__init__(cell, input_size, hidden_size, bias, proj_size, options)
        if num_layers <= 0:
            raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
        self.mode = mode
        self.num_layers, self.batch_first = num_layers, batch_first
        self.dropout, self.bidirectional = float(dropout), bool(bidirectional)
        self._names: list[list[str | None]] = []
        for layer in range(num_layers):
            I = self._width * (1 + self.bidirectional) if layer else input_size
            for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: 1 + self.bidirectional]:
                self._names.append(self._add_parameters(suffix, I, device=device, dtype=dtype))
        is_one = num_layers == 1 and not (bidirectional or proj_size)
        self._is_simple = (
            is_one and parse(self._told + "}").is_plain and not any(self._names[0][4:])
        )
        self.reset_parameters()

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction."""
        return [[getattr(self, n) for n in names if n is not None] for names in self._names]

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels read parameters wherever they lie."""

    # Calls

    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        resets: Any = None,
        *,
        return_cells: bool = False,
        trace: bool = False,
        bptt: int | None = None,
        recompute: bool = False,
        seed: int | None = None,
    ) -> tuple[Any, ...]:
        """Run the layers over sequences.

        Parameters
        ----------
        input: (T, B, I), (B, T, I) if batch_first, (T, I), or a PackedSequence.
        hx: h_0 or, of an LSTM, (h_0, c_0), each (layers*directions, B, H) or without B; None
            for zeros.
        lengths: (B,) integers 0 to T in any order, or None for T; not with a PackedSequence.
        resets: bool, shaped like input without its last axis, true where the state that enters
            the step is 0; not with a PackedSequence.
        return_cells, trace, bptt, recompute: as for `fusedrnn.lstm_vjp`.
        seed: what zoneout, recurrent and weight dropout depend on in training, 0 to 2**64 - 1;
            None draws it from PyTorch's generator.

        Returns
        -------
        output, h_n or (h_n, c_n): as of torch.nn; then every c of the last layer and a dict of
        every gate by names as "i_l0", if asked for.

        Raises
        ------
        RuntimeError, ValueError, TypeError: what torch.nn refuses, with the same type; each
            names the argument, what was expected and what came.
        """
        asks = trace or return_cells or recompute or bptt is not None
        draws = self._is_random and self.training
        if self._is_simple and lengths is None and resets is None and not (asks or draws):
            simple = self._run_simple(input, hx)
            if simple is not None:
                return simple
        kept: dict[str, Any] = {
            "bptt": bptt,
            "recompute": recompute,
            "return_cells": return_cells,
            "trace": trace,
        }
        weights = [[self._get(n) for n in names] for names in self._names]
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx, lengths, resets, weights, kept, seed)
        first = weights[0][0]
        assert first is not None
        self._check_like_weights("input", input, first, ValueError)
        if input.dim() not in (2, 3):
            raise ValueError(
                f"input must have 2 or 3 dimensions, got shape {tuple(input.shape)}"
            )
        self._check_size(input)
        unbatched = input.dim() == 2
        x = input.unsqueeze(1) if unbatched else input
        if self.batch_first and not unbatched:
            x = x.transpose(0, 1)
        if x.shape[0] == 0:
            raise RuntimeError(
                f"input must have at least one step, got shape {tuple(input.shape)}"
            )
        state = self._state(hx, x.shape[1], unbatched, first)
        if lengths is not None:
            lengths = _checked_lengths(lengths, x.shape[1], unbatched)
        if resets is not None:
            resets = _checked_resets(resets, tuple(input.shape[:-1]))
            resets = resets.unsqueeze(1) if unbatched else resets
            resets = resets.transpose(0, 1) if self.batch_first and not unbatched else resets
        made = self._run(x, state, lengths, resets, weights, kept, seed)

        def give(a: Tensor) -> Tensor:
            if unbatched:
                return a.squeeze(1)
            return a.transpose(0, 1) if self.batch_first else a

        return self._results(give, made, kept, unbatched)

    def _results(
        self, give: Callable[[Tensor], Any], made: _Made, kept: dict[str, Any], unbatched: bool
    ) -> tuple[Any, ...]:
        """Return what the user gets, sequences as `give` makes them of (T, B, …)."""
        views = [a.squeeze(1) if unbatched else a for a in made.final]
        results: list[Any] = [give(made.y), tuple(views) if self._is_pair else views[0]]
        if kept["return_cells"]:
            results.append(give(made.cells))
        if kept["trace"]:
            results.append({name: give(gate) for name, gate in made.gates.items()})
        return tuple(results)

    def _run_simple(self, input: Any, hx: Any) -> tuple[Any, ...] | None:
        """Run a plain layer where nothing needs preparing and only autograd may look.

        Else return None: the long way words errors. A step takes a few microseconds.
        """
        if torch.compiler.is_compiling():
            return None
        is_pair = self._is_pair
        h0, c0 = hx if is_pair and type(hx) is tuple and len(hx) == 2 else (hx, None)
        tensors = (input, h0, c0, *map(self._get, self._names[0][:4]))
        if type(input) is not Tensor or (is_pair and (h0 is None) != (c0 is None)):
            return None
        if not {type(h0), type(c0)} <= _STATES or input.dim() != 3:
            return None
        if self.batch_first:
            tensors = (input.transpose(0, 1), *tensors[1:])
        if not ops.is_for_autograd_alone(tensors):
            return None
        if not ops.has_gradient(tensors):
            made = compute_layer(self._cell, tensors)
        elif hx is None and self._is_usual(tensors[0], tensors[3:]):
            y, *ends = ops.run_with_gradient(f'{self._told}, "save": true}}', tensors)
            made = [y, *(a.unsqueeze(0) for a in ends[: 1 + is_pair])]
        else:
            made = None
        if made is None:
            return None
        y = made[0].transpose(0, 1) if self.batch_first else made[0]
        return y, tuple(made[1:]) if is_pair else made[1]

    def _is_usual(self, x: Tensor, weights: tuple[Any, ...]) -> bool:
        """Whether x (T, B, I) is of its size, and all of a type that the CPU knows."""
        T, _, I = x.shape
        kinds = {(a.dtype, a.is_cpu) for a in weights if a is not None}
        known = x.dtype in (torch.float32, torch.float64)
        return known and kinds == {(x.dtype, True)} and T > 0 and self.input_size == I

    def _check_size(self, input: Tensor) -> None:
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size = {self.input_size}, "
                f"got {input.shape[-1]}"
            )

    def _state(self, hx: Any, B: Any, unbatched: bool, like: Tensor) -> tuple[Any, ...]:
        """Check h_0, and c_0, and return them with B."""
        given = self._split(hx)
        if not given:
            return (None,) * (1 + self._is_pair)
        checked = []
        count = self.num_layers * (1 + self.bidirectional)
        letters = CELLS[self._cell].states
        widths = (self._width, self.hidden_size)[: len(given)]
        for (name, a), letter, width in zip(given.items(), letters, widths, strict=True):
            self._check_like_weights(name, a, like, RuntimeError)
            if a.dim() != 3 - unbatched:
                raise RuntimeError(
                    f"{name} must have {3 - unbatched} dimensions for an input of "
                    f"{3 - unbatched}, got shape {tuple(a.shape)}"
                )
            expected = (count, width) if unbatched else (count, B, width)
            if a.shape != expected:
                raise RuntimeError(
                    f"{name}, {letter}_0, must have shape {expected}, got {tuple(a.shape)}"
                )
            checked.append(a.unsqueeze(1) if unbatched else a)
        return tuple(checked)

    def _run(
        self,
        x: Tensor,
        state: tuple[Any, ...],
        lengths: Any,
        resets: Any,
        weights: list[list[Any]],
        kept: dict[str, Any],
        seed: int | None,
        layout: Layout | None = None,
    ) -> _Made:
        """Run all layers over x (T, B, I)."""
        D = 1 + self.bidirectional
        every = [p for of_one in weights for p in of_one if p is not None]
        for names, of_one in zip(self._names, weights, strict=True):
            self._check_weights(names, of_one, every[0])
        asked = self._asked((x, *state, *every), **kept)
        masks = (lengths, resets, self._seed(seed))
        final: list[list[Tensor]] = [[] for _ in range(1 + self._is_pair)]
        gates: dict[str, Tensor] = {}
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = self._dropped(x, layout)
            ys, cells = [], []
            for at in range(layer * D, (layer + 1) * D):
                start = [None if s is None else s[at] for s in state]
                start += [None] * (2 - len(start))
                told = f'{self._told}, "where": {at}' if at else self._told
                told += ', "reverse": true' if at % D else ""
                given = (x, *start, *weights[at], *masks)
                y, h_n, c_n, c, trace, _ = self._compute(told + asked, *given)
                ys.append(y)
                cells.append(c)
                for ends, end in zip(final, (h_n, c_n)[: len(final)], strict=True):
                    ends.append(end)
                if kept["trace"]:
                    suffix = f"_l{layer}" + "_reverse" * (at % D)
                    for k, letter in enumerate(CELLS[self._cell].gates):
                        gates[letter + suffix] = trace[:, :, k]
            x = ys[0] if D == 1 else torch.cat(ys, -1)
        every_c = cells[0] if D == 1 else torch.cat(cells, -1)
        stacked = [s[0].unsqueeze(0) if len(s) == 1 else torch.stack(s) for s in final]
        return _Made(x, stacked, every_c, gates)

    def _dropped(self, y: Tensor, layout: Layout | None) -> Tensor:
        """Return what the layer after sees of y; in packed data PyTorch drops what is there."""
        if layout is None:
            return dropout(y, self.dropout, True)
        return layout.pad(dropout(layout.pack(y), self.dropout, True))

    def _run_packed(
        self,
        packed: PackedSequence,
        hx: Any,
        lengths: Any,
        resets: Any,
        weights: list[list[Any]],
        kept: dict[str, Any],
        seed: int | None,
    ) -> tuple[Any, ...]:
        """Run over a PackedSequence."""
        for name, a in (("lengths", lengths), ("resets", resets)):
            if a is not None:
                raise TypeError(f"{name} must be None with a PackedSequence, which has its own")
        data, _, order, back = packed
        self._check_like_weights("input.data", data, weights[0][0], ValueError)
        if data.dim() != 2:
            raise RuntimeError(
                f"input.data must have 2 dimensions, got shape {tuple(data.shape)}"
            )
        self._check_size(data)
        layout = Layout.of(packed)
        state = self._state(hx, layout.B, False, weights[0][0])
        if order is not None:
            state = tuple(None if s is None else s.index_select(1, order) for s in state)
        x = layout.pad(data)
        made = self._run(x, state, layout.lengths, None, weights, kept, seed, layout)
        if back is not None:
            made = made._replace(final=[s.index_select(1, back) for s in made.final])

        def give(a: Tensor) -> PackedSequence:
            return PackedSequence(layout.pack(a), *packed[1:])

        return self._results(give, made, kept, False)


def _checked_lengths(lengths: Any, B: Any, unbatched: bool) -> Tensor:
    found = torch.as_tensor(lengths)
    if found.dtype.is_floating_point or found.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {found.dtype}")
    if unbatched and found.numel() == 1:
        found = found.reshape(1)
    if found.shape != (B,):
        raise ValueError(f"lengths must have shape (B,) = ({B},), got {tuple(found.shape)}")
    return found if found.dtype == torch.int32 else found.to(torch.int64)


def _checked_resets(resets: Any, expected: tuple[Any, ...]) -> Tensor:
    found = torch.as_tensor(resets)
    if found.dtype != torch.bool:
        raise TypeError(f"resets must be bool, got {found.dtype}")
    if found.shape != expected:
        raise ValueError(
            f"resets must have the shape of input without its last axis, {expected}, "
            f"got {tuple(found.shape)}"
        )
    return found


class LSTM(_Layers):
    """`torch.nn.LSTM` on our kernels.

    ::

        a = weight_ih x_t + bias_ih + weight_hh h' + bias_hh
        i, f, o = σ(a_i), σ(a_f), σ(a_o)        g = tanh(a_g)
        c = f c' + i g                          h = o tanh(c)

    Parameters
    ----------
    input_size … dtype: as of torch.nn, in its order.
    peephole, coupled_gates, layer_norm, clip, cell_clip, zoneout, recurrent_dropout,
        weight_dropout, forget_bias, orthogonal: as of `fusedrnn.LSTM`, by keyword. Parameters
        that they bring follow those of a layer's direction: weight_ch_l0, gamma_ih_l0, ….
    precision: "tf32" lets a GPU's matrix units multiply float32, rounded to 10 bits; without
        effect on other types and on the CPU.

    On the CPU bfloat16 and float16 are computed in float32 and rounded at the end of each
    layer; under autocast the CPU computes in float32, a GPU in the type of autocast.

    Raises
    ------
    TypeError, ValueError: an argument of a wrong type or value.

    Source: Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000.

    >>> import torch, fusedrnn.torch as ft
    >>> lstm = ft.LSTM(3, 4, num_layers=2, batch_first=True, zoneout=(0.1, 0.2))
    >>> output, (h_n, c_n) = lstm(torch.zeros(5, 7, 3), lengths=[7, 2, 0, 7, 1])
    >>> output.shape, h_n.shape
    (torch.Size([5, 7, 4]), torch.Size([2, 5, 4]))
    >>> lstm
    LSTM(3, 4, num_layers=2, batch_first=True, zoneout=(0.1, 0.2))
    """

    _defaults = _of_cell(LSTMOptions)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LSTMOptions],
    ) -> None:
        cell = lstm_cell(dict(options)).name
        shape = (input_size, hidden_size, num_layers, bias, batch_first, dropout)
        super().__init__("LSTM", cell, *shape, bidirectional, proj_size, device, dtype, options)


class GRU(_Layers):
    """`torch.nn.GRU` on our kernels.

    ::

        r = σ(W_r x_t + b_ir + R_r h' + b_hr)
        z = σ(W_z x_t + b_iz + R_z h' + b_hz)
        n = tanh(W_n x_t + b_in + r (R_n h' + b_hn))
        h = (1 - z) n + z h'

    The options reset_after, layer_norm, clip, zoneout, recurrent_dropout, weight_dropout,
    orthogonal are those of `fusedrnn.GRU`; all else, shapes and errors, is as for `LSTM`.
    Source: Cho et al. 2014, in the form of cuDNN and PyTorch.

    >>> import torch, fusedrnn.torch as ft
    >>> gru = ft.GRU(3, 4, bidirectional=True)
    >>> output, h_n = gru(torch.zeros(7, 5, 3))
    >>> output.shape, h_n.shape
    (torch.Size([7, 5, 8]), torch.Size([2, 5, 4]))
    """

    _defaults = _of_cell(GRUOptions)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[GRUOptions],
    ) -> None:
        _check_no_projection(options)
        cell = gru_cell(dict(options)).name
        shape = (input_size, hidden_size, num_layers, bias, batch_first, dropout)
        super().__init__("GRU", cell, *shape, bidirectional, 0, device, dtype, options)


class RNN(_Layers):
    """`torch.nn.RNN` on our kernels.

    ::

        h = φ(weight_ih x_t + bias_ih + weight_hh h' + bias_hh)

    nonlinearity is φ, "tanh", "relu" or "identity". The options clip, zoneout,
    recurrent_dropout, weight_dropout, orthogonal are those of `fusedrnn.RNN`; all else, shapes
    and errors, is as for `LSTM`. Source: Elman 1990.

    >>> import torch, fusedrnn.torch as ft
    >>> output, h_n = ft.RNN(3, 4, nonlinearity="relu")(torch.zeros(7, 5, 3))
    >>> output.shape
    torch.Size([7, 5, 4])
    """

    _defaults = _of_cell(RNNOptions)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[RNNOptions],
    ) -> None:
        _check_no_projection(options)
        cell = rnn_cell(nonlinearity).name
        self.nonlinearity = nonlinearity
        shape = (input_size, hidden_size, num_layers, bias, batch_first, dropout)
        mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(mode, cell, *shape, bidirectional, 0, device, dtype, options)


def _check_no_projection(options: Mapping[str, Any]) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size is an LSTM's")


class _Step(_Recurrent):
    """One step of a cell, for loops that are written out."""

    _shown: ClassVar[dict[str, Any]] = {"bias": True}

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(cell, input_size, hidden_size, bias, 0, options)
        self._names = self._add_parameters("", input_size, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Any = None, *, seed: int | None = None) -> Any:
        """Take a step.

        Parameters
        ----------
        input: (B, I) or (I,).
        hx: the state before, h or, of an LSTM, (h, c), each (B, H) or (H,); None for zeros.
        seed: what zoneout, recurrent and weight dropout depend on in training; None draws it.

        Returns
        -------
        The state after, in the form of hx.

        Raises
        ------
        RuntimeError, ValueError, TypeError: what torch.nn refuses, with the same type.
        """
        weights = [self._get(n) for n in self._names]
        first = weights[0]
        assert first is not None
        self._check_weights(self._names, weights, first)
        given = {"input": input, **self._split(hx)}
        for name, a in given.items():
            if isinstance(a, Tensor) and a.dim() not in (1, 2):
                raise ValueError(
                    f"{name} must have 1 or 2 dimensions, got shape {tuple(a.shape)}"
                )
        for name, a in given.items():
            self._check_like_weights(name, a, first, RuntimeError)
            size = self.input_size if name == "input" else self.hidden_size
            expected = (*input.shape[:-1], size)
            if a.shape != expected:
                raise RuntimeError(
                    f"{name} must have shape {tuple(expected)}, got {tuple(a.shape)}"
                )
        unbatched = input.dim() == 1
        x, *state = (a.unsqueeze(0) if unbatched else a for a in given.values())
        asked = self._asked((x, *state, *weights))
        start = [*state, None, None][:2]
        made = self._compute(
            self._told + asked, x.unsqueeze(0), *start, *weights, None, None, self._seed(seed)
        )
        ends = [a.squeeze(0) if unbatched else a for a in made[1 : 2 + self._is_pair]]
        return tuple(ends) if self._is_pair else ends[0]


class LSTMCell(_Step):
    """`torch.nn.LSTMCell` on our kernels: one step of `LSTM`, its equations and options.

    Takes x (B, I) and the state (h, c), each (B, H), or without B; returns the state after.

    >>> import torch, fusedrnn.torch as ft
    >>> h, c = ft.LSTMCell(3, 4)(torch.zeros(5, 3))
    >>> h.shape
    torch.Size([5, 4])
    """

    _defaults = _of_cell(LSTMOptions)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LSTMOptions],
    ) -> None:
        cell = lstm_cell(dict(options)).name
        super().__init__(cell, input_size, hidden_size, bias, device, dtype, options)


class GRUCell(_Step):
    """`torch.nn.GRUCell` on our kernels: one step of `GRU`, its equations and options.

    Takes x (B, I) and the state h, (B, H), or without B; returns the state after.

    >>> import torch, fusedrnn.torch as ft
    >>> ft.GRUCell(3, 4)(torch.zeros(5, 3)).shape
    torch.Size([5, 4])
    """

    _defaults = _of_cell(GRUOptions)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[GRUOptions],
    ) -> None:
        cell = gru_cell(dict(options)).name
        super().__init__(cell, input_size, hidden_size, bias, device, dtype, options)


class RNNCell(_Step):
    """`torch.nn.RNNCell` on our kernels: one step of `RNN`, its equations and options.

    Takes x (B, I) and the state h, (B, H), or without B; returns the state after.

    >>> import torch, fusedrnn.torch as ft
    >>> ft.RNNCell(3, 4, nonlinearity="relu")(torch.zeros(5, 3)).shape
    torch.Size([5, 4])
    """

    _defaults = _of_cell(RNNOptions)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[RNNOptions],
    ) -> None:
        cell = rnn_cell(nonlinearity).name
        super().__init__(cell, input_size, hidden_size, bias, device, dtype, options)
        self.nonlinearity = nonlinearity
