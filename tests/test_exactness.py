"""Bit for bit: threads, batch neighbours, chunks, layers against ops."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import MASKS, Sizes, arguments, cotangents, masks, op, present

import fusedrnn as fr
from fusedrnn import _cpu
from fusedrnn.cells import Cell

SHAPES = [Sizes(12, 1, 96, 160), Sizes(9, 13, 33, 100), Sizes(6, 70, 20, 48)]
LARGE = Sizes(2, 40, 40, 340)  # beyond a core's caches
MASKED = SHAPES[1]  # of which threads own rows or units, as many as they are


def with_masks(sizes: list[Sizes]) -> pytest.MarkDecorator:
    """All sizes without masks, one with them."""
    cases = [*((s, False) for s in sizes), (MASKED, True)]
    ids = [f"{s}-masked" if masked else str(s) for s, masked in cases]
    return pytest.mark.parametrize(("sizes", "masked"), cases, ids=ids)


def assert_identical(a, b) -> None:
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


@with_masks([*SHAPES, LARGE])
def test_any_number_of_threads(
    cell: Cell, sizes: Sizes, dtype: np.dtype, isa: str, masked: bool
) -> None:
    """Results and gradients have the same bits on any number of threads."""
    values = arguments(cell, sizes, dtype) | (masks("both", sizes) if masked else {})
    everything = []
    for count in (1, 2, 3, 7):
        fr.set_num_threads(count)
        results, pullback = op(cell, "_vjp")(**values)
        everything.append([*results, *present(pullback(*cotangents(results)))])
    for other in everything[1:]:
        assert_identical(other, everything[0])


BESIDE_EACH_OTHER = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
import numpy as np
import fusedrnn as fr
from fusedrnn import _cpu

layer = fr.LSTM(32, 64, 2, rng=0)
x = np.random.default_rng(1).normal(size=(40, 16, 32)).astype(np.float32)

def train():
    (y, (h, c)), pullback = layer.vjp(x)
    dx, _, gradients = pullback(np.cos(y))
    return np.concatenate([np.ravel(a) for a in (y, h, c, dx, *gradients.values())])

fr.set_num_threads(1)
expected = train()
fr.set_num_threads(8)
counts, same = [], True
while len(counts) < 40 or (set(counts) == {8} and len(counts) < 200):
    counts.append(_cpu.probe_meetings(1000, 8, True))
    same &= np.array_equal(train(), expected)
print(same, 8 in counts, set(counts) == {8})
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_threads_that_are_left_out_change_nothing() -> None:
    """Threads that must share a core, which some calls leave out and others try again."""
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_EACH_OTHER],
        env=os.environ | {"FUSEDRNN_FIXED_THREADS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True", "True", "False"], done.stdout + done.stderr


@with_masks([*SHAPES[1:], LARGE])
def test_any_neighbours_in_the_batch(
    cell: Cell, sizes: Sizes, dtype: np.dtype, isa_on_threads: None, masked: bool
) -> None:
    """y, states and their gradients of a row do not depend on the rows beside it."""
    values = arguments(cell, sizes, dtype) | (masks("both", sizes) if masked else {})
    results, pullback = op(cell, "_vjp")(**values)
    weights = cotangents(results)
    gradients = pullback(*weights)
    for rows in (slice(0, 1), slice(2, 7), slice(sizes.B - 3, sizes.B)):
        part = {
            k: v[:, rows]
            if k in ("x", "resets")
            else v[rows]
            if k in ("h0", "c0", "lengths")
            else v
            for k, v in values.items()
        }
        part_results, part_pullback = op(cell, "_vjp")(**part)
        assert_identical(part_results, [r[..., rows, :] for r in results])
        part_gradients = part_pullback(*(w[..., rows, :] for w in weights))
        for name in ("x", "h0", *(["c0"] if "c0" in values else [])):
            np.testing.assert_array_equal(
                getattr(part_gradients, name), getattr(gradients, name)[..., rows, :]
            )


@with_masks(SHAPES)
def test_chunks_equal_the_whole(
    cell: Cell, sizes: Sizes, dtype: np.dtype, isa_on_threads: None, masked: bool
) -> None:
    """A sequence given in chunks, each from the state that the last one left, is the whole."""
    values = arguments(cell, sizes, dtype)
    mask = masks("both", sizes) if masked else {}
    whole, *final = op(cell)(**values, **mask)
    x = values.pop("x")
    at = 0
    for length in (1, 3, 1, 100):
        part = x[at : at + length]
        if masked:
            values["resets"] = mask["resets"][at : at + length]
            values["lengths"] = np.clip(mask["lengths"] - at, 0, len(part))
        y, *state = op(cell)(part, **values)
        np.testing.assert_array_equal(y, whole[at : at + length])
        values |= dict(zip(("h0", "c0"), state, strict=False))
        at += length
    assert_identical(state, final)


def test_masks_without_effect_change_nothing(cell: Cell, dtype: np.dtype, isa: str) -> None:
    T, B, *_ = MASKED
    """Lengths that are all T and resets that are all false give the bits of no masks."""
    values = arguments(cell, MASKED, dtype)
    none = {"lengths": np.full(B, T), "resets": np.zeros((T, B), bool)}
    for reverse in (False, True):
        everything = []
        for mask in ({}, {"lengths": none["lengths"]}, {"resets": none["resets"]}, none):
            results, pullback = op(cell, "_vjp")(**values, **mask, reverse=reverse)
            everything.append([*results, *present(pullback(*cotangents(results)))])
        for other in everything[1:]:
            assert_identical(other, everything[0])


def test_a_short_row_equals_itself_alone(cell: Cell, dtype: np.dtype, isa: str) -> None:
    """A short row among longer ones gives the bits that it gives alone, and zeros after
    its end.
    """
    values = arguments(cell, MASKED, dtype)
    lengths = masks("lengths", MASKED)["lengths"]
    for reverse in (False, True):
        y, *final = op(cell)(**values, lengths=lengths, reverse=reverse)
        for b, length in enumerate(lengths):
            alone = {k: v[b : b + 1] if k in ("h0", "c0") else v for k, v in values.items()}
            alone["x"] = values["x"][:length, b : b + 1]
            y_alone, *final_alone = op(cell)(**alone, reverse=reverse)
            np.testing.assert_array_equal(y[:length, b : b + 1], y_alone)
            assert (y[length:, b] == 0).all()
            assert_identical([f[b : b + 1] for f in final], final_alone)


def test_layers_equal_ops(dtype: np.dtype) -> None:
    """Two bidirectional layers give the bits of four ops, concatenated."""
    layer = fr.LSTM(5, 18, num_layers=2, bidirectional=True, dtype=dtype, rng=4)
    x = np.random.default_rng(0).normal(size=(7, 3, 5)).astype(dtype)
    y, (h_n, c_n) = layer(x)
    p = layer.state_dict()
    below = x
    for l in range(2):
        sides = []
        for d, suffix in enumerate((f"l{l}", f"l{l}_reverse")):
            args = [
                p[f"{n}_{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            side, h, c = fr.lstm(below, *args, reverse=d == 1)
            np.testing.assert_array_equal(h, h_n[2 * l + d])
            np.testing.assert_array_equal(c, c_n[2 * l + d])
            sides.append(side)
        below = np.concatenate(sides, -1)
    np.testing.assert_array_equal(below, y)


def test_weights_as_they_are_equal_packed_ones(
    cell: Cell, dtype: np.dtype, isa: str, request: pytest.FixtureRequest
) -> None:
    """A call over few rows or one step, which reads the weights unpacked, gives the bits of
    packed ones.
    """
    request.addfinalizer(lambda: _cpu.set_few_rows(12))
    for sizes, kind in (
        (Sizes(2, 2, 19, 37), None),
        (Sizes(1, 61, 35, 50), None),
        (Sizes(3, 9, 5, 64), None),
        (Sizes(1, 1, 40, 33), None),
        *((Sizes(3, 9, 5, 64), kind) for kind in MASKS),
    ):
        values = arguments(cell, sizes, dtype) | (masks(kind, sizes) if kind else {})
        everything = []
        for few_rows in (0, 100):
            _cpu.set_few_rows(few_rows)
            results, pullback = op(cell, "_vjp")(**values)
            everything.append([*results, *present(pullback(*cotangents(results)))])
        assert_identical(*everything)
