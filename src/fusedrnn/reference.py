"""The definition of every cell and option, in plain NumPy.

The compiled kernels are tested against this module and must agree with it; nothing here is
fast. It takes any floating or complex dtype, and `x` as (T, B, I) or (T, I). W and R stand
for `weight_ih` and `weight_hh`, x for the input of a step, h' and c' for the state before
it, a_x = W x + b_ih for the input part of the pre-activations and a_h = R h' + b_hh for the
recurrent part. Blocks of H rows belong to the gates in torch's order.

A step returns what leads back from it: a function from the gradients of its results to
those of its arguments, which adds the parameters' to a dict. The gradients written out here
are proved against complex-step derivatives in tests/test_reference.py.

Forward takes PyTorch's tensors, too, of which autograd then sees every operation: that is how
`fusedrnn.torch` differentiates more than once, or forward. Gradients are written for NumPy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
State = tuple[Array, ...]
Nonlinearity = Literal["tanh", "relu", "identity"]  # the rows of RNN
Gradients = dict[str, Array]

EPSILON = 1e-5  # of LayerNorm


class Grads(NamedTuple):
    """Gradients of an op's arguments; one that was None or that the cell has not has None."""

    x: Array
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array | None
    bias_hh: Array | None
    h0: Array
    c0: Array | None = None
    weight_hr: Array | None = None
    weight_ch: Array | None = None
    gamma_ih: Array | None = None
    gamma_hh: Array | None = None
    gamma_c: Array | None = None
    beta_c: Array | None = None


class Parameters(NamedTuple):
    """A layer's parameters in one direction, arrays of NumPy or of a GPU.

    Attributes
    ----------
    weight_ih, weight_hh, bias_ih, bias_hh: W (gates*H, I), R (gates*H, R), b (gates*H,).
    weight_hr: the projection of h (R, H), or None: then R = H.
    weight_ch: peephole weights (3*H,) of i, f and o, or (2*H,) of i and o, or None.
    gamma_ih, gamma_hh: the scales of LayerNorm (gates*H,), or None for no LayerNorm.
    gamma_c, beta_c: those of the cell state (H,), for an LSTM with LayerNorm.
    """

    weight_ih: Any
    weight_hh: Any
    bias_ih: Any = None
    bias_hh: Any = None
    weight_hr: Any = None
    weight_ch: Any = None
    gamma_ih: Any = None
    gamma_hh: Any = None
    gamma_c: Any = None
    beta_c: Any = None


class Options(NamedTuple):
    """What a call is asked for beside its arrays.

    Attributes
    ----------
    clip: bounds every pre-activation to [-clip, clip].
    cell_clip: bounds c.
    zoneout: the probabilities with which h and c keep their values before the step.
    recurrent_dropout: the probability with which R does not see an element of h'.
    weight_dropout: that with which an element of R is 0.
    training: draw those at random; else take the expected value.
    seed, where: what the random numbers depend on, `where` telling layers and directions apart.
    bptt: no gradient of the state passes from one chunk of so many times to another; 0: one.
    return_cells, trace: return every c, every gate. recompute: keep them not for backward.
        The reference, which does all of that, does not look at these three.
    """

    clip: float = np.inf
    cell_clip: float = np.inf
    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    training: bool = False
    seed: int = 0
    where: int = 0
    bptt: int = 0
    return_cells: bool = False
    trace: bool = False
    recompute: bool = False

    @property
    def is_random(self) -> bool:
        """Whether random numbers decide."""
        drops = self.recurrent_dropout + self.weight_dropout > 0
        return self.training and (drops or any(self.zoneout))

    @property
    def drops_weights(self) -> bool:
        """Whether R is another in this call."""
        return self.training and self.weight_dropout > 0


# Arrays of either kind


def _module(a: Any) -> Any:
    """Return what a is computed with: PyTorch for its tensors, whose names are NumPy's here."""
    return np if isinstance(a, (np.ndarray, np.generic)) else sys.modules["torch"]


def _like(a: Any, values: Any, dtype: Any = None) -> Any:
    """Return values as an array of a's kind, in PyTorch on its device."""
    if _module(a) is np:
        return np.asarray(values, dtype)
    return _module(a).as_tensor(values, dtype=dtype, device=a.device)


def _zeros(a: Any, *shape: int) -> Any:
    """Return zeros of a's kind and dtype."""
    return np.zeros(shape, a.dtype) if _module(a) is np else a.new_zeros(shape)


def _blocks(a: Any, count: int) -> list[Any]:
    """Return equal parts of the last axis."""
    n = a.shape[-1] // count
    return [a[..., k * n : (k + 1) * n] for k in range(count)]


# Random numbers

_ZONEOUT, _RECURRENT, _WEIGHTS, _BETWEEN = range(4)  # what they are for


def philox(counter: Sequence[Any], seed: int) -> list[Array]:
    """Philox4x32-10 (Salmon et al. 2011): four words of 32 bits for one counter and key.

    >>> [hex(int(w)) for w in philox([0, 0, 0, 0], 0)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, np.uint64) for word in np.broadcast_arrays(*counter)]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        products = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        (high0, low0), (high1, low1) = ((p >> np.uint64(32), p & low) for p in products)
        c = [high1 ^ c[1] ^ np.uint64(key[0]), low1, high0 ^ c[3] ^ np.uint64(key[1]), low0]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def _drawn(
    what: int, words: int, first: int, i: Any, j: Any, n: int, p: float, o: Options
) -> Array:
    """Whether each of n elements of row (i, j) is drawn, which has the probability p.

    Blocks of 16 elements lie side by side in the counter, `words` of them in the words of
    one from the word `first` on.
    """
    e = np.arange(n)
    block, word = e // 16 // words, e // 16 % words + first
    counter = [block * 16 + e % 16, i[..., None], j[..., None], what | o.where << 8]
    threshold = min(int(p * 2**32 + 0.5), 2**32 - 1)
    return np.asarray(np.choose(word, philox(counter, o.seed)) < threshold)


def _dropped(what: int, i: Any, j: Any, n: int, p: float, o: Options, a: Any) -> Array:
    """Return 0 for the elements that are dropped and 1/(1-p) for the others, as a is."""
    drawn = _drawn(what, 4, 0, np.asarray(i), np.asarray(j), n, p, o)
    mask: Array = _like(a, np.where(drawn, 0, 1 / (1 - p)), a.dtype)
    return mask


def dropout(y: Array, p: float, seed: int, where: int) -> Array:
    """Return the mask of the dropout after layer `where`, whose y is (T, B, …)."""
    i, j = np.ogrid[: y.shape[0], : y.shape[1]]
    return _dropped(_BETWEEN, i, j, y.shape[-1], p, Options(seed=seed, where=where), y)


# Parts of a cell


def sigmoid(a: Array) -> Array:
    """σ(a) = 1 / (1 + exp(-a)), through tanh so that nothing overflows."""
    value: Array = 0.5 + 0.5 * _module(a).tanh(0.5 * a)
    return value


def _clipped(a: Array, bound: float) -> tuple[Array, Any]:
    """Return a within [-bound, bound], and whether a gradient passes."""
    if np.isinf(bound):
        return a, True
    module = _module(a)
    inside = abs(a.real) < bound
    return module.where(inside, a, module.sign(a.real) * bound), inside


def _mixed(keep: Any, old: Any, new: Any) -> Any:
    """Return old where a mask says so, or keep·old + (1 - keep)·new; values may be inf."""
    if isinstance(keep, float):
        return keep * old + (1 - keep) * new if keep else new
    return _module(keep).where(keep, old, new)


def _sum(a: Array) -> Array:
    """Sum over the batch, if there is one."""
    total: Array = np.atleast_2d(a).sum(0)
    return total


def _normalised(a: Array) -> tuple[Array, Callable[[Array], Array]]:
    """(a - mean) / sqrt(variance + ε) of each row (Ba et al. 2016), and back."""
    centred = a - a.mean(-1, keepdims=True)
    scale = ((centred**2).mean(-1, keepdims=True) + EPSILON) ** -0.5
    n = centred * scale

    def pull(dn: Array) -> Array:
        mean, along = dn.mean(-1, keepdims=True), (dn * n).mean(-1, keepdims=True)
        back: Array = scale * (dn - mean - n * along)
        return back

    return n, pull


def _product(
    x: Array, names: tuple[str, str, str], rows: slice, p: Parameters
) -> tuple[Array, Callable[[Array, Gradients], Array]]:
    """LN(weight x; γ) + b, or without γ weight x + b, for some rows of the weight."""
    weight, gamma, bias = (getattr(p, name) for name in names)
    a = x @ weight[rows].T
    if gamma is not None:
        n, unnormalise = _normalised(a)
        a = gamma[rows] * n
    if bias is not None:
        a = a + bias[rows]

    def pull(da: Array, into: Gradients) -> Array:
        if bias is not None:
            into[names[2]][rows] += _sum(da)
        if gamma is not None:
            into[names[1]][rows] += _sum(da * n)
            da = unnormalise(gamma[rows] * da)
        into[names[0]][rows] += np.atleast_2d(da).T @ np.atleast_2d(x)
        back: Array = da @ weight[rows]
        return back

    return a, pull


def _input_part(x: Array, rows: slice, p: Parameters) -> Any:
    return _product(x, ("weight_ih", "gamma_ih", "bias_ih"), rows, p)


def _recurrent_part(h: Array, rows: slice, p: Parameters) -> Any:
    return _product(h, ("weight_hh", "gamma_hh", "bias_hh"), rows, p)


# Cells

Pull = Callable[[State, Gradients], tuple[Array, Array, State]]


class Step(NamedTuple):
    """One step of a cell.

    Attributes
    ----------
    state: what leaves it: h before its projection, and c.
    gates: by their letters, in the order of the weights.
    pull: (d state, gradients of parameters to add to) -> dx, d of the h' that R saw, what
        reaches the state before directly.
    """

    state: State
    gates: dict[str, Array]
    pull: Pull


@dataclass(frozen=True)
class Cell:
    """A cell's equations.

    Attributes
    ----------
    gates: blocks of H rows in the weights, one letter each.
    states: names of the states it carries.
    step: (x, h' as R sees it, state, parameters, options) -> Step.
    jumps: whether a gate's slope jumps, as that of relu does. The gradients of a gate that is
        near the jump may then differ by more than its rounding.
    """

    gates: str
    states: tuple[str, ...]
    step: Callable[[Array, Array, State, Parameters, Options], Step]
    jumps: bool = False


def _lstm(coupled: bool) -> Callable[[Array, Array, State, Parameters, Options], Step]:
    letters = "igo" if coupled else "ifgo"
    sees_c = "io" if coupled else "ifo"

    def step(x: Array, seen: Array, state: State, p: Parameters, o: Options) -> Step:
        c_prev = state[1]
        a_x, pull_x = _input_part(x, slice(None), p)
        a_h, pull_h = _recurrent_part(seen, slice(None), p)
        xp = _module(a_x)
        a = dict(zip(letters, _blocks(a_x + a_h, len(letters)), strict=True))
        peephole: dict[str, Array] = {}
        if p.weight_ch is not None:
            peephole = dict(zip(sees_c, _blocks(p.weight_ch, len(sees_c)), strict=True))
        passes, gates = {}, {}

        def activate(letter: str, c: Array) -> None:
            sum_of = a[letter] + peephole[letter] * c if letter in peephole else a[letter]
            bounded, passes[letter] = _clipped(sum_of, o.clip)
            gates[letter] = xp.tanh(bounded) if letter == "g" else sigmoid(bounded)

        for letter in letters[:-1]:
            activate(letter, c_prev)
        i, g = gates["i"], gates["g"]
        f = 1 - i if coupled else gates["f"]
        c, c_passes = _clipped(f * c_prev + i * g, o.cell_clip)
        activate("o", c)
        seen_c = c
        if p.gamma_c is not None:
            n, unnormalise = _normalised(c)
            seen_c = p.gamma_c * n + p.beta_c
        tanh_c = xp.tanh(seen_c)

        def pull(d: State, into: Gradients) -> tuple[Array, Array, State]:
            dh, dc = d
            d_seen = dh * gates["o"] * (1 - tanh_c**2)
            if p.gamma_c is not None:
                into["gamma_c"] += _sum(d_seen * n)
                into["beta_c"] += _sum(d_seen)
                d_seen = unnormalise(p.gamma_c * d_seen)
            da = {"o": dh * tanh_c * gates["o"] * (1 - gates["o"]) * passes["o"]}
            dc = (dc + d_seen + da["o"] * peephole.get("o", 0)) * c_passes
            di, df = dc * g, dc * c_prev
            if coupled:
                di = di - df
            else:
                da["f"] = df * f * (1 - f) * passes["f"]
            da["i"] = di * i * (1 - i) * passes["i"]
            da["g"] = dc * i * (1 - g**2) * passes["g"]
            dc_prev = dc * f
            for letter in peephole:
                if letter != "o":
                    dc_prev = dc_prev + da[letter] * peephole[letter]
            if peephole:
                sees = [_sum(da[k] * (c if k == "o" else c_prev)) for k in sees_c]
                into["weight_ch"] += np.concatenate(sees)
            whole = np.concatenate([da[letter] for letter in letters], -1)
            return pull_x(whole, into), pull_h(whole, into), (np.zeros_like(dh), dc_prev)

        return Step((gates["o"] * tanh_c, c), gates, pull)

    return step


def _gru(reset_after: bool) -> Callable[[Array, Array, State, Parameters, Options], Step]:
    def step(x: Array, seen: Array, state: State, p: Parameters, o: Options) -> Step:
        (h_prev,) = state
        H = h_prev.shape[-1]
        rz, new = slice(0, 2 * H), slice(2 * H, 3 * H)
        x_rz, pull_x_rz = _input_part(x, rz, p)
        x_n, pull_x_n = _input_part(x, new, p)
        h_rz, pull_h_rz = _recurrent_part(seen, rz, p)
        bounded, passes_rz = _clipped(x_rz + h_rz, o.clip)
        r, z = _blocks(sigmoid(bounded), 2)
        if reset_after:
            h_n, pull_h_n = _recurrent_part(seen, new, p)
            bounded, passes_n = _clipped(x_n + r * h_n, o.clip)
        else:
            h_n, pull_h_n = _recurrent_part(r * seen, new, p)
            bounded, passes_n = _clipped(x_n + h_n, o.clip)
        n = _module(bounded).tanh(bounded)

        def pull(d: State, into: Gradients) -> tuple[Array, Array, State]:
            (dh,) = d
            da_n = dh * (1 - z) * (1 - n**2) * passes_n
            if reset_after:
                d_seen, dr = pull_h_n(da_n * r, into), da_n * h_n
            else:
                d_reset = pull_h_n(da_n, into)
                d_seen, dr = d_reset * r, d_reset * seen
            dz = dh * (h_prev - n)
            da_rz = np.concatenate([dr * r * (1 - r), dz * z * (1 - z)], -1) * passes_rz
            dx = pull_x_rz(da_rz, into) + pull_x_n(da_n, into)
            return dx, d_seen + pull_h_rz(da_rz, into), (dh * z,)

        return Step(((1 - z) * n + z * h_prev,), {"r": r, "z": z, "n": n}, pull)

    return step


def _rnn(
    value: Callable[[Array], Array], slope: Callable[[Array], Array]
) -> Callable[[Array, Array, State, Parameters, Options], Step]:
    def step(x: Array, seen: Array, state: State, p: Parameters, o: Options) -> Step:
        a_x, pull_x = _input_part(x, slice(None), p)
        a_h, pull_h = _recurrent_part(seen, slice(None), p)
        bounded, passes = _clipped(a_x + a_h, o.clip)
        h = value(bounded)

        def pull(d: State, into: Gradients) -> tuple[Array, Array, State]:
            da = d[0] * slope(h) * passes
            return pull_x(da, into), pull_h(da, into), (np.zeros_like(h),)

        return Step((h,), {"h": h}, pull)

    return step


LSTM = Cell("ifgo", ("h", "c"), _lstm(coupled=False))
COUPLED_LSTM = Cell("igo", ("h", "c"), _lstm(coupled=True))
GRU = Cell("rzn", ("h",), _gru(reset_after=True))
GRU_RESET_BEFORE = Cell("rzn", ("h",), _gru(reset_after=False))
RNN: dict[str, Cell] = {
    "tanh": Cell("h", ("h",), _rnn(lambda a: _module(a).tanh(a), lambda h: 1 - h**2)),
    "relu": Cell(
        "h",
        ("h",),
        _rnn(
            lambda a: _module(a).where(a.real <= 0, _module(a).zeros_like(a), a),
            lambda h: (h.real > 0).astype(h.dtype),
        ),
        jumps=True,
    ),
    "identity": Cell("h", ("h",), _rnn(lambda a: a, np.ones_like)),
}


# A layer in one direction


@dataclass
class Run:
    """What `run` computed.

    Attributes
    ----------
    y: every h. state: the final one. cells: every c, of an LSTM.
    gates: every gate by its letter, each (T, B, H).
    pullback: (dy, d state, d cells), None for zeros, to `Grads`.
    """

    y: Array
    state: State
    pullback: Callable[..., Grads]
    cells: Array | None = None
    gates: dict[str, Array] = field(default_factory=dict)


def run(
    cell: Cell,
    x: Array,
    parameters: Parameters,
    state: Sequence[Array | None],
    lengths: npt.ArrayLike | None = None,
    resets: npt.ArrayLike | None = None,
    reverse: bool = False,
    options: Options | None = None,
) -> Run:
    """Run `cell` over x.

    A row takes the steps of times below its length; at the others its state stays, y, cells
    and gates are 0, and what x, dy and d cells hold is not looked at. The state that enters a
    step is 0 where resets is true.
    """
    p, o = parameters, options or Options()
    where = _module(x).where
    T, batch, dtype = len(x), x.shape[1:-1], x.dtype
    B, H = (batch or (1,))[0], p.weight_ih.shape[0] // len(cell.gates)
    R = H if p.weight_hr is None else len(p.weight_hr)
    start: State = tuple(
        _zeros(x, *batch, width) if s is None else s
        for s, width in zip(state, (R, H), strict=False)
    )
    zero = 0.0
    times = range(T)[:: -1 if reverse else 1]
    times_of_rows = _like(x, np.arange(T).reshape(T, *[1] * (x.ndim - 1)))
    until = _like(x, T if lengths is None else lengths)[..., None]
    taken = times_of_rows < until
    fresh = taken & (False if resets is None else _like(x, resets)[..., None])
    cut = fresh
    if o.bptt:
        boundary = times_of_rows + reverse
        cut = fresh | ((boundary % o.bptt == 0) & (boundary > 0) & (boundary < until))
    x = where(taken, x, zero)

    rows = np.arange(B).reshape(batch)
    seen_mask: Any = 1.0
    weight_mask: Any = 1.0
    if o.training and o.recurrent_dropout:
        seen_mask = _dropped(_RECURRENT, 0, rows, R, o.recurrent_dropout, o, x)
    if o.training and o.weight_dropout:
        of_weights = np.arange(len(p.weight_hh))
        weight_mask = _dropped(_WEIGHTS, 0, of_weights, R, o.weight_dropout, o, x)
        p = p._replace(weight_hh=p.weight_hh * weight_mask)

    def keep(t: int) -> tuple[Any, ...]:
        if not o.training or not any(o.zoneout):
            return o.zoneout
        time, words = np.full(batch, t), 4 // len(cell.states)
        return tuple(
            _like(x, _drawn(_ZONEOUT, words, words * n, time, rows, width, o.zoneout[n], o))
            for n, (_, width) in enumerate(zip(cell.states, (R, H), strict=False))
        )

    now = start
    steps: list[tuple[State, Step]] = []
    made: dict[str, list[Any]] = {}
    for t in times:
        old = tuple(where(fresh[t], zero, s) for s in now)
        if o.bptt and not isinstance(x, np.ndarray):  # autograd must not pass
            old = tuple(where(cut[t], s.detach(), s) for s in old)
        step = cell.step(x[t], old[0] * seen_mask, old, p, o)
        (h, *c), kept = step.state, keep(t)
        if p.weight_hr is not None:
            h = h @ p.weight_hr.T
        new = tuple(_mixed(k, s, n) for k, s, n in zip(kept, old, (h, *c), strict=False))
        now = tuple(where(taken[t], n, s) for n, s in zip(new, now, strict=True))
        steps.append((old, step))
        of_step = dict(zip(("y", "cells"), now, strict=False)) | step.gates
        for name, value in of_step.items():
            made.setdefault(name, []).append(where(taken[t], value, zero))
    by_time = slice(None, None, -1 if reverse else 1)

    def over_time(name: str, width: int) -> Any:
        steps_of = made.get(name)
        stack = _module(x).stack
        return stack(steps_of[by_time]) if steps_of else _zeros(x, T, *batch, width)

    y = over_time("y", R)
    cells = over_time("cells", H) if "c" in cell.states else None
    gates = {letter: over_time(letter, H) for letter in cell.gates}

    def pullback(
        dy: Array | None = None,
        d_final: Sequence[Array | None] | None = None,
        d_cells: Array | None = None,
    ) -> Grads:
        ends = d_final or [None] * len(start)
        d: State = tuple(
            np.zeros_like(s) if g is None else g for s, g in zip(start, ends, strict=True)
        )
        dx = np.zeros(x.shape, dtype)
        into = {k: np.zeros_like(v) for k, v in p._asdict().items() if v is not None}
        for n, t in reversed(list(enumerate(times))):
            old, step = steps[n]
            given = (dy, d_cells if cells is not None else None)
            d_new = tuple(
                g if more is None else g + np.where(taken[t], more[t], zero)
                for g, more in zip(d, given, strict=False)
            )
            kept = keep(t)
            dh, *dc = (
                np.where(taken[t], _mixed(k, zero, g), zero)
                for k, g in zip(kept, d_new, strict=False)
            )
            if p.weight_hr is not None:
                m = step.state[0]
                into["weight_hr"] += np.atleast_2d(dh).T @ np.atleast_2d(m)
                dh = dh @ p.weight_hr
            dx[t], d_seen, direct = step.pull((dh, *dc), into)
            first = np.zeros_like(old[0]) if p.weight_hr is not None else direct[0]
            d_old = (first + d_seen * seen_mask, *direct[1:])
            d_old = tuple(
                _mixed(k, g, zero) + before
                for k, g, before in zip(kept, d_new, d_old, strict=False)
            )
            d_old = tuple(np.where(cut[t], zero, g) for g in d_old)
            d = tuple(np.where(taken[t], g, same) for g, same in zip(d_old, d, strict=True))
        into["weight_hh"] = into["weight_hh"] * weight_mask
        return Grads(dx, h0=d[0], c0=d[1] if len(d) > 1 else None, **_by_name(into))

    return Run(y, now, pullback, cells, gates)


def _by_name(into: Gradients) -> dict[str, Any]:
    return {name: into.get(name) for name in Parameters._fields}


# Ops

_PARAMETERS = Parameters._fields[4:]
_OPTIONS = ("clip", "cell_clip", "recurrent_dropout", "weight_dropout", "training", "bptt")
_MASKS = ("lengths", "resets", "reverse")


def op(
    cell: Cell,
    x: Array,
    weights: Sequence[Array | None],
    state: Sequence[Array | None],
    **given: Any,
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    """Run a cell with an op's keyword arguments; return its results and its pullback."""

    def take(names: Sequence[str]) -> dict[str, Any]:
        return {n: given.pop(n) for n in names if given.get(n) is not None}

    weight_ih, weight_hh, *biases = weights
    assert weight_ih is not None
    assert weight_hh is not None
    parameters = Parameters(weight_ih, weight_hh, *biases, **take(_PARAMETERS))
    zoneout = given.pop("zoneout", 0.0)
    pair = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    where = given.pop("where", 0)
    given = {"training": True} | given
    options = Options(**take(_OPTIONS), **take(["seed"]), zoneout=pair, where=where)
    extra = [given.pop(name, False) for name in ("return_cells", "trace")]
    masks = take(_MASKS)
    given.pop("recompute", None)  # it changes no result
    left = [name for name, value in given.items() if value is not None]
    if left:
        raise TypeError(f"no such option: {', '.join(left)}")
    done = run(cell, x, parameters, state, **masks, options=options)
    more = [r for r, wanted in zip((done.cells, done.gates), extra, strict=True) if wanted]

    def pullback(
        dy: Array | None = None,
        dh_n: Array | None = None,
        dc_n: Array | None = None,
        d_cells: Array | None = None,
    ) -> Grads:
        return done.pullback(dy, (dh_n, dc_n)[: len(cell.states)], d_cells)

    return (done.y, *done.state, *more), pullback


def lstm_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    coupled_gates: bool = False,
    **options: Any,
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    """Run an LSTM in NumPy and return its pullback: the definition of `fusedrnn.lstm_vjp`."""
    cell = COUPLED_LSTM if coupled_gates else LSTM
    return op(cell, x, (weight_ih, weight_hh, bias_ih, bias_hh), (h0, c0), **options)


def gru_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    reset_after: bool = True,
    **options: Any,
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    """Run a GRU in NumPy and return its pullback: the definition of `fusedrnn.gru_vjp`."""
    cell = GRU if reset_after else GRU_RESET_BEFORE
    return op(cell, x, (weight_ih, weight_hh, bias_ih, bias_hh), (h0,), **options)


def rnn_vjp(
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    *,
    nonlinearity: Nonlinearity = "tanh",
    **options: Any,
) -> tuple[tuple[Any, ...], Callable[..., Grads]]:
    """Run an RNN in NumPy and return its pullback: the definition of `fusedrnn.rnn_vjp`."""
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    return op(RNN[nonlinearity], x, weights, (h0,), **options)


def lstm(*args: Any, **options: Any) -> tuple[Any, ...]:
    """Run an LSTM in NumPy: the definition of `fusedrnn.lstm`, which see.

    >>> y, h_n, c_n = lstm(np.ones((5, 2, 3)), np.ones((16, 3)), np.ones((16, 4)))
    >>> y.shape, c_n.shape
    ((5, 2, 4), (2, 4))
    """
    return lstm_vjp(*args, **{"training": False} | options)[0]


def gru(*args: Any, **options: Any) -> tuple[Any, ...]:
    """Run a GRU in NumPy: the definition of `fusedrnn.gru`, which see."""
    return gru_vjp(*args, **{"training": False} | options)[0]


def rnn(*args: Any, **options: Any) -> tuple[Any, ...]:
    """Run an Elman RNN in NumPy: the definition of `fusedrnn.rnn`, which see."""
    return rnn_vjp(*args, **{"training": False} | options)[0]
