"""σ, tanh and the parts of other activations: errors, limits, NaN, monotone.

all_floats.py proves at every float32 what is sampled here.
"""

from __future__ import annotations

import numpy as np
import pytest

from fusedrnn import _cpu

# The largest error in ULP.
ALLOWED = {"sigmoid": 3, "tanh": 3, "exp_below_0": 4, "exp_minus_1": 4, "log_1_plus": 4}
# The first two of these take negative numbers, log_1_plus numbers from 0 to 1.
OTHERS = {"exp_below_0": np.exp, "exp_minus_1": np.expm1, "log_1_plus": np.log1p}


def exact(name: str, x: np.ndarray) -> np.ndarray:
    """In extended precision, σ without cancellation on either side."""
    x = x.astype(np.longdouble)
    if name in OTHERS:
        return OTHERS[name](x)
    if name == "tanh":
        return np.tanh(x)
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def samples(dtype: np.dtype) -> np.ndarray:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**63, 400_000, np.uint64).view(np.float64)
    if dtype == np.float32:
        bits = rng.integers(0, 2**32, 800_000, np.uint32).view(np.float32)
    dense = [rng.uniform(-r, r, 300_000) for r in (1e-3, 1, 10, 100, 800)]
    edges = [0.0, -0.0, np.log(2) / 2, np.log(2), 88.72, -87.3365, -88, 709.78, -708.3964, -745]
    x = np.concatenate([bits[np.isfinite(bits)], *dense, edges, np.negative(edges)])
    return x.astype(dtype)


@pytest.mark.parametrize("name", ALLOWED)
def test_errors(name: str, dtype: np.dtype, isa: str) -> None:
    """σ and tanh are at most 3 ULP off, the others 4, and none is ever beyond 1."""
    x = samples(dtype)
    if name in OTHERS:
        x = -np.abs(x)
    if name == "log_1_plus":
        x = np.exp(x[x > -60])
    y = _cpu.elementwise(name, x)
    expected = exact(name, x)
    tiny = np.finfo(dtype).tiny
    normal = np.abs(expected) >= tiny
    ulp = np.spacing(np.abs(expected[normal]).astype(dtype)).astype(np.longdouble)
    if name == "exp_below_0":  # a denormal term of its sum counts as 0 in portable code
        ulp = np.maximum(ulp, tiny)
    error = np.abs(y[normal] - expected[normal]) / ulp
    worst = np.argmax(error)
    assert error[worst] <= ALLOWED[name], f"{error[worst]:.2f} ULP at {x[normal][worst]!r}"
    assert (np.abs(y[~normal]) <= tiny).all()  # denormal results may be 0
    assert (np.abs(y) <= 1).all()


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_limits(name: str, dtype: np.dtype, isa: str) -> None:
    """σ and tanh have their limits at ±inf, keep NaN, and tanh keeps the sign of 0."""
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan], dtype)
    y = _cpu.elementwise(name, x)
    low, middle = (-1, 0) if name == "tanh" else (0, 0.5)
    np.testing.assert_array_equal(y, np.array([middle, middle, 1, low, np.nan, np.nan], dtype))
    if name == "tanh":
        assert np.signbit(y[1])


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_monotone(name: str, dtype: np.dtype, isa: str) -> None:
    """No argument's result is above that of a greater one, nor of the next number."""
    x = np.sort(samples(dtype))
    y = _cpu.elementwise(name, x)
    assert (np.diff(y) >= 0).all()
    assert (_cpu.elementwise(name, np.nextafter(x, dtype.type(np.inf))) >= y).all()


def test_every_length(dtype: np.dtype, isa: str) -> None:
    """Arrays of any length are computed to their end."""
    for n in range(40):
        x = np.linspace(-3, 3, n).astype(dtype)
        y = _cpu.elementwise("tanh", x)
        np.testing.assert_allclose(
            y, np.tanh(x), rtol=5 * np.finfo(dtype).eps
        )  # NumPy's: 1 ULP
