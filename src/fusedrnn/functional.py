"""The fused ops: one layer in one direction, with or without a pullback.

An op checks its arguments in their order, packs the weights for the kernels and calls them.
`layers.py` keeps the packed weights instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from . import checks
from .cells import CELLS, Cell
from .cuda import Precision
from .device import backend_of
from .kernel import FEW_ROWS
from .reference import Array, Grads, LSTMGrads, Nonlinearity

__all__ = ["Grads", "LSTMGrads", "gru", "gru_vjp", "lstm", "lstm_vjp", "rnn", "rnn_vjp"]


@dataclass
class _Call:
    """The checked arguments of an op, unbatched input seen as a batch of one."""

    on: Any  # a Host or a Device
    cell: Cell
    unbatched: bool
    masks: Any
    reverse: bool
    x: Any
    parameters: tuple[Any, Any, Any, Any]
    state: tuple[Any, ...]
    y: Any  # this and the final state are the user's arrays
    final: tuple[Any, ...]

    def pack(self, forward: Any = None) -> Any:
        """Make the weights ready for this call, or for its backward."""
        T, B, _ = self.x.shape
        return self.on.pack(self.cell, *self.parameters, forward, T * B <= FEW_ROWS)

    def run(self, weights: Any, save: bool) -> Any:
        """Compute y and the final state; return what backward needs beside them."""
        on = self.on
        final = tuple(on.see(a) for a in self.final)
        y = on.see(self.y)
        return on.forward(weights, self.x, self.state, self.masks, self.reverse, y, final, save)

    def results(self) -> tuple[Any, ...]:
        return tuple(self.user_view(a) for a in (self.y, *self.final))

    def user_view(self, a: Any) -> Any:
        """Undo the batch of one."""
        a = self.on.give(a)
        return a[..., 0, :] if self.unbatched else a

    def user_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Undo the batch of one."""
        return (*shape[:-2], shape[-1]) if self.unbatched else shape


def _check(
    cell: Cell,
    x: Any,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any,
    bias_hh: Any,
    states: tuple[Any, ...],
    lengths: Any,
    resets: Any,
    reverse: Any,
    precision: Any,
    out: Any = None,
) -> _Call:
    on = backend_of(x, precision)
    x = on.array("x", x)
    checks.sequence(x, "(T, B, I)")
    unbatched = x.ndim == 2
    I, dtype, G = x.shape[-1], x.dtype, len(cell.gates)
    rows = f"{G}*H" if G > 1 else "H"

    weight_ih = on.array("weight_ih", weight_ih, dtype, whole=True)
    if weight_ih.ndim != 2 or weight_ih.shape[1] != I or weight_ih.shape[0] % G:
        raise ValueError(
            f"weight_ih must have shape ({rows}, I) with I = {I}, got {weight_ih.shape}"
        )
    H = weight_ih.shape[0] // G
    if H == 0:
        raise ValueError(f"weight_ih must have at least {G} rows, got {weight_ih.shape}")
    weight_hh = on.array("weight_hh", weight_hh, dtype, whole=True)
    checks.shape("weight_hh", weight_hh, (G * H, H), f"({rows}, H)")
    biases = []
    for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)):
        if bias is not None:
            bias = on.array(name, bias, dtype, whole=True)
            checks.shape(name, bias, (G * H,), f"({rows},)")
        biases.append(bias)

    batch = x.shape[1:-1]
    meaning = "(H,)" if unbatched else "(B, H)"
    state_dtype = on.state_dtype(dtype)
    state = []
    for letter, value in zip(cell.states, states, strict=True):
        if value is None:
            state.append(on.zeros((*batch, H), state_dtype))
        else:
            value = on.state(f"{letter}0", value, state_dtype)
            checks.shape(f"{letter}0", value, (*batch, H), meaning)
            state.append(value)
    if lengths is not None:
        lengths = on.lengths(lengths, x.shape[0], batch)
    if resets is not None:
        axes = "(T,)" if unbatched else "(T, B)"
        resets = on.resets(resets, x.shape[:-1], axes)
    reverse = checks.flag("reverse", reverse)
    shape_y = (*x.shape[:-1], H)
    if out is not None:
        used = [x, weight_ih, weight_hh, *biases, *state]
        out = on.output(out, shape_y, "(T, H)" if unbatched else "(T, B, H)", used)
    if unbatched:
        x, batch = x[:, None], (1,)
        state = [None if a is None else a[None] for a in state]
        resets = None if resets is None else resets[:, None]
        out = None if out is None else out[:, None]
    y = on.empty((x.shape[0], *batch, H), dtype) if out is None else out
    return _Call(
        on,
        cell,
        unbatched,
        on.masks(lengths, resets),
        reverse,
        x,
        (weight_ih, weight_hh, *biases),
        tuple(state),
        y,
        tuple(on.empty((*batch, H), state_dtype) for _ in state),
    )


def _forward(call: _Call) -> tuple[Any, ...]:
    call.run(call.pack(), save=False)
    return call.results()


def _vjp(call: _Call) -> tuple[tuple[Any, ...], Callable[..., tuple[Any, ...]]]:
    on = call.on
    weights = call.pack()
    saved = call.run(weights, save=True)
    tape = on.tape(
        call.cell,
        call.pack(forward=weights),
        call.x,
        call.state,
        call.masks,
        call.reverse,
        on.see(call.y),
        saved,
    )
    on.freeze(call.y)
    has_bias = [p is not None for p in call.parameters]
    T, B, I = call.x.shape
    H = call.y.shape[-1]

    def pullback(*d_results: Any) -> tuple[Any, ...]:
        on = call.on.now()
        names = tuple(f"d{letter}_n" for letter in call.cell.states)
        dy = _gradient(on, "dy", d_results[0], (T, B, H), call)
        d_final = tuple(
            _gradient(on, name, value, (B, H), call)
            for name, value in zip(names, d_results[1:], strict=True)
        )
        dx = on.empty((T, B, I), call.x.dtype)
        state_dtype = on.state_dtype(call.x.dtype)
        d_state = tuple(on.empty((B, H), state_dtype) for _ in names)
        d_parameters = tape.backward(dy, d_final, on.see(dx), tuple(map(on.see, d_state)))
        return (
            call.user_view(dx),
            *(
                on.give(g) if has else None
                for g, has in zip(d_parameters, has_bias, strict=True)
            ),
            *(call.user_view(g) for g in d_state),
        )

    return call.results(), pullback


def _gradient(on: Any, name: str, value: Any, shape: tuple[int, ...], call: _Call) -> Any:
    """Check the gradient of a result, None for zeros."""
    if value is None:
        return None
    dtype = call.x.dtype
    if len(shape) == 3:
        value = on.array(name, value, dtype)
    else:
        value = on.state(name, value, on.state_dtype(dtype))
    axes = "(T, B, H)" if len(shape) == 3 else "(B, H)"
    if call.unbatched:
        axes = axes.replace("B, ", "") if len(shape) == 3 else "(H,)"
    checks.shape(name, value, call.user_shape(shape), axes)
    return value[..., None, :] if call.unbatched else value


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
    precision: Precision = "exact",
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    r"""Run an LSTM layer over a sequence.

    ::

        a = weight_ih x_t + bias_ih + weight_hh h' + bias_hh
        i, f, o = σ(a_i), σ(a_f), σ(a_o)        g = tanh(a_g)
        c = f c' + i g                          h = o tanh(c)

    Parameters
    ----------
    x: (T, B, I) or (T, I), float32 or float64, any strides; every other array has its dtype.
        On a GPU, where all arrays must be (`fusedrnn.cuda`), bfloat16 and float16, too, with
        float32 states; rows of x and everything else contiguous.
    weight_ih: (4*H, I), gates in the order i f g o.
    weight_hh: (4*H, H).
    bias_ih, bias_hh: (4*H,), or None for none.
    h0, c0: (B, H) or (H,), the state before the first step, or None for zeros.
    lengths: (B,) integers 0 to T in any order, one for x (T, I), or None for T. Row b takes
        the steps of times below lengths[b] alone: beyond them its y is 0 and x is not read,
        and h_n and c_n are of its last step.
    resets: (T, B) or (T,) bool, or None for none. Where true, the h and c that enter that
        step are 0.
    reverse: go from the last time of each row to the first; y[t] stays beside x[t].
    precision: "exact", or "tf32" for the products of float32 on a GPU's matrix units.
    out: an array to write y into, its last axis contiguous; not on a GPU.

    Returns
    -------
    y: (T, B, H) or (T, H), every h.
    h_n, c_n: (B, H) or (H,), the state after the last step taken.

    Raises
    ------
    TypeError: a wrong type or dtype. ValueError: a wrong shape. Both before computing.

    Notes
    -----
    On the CPU results do not depend on the number of threads or on the other rows of the
    batch, and a sequence fed in parts, state carried over, equals the whole, bit for bit on one
    machine and ISA; denormal numbers count as zero. On a GPU the same call gives the same bits
    again. Gradients come from `lstm_vjp`: PyTorch's autograd does not see an op. Source:
    Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000.

    >>> import numpy as np, fusedrnn as fr
    >>> rng = np.random.default_rng(0)
    >>> x, W, R = rng.normal(size=(5, 2, 3)), rng.normal(size=(16, 3)), rng.normal(size=(16, 4))
    >>> y, h_n, c_n = fr.lstm(x, W, R)
    >>> y.shape, bool((y[-1] == h_n).all())
    ((5, 2, 4), True)
    """
    call = _check(
        CELLS["lstm"],
        x,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        (h0, c0),
        lengths,
        resets,
        reverse,
        precision,
        out,
    )
    y, h_n, c_n = _forward(call)
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
    precision: Precision = "exact",
) -> tuple[tuple[Array, Array, Array], Callable[..., LSTMGrads]]:
    """Run `lstm` and return a function that computes its gradients.

    The arguments are those of `lstm`. 5·H values a step and row are kept beside x and y; the
    arguments are kept by reference and y is read-only, because the pullback reads them; on a
    GPU leave y as it is until then.

    Returns
    -------
    (y, h_n, c_n), pullback: as from `lstm`, and ``pullback(dy=None, dh_n=None, dc_n=None)``,
        which takes the gradients of the three, None for zeros, and returns an `LSTMGrads`:
        x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, each shaped like its argument. It
        may be called more than once.

    >>> import numpy as np, fusedrnn as fr
    >>> rng = np.random.default_rng(0)
    >>> x, W, R = rng.normal(size=(5, 2, 3)), rng.normal(size=(16, 3)), rng.normal(size=(16, 4))
    >>> (y, h_n, c_n), pullback = fr.lstm_vjp(x, W, R)
    >>> grads = pullback(2 * y)  # of the sum of y²
    >>> grads.weight_hh.shape
    (16, 4)
    """
    results, pull = _vjp(
        _check(
            CELLS["lstm"],
            x,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            (h0, c0),
            lengths,
            resets,
            reverse,
            precision,
        )
    )
    y, h_n, c_n = results

    def pullback(
        dy: Array | None = None, dh_n: Array | None = None, dc_n: Array | None = None
    ) -> LSTMGrads:
        return LSTMGrads(*pull(dy, dh_n, dc_n))

    return (y, h_n, c_n), pullback


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
    precision: Precision = "exact",
    out: Array | None = None,
) -> tuple[Array, Array]:
    r"""Run a GRU layer over a sequence, the reset gate applied after the matmul.

    ::

        r = σ(W_r x_t + b_ir + R_r h' + b_hr)
        z = σ(W_z x_t + b_iz + R_z h' + b_hz)
        n = tanh(W_n x_t + b_in + r (R_n h' + b_hn))
        h = (1 - z) n + z h'

    Parameters
    ----------
    x: (T, B, I) or (T, I), float32 or float64, any strides; every other array has its dtype.
        On a GPU, where all arrays must be (`fusedrnn.cuda`), bfloat16 and float16, too, with
        float32 states; rows of x and everything else contiguous.
    weight_ih: (3*H, I), gates in the order r z n.
    weight_hh: (3*H, H).
    bias_ih, bias_hh: (3*H,), or None for none.
    h0: (B, H) or (H,), the state before the first step, or None for zeros.
    lengths: (B,) integers 0 to T in any order, one for x (T, I), or None for T. Row b takes
        the steps of times below lengths[b] alone: beyond them its y is 0 and x is not read,
        and h_n is of its last step.
    resets: (T, B) or (T,) bool, or None for none. Where true, the h that enters that step is 0.
    reverse: go from the last time of each row to the first; y[t] stays beside x[t].
    precision: "exact", or "tf32" for the products of float32 on a GPU's matrix units.
    out: an array to write y into, its last axis contiguous; not on a GPU.

    Returns
    -------
    y: (T, B, H) or (T, H), every h.
    h_n: (B, H) or (H,), the state after the last step taken.

    Raises
    ------
    TypeError: a wrong type or dtype. ValueError: a wrong shape. Both before computing.

    Notes
    -----
    Exactness as for `lstm`. Source: Cho et al. 2014, in the form of cuDNN and PyTorch.

    >>> import numpy as np, fusedrnn as fr
    >>> rng = np.random.default_rng(0)
    >>> x, W, R = rng.normal(size=(5, 2, 3)), rng.normal(size=(12, 3)), rng.normal(size=(12, 4))
    >>> y, h_n = fr.gru(x, W, R)
    >>> y.shape
    (5, 2, 4)
    """
    y, h_n = _forward(
        _check(
            CELLS["gru"],
            x,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            (h0,),
            lengths,
            resets,
            reverse,
            precision,
            out,
        )
    )
    return y, h_n


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
    precision: Precision = "exact",
) -> tuple[tuple[Array, Array], Callable[..., Grads]]:
    """Run `gru` and return a function that computes its gradients.

    The arguments are those of `gru`. 4·H values a step and row are kept beside x and y; the
    arguments are kept by reference and y is read-only, because the pullback reads them; on a
    GPU leave y as it is until then.

    Returns
    -------
    (y, h_n), pullback: as from `gru`, and ``pullback(dy=None, dh_n=None)``, which takes the
        gradients of the two, None for zeros, and returns a `Grads`: x, weight_ih, weight_hh,
        bias_ih, bias_hh, h0, each shaped like its argument. It may be called more than once.

    >>> import numpy as np, fusedrnn as fr
    >>> rng = np.random.default_rng(0)
    >>> x, W, R = rng.normal(size=(5, 2, 3)), rng.normal(size=(12, 3)), rng.normal(size=(12, 4))
    >>> (y, h_n), pullback = fr.gru_vjp(x, W, R)
    >>> pullback(2 * y).x.shape
    (5, 2, 3)
    """
    return _one_state_vjp(
        _check(
            CELLS["gru"],
            x,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            (h0,),
            lengths,
            resets,
            reverse,
            precision,
        )
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
    precision: Precision = "exact",
    out: Array | None = None,
) -> tuple[Array, Array]:
    r"""Run an Elman RNN layer over a sequence.

    ::

        h = φ(weight_ih x_t + bias_ih + weight_hh h' + bias_hh)

    Parameters
    ----------
    x: (T, B, I) or (T, I), float32 or float64, any strides; every other array has its dtype.
        On a GPU, where all arrays must be (`fusedrnn.cuda`), bfloat16 and float16, too, with
        float32 states; rows of x and everything else contiguous.
    weight_ih: (H, I).
    weight_hh: (H, H).
    bias_ih, bias_hh: (H,), or None for none.
    h0: (B, H) or (H,), the state before the first step, or None for zeros.
    nonlinearity: φ, "tanh", "relu" or "identity" (a linear recurrence).
    lengths: (B,) integers 0 to T in any order, one for x (T, I), or None for T. Row b takes
        the steps of times below lengths[b] alone: beyond them its y is 0 and x is not read,
        and h_n is of its last step.
    resets: (T, B) or (T,) bool, or None for none. Where true, the h that enters that step is 0.
    reverse: go from the last time of each row to the first; y[t] stays beside x[t].
    precision: "exact", or "tf32" for the products of float32 on a GPU's matrix units.
    out: an array to write y into, its last axis contiguous; not on a GPU.

    Returns
    -------
    y: (T, B, H) or (T, H), every h.
    h_n: (B, H) or (H,), the state after the last step taken.

    Raises
    ------
    TypeError: a wrong type or dtype. ValueError: a wrong shape or nonlinearity. Both before
        computing.

    Notes
    -----
    Exactness as for `lstm`. Source: Elman 1990.

    >>> import numpy as np, fusedrnn as fr
    >>> y, h_n = fr.rnn(np.ones((3, 1)), np.eye(1), np.eye(1), nonlinearity="relu")
    >>> y.ravel()
    array([1., 2., 3.])
    """
    y, h_n = _forward(
        _check(
            rnn_cell(nonlinearity),
            x,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            (h0,),
            lengths,
            resets,
            reverse,
            precision,
            out,
        )
    )
    return y, h_n


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
    precision: Precision = "exact",
) -> tuple[tuple[Array, Array], Callable[..., Grads]]:
    """Run `rnn` and return a function that computes its gradients.

    The arguments are those of `rnn`. Nothing is kept beside x and y; the arguments are kept
    by reference and y is read-only, because the pullback reads them; on a GPU leave y as it is
    until then.

    Returns
    -------
    (y, h_n), pullback: as from `rnn`; the pullback is that of `gru_vjp`.

    >>> import numpy as np, fusedrnn as fr
    >>> (y, h_n), pullback = fr.rnn_vjp(np.ones((3, 1)), np.eye(1), np.eye(1))
    >>> pullback(dh_n=np.ones(1)).h0.shape
    (1,)
    """
    return _one_state_vjp(
        _check(
            rnn_cell(nonlinearity),
            x,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            (h0,),
            lengths,
            resets,
            reverse,
            precision,
        )
    )


def rnn_cell(nonlinearity: Any) -> Cell:
    cell = CELLS.get(f"rnn_{nonlinearity}")
    if cell is None:
        known = ", ".join(f'"{n.removeprefix("rnn_")}"' for n in CELLS if n.startswith("rnn_"))
        raise ValueError(f"nonlinearity must be one of {known}, got {nonlinearity!r}")
    return cell


def _one_state_vjp(call: _Call) -> tuple[tuple[Array, Array], Callable[..., Grads]]:
    (y, h_n), pull = _vjp(call)

    def pullback(dy: Array | None = None, dh_n: Array | None = None) -> Grads:
        return Grads(*pull(dy, dh_n))

    return (y, h_n), pullback
