"""Replacements of torch.nn's modules: the same names, arguments, parameters and results.

Unless stated here, PyTorch's documentation of the module of the same name applies. Additional
options run on the fused kernels, too, forward and backward.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from .. import checks
from ..cells import CELLS, gru_cell, lstm_cell, rnn_cell
from ..options import MaskedOutput
from . import ops
from .base import (
    GRUOptions,
    LSTMOptions,
    Recurrent,
    RNNOptions,
    check_kind,
    is_half,
    of_cell,
)
from .kernels import NeedsChecksError
from .masks import checked_flags, checked_lengths
from .packed import Layout

if TYPE_CHECKING:
    from typing_extensions import Unpack


# lengths, resets and mask, each None for none.
Masks = tuple[Any, Any, Any]


class _Made(NamedTuple):
    """The results of layers, time-major; cells and gates only if requested."""

    y: Tensor
    final: list[Tensor]
    cells: Tensor
    gates: dict[str, Tensor]


class _Layers(Recurrent):
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
        check_kind("bias", bias, bool)
        check_kind("batch_first", batch_first, bool)
        super().__init__(cell, input_size, hidden_size, bias, proj_size, options)
        if num_layers <= 0:
            raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
        self.mode = mode
        self.num_layers, self.batch_first = num_layers, batch_first
        self.dropout, self.bidirectional = float(dropout), bool(bidirectional)
        D, self._names = 1 + self.bidirectional, []
        for layer in range(num_layers):
            I = self._width * D if layer else input_size
            for suffix in (f"_l{layer}", f"_l{layer}_reverse")[:D]:
                self._names += self._add_parameters(suffix, I, device=device, dtype=dtype)
        # The layers together, each alone, and each direction alone.
        self._together = self._describe(layers=num_layers, directions=D)
        self._alone = [
            self._describe(directions=D, where=layer * D) for layer in range(num_layers)
        ]
        self._one_way = [
            self._describe(reverse=at % D == 1, where=at) for at in range(num_layers * D)
        ]
        self.reset_parameters()

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction."""
        count = self.num_layers * (1 + self.bidirectional)
        each = len(self._names) // count
        names = [self._names[at * each : (at + 1) * each] for at in range(count)]
        return [[getattr(self, n) for n in of_one] for of_one in names]

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels read parameters wherever they lie."""

    # Calls

    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        resets: Any = None,
        mask: Any = None,
        *,
        masked_output: MaskedOutput = "zero",
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
        hx: h_0 or, for an LSTM, (h_0, c_0), each (layers*directions, B, H) or without B; None
            for zeros.
        lengths: (B,) integers 0 to T in any order, or None for T; not with a PackedSequence.
        resets: bool, shaped like input without its last axis, true where the state is set to 0
            before the step; not with a PackedSequence.
        mask: bool, shaped like resets, true at the steps that a row takes, with padding and
            gaps anywhere; not with a PackedSequence. Numbers that are 0 or 1 are taken as bool,
            here and for resets; others are refused, except on a GPU and under torch.compile.
        masked_output: output at steps that are not taken: "zero", or "last" for h of the
            unchanged state.
        return_cells, trace, bptt, recompute: as for `fusedrnn.lstm_vjp`.
        seed: 0 to 2**64 - 1, determines the masks of zoneout, recurrent and weight dropout in
            training; None draws it from PyTorch's generator.

        Returns
        -------
        output, h_n or (h_n, c_n): as from torch.nn; then, with return_cells, every c of the
        last layer and, with trace, a dict of every gate by names such as "i_l0".

        Raises
        ------
        RuntimeError, ValueError, TypeError: the same type as torch.nn raises; each names the
            argument, what was expected and what came.
        """
        is_plain = (
            return_cells is trace is recompute is False
            and lengths is resets is mask is bptt is seed is None
            and masked_output == "zero"
        )
        if is_plain and not (self.training and (self._is_random or self.dropout)):
            results = self._try_unchecked(input, hx)
            if results is not None:
                return results
        kept: dict[str, Any] = {
            "bptt": bptt,
            "recompute": recompute,
            "return_cells": return_cells,
            "trace": trace,
            "masked_output": masked_output,
        }
        masks = (lengths, resets, mask)
        checks.repeats(mask, masked_output == "last")
        if isinstance(input, fx.Proxy):
            named = dict(zip(("lengths", "resets", "mask"), masks, strict=True))
            asked = kept | named | {"seed": seed}
            given = {k: v for k, v in asked.items() if v is not None and v is not False}
            if masked_output == "zero":
                del given["masked_output"]
            result: tuple[Any, ...] = self._as_leaf(input, input, hx, **given)
            return result
        weights = self._weights(self._names)
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx, masks, weights, kept, seed)
        first = weights[0]
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
            lengths = checked_lengths(lengths, x.shape[1], unbatched)

        def flags(name: str, value: Any) -> Any:
            if value is None:
                return None
            found = checked_flags(name, value, tuple(input.shape[:-1]))
            if unbatched:
                return found.unsqueeze(1)
            return found.transpose(0, 1) if self.batch_first else found

        masks = (lengths, flags("resets", resets), flags("mask", mask))
        made = self._run(x, state, masks, weights, kept, seed)
        return self._results(self._layout(unbatched), made, kept, unbatched)

    def _layout(self, unbatched: bool) -> Callable[[Tensor], Tensor]:
        """Return a function that converts sequences (T, B, …) to the user's layout."""

        def convert(a: Tensor) -> Tensor:
            if unbatched:
                return a.squeeze(1)
            return a.transpose(0, 1) if self.batch_first else a

        return convert

    def _try_unchecked(self, input: Any, hx: Any) -> tuple[Any, ...] | None:
        """Run a call without options on unchecked tensors; return None if it needs checks."""
        if torch.compiler.is_compiling():
            return None
        results: Any = self._infer(input, hx, int(self.batch_first))
        if results is not False or input is None:
            return results or None
        if input.is_nested or input.dim() not in (2, 3) or is_half(input):
            return None
        unbatched = input.dim() == 2
        h0, c0 = hx if self._is_pair and hx else (hx, None)
        x = input.unsqueeze(1) if unbatched else input
        x = x.transpose(0, 1) if self.batch_first and not unbatched else x
        if unbatched:
            h0, c0 = (None if s is None else s.unsqueeze(1) for s in (h0, c0))
        weights: list[Any] = list(map(self._parameters.get, self._names))
        try:
            y, *ends = ops.record(self._saving, x, h0, c0, weights)
        except NeedsChecksError:
            return None
        made = _Made(y, ends[: 1 + self._is_pair], y, {})
        kept = {"return_cells": False, "trace": False}
        return self._results(self._layout(unbatched), made, kept, unbatched)

    def _results(
        self, give: Callable[[Tensor], Any], made: _Made, kept: dict[str, Any], unbatched: bool
    ) -> tuple[Any, ...]:
        """Return the user's results; `give` converts sequences (T, B, …)."""
        views = [a.squeeze(1) if unbatched else a for a in made.final]
        results: list[Any] = [give(made.y), tuple(views) if self._is_pair else views[0]]
        if kept["return_cells"]:
            results.append(give(made.cells))
        if kept["trace"]:
            results.append({name: give(gate) for name, gate in made.gates.items()})
        return tuple(results)

    def _check_size(self, input: Tensor) -> None:
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size = {self.input_size}, "
                f"got {input.shape[-1]}"
            )

    def _state(self, hx: Any, B: Any, unbatched: bool, like: Tensor) -> tuple[Any, ...]:
        """Check h_0 and c_0, and return them with an axis of B."""
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
                    f"{name} must have {3 - unbatched} dimensions like input, "
                    f"got shape {tuple(a.shape)}"
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
        masks: Masks,
        weights: list[Tensor],
        kept: dict[str, Any],
        seed: int | None,
        layout: Layout | None = None,
    ) -> _Made:
        """Run all layers over x (T, B, I)."""
        D = 1 + self.bidirectional
        h0, c0 = (*state, None)[:2]
        asked = self._asked((x, *state, *weights), **kept)
        others = (*masks, self._seed(seed))
        drops = bool(self.dropout) and self.training and self.num_layers > 1
        if x.is_cuda:  # one layer and direction at a time
            parts, width = self._one_way, 1
        elif drops:
            parts, width = self._alone, D
        else:
            parts, width = [self._together], self.num_layers * D
        each = len(weights) // (self.num_layers * D)
        ends: list[tuple[Tensor, ...]] = []
        ys: list[Tensor] = []
        cells: list[Tensor] = []
        traces: list[Tensor] = []
        for n, part in enumerate(parts):
            at = n * width
            if at and at % D == 0:
                x = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
                ys, cells = [], []
                if drops:
                    x = self._dropped(x, layout)
            start: tuple[Any, ...] = (h0, c0)
            if len(parts) > 1:
                start = tuple(None if s is None else s[at : at + width] for s in start)
            of_part = weights[at * each : (at + width) * each]
            y, h_n, c_n, c, trace, _ = self._compute(part, asked, x, *start, of_part, *others)
            ys.append(y)
            cells.append(c)
            ends.append((h_n, c_n)[: 1 + self._is_pair])
            traces.append(trace)
        final = [e[0] if len(e) == 1 else torch.cat(e) for e in zip(*ends, strict=True)]
        y = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
        every_c = cells[0] if len(cells) == 1 else torch.cat(cells, -1)
        return _Made(y, final, every_c, self._gates(traces) if kept["trace"] else {})

    def _gates(self, traces: list[Tensor]) -> dict[str, Tensor]:
        """Return every gate by names such as "i_l0"."""
        each = [one for trace in traces for one in trace.unbind()]
        D, letters = 1 + self.bidirectional, CELLS[self._cell].gates
        return {
            f"{letter}_l{at // D}" + "_reverse" * (at % D): trace[:, :, k]
            for at, trace in enumerate(each)
            for k, letter in enumerate(letters)
        }

    def _dropped(self, y: Tensor, layout: Layout | None) -> Tensor:
        """Return y with dropout, for the next layer; masks of packed data skip the padding."""
        if layout is None:
            return dropout(y, self.dropout, True)
        return layout.pad(dropout(layout.pack(y), self.dropout, True))

    def _run_packed(
        self,
        packed: PackedSequence,
        hx: Any,
        masks: Masks,
        weights: list[Tensor],
        kept: dict[str, Any],
        seed: int | None,
    ) -> tuple[Any, ...]:
        """Run over a PackedSequence."""
        lengths, *flags = masks
        if lengths is not None:
            raise TypeError(
                "lengths must be None with a PackedSequence, which has its own lengths, "
                f"got {type(lengths).__name__}"
            )
        for name, value in zip(("resets", "mask"), flags, strict=True):
            if value is not None:
                raise TypeError(
                    f"{name} must be None with a PackedSequence, got {type(value).__name__}; "
                    "pass a padded tensor and lengths instead"
                )
        data, _, order, back = packed
        self._check_like_weights("input.data", data, weights[0], ValueError)
        if data.dim() != 2:
            raise RuntimeError(
                f"input.data must have 2 dimensions, got shape {tuple(data.shape)}"
            )
        self._check_size(data)
        layout = Layout.of(packed)
        state = self._state(hx, layout.B, False, weights[0])
        if order is not None:
            state = tuple(None if s is None else s.index_select(1, order) for s in state)
        x = layout.pad(data)
        made = self._run(x, state, (layout.lengths, None, None), weights, kept, seed, layout)
        if back is not None:
            made = made._replace(final=[s.index_select(1, back) for s in made.final])

        def give(a: Tensor) -> PackedSequence:
            return PackedSequence(layout.pack(a), *packed[1:])

        return self._results(give, made, kept, False)


class LSTM(_Layers):
    """`torch.nn.LSTM` on our kernels.

    ::

        a = weight_ih x_t + bias_ih + weight_hh h' + bias_hh
        i, f, o = σ(a_i), σ(a_f), σ(a_o)        g = tanh(a_g)
        c = f c' + i g                          h = o tanh(c)

    Parameters
    ----------
    input_size … dtype: as for torch.nn, in its order.
    peephole, coupled_gates, layer_norm, clip, cell_clip, zoneout, recurrent_dropout,
        weight_dropout, forget_bias, orthogonal: as for `fusedrnn.LSTM`, by keyword. Their
        parameters follow the others of a layer's direction: weight_ch_l0, gamma_ih_l0, ….
    precision: "tf32" lets a GPU's matrix units multiply float32, rounded to 10 bits; without
        effect on other types and on the CPU.

    Under autocast a module computes in the type of autocast. float16 is computed in float32 on
    the CPU, and rounded at the end of each layer. In bfloat16 products round their operands;
    sums, h and c are float32 (`fusedrnn.reference.narrow`).

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

    _theirs = nn.LSTM
    _defaults = of_cell(LSTMOptions)

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
    orthogonal are those of `fusedrnn.GRU`; everything else, with shapes and errors, is as for
    `LSTM`. Source: Cho et al. 2014, in the form of cuDNN and PyTorch.

    >>> import torch, fusedrnn.torch as ft
    >>> gru = ft.GRU(3, 4, bidirectional=True)
    >>> output, h_n = gru(torch.zeros(7, 5, 3))
    >>> output.shape, h_n.shape
    (torch.Size([7, 5, 8]), torch.Size([2, 5, 4]))
    """

    _theirs = nn.GRU
    _defaults = of_cell(GRUOptions)

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
    recurrent_dropout, weight_dropout, orthogonal are those of `fusedrnn.RNN`; everything else,
    with shapes and errors, is as for `LSTM`. Source: Elman 1990.

    >>> import torch, fusedrnn.torch as ft
    >>> output, h_n = ft.RNN(3, 4, nonlinearity="relu")(torch.zeros(7, 5, 3))
    >>> output.shape
    torch.Size([7, 5, 4])
    """

    _theirs = nn.RNN
    _defaults = of_cell(RNNOptions)

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
        cell = rnn_cell({"nonlinearity": nonlinearity}).name
        self.nonlinearity = nonlinearity
        shape = (input_size, hidden_size, num_layers, bias, batch_first, dropout)
        mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(mode, cell, *shape, bidirectional, 0, device, dtype, options)


def _check_no_projection(options: Mapping[str, Any]) -> None:
    if "proj_size" in options:
        raise ValueError(
            f"proj_size must be left out, because only an LSTM has a projection, got "
            f"{options['proj_size']}"
        )
