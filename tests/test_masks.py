"""A row with a mask is the sequence of the steps that it takes, bit for bit."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from helpers import Sizes, check_against_reference, cotangents, masks, op, with_options

import fusedrnn as fr
from fusedrnn.cells import CELLS, Cell

SHAPES = [Sizes(5, 3, 4, 7), Sizes(7, 1, 9, 33), Sizes(9, 20, 7, 50)]
# An option, or options, of every kind: of gates, of states, with a second product, random.
TOGETHER = {
    "lstm": ["projection", "peephole", "clip", "return_cells", "resets"],
    "lstm_coupled": ["layer_norm", "zoneout", "recompute"],
    "gru": ["zoneout", "recurrent_dropout", "resets"],
    "gru_before": ["trace", "bptt"],
    "rnn_tanh": ["zoneout", "resets"],
}


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["mask", "mask last"])
@pytest.mark.parametrize("reverse", [False, True])
def test_masks(
    cell: Cell, sizes: Sizes, kind: str, reverse: bool, dtype: np.dtype, isa: str
) -> None:
    """Masks alone, with resets and with lengths agree with the reference."""
    for others in ([], ["resets"], ["lengths"]):
        check_against_reference(cell, sizes, dtype, [*others, kind], reverse=reverse)


def test_masks_of_unusual_kinds(cell: Cell, isa: str) -> None:
    """No row that takes a step, padding on one side, and a row of one step."""
    T, B = 6, 4
    mask = np.zeros((T, B), bool)
    for rows in (mask, mask.copy(), mask.copy(), mask.copy()):
        for repeats in ("zero", "last"):
            asked = {"mask": rows, "masked_output": repeats}
            check_against_reference(cell, Sizes(T, B, 3, 20), "float64", [], masks=asked)
        mask[2:, 1], mask[:3, 2], mask[4, 3] = True, True, True


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_their_compacted_sequences(
    name: str, threads: int, dtype: np.dtype, isa: str
) -> None:
    """A masked call has the bits of a call with lengths whose rows have no gaps, forward and
    backward; random masks, chunks and returned gates among them.
    """
    fr.set_num_threads(threads)
    cell, sizes = CELLS[name], Sizes(9, 12, 7, 40)
    values, options = with_options(cell, sizes, TOGETHER[name], dtype)
    mask = masks("mask", sizes)["mask"]
    count = mask.sum(0)
    order = np.argsort(~mask, axis=0, kind="stable")  # the steps of a row first

    def compact(a: np.ndarray) -> np.ndarray:
        return np.take_along_axis(a, order.reshape(*order.shape, *[1] * (a.ndim - 2)), 0)

    resets = options.pop("resets", None)
    results, pullback = op(cell, "_vjp")(**values, **options, resets=resets, mask=mask)
    packed = values | {"x": compact(values["x"])}
    given = {"lengths": count, "resets": None if resets is None else compact(resets)}
    expected, expected_pullback = op(cell, "_vjp")(**packed, **options, **given)

    def check(actual: Any, wanted: Any, what: str) -> None:
        if actual.shape[:2] == mask.shape:
            actual, rest = compact(actual), actual[~mask]
            assert (rest == 0).all(), what
        np.testing.assert_array_equal(actual, wanted, what)

    for n, (a, e) in enumerate(zip(results, expected, strict=True)):
        for key in a if isinstance(a, dict) else [...]:
            check(a[key], e[key], f"result {n} {key}")
    d = cotangents(results)
    of_packed = [compact(g) if g.shape[:2] == mask.shape else g for g in d]
    names = ["dy", *(f"d{letter}_n" for letter in cell.states), "d_cells"]
    gradients = pullback(**dict(zip(names, d, strict=False)))
    wanted = expected_pullback(**dict(zip(names, of_packed, strict=False)))
    for key, e in wanted._asdict().items():
        if e is not None:
            check(getattr(gradients, key), e, f"d{key}")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_layers(kind: str, batch_first: bool) -> None:
    """In stacked layers in both directions, each row alone and without gaps has the same
    bits; "last" repeats h in the direction of travel, from the initial state on.
    """
    layer = getattr(fr, kind.upper())(
        4, 9, num_layers=2, bidirectional=True, batch_first=batch_first, rng=3
    )
    rng = np.random.default_rng(0)
    mask = masks("mask", Sizes(8, 6, 4, 9))["mask"]
    x = rng.normal(size=(8, 6, 4)).astype(np.float32)
    h0 = rng.normal(size=(4, 6, 9)).astype(np.float32)
    state = (h0, h0 / 2) if kind == "lstm" else h0
    turned = (lambda a: a.swapaxes(0, 1)) if batch_first else (lambda a: a)
    given = {"state": state, "mask": turned(mask)}
    (y, end), pullback = layer.vjp(turned(x), **given)
    repeated, _ = layer(turned(x), **given, masked_output="last")
    dy = rng.normal(size=y.shape).astype(np.float32)
    gradients = pullback(dy)
    y, repeated, dx = turned(y), turned(repeated), turned(gradients.x)
    ends, starts = (s if isinstance(s, tuple) else (s,) for s in (end, state))
    for b in range(6):
        steps = mask[:, b]
        of_row = tuple(s[:, b] for s in starts)
        one = of_row if kind == "lstm" else of_row[0]
        (row, row_end), row_pullback = layer.vjp(x[steps, b], one)
        np.testing.assert_array_equal(y[steps, b], row)
        np.testing.assert_array_equal(dx[steps, b], row_pullback(turned(dy)[steps, b]).x)
        assert (y[~steps, b] == 0).all()
        assert (dx[~steps, b] == 0).all()
        for s, e in zip(ends, row_end if kind == "lstm" else (row_end,), strict=True):
            np.testing.assert_array_equal(s[:, b], e)
        for d, order in enumerate((range(8), range(7, -1, -1))):
            last = h0[2 + d, b]
            for t in order:
                half = repeated[t, b, 9 * d : 9 * d + 9]
                last = half if steps[t] else last
                np.testing.assert_array_equal(half, last)


def test_masks_without_effect(cell: Cell, dtype: np.dtype) -> None:
    """All true is no mask, and padding on the right is lengths, bit for bit."""
    values, _ = with_options(cell, Sizes(6, 5, 3, 20), [], dtype)
    lengths = np.array([6, 3, 0, 1, 5])
    for given, mask in (
        ({}, np.ones((6, 5), bool)),
        ({"lengths": lengths}, np.arange(6)[:, None] < lengths),
    ):
        plain, pull = op(cell, "_vjp")(**values, **given)
        masked, pull_masked = op(cell, "_vjp")(**values, mask=mask)
        d = cotangents(plain)
        for a, b in zip([*plain, *pull(*d)[:3]], [*masked, *pull_masked(*d)[:3]], strict=True):
            np.testing.assert_array_equal(a, b)


def test_long_gaps_in_bfloat16() -> None:
    """The gradients of repeated rows are summed in float32 and rounded once."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    weights = [np.full((1, 1), 0.5, bfloat16), np.zeros((1, 1), bfloat16)]
    x, h0 = np.ones((1200, 2, 1), bfloat16), np.zeros((2, 1), np.float32)
    mask = np.zeros((1200, 2), bool)
    mask[400, 1] = True
    _, pullback = fr.rnn_vjp(x, *weights, h0=h0, mask=mask, masked_output="last")
    gradients = pullback(np.ones((1200, 2, 1), bfloat16))
    slope = 0.5 * (1 - np.tanh(0.5) ** 2)
    np.testing.assert_array_equal(gradients.h0, [[1200], [400]])
    np.testing.assert_allclose(float(gradients.x[400, 1, 0]), 800 * slope, rtol=1e-2)


def test_an_output_of_the_user() -> None:
    """`out` gets y with the steps at their times, whatever its strides."""
    values, _ = with_options(CELLS["gru"], Sizes(7, 4, 3, 6), [])
    mask = masks("mask", Sizes(7, 4, 3, 6))["mask"]
    expected, _ = fr.gru(**values, mask=mask, masked_output="last")
    out = np.empty((4, 7, 2, 6)).swapaxes(0, 1)[:, :, 0]
    y, _ = fr.gru(**values, mask=mask, masked_output="last", out=out)
    assert y is out
    np.testing.assert_array_equal(y, expected)


def test_flags_may_be_numbers() -> None:
    """Masks and resets are also taken as numbers that are all 0 or 1, and without a batch."""
    values, _ = with_options(CELLS["lstm"], Sizes(5, 3, 4, 6), [])
    mask = masks("mask", Sizes(5, 3, 4, 6))["mask"]
    expected = fr.lstm(**values, mask=mask, resets=~mask)
    for dtype in (int, np.float32, np.uint8):
        given = {"mask": mask.astype(dtype), "resets": (~mask).astype(dtype)}
        for a, e in zip(fr.lstm(**values, **given), expected, strict=True):
            np.testing.assert_array_equal(a, e)
    flat = {
        k: v[:, 1] if k == "x" else v[1] if k in ("h0", "c0") else v for k, v in values.items()
    }
    y, *_ = fr.lstm(**flat, mask=mask[:, 1].tolist(), resets=~mask[:, 1])
    np.testing.assert_array_equal(y, expected[0][:, 1])


def test_a_stream_takes_masks() -> None:
    """Rows that take no step keep their state, also if they were just reset."""
    layer = fr.LSTM(3, 6, num_layers=2, rng=0)
    x = np.random.default_rng(1).normal(size=(6, 4, 3)).astype(np.float32)
    mask, resets = np.random.default_rng(2).random((6, 4)) < 0.5, np.zeros((6, 4), bool)
    resets[3, 2] = resets[3, 0] = True
    mask[3] = [False, True, True, False]
    start = layer(x)[1]
    whole, _ = layer(x, start, mask=mask)
    stream = fr.Stream(layer, 4)
    stream.state = start
    for t in range(3):
        np.testing.assert_array_equal(stream.step(x[t], mask[t]), whole[t])
    h = stream.state[0][-1]
    stream.reset(resets[3])
    y = stream.step(x[3], mask[3], masked_output="last")
    np.testing.assert_array_equal(y[0], 0)
    np.testing.assert_array_equal(y[3], h[3])
    np.testing.assert_array_equal(y[1], whole[3, 1])
    np.testing.assert_array_equal(stream.step(x[4], [0, 1, 0, 1])[0], 0)
    one = fr.Stream(layer, None)
    np.testing.assert_array_equal(one.step(x[0, 0], False), 0)
    np.testing.assert_array_equal(one.state[0], 0)


MASK = np.ones((3, 2), bool)
WRONG = [
    ({"mask": MASK.T}, ValueError, "mask must have shape (T, B) = (3, 2), got (2, 3)"),
    ({"mask": "no"}, TypeError, "mask must be bool or numbers that are 0 or 1, got <U2"),
    (
        {"mask": MASK * 1j},
        TypeError,
        "mask must be bool or numbers that are 0 or 1, got complex128",
    ),
    ({"mask": MASK * 2}, ValueError, "mask must be bool or numbers that are 0 or 1, got 2"),
    (
        {"mask": MASK * np.nan},
        ValueError,
        "mask must be bool or numbers that are 0 or 1, got nan",
    ),
    (
        {"mask": MASK, "lengths": [3, 1]},
        ValueError,
        "mask must be false from a row's length on: it is true at step 1 of row 1, whose "
        "length is 1",
    ),
    (
        {"masked_output": "last"},
        ValueError,
        'masked_output must be "zero" without a mask, got "last"',
    ),
    (
        {"mask": MASK, "masked_output": "none"},
        ValueError,
        'masked_output must be "zero" or "last", got \'none\'',
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_wrong_masks(given: dict[str, Any], error: type, message: str) -> None:
    """Ops and layers refuse wrong masks before they compute anything."""
    values, _ = with_options(CELLS["gru"], Sizes(3, 2, 4, 5), [])
    with pytest.raises(error, match=re.escape(message)):
        fr.gru(**values, **given)
    layer = fr.GRU(4, 5, dtype=np.float64)
    with pytest.raises(error, match=re.escape(message)):
        layer.vjp(values["x"], **given)


def test_wrong_masks_of_other_layouts() -> None:
    """Messages name the axes of the layer, and a row's length without a batch."""
    x = np.zeros((2, 3, 4), np.float32)
    first = fr.GRU(4, 5, batch_first=True)
    with pytest.raises(ValueError, match=re.escape("mask must have shape (B, T) = (2, 3)")):
        first(x, mask=MASK)
    with pytest.raises(ValueError, match="true at step 2 of row 1, whose length is 2"):
        first(x, mask=MASK.T, lengths=[3, 2])
    with pytest.raises(ValueError, match="it is true at step 2, whose length is 2"):
        fr.GRU(4, 5)(x[0], mask=[1, 1, 1], lengths=2)
