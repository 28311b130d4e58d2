"""The reference's gradients are the derivatives of its forward, to rounding."""

from __future__ import annotations

import itertools
from typing import Any

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
    options_of,
    pulled,
    spoil_padding,
    with_options,
)

from fusedrnn import reference
from fusedrnn.cells import CELLS, Cell

SIZES = Sizes(T=4, B=3, I=2, H=5)

# Alone, and the more they have to do with each other, together.
TOGETHER = [
    ["projection", "peephole", "layer_norm", "zoneout", "recurrent_dropout", "both"],
    ["projection", "clip", "cell_clip", "zoneout in inference", "resets", "return_cells"],
    ["peephole", "cell_clip", "layer_norm", "weight_dropout", "return_cells", "lengths"],
    ["clip", "layer_norm", "recurrent_dropout", "weight_dropout", "zoneout"],
]


def check_derivatives(
    cell: Cell,
    names: list[str],
    reverse: bool,
    sizes: Sizes = SIZES,
    at_once: bool = False,
    **more: Any,
) -> None:
    """Im f(v + iεu)/ε is the derivative along u without cancellation (Squire & Trapp 1998).

    v is each argument in turn, or all of them `at_once`.
    """
    values, options = with_options(cell, sizes, names)
    options |= {"reverse": reverse, **more}
    results, pullback = op(cell, "_vjp", reference)(**values, **options)
    weights = cotangents(results)
    gradients = pulled(cell, pullback, weights)
    assert set(gradients) == set(values)
    rng = np.random.default_rng(2)
    along = {name: rng.normal(size=value.shape) for name, value in values.items()}
    for group in [[*values]] if at_once else [[name] for name in values]:
        moved = values | {name: values[name] + 1e-30j * along[name] for name in group}
        outputs = op(cell, "", reference)(**double_complex(moved), **options)
        expected = sum(
            (w * r.imag).sum() / 1e-30 for w, r in zip(weights, outputs, strict=False)
        )
        actual = sum((gradients[name] * along[name]).sum() for name in group)
        what = f"{cell.name} {names} {more} {group}"
        assert_close(actual, expected, "float64", what, gradient=True)


def double_complex(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v.astype(complex) for k, v in values.items()}


@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_complex_step_derivatives(
    cell: Cell, reverse: bool, kind: str | None
) -> None:
    """Gradients with and without masks are the derivatives, by complex steps."""
    check_derivatives(cell, [kind] if kind else [], reverse)


def test_gradients_with_options_are_complex_step_derivatives(cell: Cell) -> None:
    """Gradients with each option, and with many together, are the derivatives."""
    known = [*options_of(cell), *MASKS]
    for names in [*([name] for name in options_of(cell)), *TOGETHER]:
        check_derivatives(cell, [n for n in names if n in known], reverse=len(names) > 1)


# Two names of one argument.
EXCLUSIVE = [{"zoneout", "zoneout in inference"}, {"mask", "mask last"}]


def test_gradients_with_every_pair_of_options(cell: Cell) -> None:
    """Gradients with every two options, masks and directions are the derivatives; with bptt
    those that take the states between chunks for constants.
    """
    known = [*options_of(cell), *(m for m in MASKS if m != "both"), "reverse"]
    for pair in itertools.combinations(known, 2):
        if {*pair} not in EXCLUSIVE:
            names = [n for n in pair if n != "reverse"]
            check_derivatives(cell, names, "reverse" in pair, Sizes(6, 2, 2, 3), at_once=True)


@pytest.mark.parametrize("name", ["lstm", "gru_before"])
def test_gradients_with_every_pair_of_activations(name: str) -> None:
    """So are those with every two activations of gates and states, also those with jumps."""
    for state, gate in itertools.product(reference.ACTIVATIONS, repeat=2):
        activations = {"activation": state, "recurrent_activation": gate}
        check_derivatives(
            CELLS[name], ["clip"], False, Sizes(2, 2, 2, 3), at_once=True, **activations
        )


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_not_looked_at(cell: Cell, reverse: bool) -> None:
    """What x and dy hold beyond a row's length changes nothing."""
    values, mask = arguments(cell, SIZES), masks("both", SIZES)
    everything = []
    for spoil in (False, True):
        if spoil:
            spoil_padding(values["x"], mask)
        results, pullback = op(cell, "_vjp", reference)(**values, **mask, reverse=reverse)
        weights = cotangents(results)
        if spoil:
            spoil_padding(weights[0], mask)
        everything.append([*results, *pulled(cell, pullback, weights).values()])
    for a, b in zip(*everything, strict=True):
        np.testing.assert_array_equal(a, b)


def test_lengths_and_resets_say_where_a_row_starts_and_ends(cell: Cell) -> None:
    """Lengths and resets give the bits of the same steps cut apart by hand, in both
    directions.
    """
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
    """A sequence without a batch is a batch of one."""
    values = arguments(cell, SIZES._replace(B=1))
    flat = {
        k: v[:, 0] if k == "x" else v[0] if k in ("h0", "c0") else v for k, v in values.items()
    }
    batched, pull_batched = op(cell, "_vjp", reference)(**values)
    single, pull_single = op(cell, "_vjp", reference)(**flat)
    for a, b in zip(single, batched, strict=True):
        assert_close(a, np.squeeze(b, -2))
    weights = cotangents(batched)
    gradients = pulled(cell, pull_single, [np.squeeze(w, -2) for w in weights])
    expected = pulled(cell, pull_batched, weights)
    for a, b in zip(gradients.values(), expected.values(), strict=True):
        assert_close(a, b.reshape(a.shape), gradient=True)


def test_random_numbers_are_philox() -> None:
    """Random numbers are Philox's: the known answers published with it (Salmon et al. 2011)."""
    full = 2**32 - 1
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, expected in [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([full] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, 0x299F31D0A4093822, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]:
        assert [int(word) for word in reference.philox(counter, key)] == expected


def test_masks_have_their_probability_and_know_no_sizes() -> None:
    """A mask's element depends on its place alone: in a larger array it is the same."""
    values = np.zeros((30, 20, 170))
    mask = reference.dropout(values, 0.3, seed=5, where=0)
    assert set(np.unique(mask)) == {0, 1 / 0.7}
    assert abs((mask == 0).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / mask.size)
    part = reference.dropout(values[:7, :3, :33], 0.3, seed=5, where=0)
    np.testing.assert_array_equal(part, mask[:7, :3, :33])
    for other in ({"seed": 6, "where": 0}, {"seed": 5, "where": 1}):
        agree = (reference.dropout(values, 0.3, **other) == mask).mean()
        assert abs(agree - (0.3**2 + 0.7**2)) < 0.01


def test_zoneout_keeps_what_was_with_its_probability() -> None:
    """Zoneout keeps h and c of the step before, each with its probability."""
    cell, sizes = CELLS["lstm"], Sizes(8, 40, 3, 50)
    values = arguments(cell, sizes)
    options = {"zoneout": (0.2, 0.6), "return_cells": True, "training": True, "seed": 1}
    y, _, _, cells = reference.lstm(**values, **options)
    for every, start, p in ((y, values["h0"], 0.2), (cells, values["c0"], 0.6)):
        kept = np.concatenate([start[None], every[:-1]]) == every
        assert abs(kept.mean() - p) < 5 * np.sqrt(p * (1 - p) / kept.size)


def test_no_gradient_passes_from_chunk_to_chunk() -> None:
    """With bptt each chunk's gradient is that of a call of its own, from the state before
    it.
    """
    cell, sizes = CELLS["gru"], Sizes(7, 2, 3, 5)
    values = arguments(cell, sizes)
    for reverse in (False, True):
        (y, _), pullback = reference.gru_vjp(**values, reverse=reverse, bptt=3)
        dx = np.empty_like(values["x"])
        part = dict(values)
        for begin in (6, 3, 0) if reverse else (0, 3, 6):
            chunk = slice(begin, begin + 3)
            part["x"] = values["x"][chunk]
            (_, part["h0"]), pull = reference.gru_vjp(**part, reverse=reverse)
            dx[chunk] = pull(y[chunk]).x
        assert_close(pullback(y).x, dx, gradient=True)
