"""The reference's gradients are the derivatives of its forward, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    MASKS,
    NAMES,
    Sizes,
    arguments,
    assert_close,
    cotangents,
    masks,
    op,
    spoil_padding,
)

from fusedrnn import reference
from fusedrnn.cells import Cell

SIZES = Sizes(T=4, B=3, I=2, H=5)


@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_complex_step_derivatives(
    cell: Cell, reverse: bool, kind: str | None
) -> None:
    """Im f(v + iεu)/ε is the derivative along u without cancellation (Squire & Trapp 1998)."""
    values = arguments(cell, SIZES)
    options = {"reverse": reverse, **(masks(kind, SIZES) if kind else {})}
    results, pullback = op(cell, "_vjp", reference)(**values, **options)
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
            outputs = op(cell, "", reference)(**moved, **options)
            expected[at] = sum(
                (w * r.imag).sum() / 1e-30 for w, r in zip(weights, outputs, strict=True)
            )
        assert_close(gradient, expected, np.float64, name)


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_not_looked_at(cell: Cell, reverse: bool) -> None:
    values, given = arguments(cell, SIZES), masks("both", SIZES)
    everything = []
    for spoil in (False, True):
        if spoil:
            spoil_padding(values["x"], given)
        results, pullback = op(cell, "_vjp", reference)(**values, **given, reverse=reverse)
        weights = cotangents(results)
        if spoil:
            spoil_padding(weights[0], given)
        everything.append([*results, *pullback(*weights)])
    for a, b in zip(*everything, strict=True):
        np.testing.assert_array_equal(a, b)


def test_lengths_and_resets_say_where_a_row_starts_and_ends(cell: Cell) -> None:
    """Against the same steps cut apart by hand, in both directions."""
    values = arguments(cell, Sizes(5, 1, 2, 5))
    run = op(cell, "", reference)
    x, (h0, *c0) = values.pop("x"), [values.pop(n) for n in ("h0", "c0") if n in values]
    start = dict(zip(("h0", "c0"), (h0, *c0), strict=False))
    resets = np.arange(5)[:, None] == 2

    y, *state = run(x, **values, **start, lengths=[4], resets=resets)
    first, *_ = run(x[:2], **values, **start)
    second, *end = run(x[2:4], **values)
    np.testing.assert_array_equal(y, np.concatenate([first, second, np.zeros_like(y[:1])]))
    np.testing.assert_array_equal(state, end)

    y, *state = run(x, **values, **start, lengths=[4], resets=resets, reverse=True)
    first, *_ = run(x[3:4], **values, **start, reverse=True)
    second, *end = run(x[:3], **values, reverse=True)
    np.testing.assert_array_equal(y, np.concatenate([second, first, np.zeros_like(y[:1])]))
    np.testing.assert_array_equal(state, end)


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
