"""The fused ops: one layer in one direction, with or without a pullback.

An op packs its weights in each call. `layers.py` keeps the packed weights instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from . import engine
from .cells import Cell, gru_cell, lstm_cell, rnn_cell
from .reference import Array, Grads
from .weights import Weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import GRUOptions, LSTMOptions, RNNOptions

__all__ = ["Grads", "gru", "gru_vjp", "lstm", "lstm_vjp", "rnn", "rnn_vjp"]


def _forward(
    cell: Cell,
    x: Any,
    weights: tuple[Any, ...],
    states: tuple[Any, ...],
    options: Mapping[str, Any],
    out: Any,
) -> tuple[Any, ...]:
    if not options and out is None:
        results = engine.plain_op(cell, x, weights, states)
        if results is not None:
            return results
    return engine.OpCall(cell, x, weights, states, options, out=out).forward()


def _vjp(
    cell: Cell,
    x: Any,
    weights: tuple[Any, ...],
    states: tuple[Any, ...],
    options: Mapping[str, Any],
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    call = engine.OpCall(cell, x, weights, states, options, training=True)
    results, tape = call.vjp()

    def pullback(
        dy: Array | None = None,
        dh_n: Array | None = None,
        dc_n: Array | None = None,
        d_cells: Array | None = None,
    ) -> Grads:
        if dc_n is not None and "c" not in cell.states:
            raise TypeError(f"{cell.op} has no c, got dc_n")
        return call.pull_back(tape, results, dy, (dh_n, dc_n), d_cells)

    return results, pullback


def lstm(
    x: Array,
    weight_ih: Array | Weights,
    weight_hh: Array | None = None,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    out: Array | None = None,
    **options: Unpack[LSTMOptions],
) -> tuple[Any, ...]:
    r"""Run an LSTM layer over a sequence.

    ::

        a = weight_ih x_t + bias_ih + weight_hh h' + bias_hh
        i, f, o = σ(a_i), σ(a_f), σ(a_o)        g = tanh(a_g)
        c = f c' + i g                          h = o tanh(c)

    Parameters
    ----------
    x: (T, B, I) or (T, I), float32, float64 or ml_dtypes.bfloat16, any strides; every other
        array has its dtype, but states and gradients of parameters of bfloat16 are float32.
        If x is on a GPU (`fusedrnn.cuda`), every array must be, in bfloat16 or float16, too,
        with float32 states; the rows of x and all other arrays must be contiguous.
    weight_ih: (4*H, I), gates in the order i f g o; or `fusedrnn.Weights`, which stands for
        all weights and biases.
    weight_hh: (4*H, H).
    bias_ih, bias_hh: (4*H,), or None for none.
    h0, c0: (B, H) or (H,), the state before the first step, or None for zeros.
    out: an array that y is written into, its last axis contiguous; not on a GPU.

    The options are given by keyword, alone or together:

    lengths: (B,) integers 0 to T in any order, one integer for x (T, I), or None for T. Row b
        takes only the steps t < lengths[b]: beyond them its y is 0 and x is not read; h_n and
        c_n are the state after its last step.
    resets: (T, B) or (T,) bool, or None for none. Where true, h and c are set to 0 before that
        step.
    mask: (T, B) or (T,) bool, or None for all true: the steps that a row takes. Its state stays
        at the others, where x is not read, so padding and gaps may be anywhere. The row has the
        bits of the sequence of the steps that it takes. Numbers that are 0 or 1 are taken as
        bool, here and for resets.
    masked_output: y at steps that a row does not take, with a mask: "zero", or "last" for h of
        the unchanged state, as Keras repeats it.
    reverse: run each row from its last step to its first; y[t] still belongs to x[t].
    weight_hr: (R, H), R <= H: h = weight_hr (o tanh(c)). Then h0, h_n and y have R units and
        weight_hh is (4*H, R).
    weight_ch: (3*H,), peepholes of i, f and o: the first two times c' are added to a_i and
        a_f, the last times c to a_o (Gers & Schmidhuber 2000).
    activation: the function in place of tanh: "tanh", "sigmoid", "relu", "relu6",
        "hard_sigmoid", "hard_tanh", "identity" (or "linear"), "affine", "softsign", "softplus",
        "elu", "selu", "leaky_relu" or "thresholded_relu", or a tuple of a name and its numbers,
        ("leaky_relu", 0.3) or ("hard_sigmoid", 0.2, 0.5), which are ONNX's alpha and beta.
    recurrent_activation: the same in place of σ.
    coupled_gates: f = 1 - i. Weights have three blocks, i g o, and weight_ch two.
    clip: every pre-activation is clipped to [-clip, clip].
    cell_clip: c is clipped to [-cell_clip, cell_clip].
    gamma_ih, gamma_hh, gamma_c, beta_c: two of (4*H,), two of (H,): LayerNorm (Ba, Kiros &
        Hinton 2016), a = gamma_ih N(weight_ih x_t) + gamma_hh N(weight_hh h') + bias_ih +
        bias_hh and h = o tanh(gamma_c N(c) + beta_c) with N(v) = (v - mean) / sqrt(variance +
        1e-5).
    zoneout: (p_h, p_c), the probabilities with which a unit's h and c keep their previous
        values (Krueger et al. 2016), or one for both; unless training, the expected value.
    recurrent_dropout: the probability with which a unit of h' is dropped before weight_hh, for
        the whole sequence (Gal & Ghahramani 2016); the others are scaled by 1 / (1 - p).
    weight_dropout: the same for the elements of weight_hh (Merity, Keskar & Socher 2017).
    training: draw the masks of zoneout and dropout at random.
    seed: 0 to 2**64 - 1; the same seed gives the same masks for any number of threads. None
        draws a new one in each call.
    return_cells: also return every c, (T, B, H) or (T, H).
    trace: also return every gate, as a dict of arrays like y by their letters.
    precision: "exact", or "tf32" for the products of float32 on a GPU's matrix units.

    Returns
    -------
    y: (T, B, H) or (T, H), every h.
    h_n, c_n: (B, H) or (H,), the state after each row's last step.
    cells: every c, shaped like y but with H units; only with return_cells.
    gates: a dict of every gate; only with trace.

    Raises
    ------
    TypeError: a wrong type or dtype. ValueError: a wrong shape or value. Both before computing.

    Notes
    -----
    On the CPU, on one machine and ISA, results are the same bit for bit for any number of
    threads, any other rows in the batch, and a sequence in one call or in several that carry
    the state over; denormal numbers count as zero. On a GPU the same call gives the same bits
    again. Gradients come from `lstm_vjp`: PyTorch's autograd does not record an op. Source:
    Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000.

    >>> import numpy as np, fusedrnn as fr
    >>> rng = np.random.default_rng(0)
    >>> x, W, R = rng.normal(size=(5, 2, 3)), rng.normal(size=(16, 3)), rng.normal(size=(16, 4))
    >>> y, h_n, c_n = fr.lstm(x, W, R)
    >>> y.shape, bool((y[-1] == h_n).all())
    ((5, 2, 4), True)
    >>> y, h_n, c_n, gates = fr.lstm(x, W, R, clip=3.0, lengths=[5, 2], trace=True)
    >>> list(gates), bool((gates["i"][2:, 1] == 0).all())
    (['i', 'f', 'g', 'o'], True)
    """
    cell, weights = lstm_cell(options), (weight_ih, weight_hh, bias_ih, bias_hh)
    return _forward(cell, x, weights, (h0, c0), options, out)


def lstm_vjp(
    x: Array,
    weight_ih: Array | Weights,
    weight_hh: Array | None = None,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    bptt: int | None = None,
    recompute: bool = False,
    **options: Unpack[LSTMOptions],
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    """Run `lstm` and return a function that computes its gradients.

    The arguments are those of `lstm`, with training=True by default, and

    bptt: the number of steps of a chunk; the state's gradient does not pass between chunks,
        [0, bptt), [bptt, 2*bptt) …. None for one chunk.
    recompute: keep only h and c, and compute the gates again, in one product over many steps.

    Otherwise 5·H values per step and row are kept beside x and y (9·H with LayerNorm). The
    arguments are kept by reference and y is read-only, because the pullback reads them; on a
    GPU, do not change y and cells before that.

    Returns
    -------
    results, pullback: as from `lstm`, and ``pullback(dy=None, dh_n=None, dc_n=None,
        d_cells=None)``, which takes the gradients of y, h_n, c_n and cells, None for zeros,
        and returns a `fusedrnn.reference.Grads`: x, weight_ih, weight_hh, bias_ih, bias_hh,
        h0, c0, weight_hr and so on, each shaped like its argument, None where that was None.
        It may be called more than once.

    >>> import numpy as np, fusedrnn as fr
    >>> rng = np.random.default_rng(0)
    >>> x, W, R = rng.normal(size=(5, 2, 3)), rng.normal(size=(16, 3)), rng.normal(size=(16, 4))
    >>> (y, h_n, c_n), pullback = fr.lstm_vjp(x, W, R, zoneout=(0.1, 0.2), seed=7)
    >>> grads = pullback(2 * y)  # of the sum of y²
    >>> grads.weight_hh.shape
    (16, 4)
    """
    cell, weights = lstm_cell(options), (weight_ih, weight_hh, bias_ih, bias_hh)
    arguments = options | {"bptt": bptt, "recompute": recompute}
    return _vjp(cell, x, weights, (h0, c0), arguments)


def gru(
    x: Array,
    weight_ih: Array | Weights,
    weight_hh: Array | None = None,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    out: Array | None = None,
    **options: Unpack[GRUOptions],
) -> tuple[Any, ...]:
    r"""Run a GRU layer over a sequence.

    ::

        r = σ(W_r x_t + b_ir + R_r h' + b_hr)
        z = σ(W_z x_t + b_iz + R_z h' + b_hz)
        n = tanh(W_n x_t + b_in + r (R_n h' + b_hn))
        h = (1 - z) n + z h'

    Parameters
    ----------
    x, bias_ih, bias_hh, h0, out: as for `lstm`, biases (3*H,).
    weight_ih: (3*H, I), gates in the order r z n.
    weight_hh: (3*H, H).

    The options are given by keyword, alone or together:

    reset_after: False applies the reset gate before the matmul, as the first paper and ONNX
        do: n = tanh(W_n x_t + b_in + R_n (r h') + b_hn).
    gamma_ih, gamma_hh: (3*H,): LayerNorm, gamma_ih N(W x_t) for W x_t and gamma_hh N(R h')
        for R h'; the blocks of r and z are normalised together, that of n separately.
    activation, recurrent_activation: in place of tanh and σ, as for `lstm`.
    zoneout: the probability with which a unit's h keeps its previous value.
    lengths, resets, mask, masked_output, reverse, clip, recurrent_dropout, weight_dropout,
        training, seed, trace, precision: as for `lstm`.

    Returns
    -------
    y: (T, B, H) or (T, H), every h.
    h_n: (B, H) or (H,), the state after each row's last step.
    gates: with trace.

    Raises
    ------
    TypeError: a wrong type or dtype. ValueError: a wrong shape or value. Both before computing.

    Notes
    -----
    Exactness as for `lstm`. Source: Cho et al. 2014, in the form of cuDNN and PyTorch.

    >>> import numpy as np, fusedrnn as fr
    >>> rng = np.random.default_rng(0)
    >>> x, W, R = rng.normal(size=(5, 2, 3)), rng.normal(size=(12, 3)), rng.normal(size=(12, 4))
    >>> y, h_n = fr.gru(x, W, R, reset_after=False)
    >>> y.shape
    (5, 2, 4)
    """
    cell, weights = gru_cell(options), (weight_ih, weight_hh, bias_ih, bias_hh)
    return _forward(cell, x, weights, (h0,), options, out)


def gru_vjp(
    x: Array,
    weight_ih: Array | Weights,
    weight_hh: Array | None = None,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    bptt: int | None = None,
    recompute: bool = False,
    **options: Unpack[GRUOptions],
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    """Run `gru` and return a function that computes its gradients.

    The arguments are those of `gru`, with training, bptt and recompute as for `lstm_vjp`. 4·H
    values per step and row are kept beside x and y, 6·H with LayerNorm, none with recompute.

    Returns
    -------
    results, pullback: as from `gru`, and ``pullback(dy=None, dh_n=None)``, as from `lstm_vjp`.

    >>> import numpy as np, fusedrnn as fr
    >>> rng = np.random.default_rng(0)
    >>> x, W, R = rng.normal(size=(5, 2, 3)), rng.normal(size=(12, 3)), rng.normal(size=(12, 4))
    >>> (y, h_n), pullback = fr.gru_vjp(x, W, R)
    >>> pullback(2 * y).x.shape
    (5, 2, 3)
    """
    cell, weights = gru_cell(options), (weight_ih, weight_hh, bias_ih, bias_hh)
    arguments = options | {"bptt": bptt, "recompute": recompute}
    return _vjp(cell, x, weights, (h0,), arguments)


def rnn(
    x: Array,
    weight_ih: Array | Weights,
    weight_hh: Array | None = None,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    out: Array | None = None,
    **options: Unpack[RNNOptions],
) -> tuple[Any, ...]:
    r"""Run an Elman RNN layer over a sequence.

    ::

        h = φ(weight_ih x_t + bias_ih + weight_hh h' + bias_hh)

    Parameters
    ----------
    x, bias_ih, bias_hh, h0, out: as for `lstm`, biases (H,).
    weight_ih: (H, I).
    weight_hh: (H, H).

    The options are given by keyword, alone or together:

    nonlinearity: φ, "tanh", "relu" or "identity" (a linear recurrence).
    activation: another φ, as for `lstm`, where nonlinearity is "tanh".
    lengths, resets, mask, masked_output, reverse, clip, zoneout, recurrent_dropout,
        weight_dropout, training, seed, trace, precision: as for `gru`; the only gate is h.

    Returns
    -------
    y: (T, B, H) or (T, H), every h.
    h_n: (B, H) or (H,), the state after each row's last step.
    gates: with trace.

    Raises
    ------
    TypeError: a wrong type or dtype. ValueError: a wrong shape or value. Both before computing.

    Notes
    -----
    Exactness as for `lstm`. Source: Elman 1990.

    >>> import numpy as np, fusedrnn as fr
    >>> y, h_n = fr.rnn(np.ones((3, 1)), np.eye(1), np.eye(1), nonlinearity="relu")
    >>> y.ravel()
    array([1., 2., 3.])
    """
    cell, weights = rnn_cell(options), (weight_ih, weight_hh, bias_ih, bias_hh)
    return _forward(cell, x, weights, (h0,), options, out)


def rnn_vjp(
    x: Array,
    weight_ih: Array | Weights,
    weight_hh: Array | None = None,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    bptt: int | None = None,
    recompute: bool = False,
    **options: Unpack[RNNOptions],
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    """Run `rnn` and return a function that computes its gradients.

    The arguments are those of `rnn`, with training, bptt and recompute as for `lstm_vjp`.
    Nothing is kept beside x and y, except H values per step and row with zoneout and
    training=False.

    Returns
    -------
    results, pullback: as from `rnn`, and ``pullback(dy=None, dh_n=None)``, as from `lstm_vjp`.

    >>> import numpy as np, fusedrnn as fr
    >>> (y, h_n), pullback = fr.rnn_vjp(np.ones((3, 1)), np.eye(1), np.eye(1))
    >>> pullback(dh_n=np.ones(1)).h0.shape
    (1,)
    """
    cell, weights = rnn_cell(options), (weight_ih, weight_hh, bias_ih, bias_hh)
    arguments = options | {"bptt": bptt, "recompute": recompute}
    return _vjp(cell, x, weights, (h0,), arguments)
