"""The fused ops: one layer in one direction, with or without a pullback.

An op checks its arguments in their order, packs the weights for the kernels and calls them.
`layers.py` keeps the packed weights instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import checks
from .cells import CELLS, Cell
from .device import backend_of
from .kernel import FEW_ROWS, HOST, Problem
from .options import beyond_plain, check_options
from .reference import Array, Grads, Parameters

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import GRUOptions, LSTMOptions, RNNOptions

__all__ = ["Grads", "gru", "gru_vjp", "lstm", "lstm_vjp", "rnn", "rnn_vjp"]

# Keyword arguments that are arrays, masks or of one backend: what is left are options.
_ARRAYS = Parameters._fields[4:]
_OTHERS = ("lengths", "resets", "reverse", "precision")


@dataclass
class _Call:
    """The checked arguments of an op, unbatched input seen as a batch of one."""

    on: Any  # a Host or a Device
    problem: Problem
    parameters: Parameters
    unbatched: bool
    made: list[Any]  # y, the final state, cells: the user's arrays
    trace: Any

    def pack(self, parameters: Parameters, forward: Any = None) -> Any:
        """Make the weights ready for this call, or for its backward."""
        problem = self.problem
        T, B, _ = problem.x.shape
        borrow = T * B <= FEW_ROWS and not problem.row_wise
        return self.on.pack(problem.cell, parameters, forward, borrow, problem.row_wise)

    def seen(self) -> Parameters:
        """Return the parameters as this call sees them."""
        request = self.problem.request
        seen: Parameters = self.on.with_weights_dropped(self.parameters, request)
        return seen

    def results(self) -> tuple[Any, ...]:
        """Return what the user gets."""
        results = [self.user_view(a) for a in self.made]
        if self.trace is not None:
            results.append(self.user_trace())
        return tuple(results)

    def user_trace(self) -> dict[str, Any]:
        """Return every gate by its letter."""
        gates = self.on.give(self.trace)
        views = (gates[:, :, k] for k in range(gates.shape[2]))
        letters = self.problem.cell.gates
        if self.unbatched:
            return {k: v[:, 0] for k, v in zip(letters, views, strict=True)}
        return dict(zip(letters, views, strict=True))

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
    weights: tuple[Any, ...],
    states: tuple[Any, ...],
    given: Mapping[str, Any],
    training: bool = False,
    out: Any = None,
) -> _Call:
    """Check everything; `training` is what is taken where it is not said."""
    others = {n: given[n] for n in _OTHERS if n in given}
    of_arrays = {n: given[n] for n in _ARRAYS if n in given}
    on = backend_of(x, others.get("precision", "exact"))
    x = on.array("x", x)
    checks.sequence(x, "(T, B, I)")
    unbatched = x.ndim == 2
    parameters = _parameters(cell, on, x, weights, of_arrays)
    H, R = parameters.weight_ih.shape[0] // len(cell.gates), parameters.weight_hh.shape[1]

    batch = x.shape[1:-1]
    state_dtype = on.state_dtype(x.dtype)
    state = []
    for letter, width, value in zip(cell.states, (R, H), states, strict=False):
        name = f"{letter}0"
        if value is None:
            state.append(on.zeros((*batch, width), state_dtype))
        else:
            value = on.state(name, value, state_dtype)
            axis = "R" if width != H else "H"
            checks.shape(
                name, value, (*batch, width), f"({axis},)" if unbatched else f"(B, {axis})"
            )
            state.append(value)
    lengths, resets = others.get("lengths"), others.get("resets")
    if lengths is not None:
        lengths = on.lengths(lengths, x.shape[0], batch)
    if resets is not None:
        resets = on.resets(resets, x.shape[:-1], "(T,)" if unbatched else "(T, B)")
    reverse = checks.flag("reverse", others.get("reverse", False))
    rest = {n: v for n, v in given.items() if n not in (*_ARRAYS, *_OTHERS)}
    request = check_options(cell, rest, training, is_vjp=training)
    on_cpu = on is HOST
    row_wise = bool(beyond_plain(cell, parameters, on_cpu) or request.beyond_plain(on_cpu))
    if out is not None:
        axis = "R" if R != H else "H"
        meaning = f"(T, {axis})" if unbatched else f"(T, B, {axis})"
        used = [x, *parameters, *state]
        out = on.output(out, (*x.shape[:-1], R), meaning, used)
    if unbatched:
        x, batch = x[:, None], (1,)
        state = [None if a is None else a[None] for a in state]
        resets = None if resets is None else resets[:, None]
        out = None if out is None else out[:, None]
    T = x.shape[0]
    y = on.empty((T, *batch, R), x.dtype) if out is None else out
    final = tuple(
        on.empty((*batch, width), state_dtype)
        for width, _ in zip((R, H), cell.states, strict=False)
    )
    needs_cells = request.return_cells or (request.recompute and "c" in cell.states)
    cells = on.empty((T, *batch, H), state_dtype) if needs_cells else None
    trace = on.empty((T, *batch, len(cell.gates), H), x.dtype) if request.trace else None
    problem = Problem(
        cell,
        x,
        tuple(state),
        on.masks(lengths, resets),
        reverse,
        on.see(y),
        tuple(map(on.see, final)),
        request,
        row_wise,
        None if cells is None else on.see(cells),
        None if trace is None else on.see(trace),
    )
    results = [y, *final] + [cells] * request.return_cells
    return _Call(on, problem, parameters, unbatched, results, trace)


def _parameters(
    cell: Cell, on: Any, x: Any, weights: tuple[Any, ...], given: Mapping[str, Any]
) -> Parameters:
    """Check the parameters of an op on x; the first of `weights` says what H is."""
    values = dict(zip(Parameters._fields, weights, strict=False)) | dict(given)
    I, G = x.shape[-1], len(cell.gates)
    weight_ih = on.array("weight_ih", values["weight_ih"], x.dtype, whole=True)
    if weight_ih.ndim != 2 or weight_ih.shape[1] != I or weight_ih.shape[0] % G:
        axes = cell.parameter_shapes(I, 1)["weight_ih"].axes
        raise ValueError(
            f"weight_ih must have shape {axes} with I = {I}, got {weight_ih.shape}"
        )
    H = weight_ih.shape[0] // G
    if H == 0:
        raise ValueError(f"weight_ih must have at least {G} rows, got {weight_ih.shape}")
    R = None
    if values.get("weight_hr") is not None and "c" in cell.states:
        weight_hr = on.array("weight_hr", values["weight_hr"], x.dtype, whole=True)
        if weight_hr.ndim != 2 or weight_hr.shape[1] != H or not 1 <= weight_hr.shape[0] <= H:
            raise ValueError(
                f"weight_hr must have shape (R, H) with 1 <= R <= H = {H}, "
                f"got {weight_hr.shape}"
            )
        R = weight_hr.shape[0]
    shapes = cell.parameter_shapes(I, H, R)
    checked = {"weight_ih": weight_ih}
    for name, value in values.items():
        if name not in shapes and value is not None:
            raise TypeError(f"{cell.op} has no {name}")
        if name == "weight_ih" or (value is None and name != "weight_hh"):
            continue
        checked[name] = on.array(name, value, x.dtype, whole=True)
        checks.shape(name, checked[name], *shapes[name])
    norms = [n for n in shapes if n.startswith(("gamma", "beta"))]
    missing = [n for n in norms if n not in checked]
    if missing and len(missing) < len(norms):
        raise ValueError(f"{missing[0]} must be given with the others of {', '.join(norms)}")
    return Parameters(**checked)


def _forward(call: _Call) -> tuple[Any, ...]:
    call.on.forward(call.pack(call.seen()), call.problem)
    return call.results()


def _vjp(call: _Call) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    on, problem, parameters = call.on, call.problem, call.parameters
    seen = call.seen()
    weights = call.pack(seen)
    saved = on.forward(weights, problem, save=True)
    tape = on.tape(problem, parameters, call.pack(seen, weights), weights, saved)
    on.freeze(call.made[0])
    if problem.cells is not None and problem.request.return_cells:
        on.freeze(call.made[-1])
    T, B, I = problem.x.shape
    H, R = parameters.weight_ih.shape[0] // len(problem.cell.gates), problem.y.shape[-1]
    letters = problem.cell.states
    widths = dict(zip(letters, (R, H), strict=False))

    def pullback(
        dy: Array | None = None,
        dh_n: Array | None = None,
        dc_n: Array | None = None,
        d_cells: Array | None = None,
    ) -> Grads:
        on = call.on.now()
        if dc_n is not None and "c" not in letters:
            raise TypeError(f"{problem.cell.op} has no c, got dc_n")
        if d_cells is not None and not problem.request.return_cells:
            raise TypeError("d_cells is the gradient of cells: ask for return_cells=True")
        dy = _gradient(on, "dy", dy, (T, B, R), call)
        d_final = tuple(
            _gradient(on, f"d{letter}_n", value, (B, widths[letter]), call)
            for letter, value in zip(letters, (dh_n, dc_n), strict=False)
        )
        d_cells = _gradient(on, "d_cells", d_cells, (T, B, H), call)
        dx = on.empty((T, B, I), problem.x.dtype)
        state_dtype = on.state_dtype(problem.x.dtype)
        d_state = tuple(on.empty((B, widths[letter]), state_dtype) for letter in letters)
        d = tape.backward(dy, d_final, d_cells, on.see(dx), tuple(map(on.see, d_state)))
        by_name: dict[str, Any] = {
            k: None if a is None else on.give(a) for k, a in d._asdict().items()
        }
        d0 = dict(zip(("h0", "c0"), map(call.user_view, d_state), strict=False))
        return Grads(call.user_view(dx), **by_name, **d0)

    return call.results(), pullback


def _gradient(on: Any, name: str, value: Any, shape: tuple[int, ...], call: _Call) -> Any:
    """Check the gradient of a result, None for zeros."""
    if value is None:
        return None
    dtype = call.problem.x.dtype
    if name == "dy":
        value = on.array(name, value, dtype)
    elif len(shape) == 3:
        value = on.array(name, value, on.state_dtype(dtype))
    else:
        value = on.state(name, value, on.state_dtype(dtype))
    axes = "(T, B, H)" if len(shape) == 3 else "(B, H)"
    if call.unbatched:
        axes = axes.replace("B, ", "") if len(shape) == 3 else "(H,)"
    if shape[-1] != call.parameters.weight_ih.shape[0] // len(call.problem.cell.gates):
        axes = axes.replace("H", "R")
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
    x: (T, B, I) or (T, I), float32 or float64, any strides; every other array has its dtype.
        On a GPU, where all arrays must be (`fusedrnn.cuda`), bfloat16 and float16, too, with
        float32 states; rows of x and everything else contiguous.
    weight_ih: (4*H, I), gates in the order i f g o.
    weight_hh: (4*H, H).
    bias_ih, bias_hh: (4*H,), or None for none.
    h0, c0: (B, H) or (H,), the state before the first step, or None for zeros.
    out: an array to write y into, its last axis contiguous; not on a GPU.

    Any of these may be asked for, alone or together, by keyword:

    lengths: (B,) integers 0 to T in any order, one for x (T, I), or None for T. Row b takes
        the steps of times below lengths[b] alone: beyond them its y is 0 and x is not read,
        and h_n and c_n are of its last step.
    resets: (T, B) or (T,) bool, or None for none. Where true, the h and c that enter that
        step are 0.
    reverse: go from the last time of each row to the first; y[t] stays beside x[t].
    weight_hr: (R, H), R <= H: h = weight_hr (o tanh(c)). Then h0, h_n and y have R units and
        weight_hh is (4*H, R).
    weight_ch: (3*H,), peepholes of i, f and o: c' times the first two is added to a_i and
        a_f, c times the last to a_o (Gers & Schmidhuber 2000).
    coupled_gates: f = 1 - i. Weights have three blocks, i g o, and weight_ch two.
    clip: every pre-activation is bounded to [-clip, clip].
    cell_clip: c is bounded to [-cell_clip, cell_clip].
    gamma_ih, gamma_hh, gamma_c, beta_c: two of (4*H,), two of (H,): LayerNorm (Ba, Kiros &
        Hinton 2016), a = gamma_ih N(weight_ih x_t) + gamma_hh N(weight_hh h') + bias_ih +
        bias_hh and h = o tanh(gamma_c N(c) + beta_c) with N(v) = (v - mean) / sqrt(variance +
        1e-5).
    zoneout: (p_h, p_c), the probabilities with which a unit's h and c stay as they were
        (Krueger et al. 2016), or one for both; unless training, what is expected.
    recurrent_dropout: the probability with which weight_hh does not see a unit of h' in the
        whole sequence (Gal & Ghahramani 2016); the others are scaled by 1 / (1 - p).
    weight_dropout: the same of the elements of weight_hh (Merity, Keskar & Socher 2017).
    training: draw zoneout and dropout at random. seed: 0 to 2**64 - 1, what they depend on:
        the same seed, the same masks, whatever the threads; None for another each call.
    return_cells: give every c, too, (T, B, H) or (T, H).
    trace: give every gate, too, a dict of arrays like y, by their letters.
    precision: "exact", or "tf32" for the products of float32 on a GPU's matrix units.

    Returns
    -------
    y: (T, B, H) or (T, H), every h.
    h_n, c_n: (B, H) or (H,), the state after the last step taken.
    cells, the dict of gates: if asked for.

    Raises
    ------
    TypeError: a wrong type or dtype. ValueError: a wrong shape or value. Both before computing.

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
    >>> y, h_n, c_n, gates = fr.lstm(x, W, R, clip=3.0, lengths=[5, 2], trace=True)
    >>> list(gates), bool((gates["i"][2:, 1] == 0).all())
    (['i', 'f', 'g', 'o'], True)
    """
    cell = lstm_cell(options)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    return _forward(_check(cell, x, weights, (h0, c0), options, out=out))


def lstm_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
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

    The arguments are those of `lstm`, but training is True unless said otherwise, and

    bptt: no gradient of the state passes from one chunk of so many times, [0, bptt),
        [bptt, 2*bptt) …, to another; None for one chunk.
    recompute: keep h and c alone and compute the gates again, in one product over many steps.

    Otherwise 5·H values a step and row are kept beside x and y (9·H with LayerNorm). The
    arguments are kept by reference and y is read-only, because the pullback reads them; on a
    GPU leave y and cells as they are until then.

    Returns
    -------
    results, pullback: as from `lstm`, and ``pullback(dy=None, dh_n=None, dc_n=None,
        d_cells=None)``, which takes the gradients of y, h_n, c_n and cells, None for zeros,
        and returns a `fusedrnn.reference.Grads`: x, weight_ih, weight_hh, bias_ih, bias_hh,
        h0, c0, weight_hr and so on, each shaped like its argument, None for what was None. It
        may be called more than once.

    >>> import numpy as np, fusedrnn as fr
    >>> rng = np.random.default_rng(0)
    >>> x, W, R = rng.normal(size=(5, 2, 3)), rng.normal(size=(16, 3)), rng.normal(size=(16, 4))
    >>> (y, h_n, c_n), pullback = fr.lstm_vjp(x, W, R, zoneout=(0.1, 0.2), seed=7)
    >>> grads = pullback(2 * y)  # of the sum of y²
    >>> grads.weight_hh.shape
    (16, 4)
    """
    cell = lstm_cell(options)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    given = options | {"bptt": bptt, "recompute": recompute}
    return _vjp(_check(cell, x, weights, (h0, c0), given, training=True))


def lstm_cell(options: Any) -> Cell:
    """Take from options what selects the cell."""
    coupled = checks.flag("coupled_gates", options.pop("coupled_gates", False))
    return CELLS["lstm_coupled" if coupled else "lstm"]


def gru(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
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

    By keyword, alone or together:

    reset_after: False applies the reset gate before the matmul, as the first paper and ONNX
        do: n = tanh(W_n x_t + b_in + R_n (r h') + b_hn).
    gamma_ih, gamma_hh: (3*H,): LayerNorm, gamma_ih N(W x_t) for W x_t and gamma_hh N(R h')
        for R h'; those of r and z are normalised together, those of n apart.
    zoneout: the probability with which a unit's h stays as it was.
    lengths, resets, reverse, clip, recurrent_dropout, weight_dropout, training, seed, trace,
        precision: as for `lstm`.

    Returns
    -------
    y: (T, B, H) or (T, H), every h.
    h_n: (B, H) or (H,), the state after the last step taken.
    the dict of gates: if asked for.

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
    return _forward(_check(cell, x, weights, (h0,), options, out=out))


def gru_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
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
    values a step and row are kept beside x and y, 6·H with LayerNorm, none if recomputed.

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
    given = options | {"bptt": bptt, "recompute": recompute}
    return _vjp(_check(cell, x, weights, (h0,), given, training=True))


def gru_cell(options: Any) -> Cell:
    """Take from options what selects the cell."""
    after = checks.flag("reset_after", options.pop("reset_after", True))
    return CELLS["gru" if after else "gru_before"]


def rnn(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
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

    By keyword, alone or together:

    nonlinearity: φ, "tanh", "relu" or "identity" (a linear recurrence).
    lengths, resets, reverse, clip, zoneout, recurrent_dropout, weight_dropout, training, seed,
        trace, precision: as for `gru`; the one gate is h.

    Returns
    -------
    y: (T, B, H) or (T, H), every h.
    h_n: (B, H) or (H,), the state after the last step taken.
    the dict of gates: if asked for.

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
    cell, weights = _rnn_cell(options), (weight_ih, weight_hh, bias_ih, bias_hh)
    return _forward(_check(cell, x, weights, (h0,), options, out=out))


def rnn_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
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
    Nothing is kept beside x and y; H values a step and row with zoneout and training=False.

    Returns
    -------
    results, pullback: as from `rnn`, and ``pullback(dy=None, dh_n=None)``, as from `lstm_vjp`.

    >>> import numpy as np, fusedrnn as fr
    >>> (y, h_n), pullback = fr.rnn_vjp(np.ones((3, 1)), np.eye(1), np.eye(1))
    >>> pullback(dh_n=np.ones(1)).h0.shape
    (1,)
    """
    cell, weights = _rnn_cell(options), (weight_ih, weight_hh, bias_ih, bias_hh)
    given = options | {"bptt": bptt, "recompute": recompute}
    return _vjp(_check(cell, x, weights, (h0,), given, training=True))


def _rnn_cell(options: Any) -> Cell:
    return rnn_cell(options.pop("nonlinearity", "tanh"))


def rnn_cell(nonlinearity: Any) -> Cell:
    cell = CELLS.get(f"rnn_{nonlinearity}")
    if cell is None:
        known = ", ".join(f'"{n.removeprefix("rnn_")}"' for n in CELLS if n.startswith("rnn_"))
        raise ValueError(f"nonlinearity must be one of {known}, got {nonlinearity!r}")
    return cell
