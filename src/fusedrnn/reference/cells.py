"""The cells: the equations of a step and of its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .activations import IDENTITY, RELU, SIGMOID, TANH, Activation
from .arrays import blocks, like, module_of
from .types import Array, Gradients, Options, Parameters, State

EPSILON = 1e-5  # which LayerNorm adds to the variance


def _clipped(a: Array, bound: float) -> tuple[Array, Any]:
    """Return a clipped to [-bound, bound], and where the gradient passes."""
    if np.isinf(bound):
        return a, True
    module = module_of(a)
    inside = abs(a.real) < bound
    return module.where(inside, a, module.sign(a.real) * bound), inside


def _activated(value: Activation, a: Array, p: Parameters, o: Options) -> tuple[Array, Any]:
    """Return the activation of a clipped a, and where the gradient passes."""
    bounded, inside = _clipped(a, o.clip)
    found = value(bounded)
    if inside is True:
        return found, inside
    bounds = sorted(value(like(a, [-o.clip, o.clip], a.dtype)), key=lambda b: b.real)
    return found, p.passes(inside, found, (bounds[0], bounds[1]))


def _passed(passes: Any, d: Array) -> Array:
    """Return d where the gradient passes, else 0, also where d is not finite."""
    return d if passes is True else np.where(passes, d, 0)


def mixed(keep: Any, old: Any, new: Any) -> Any:
    """Return keep·old + (1 - keep)·new for a number, else old where the mask is true.

    The mask selects and does not multiply, because the values may be infinite.
    """
    if isinstance(keep, float):
        return keep * old + (1 - keep) * new if keep else new
    return module_of(keep).where(keep, old, new)


def _sum(a: Array) -> Array:
    """Sum over the batch, if there is one."""
    total: Array = np.atleast_2d(a).sum(0)
    return total


def _normalised(a: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Return (a - mean) / sqrt(variance + ε) of each row (Ba et al. 2016), and its pullback."""
    centred = a - a.mean(-1, keepdims=True)
    scale = ((centred**2).mean(-1, keepdims=True) + EPSILON) ** -0.5
    n = centred * scale

    def pull(dn: Array) -> Array:
        mean, along = dn.mean(-1, keepdims=True), (dn * n).mean(-1, keepdims=True)
        da: Array = scale * (dn - mean - n * along)
        return da

    return n, pull


def _product(
    x: Array, names: tuple[str, str, str], rows: slice, p: Parameters
) -> tuple[Array, Callable[[Array, Gradients], Array]]:
    """Return LN(weight x; γ) + b for some rows, or weight x + b without γ, and the pullback."""
    weight, gamma, bias = (getattr(p, name) for name in names)
    x = p.rounded(x)
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
        da = p.rounded(da)
        into[names[0]][rows] += np.atleast_2d(da).T @ np.atleast_2d(x)
        dx: Array = da @ weight[rows]
        return dx

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
    state: the new state: h before its projection, and c.
    gates: by their letters, in the order of the weights.
    pull: (d state, gradients of parameters to add to) -> dx, the gradient of h' as R reads it,
        the gradient that reaches the previous state directly.
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
    states: names of the states that a step hands to the next.
    step: (x, h' as R reads it, after dropout; state, parameters, options) -> Step.
    activations: the options that replace the cell's activations: activation for tanh,
        recurrent_activation for σ.
    jumps: whether the derivative of an activation jumps, as relu's does. Near the jump,
        gradients may differ by more than rounding.
    """

    gates: str
    states: tuple[str, ...]
    step: Callable[[Array, Array, State, Parameters, Options], Step]
    activations: tuple[str, ...] = ("activation", "recurrent_activation")
    jumps: bool = False


def _lstm(coupled: bool) -> Callable[[Array, Array, State, Parameters, Options], Step]:
    letters = "igo" if coupled else "ifgo"
    peephole_gates = "io" if coupled else "ifo"

    def step(x: Array, h_dropped: Array, state: State, p: Parameters, o: Options) -> Step:
        c_prev = state[1]
        of_state, of_gate = o.activation or TANH, o.recurrent_activation or SIGMOID
        a_x, pull_x = _input_part(x, slice(None), p)
        a_h, pull_h = _recurrent_part(h_dropped, slice(None), p)
        a = dict(zip(letters, blocks(a_x + a_h, len(letters)), strict=True))
        peephole: dict[str, Array] = {}
        if p.weight_ch is not None:
            parts = blocks(p.weight_ch, len(peephole_gates))
            peephole = dict(zip(peephole_gates, parts, strict=True))
        passes, gates = {}, {}

        def activate(letter: str, c: Array) -> None:
            total = a[letter] + peephole[letter] * c if letter in peephole else a[letter]
            phi = of_state if letter == "g" else of_gate
            gates[letter], passes[letter] = _activated(phi, total, p, o)

        for letter in letters[:-1]:
            activate(letter, c_prev)
        i, g = gates["i"], gates["g"]
        f = 1 - i if coupled else gates["f"]
        c, c_passes = _clipped(f * c_prev + i * g, o.cell_clip)
        activate("o", c)
        c_normalised = c
        if p.gamma_c is not None:
            n, unnormalise = _normalised(c)
            c_normalised = p.gamma_c * n + p.beta_c
        tanh_c = of_state(c_normalised)

        def pull(d: State, into: Gradients) -> tuple[Array, Array, State]:
            dh, dc = d
            i, g, out = (p.rounded(gates[letter]) for letter in "igo")
            f = p.rounded(1 - gates["i"] if coupled else gates["f"])
            dc_of_h = dh * out * of_state.slope(tanh_c)
            if p.gamma_c is not None:
                into["gamma_c"] += _sum(dc_of_h * n)
                into["beta_c"] += _sum(dc_of_h)
                dc_of_h = unnormalise(p.gamma_c * dc_of_h)
            da = {"o": _passed(passes["o"], dh * tanh_c * of_gate.slope(out))}
            dc = dc + dc_of_h
            if peephole:
                dc = dc + da["o"] * peephole["o"]
            dc = _passed(c_passes, dc)
            di, df = dc * g, dc * c_prev
            if coupled:
                di = di - df
            else:
                da["f"] = _passed(passes["f"], df * of_gate.slope(f))
            da["i"] = _passed(passes["i"], di * of_gate.slope(i))
            da["g"] = _passed(passes["g"], dc * i * of_state.slope(g))
            dc_prev = dc * f
            for letter in peephole:
                if letter != "o":
                    dc_prev = dc_prev + da[letter] * peephole[letter]
            if peephole:
                d_peephole = [_sum(da[k] * (c if k == "o" else c_prev)) for k in peephole_gates]
                into["weight_ch"] += np.concatenate(d_peephole)
            da_all = np.concatenate([da[letter] for letter in letters], -1)
            return pull_x(da_all, into), pull_h(da_all, into), (np.zeros_like(dh), dc_prev)

        return Step((gates["o"] * tanh_c, c), gates, pull)

    return step


def _gru(reset_after: bool) -> Callable[[Array, Array, State, Parameters, Options], Step]:
    def step(x: Array, h_dropped: Array, state: State, p: Parameters, o: Options) -> Step:
        (h_prev,) = state
        of_state, of_gate = o.activation or TANH, o.recurrent_activation or SIGMOID
        H = h_prev.shape[-1]
        rz, new = slice(0, 2 * H), slice(2 * H, 3 * H)
        x_rz, pull_x_rz = _input_part(x, rz, p)
        x_n, pull_x_n = _input_part(x, new, p)
        h_rz, pull_h_rz = _recurrent_part(h_dropped, rz, p)
        rz_gates, passes_rz = _activated(of_gate, x_rz + h_rz, p, o)
        r, z = blocks(rz_gates, 2)
        if reset_after:
            h_n, pull_h_n = _recurrent_part(h_dropped, new, p)
            a_n = x_n + r * h_n
        else:
            h_n, pull_h_n = _recurrent_part(r * h_dropped, new, p)
            a_n = x_n + h_n
        n, passes_n = _activated(of_state, a_n, p, o)

        def pull(d: State, into: Gradients) -> tuple[Array, Array, State]:
            (dh,) = d
            r_, z_, n_, h_n_ = map(p.rounded, (r, z, n, h_n))
            da_n = _passed(passes_n, dh * (1 - z_) * of_state.slope(n_))
            if reset_after:
                dh_dropped, dr = pull_h_n(da_n * r_, into), da_n * h_n_
            else:
                d_reset = pull_h_n(da_n, into)
                dh_dropped, dr = d_reset * r_, d_reset * p.rounded(h_dropped)
            dz = dh * (p.rounded(h_prev) - n_)
            slopes = of_gate.slope(np.concatenate([r_, z_], -1))
            da_rz = _passed(passes_rz, np.concatenate([dr, dz], -1) * slopes)
            dx = pull_x_rz(da_rz, into) + pull_x_n(da_n, into)
            return dx, dh_dropped + pull_h_rz(da_rz, into), (dh * z_,)

        return Step(((1 - z) * n + z * h_prev,), {"r": r, "z": z, "n": n}, pull)

    return step


def _rnn(own: Activation) -> Callable[[Array, Array, State, Parameters, Options], Step]:
    def step(x: Array, h_dropped: Array, state: State, p: Parameters, o: Options) -> Step:
        a_x, pull_x = _input_part(x, slice(None), p)
        a_h, pull_h = _recurrent_part(h_dropped, slice(None), p)
        phi = o.activation or own
        h, passes = _activated(phi, a_x + a_h, p, o)

        def pull(d: State, into: Gradients) -> tuple[Array, Array, State]:
            slope = phi.slope(p.rounded(h))
            passes_relu = slope != 0 if own is RELU else True
            da = _passed(passes, _passed(passes_relu, d[0] * slope))
            return pull_x(da, into), pull_h(da, into), (np.zeros_like(h),)

        return Step((h,), {"h": h}, pull)

    return step


LSTM = Cell("ifgo", ("h", "c"), _lstm(coupled=False))
COUPLED_LSTM = Cell("igo", ("h", "c"), _lstm(coupled=True))
GRU = Cell("rzn", ("h",), _gru(reset_after=True))
GRU_RESET_BEFORE = Cell("rzn", ("h",), _gru(reset_after=False))
RNN: dict[str, Cell] = {
    "tanh": Cell("h", ("h",), _rnn(TANH), ("activation",)),
    "relu": Cell("h", ("h",), _rnn(RELU), (), jumps=True),
    "identity": Cell("h", ("h",), _rnn(IDENTITY), ()),
}
