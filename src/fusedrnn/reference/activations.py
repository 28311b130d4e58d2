"""Activations that an option may select, with slopes that follow from their values alone."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from .arrays import module_of
from .types import Array


class Kind(IntEnum):
    """The form of an activation φ(a), with the numbers α, β, low and high.

    TANH α tanh(β a) · SIGMOID σ(a) · LINE α a + β within [low, high] · ELU β a if a > 0, else
    α (exp(a) - 1) · SOFTSIGN a / (1 + |a|) · SOFTPLUS log(1 + exp(a)) · LEAKY a if a > 0, else
    α a · THRESHOLD a if a > α, else 0. The kernels know them by the same numbers
    (csrc/activations.h).
    """

    TANH = 1
    SIGMOID = 2
    LINE = 3
    ELU = 4
    SOFTSIGN = 5
    SOFTPLUS = 6
    LEAKY = 7
    THRESHOLD = 8


class Activation(NamedTuple):
    """An activation φ and its derivative as a function of its value."""

    kind: Kind
    alpha: float = 1.0
    beta: float = 1.0
    low: float = float("-inf")
    high: float = float("inf")

    def __call__(self, a: Array) -> Array:
        """Return φ(a), of real or complex a."""
        xp, alpha, beta = module_of(a), self.alpha, self.beta
        zero = xp.zeros_like(a)
        is_negative = a.real <= 0
        negative, positive = xp.where(is_negative, a, zero), xp.where(is_negative, zero, a)
        size = positive - negative
        value: Any
        if self.kind == Kind.TANH:
            value = alpha * xp.tanh(beta * a)
        elif self.kind == Kind.SIGMOID:
            value = sigmoid(a)
        elif self.kind == Kind.LINE:
            line = alpha * a + beta
            value = xp.where(line.real < self.high, line, zero + self.high)
            value = xp.where(line.real > self.low, value, zero + self.low)
            value = xp.where(line == line, value, line)  # NaN stays
        elif self.kind == Kind.ELU:
            value = beta * positive + alpha * xp.expm1(negative)
        elif self.kind == Kind.SOFTSIGN:
            value = a / (1 + size)
        elif self.kind == Kind.SOFTPLUS:
            value = positive + xp.log1p(xp.exp(-size))
        elif self.kind == Kind.LEAKY:
            value = positive + alpha * negative
        else:
            value = xp.where(a.real <= alpha, zero, a)
        return value  # type: ignore[no-any-return]

    def slope(self, y: Array) -> Array:
        """Return φ'(a) for y = φ(a)."""
        xp, alpha, beta = module_of(y), self.alpha, self.beta
        one = xp.ones_like(y)
        value: Any
        if self.kind == Kind.TANH:
            value = beta * (alpha - y * y / alpha)
        elif self.kind == Kind.SIGMOID:
            value = y * (1 - y)
        elif self.kind == Kind.LINE:
            inside = one.real > 0  # an infinite bound is never reached
            if self.low > -np.inf:
                inside = inside & (self.low < y.real)
            if self.high < np.inf:
                inside = inside & (y.real < self.high)
            value = alpha * xp.where(inside, one, 0 * one)
        elif self.kind == Kind.ELU:
            value = xp.where(y.real > 0, beta * one, y + alpha)
        elif self.kind == Kind.SOFTSIGN:
            value = (1 - abs(y)) ** 2
        elif self.kind == Kind.SOFTPLUS:
            value = -xp.expm1(-y)
        elif self.kind == Kind.LEAKY:
            value = xp.where(y.real > 0, one, alpha * one)
        else:
            value = xp.where(y.real == 0, 0 * one, one)
        return value  # type: ignore[no-any-return]

    @property
    def jumps(self) -> bool:
        """Whether the derivative jumps, as relu's does; see `Cell.jumps`."""
        return self.kind in (Kind.LINE, Kind.ELU, Kind.LEAKY, Kind.THRESHOLD)


def sigmoid(a: Array) -> Array:
    """σ(a) = 1 / (1 + exp(-a)), through tanh so that nothing overflows."""
    value: Array = 0.5 + 0.5 * module_of(a).tanh(0.5 * a)
    return value


TANH = Activation(Kind.TANH)
SIGMOID = Activation(Kind.SIGMOID)
RELU = Activation(Kind.LINE, 1.0, 0.0, 0.0)
IDENTITY = Activation(Kind.LINE, 1.0, 0.0)
_SELU = 1.6732632423543772, 1.0507009873554805  # Klambauer et al. 2017

# The activations by name: their numbers, with default values, and the function of these.
ACTIVATIONS: dict[str, tuple[tuple[float, ...], Any]] = {
    "tanh": ((1.0, 1.0), lambda a, b: Activation(Kind.TANH, a, b)),
    "sigmoid": ((), lambda: SIGMOID),
    "relu": ((), lambda: RELU),
    "relu6": ((), lambda: Activation(Kind.LINE, 1.0, 0.0, 0.0, 6.0)),
    "hard_sigmoid": ((1 / 6, 0.5), lambda a, b: Activation(Kind.LINE, a, b, 0.0, 1.0)),
    "hard_tanh": ((), lambda: Activation(Kind.LINE, 1.0, 0.0, -1.0, 1.0)),
    "identity": ((), lambda: IDENTITY),
    "linear": ((), lambda: IDENTITY),
    "affine": ((1.0, 0.0), lambda a, b: Activation(Kind.LINE, a, b)),
    "softsign": ((), lambda: Activation(Kind.SOFTSIGN)),
    "softplus": ((), lambda: Activation(Kind.SOFTPLUS)),
    "elu": ((1.0,), lambda a: Activation(Kind.ELU, a)),
    "selu": ((), lambda: Activation(Kind.ELU, _SELU[0] * _SELU[1], _SELU[1])),
    "leaky_relu": ((0.01,), lambda a: Activation(Kind.LEAKY, a)),
    "thresholded_relu": ((1.0,), lambda a: Activation(Kind.THRESHOLD, a)),
}
# The numbers for which the slope follows from the value, where not all are right.
REQUIRED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "tanh": ("alpha ≠ 0", lambda alpha: alpha != 0),
    **{
        name: ("alpha ≥ 0", lambda alpha: alpha >= 0)
        for name in ("elu", "leaky_relu", "thresholded_relu")
    },
}


def activation_of(name: str, *numbers: float) -> Activation:
    """Return the activation of a name, with default values for numbers that are left out."""
    defaults, make = ACTIVATIONS[name]
    found: Activation = make(*numbers, *defaults[len(numbers) :])
    return found
