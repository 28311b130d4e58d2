"""The reference's gradients are the derivatives of its forward, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import NAMES, Sizes, arguments, assert_close, cotangents, op

from fusedrnn import reference
from fusedrnn.cells import Cell

SIZES = Sizes(T=4, B=3, I=2, H=5)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_complex_step_derivatives(cell: Cell, reverse: bool) -> None:
    """Im f(v + iεu)/ε is the derivative along u without cancellation (Squire & Trapp 1998)."""
    values = arguments(cell, SIZES)
    results, pullback = op(cell, "_vjp", reference)(**values, reverse=reverse)
    weights = cotangents(results)
    gradients = pullback(*weights)
    for name in values:
        if "relu" in cell.name:  # the argument stays away from the kink
            assert np.abs(results[0]).min() >= 0
        gradient = getattr(gradients, name)
        expected = np.zeros_like(values[name])
        for at in np.ndindex(values[name].shape):
            moved = {k: v.astype(complex) for k, v in values.items()}
            moved[name][at] += 1e-30j
            outputs = op(cell, "", reference)(**moved, reverse=reverse)
            expected[at] = sum(
                (w * r.imag).sum() / 1e-30 for w, r in zip(weights, outputs, strict=True)
            )
        assert_close(gradient, expected, np.float64, name)


def test_absent_biases_and_states_are_zeros(cell: Cell) -> None:
    values = arguments(cell, SIZES)
    zeros = {n: np.zeros_like(v) for n, v in values.items() if n in NAMES[3:]}
    absent = {k: v for k, v in values.items() if k not in zeros}
    run = op(cell, "", reference)
    for a, b in zip(run(**absent), run(**(values | zeros)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_unbatched_equals_a_batch_of_one(cell: Cell) -> None:
    values = arguments(cell, SIZES._replace(B=1))
    flat = {
        k: v[:, 0] if k == "x" else v[0] if k in ("h0", "c0") else v for k, v in values.items()
    }
    batched, pull_batched = op(cell, "_vjp", reference)(**values)
    single, pull_single = op(cell, "_vjp", reference)(**flat)
    for a, b in zip(single, batched, strict=True):
        np.testing.assert_allclose(a, np.squeeze(b, -2), rtol=1e-13)
    weights = cotangents(batched)
    gradients = pull_single(*(np.squeeze(w, -2) for w in weights))
    for a, b in zip(gradients, pull_batched(*weights), strict=True):
        np.testing.assert_allclose(a, b.reshape(a.shape), rtol=1e-12)
