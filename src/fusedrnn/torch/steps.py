"""Modules that run a single step of a cell, for the user's own loops over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..cells import gru_cell, lstm_cell, rnn_cell
from . import ops
from .base import GRUOptions, LSTMOptions, Recurrent, RNNOptions, check_dense, of_cell
from .kernels import NeedsChecksError

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Step(Recurrent):
    """A single step of a cell, for the user's own loop over time."""

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
        self._together = self._describe()
        if not bias:
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Any = None, *, seed: int | None = None) -> Any:
        """Run a step.

        Parameters
        ----------
        input: (B, I) or (I,).
        hx: the previous state, h or, for an LSTM, (h, c), each (B, H) or (H,); None for zeros.
        seed: determines the masks of zoneout, recurrent and weight dropout in training; None
            draws a seed.

        Returns
        -------
        The new state, in the form of hx.

        Raises
        ------
        RuntimeError, ValueError, TypeError: the same type as torch.nn raises.
        """
        is_random = self.training and self._is_random
        if seed is None and not (torch.compiler.is_compiling() or is_random):
            state = self._try_unchecked(input, hx)
            if state is not None:
                return state
        if isinstance(input, fx.Proxy):
            return self._as_leaf(input, input, hx, **({} if seed is None else {"seed": seed}))
        weights = self._weights(self._names)
        first = weights[0]
        given = {"input": input, **self._split(hx)}
        for name, a in given.items():
            check_dense(name, a)
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
        h0, c0 = [*(a.unsqueeze(0) for a in state), None, None][:2]
        tensors = (x.unsqueeze(0), h0, c0, weights, None, None, None, self._seed(seed))
        made = self._compute(self._together, asked, *tensors, wide_states=True)
        ends = [a[0, 0] if unbatched else a[0] for a in made[1 : 2 + self._is_pair]]
        return tuple(ends) if self._is_pair else ends[0]

    def _try_unchecked(self, input: Any, hx: Any) -> Any:
        """Run a step without options on unchecked tensors; return None if it needs checks."""
        state = self._infer(input, hx, 2)
        if state is not False:
            return state
        h, c = hx if self._is_pair and hx is not None else (hx, None)
        weights: list[Any] = list(map(self._parameters.get, self._names))
        try:
            return ops.record_step(self._saving, self._plain[1], input, h, c, weights)
        except NeedsChecksError:
            return None


class LSTMCell(_Step):
    """`torch.nn.LSTMCell` on our kernels: one step of `LSTM`, its equations and options.

    It takes x (B, I) and the state (h, c), each (B, H), or without B; it returns the new state.

    >>> import torch, fusedrnn.torch as ft
    >>> h, c = ft.LSTMCell(3, 4)(torch.zeros(5, 3))
    >>> h.shape
    torch.Size([5, 4])
    """

    _theirs = nn.LSTMCell
    _defaults = of_cell(LSTMOptions)

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

    It takes x (B, I) and the state h, (B, H), or without B; it returns the new state.

    >>> import torch, fusedrnn.torch as ft
    >>> ft.GRUCell(3, 4)(torch.zeros(5, 3)).shape
    torch.Size([5, 4])
    """

    _theirs = nn.GRUCell
    _defaults = of_cell(GRUOptions)

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

    It takes x (B, I) and the state h, (B, H), or without B; it returns the new state.

    >>> import torch, fusedrnn.torch as ft
    >>> ft.RNNCell(3, 4, nonlinearity="relu")(torch.zeros(5, 3)).shape
    torch.Size([5, 4])
    """

    _theirs = nn.RNNCell
    _defaults = of_cell(RNNOptions)

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
        cell = rnn_cell({"nonlinearity": nonlinearity}).name
        super().__init__(cell, input_size, hidden_size, bias, device, dtype, options)
        self.nonlinearity = nonlinearity
