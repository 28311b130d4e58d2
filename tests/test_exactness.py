"""Bit for bit: threads, batch neighbours, chunks, layers against ops."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Sizes, arguments, cotangents, op

import fusedrnn as fr
from fusedrnn import kernel
from fusedrnn.cells import Cell

SHAPES = [Sizes(12, 1, 96, 160), Sizes(9, 13, 33, 100), Sizes(6, 70, 20, 48)]
LARGE = Sizes(2, 40, 40, 340)  # beyond a core's caches


@pytest.fixture(autouse=True)
def follow_openmp_afterwards():
    yield
    fr.set_num_threads(0)


def assert_identical(a, b) -> None:
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("sizes", [*SHAPES, LARGE], ids=str)
def test_any_number_of_threads(cell: Cell, sizes: Sizes, dtype: np.dtype, isa: str) -> None:
    values = arguments(cell, sizes, dtype)
    everything = []
    for count in (1, 2, 3, 7):
        fr.set_num_threads(count)
        results, pullback = op(cell, "_vjp")(**values)
        everything.append([*results, *pullback(*cotangents(results))])
    for other in everything[1:]:
        assert_identical(other, everything[0])


@pytest.mark.parametrize("sizes", [*SHAPES[1:], LARGE], ids=str)
def test_any_neighbours_in_the_batch(
    cell: Cell, sizes: Sizes, dtype: np.dtype, isa: str, threads: int
) -> None:
    """y, states and their gradients of a row do not know which rows are beside it."""
    values = arguments(cell, sizes, dtype)
    results, pullback = op(cell, "_vjp")(**values)
    weights = cotangents(results)
    gradients = pullback(*weights)
    for rows in (slice(0, 1), slice(2, 7), slice(sizes.B - 3, sizes.B)):
        part = {
            k: v[:, rows] if k == "x" else v[rows] if k in ("h0", "c0") else v
            for k, v in values.items()
        }
        part_results, part_pullback = op(cell, "_vjp")(**part)
        assert_identical(part_results, [r[..., rows, :] for r in results])
        part_gradients = part_pullback(*(w[..., rows, :] for w in weights))
        for name in ("x", "h0", *(["c0"] if "c0" in values else [])):
            np.testing.assert_array_equal(
                getattr(part_gradients, name), getattr(gradients, name)[..., rows, :]
            )


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_chunks_equal_the_whole(
    cell: Cell, sizes: Sizes, dtype: np.dtype, isa: str, threads: int
) -> None:
    values = arguments(cell, sizes, dtype)
    whole, *final = op(cell)(**values)
    x = values.pop("x")
    at = 0
    for length in (1, 3, 1, 100):
        y, *state = op(cell)(x[at : at + length], **values)
        np.testing.assert_array_equal(y, whole[at : at + length])
        values |= dict(zip(("h0", "c0"), state, strict=False))
        at += length
    assert_identical(state, final)


def test_layers_equal_ops(dtype: np.dtype) -> None:
    """Two bidirectional layers are four ops, concatenated."""
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


def test_borrowed_weights_equal_packed_ones(
    cell: Cell, dtype: np.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call over few rows reads the weights as they are: the same sums, in order."""
    for sizes in (Sizes(2, 2, 19, 37), Sizes(3, 9, 5, 64), Sizes(1, 1, 40, 33)):
        values = arguments(cell, sizes, dtype)
        everything = []
        for few_rows in (0, 100):
            monkeypatch.setattr(kernel, "FEW_ROWS", few_rows)
            results, pullback = op(cell, "_vjp")(**values)
            everything.append([*results, *pullback(*cotangents(results))])
        assert_identical(*everything)
