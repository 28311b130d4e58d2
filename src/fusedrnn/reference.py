"""The definition of every cell, in plain NumPy.

The compiled kernels are tested against this module and must agree with it; nothing here is
fast. It takes any floating or complex dtype, and `x` as (T, B, I) or (T, I). W and R stand
for `weight_ih` and `weight_hh`, x for the input of a step, h' and c' for the state before
it, a_x = W x + b_ih for the input part of the pre-activations and a_h = R h' + b_hh for the
recurrent part. Blocks of H rows belong to the gates in torch's order.

The gradients written out here are proved against complex-step derivatives in
tests/test_reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
State = tuple[Array, ...]
Nonlinearity = Literal["tanh", "relu", "identity"]


class Grads(NamedTuple):
    """Gradients of a GRU's or RNN's arguments; a bias that was None has None."""

    x: Array
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array | None
    bias_hh: Array | None
    h0: Array


class LSTMGrads(NamedTuple):
    """Gradients of an LSTM's arguments; a bias that was None has None."""

    x: Array
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array | None
    bias_hh: Array | None
    h0: Array
    c0: Array


def sigmoid(a: Array) -> Array:
    """σ(a) = 1 / (1 + exp(-a)), through tanh so that nothing overflows."""
    half = a.dtype.type(0.5)
    value: Array = half + half * np.tanh(half * a)
    return value


def _gates(a: Array, count: int) -> list[Array]:
    return np.split(a, count, axis=-1)


@dataclass(frozen=True)
class Cell:
    """One step of a cell and its gradient.

    Attributes
    ----------
    gates: blocks of H rows in the weights, one letter each.
    states: names of the states it carries.
    forward: (a_x, a_h, state) -> new state, saved.
    backward: (saved, d new state) -> da_x, da_h, what reaches the old state directly.
    """

    gates: str
    states: tuple[str, ...]
    forward: Callable[[Array, Array, State], tuple[State, State]]
    backward: Callable[[State, State], tuple[Array, Array, State]]


def _lstm_forward(a_x: Array, a_h: Array, state: State) -> tuple[State, State]:
    _, c_prev = state
    a_i, a_f, a_g, a_o = _gates(a_x + a_h, 4)
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
    c = f * c_prev + i * g
    return (o * np.tanh(c), c), (i, f, g, o, c_prev, c)


def _lstm_backward(saved: State, d: State) -> tuple[Array, Array, State]:
    i, f, g, o, c_prev, c = saved
    dh, dc = d
    tanh_c = np.tanh(c)
    dc = dc + dh * o * (1 - tanh_c**2)
    da = np.concatenate(
        [
            dc * g * i * (1 - i),
            dc * c_prev * f * (1 - f),
            dc * i * (1 - g**2),
            dh * tanh_c * o * (1 - o),
        ],
        axis=-1,
    )
    return da, da, (np.zeros_like(dh), dc * f)


def _gru_forward(a_x: Array, a_h: Array, state: State) -> tuple[State, State]:
    (h_prev,) = state
    x_r, x_z, x_n = _gates(a_x, 3)
    h_r, h_z, h_n = _gates(a_h, 3)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = np.tanh(x_n + r * h_n)
    return ((1 - z) * n + z * h_prev,), (r, z, n, h_n, h_prev)


def _gru_backward(saved: State, d: State) -> tuple[Array, Array, State]:
    r, z, n, h_n, h_prev = saved
    (dh,) = d
    da_n = dh * (1 - z) * (1 - n**2)
    da_z = dh * (h_prev - n) * z * (1 - z)
    da_r = da_n * h_n * r * (1 - r)
    da_x = np.concatenate([da_r, da_z, da_n], axis=-1)
    da_h = np.concatenate([da_r, da_z, da_n * r], axis=-1)
    return da_x, da_h, (dh * z,)


def _rnn_cell(value: Callable[[Array], Array], slope: Callable[[Array], Array]) -> Cell:
    def forward(a_x: Array, a_h: Array, state: State) -> tuple[State, State]:
        h = value(a_x + a_h)
        return (h,), (h,)

    def backward(saved: State, d: State) -> tuple[Array, Array, State]:
        (h,), (dh,) = saved, d
        da = dh * slope(h)
        return da, da, (np.zeros_like(dh),)

    return Cell("h", ("h",), forward, backward)


LSTM = Cell("ifgo", ("h", "c"), _lstm_forward, _lstm_backward)
GRU = Cell("rzn", ("h",), _gru_forward, _gru_backward)
RNN: dict[str, Cell] = {
    "tanh": _rnn_cell(np.tanh, lambda h: 1 - h**2),
    "relu": _rnn_cell(
        lambda a: np.where(a.real <= 0, a.dtype.type(0), a),
        lambda h: (h.real > 0).astype(h.dtype),
    ),
    "identity": _rnn_cell(lambda a: a, np.ones_like),
}


def run(
    cell: Cell,
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None,
    bias_hh: Array | None,
    state: tuple[Array | None, ...],
    lengths: npt.ArrayLike | None,
    resets: npt.ArrayLike | None,
    reverse: bool,
) -> tuple[Array, State, Callable[..., tuple[Any, ...]]]:
    """Run `cell` over x; return y, the final state and the pullback.

    A row takes the steps of times below its length; at the others its state stays, y is 0,
    and what x and dy hold is not looked at. The state that enters a step is 0 where resets
    is true.

    The pullback takes dy and the gradient of each final state, None for zeros, and returns
    the gradients of x, weight_ih, weight_hh, bias_ih, bias_hh and each initial state.
    """
    H = weight_hh.shape[1]
    zeros = np.zeros((*x.shape[1:-1], H), x.dtype)
    start: State = tuple(zeros if s is None else s for s in state)
    T = len(x)
    times = range(T)[:: -1 if reverse else 1]
    y = np.empty((*x.shape[:-1], H), x.dtype)

    zero = x.dtype.type(0)
    times_of_rows = np.arange(T).reshape(T, *[1] * (x.ndim - 1))
    taken = times_of_rows < np.asarray(T if lengths is None else lengths)[..., None]
    fresh = taken & (False if resets is None else np.asarray(resets)[..., None])
    x = np.where(taken, x, zero)

    now = start
    before: list[State] = []
    saved: list[State] = []
    for t in times:
        old = tuple(np.where(fresh[t], zero, s) for s in now)
        a_x = x[t] @ weight_ih.T + (0 if bias_ih is None else bias_ih)
        a_h = old[0] @ weight_hh.T + (0 if bias_hh is None else bias_hh)
        new, kept = cell.forward(a_x, a_h, old)
        before.append(old)
        saved.append(kept)
        now = tuple(np.where(taken[t], n, s) for n, s in zip(new, now, strict=True))
        y[t] = np.where(taken[t], now[0], zero)

    def pullback(dy: Array | None, *d_final: Array | None) -> tuple[Any, ...]:
        d: State = tuple(zeros if g is None else g for g in d_final)
        dx = np.zeros(x.shape, x.dtype)
        dW, dR = np.zeros_like(weight_ih), np.zeros_like(weight_hh)
        db_ih = np.zeros(len(weight_ih), x.dtype)
        db_hh = np.zeros(len(weight_hh), x.dtype)
        for step, t in reversed(list(enumerate(times))):
            dh = d[0] if dy is None else d[0] + np.where(taken[t], dy[t], zero)
            da_x, da_h, direct = cell.backward(saved[step], (dh, *d[1:]))
            da_x, da_h = np.where(taken[t], da_x, zero), np.where(taken[t], da_h, zero)
            d_old = (direct[0] + da_h @ weight_hh, *direct[1:])
            d_old = tuple(np.where(fresh[t], zero, g) for g in d_old)
            d = tuple(np.where(taken[t], g, same) for g, same in zip(d_old, d, strict=True))
            dx[t] = da_x @ weight_ih
            rows_x, rows_h = np.atleast_2d(da_x), np.atleast_2d(da_h)
            dW += rows_x.T @ np.atleast_2d(x[t])
            dR += rows_h.T @ np.atleast_2d(before[step][0])
            db_ih += rows_x.sum(0)
            db_hh += rows_h.sum(0)
        return (
            dx,
            dW,
            dR,
            None if bias_ih is None else db_ih,
            None if bias_hh is None else db_hh,
            *d,
        )

    return y, now, pullback


def lstm(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    lengths: npt.ArrayLike | None = None,
    resets: npt.ArrayLike | None = None,
    reverse: bool = False,
) -> tuple[Array, Array, Array]:
    """Run an LSTM in NumPy: the definition of `fusedrnn.lstm`, which see.

    >>> y, h_n, c_n = lstm(np.ones((5, 2, 3)), np.ones((16, 3)), np.ones((16, 4)))
    >>> y.shape, c_n.shape
    ((5, 2, 4), (2, 4))
    """
    y, h_n, c_n = lstm_vjp(
        x,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        c0,
        lengths=lengths,
        resets=resets,
        reverse=reverse,
    )[0]
    return y, h_n, c_n


def lstm_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    lengths: npt.ArrayLike | None = None,
    resets: npt.ArrayLike | None = None,
    reverse: bool = False,
) -> tuple[tuple[Array, Array, Array], Callable[..., Any]]:
    """Run an LSTM in NumPy and return its pullback: the definition of `fusedrnn.lstm_vjp`."""
    y, (h_n, c_n), pullback = run(
        LSTM, x, weight_ih, weight_hh, bias_ih, bias_hh, (h0, c0), lengths, resets, reverse
    )

    def pull(
        dy: Array | None = None, dh_n: Array | None = None, dc_n: Array | None = None
    ) -> LSTMGrads:
        return LSTMGrads(*pullback(dy, dh_n, dc_n))

    return (y, h_n, c_n), pull


def gru(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    lengths: npt.ArrayLike | None = None,
    resets: npt.ArrayLike | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """Run a GRU in NumPy: the definition of `fusedrnn.gru`, which see."""
    return gru_vjp(
        x,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        lengths=lengths,
        resets=resets,
        reverse=reverse,
    )[0]


def gru_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    lengths: npt.ArrayLike | None = None,
    resets: npt.ArrayLike | None = None,
    reverse: bool = False,
) -> tuple[tuple[Array, Array], Callable[..., Any]]:
    """Run a GRU in NumPy and return its pullback: the definition of `fusedrnn.gru_vjp`."""
    return _one_state_vjp(
        GRU, x, weight_ih, weight_hh, bias_ih, bias_hh, h0, lengths, resets, reverse
    )


def rnn(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    nonlinearity: Nonlinearity = "tanh",
    lengths: npt.ArrayLike | None = None,
    resets: npt.ArrayLike | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """Run an Elman RNN in NumPy: the definition of `fusedrnn.rnn`, which see."""
    return _one_state_vjp(
        RNN[nonlinearity],
        x,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        lengths,
        resets,
        reverse,
    )[0]


def rnn_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    nonlinearity: Nonlinearity = "tanh",
    lengths: npt.ArrayLike | None = None,
    resets: npt.ArrayLike | None = None,
    reverse: bool = False,
) -> tuple[tuple[Array, Array], Callable[..., Any]]:
    """Run an RNN in NumPy and return its pullback: the definition of `fusedrnn.rnn_vjp`."""
    return _one_state_vjp(
        RNN[nonlinearity],
        x,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        lengths,
        resets,
        reverse,
    )


def _one_state_vjp(
    cell: Cell,
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None,
    bias_hh: Array | None,
    h0: Array | None,
    lengths: npt.ArrayLike | None,
    resets: npt.ArrayLike | None,
    reverse: bool,
) -> tuple[tuple[Array, Array], Callable[..., Any]]:
    y, (h_n,), pullback = run(
        cell, x, weight_ih, weight_hh, bias_ih, bias_hh, (h0,), lengths, resets, reverse
    )

    def pull(dy: Array | None = None, dh_n: Array | None = None) -> Grads:
        return Grads(*pullback(dy, dh_n))

    return (y, h_n), pull
