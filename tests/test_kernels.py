"""The kernels agree with the reference in float64, on every ISA and any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from conftest import VECTORS
from helpers import (
    MASKS,
    PARAMETERS,
    Sizes,
    arguments,
    check_against_reference,
    cotangents,
    masks,
    op,
    pulled,
)
from hypothesis import strategies as st

import fusedrnn as fr
from fusedrnn import _cpu, reference
from fusedrnn.cells import CELLS, Cell

# Around lanes (2 to 16), panels (to 32) and tiles (to 8 rows); primes; single things.
SHAPES = [
    Sizes(1, 1, 1, 1),
    Sizes(5, 3, 4, 7),
    Sizes(7, 1, 9, 33),
    Sizes(6, 20, 7, 50),
    Sizes(40, 13, 3, 16),
    Sizes(3, 70, 17, 31),
    Sizes(2, 9, 33, 64),
    Sizes(600, 1, 2, 5),  # several stretches of steps
    Sizes(3, 300, 3, 8),
]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_agrees_with_reference(
    cell: Cell, sizes: Sizes, dtype: np.dtype, isa: str, reverse: bool
) -> None:
    """Ops agree with the reference on sizes around lanes, panels and tiles."""
    check_against_reference(cell, sizes, dtype, reverse=reverse)


MASKED = [
    Sizes(7, 1, 9, 33),
    Sizes(3, 70, 17, 31),
    Sizes(300, 4, 2, 5),  # several stretches of steps
    Sizes(9, 30, 33, 64),
]


@pytest.mark.parametrize("sizes", MASKED, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_masks_agree_with_reference(
    cell: Cell, sizes: Sizes, dtype: np.dtype, isa: str, reverse: bool
) -> None:
    """Ops with lengths, resets or both agree with the reference."""
    for kind in MASKS:
        check_against_reference(cell, sizes, dtype, [kind], reverse=reverse)


@pytest.mark.parametrize("sizes", [Sizes(9, 6, 40, 128), Sizes(6, 64, 30, 96)], ids=str)
def test_agrees_with_reference_on_many_threads(
    cell: Cell, sizes: Sizes, dtype: np.dtype, isa: str, threads: int
) -> None:
    """Ops agree with the reference where threads share units, and where they share rows."""
    check_against_reference(cell, sizes, dtype)
    check_against_reference(cell, sizes, dtype, ["both"], reverse=True)


# Weights beyond a core's caches, whose panels are taken in pieces of their depth and asked
# for ahead, with narrow last panels; the last in pieces on narrower vectors, too. Those of 530
# rows are more than share a panel: without vectors they take long, and small caches stand for
# them below.
LARGE = [
    (isa, sizes)
    for isa in VECTORS
    for sizes in (Sizes(2, 20, 330, 340), Sizes(2, 530, 130, 330), Sizes(2, 20, 9, 660))
    if isa != "portable" or sizes.B < 530
]


@pytest.mark.parametrize(("isa", "sizes"), LARGE, ids=str, indirect=["isa"])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_agrees_with_reference_on_large_weights(
    name: str, sizes: Sizes, dtype: np.dtype, isa: str
) -> None:
    """Ops agree with the reference on weights beyond a core's caches."""
    check_against_reference(CELLS[name], sizes, dtype)
    check_against_reference(CELLS[name], sizes, dtype, ["both"], reverse=True)


SMALL_CACHES = """
import fusedrnn as fr
from fusedrnn.cells import CELLS
from helpers import Sizes, check_against_reference
for isa in fr.show_config("dict")["isas available"]:
    fr.set_isa(isa)
    for cell in (CELLS["lstm"], CELLS["gru"]):
        for dtype in ("float32", "float64"):
            check_against_reference(cell, Sizes(2, 70, 30, 215), dtype, ["both"])
"""


def test_agrees_with_reference_on_weights_beyond_small_caches() -> None:
    """Kernels that see small caches pass over large weights once for each few tiles of rows."""
    environment = os.environ | {"FUSEDRNN_L1_BYTES": "4096", "FUSEDRNN_L2_BYTES": "32768"}
    command = [sys.executable, "-c", SMALL_CACHES]
    subprocess.run(command, check=True, cwd=Path(__file__).parent, env=environment)


@hypothesis.given(
    sizes=st.builds(
        Sizes, st.integers(1, 12), st.integers(1, 40), st.integers(1, 40), st.integers(1, 70)
    ),
    name=st.sampled_from(list(CELLS)),
    isa=st.sampled_from([n for n, supported in _cpu.isas().items() if supported]),
    dtype=st.sampled_from(["float32", "float64"]),
    reverse=st.booleans(),
    bias=st.booleans(),
    count=st.integers(1, 4),
    kind=st.sampled_from([None, *MASKS]),
)
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
def test_agrees_with_reference_on_any_shape(
    sizes: Sizes,
    name: str,
    isa: str,
    dtype: str,
    reverse: bool,
    bias: bool,
    count: int,
    kind: str | None,
) -> None:
    """Ops agree with the reference on random shapes, options and numbers of threads."""
    options = [kind] if kind else []
    fr.set_isa(isa)
    fr.set_num_threads(count)
    try:
        check_against_reference(
            CELLS[name], sizes, dtype, options, reverse=reverse, bias=bias, seed=3
        )
    finally:
        fr.set_isa(None)


@pytest.mark.parametrize("kind", [None, "both"])
@pytest.mark.parametrize("sizes", [Sizes(4, 5, 7, 19), Sizes(3, 40, 5, 33)], ids=str)
def test_integers_are_exact(
    sizes: Sizes, dtype: np.dtype, isa: str, threads: int, kind: str | None
) -> None:
    """A linear recurrence on small integers is exact: every index and tail, without
    tolerance.
    """
    rng = np.random.default_rng(7)
    T, B, I, H = sizes
    shapes = [(T, B, I), (H, I), (H, H), (H,), (H,), (B, H)]
    values = [rng.integers(-1, 2, shape).astype(dtype) for shape in shapes]
    options = masks(kind, sizes) if kind else {}
    options |= {"nonlinearity": "identity", "reverse": kind == "both"}
    results, pullback = fr.rnn_vjp(*values, **options)
    expected, expected_pullback = reference.rnn_vjp(*values, **options)
    weights = [rng.integers(-1, 2, r.shape).astype(dtype) for r in results]
    for a, e in zip(results, expected, strict=True):
        np.testing.assert_array_equal(a, e)
    gradients = pulled(CELLS["rnn_identity"], pullback, weights)
    expected_gradients = pulled(CELLS["rnn_identity"], expected_pullback, weights)
    for name, e in expected_gradients.items():
        np.testing.assert_array_equal(gradients[name], e, name)


@pytest.mark.parametrize(
    "sizes", [Sizes(0, 3, 4, 5), Sizes(3, 0, 4, 5), Sizes(0, 0, 1, 1)], ids=str
)
def test_empty_sequences_and_batches(cell: Cell, sizes: Sizes, dtype: np.dtype) -> None:
    """Sequences and batches of no length give what the reference gives."""
    check_against_reference(cell, sizes, dtype)
    check_against_reference(cell, sizes, dtype, ["both"], reverse=True)


def test_only_empty_rows(cell: Cell, dtype: np.dtype) -> None:
    """A batch whose rows all have length 0 gives what the reference gives."""
    sizes = Sizes(4, 3, 2, 5)
    check_against_reference(cell, sizes, dtype, masks={"lengths": np.zeros(3, int)})


def test_masks_of_an_unbatched_sequence(cell: Cell) -> None:
    """A sequence without a batch takes one length and one row of resets."""
    values = arguments(cell, Sizes(6, 1, 3, 18))
    resets = np.arange(6) == 2
    flat = {
        k: v[:, 0] if k == "x" else v[0] if k in ("h0", "c0") else v for k, v in values.items()
    }
    batch, batch_pullback = op(cell, "_vjp")(**values, lengths=[4], resets=resets[:, None])
    single, pullback = op(cell, "_vjp")(**flat, lengths=4, resets=resets)
    weights = cotangents(batch)
    gradients = pulled(cell, pullback, [np.squeeze(w, -2) for w in weights])
    expected = pulled(cell, batch_pullback, weights)
    for a, b in zip([*single, *gradients.values()], [*batch, *expected.values()], strict=True):
        np.testing.assert_array_equal(a, b.reshape(a.shape))


def test_a_cut_gradient_is_not_multiplied_by_zero(cell: Cell, isa: str) -> None:
    """A gradient that a reset cuts does not pass, even if it is infinite."""
    values = arguments(cell, Sizes(4, 9, 3, 18))
    resets = np.zeros((4, 9), bool)
    resets[2] = True
    results, pullback = op(cell, "_vjp")(**values, resets=resets)
    weights = cotangents(results)
    clean = pullback(*weights)
    weights[0][3, 4] = np.inf
    gradients = pullback(*weights)
    np.testing.assert_array_equal(gradients.x[:2], clean.x[:2])
    np.testing.assert_array_equal(gradients.h0, clean.h0)
    assert not np.isfinite(gradients.x[2:, 4]).all()


def test_the_pullback_keeps_its_masks(cell: Cell) -> None:
    sizes = Sizes(5, 4, 3, 18)
    mask = masks("both", sizes)
    results, pullback = op(cell, "_vjp")(**arguments(cell, sizes), **mask)
    before = pullback(results[0])
    mask["lengths"][:] = 0
    mask["resets"][:] = True
    for a, b in zip(pullback(results[0]), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_missing_gradients_are_zeros(cell: Cell, isa: str) -> None:
    values = arguments(cell, Sizes(5, 4, 3, 18))
    results, pullback = op(cell, "_vjp")(**values)
    weights = cotangents(results)
    for which in range(len(weights)):
        partial = [w if i == which else None for i, w in enumerate(weights)]
        zeros = [w if i == which else np.zeros_like(w) for i, w in enumerate(weights)]
        for a, b in zip(pullback(*partial), pullback(*zeros), strict=True):
            np.testing.assert_array_equal(a, b)


def test_pullback_twice_gives_the_same(cell: Cell) -> None:
    results, pullback = op(cell, "_vjp")(**arguments(cell, Sizes(5, 4, 3, 18)))
    weights = cotangents(results)
    for a, b in zip(pullback(*weights), pullback(*weights), strict=True):
        np.testing.assert_array_equal(a, b)


def variants(a: np.ndarray) -> dict[str, np.ndarray]:
    """The same values at other strides."""
    wide = np.repeat(a, 2, axis=-1)
    readonly = a.copy()
    readonly.flags.writeable = False
    unaligned = np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape)
    return {
        "sliced": wide[..., ::2],
        "inner": np.concatenate([a, a], axis=-1)[..., : a.shape[-1]],
        "fortran": np.asfortranarray(a),
        "backwards": a[::-1].copy()[::-1],
        "read-only": readonly,
        "unaligned": unaligned,
    }


@pytest.mark.parametrize("kind", list(variants(np.zeros((1, 1)))))
def test_any_strides(cell: Cell, kind: str) -> None:
    """Arrays of any strides, read-only or unaligned, give the same bits and are not
    written to.
    """
    values = arguments(cell, Sizes(5, 4, 3, 18), np.float32)
    strided = {k: variants(v)[kind] for k, v in values.items()}
    before = {k: v.copy() for k, v in strided.items()}
    plain, plain_pullback = op(cell, "_vjp")(**values)
    results, pullback = op(cell, "_vjp")(**strided)
    weights = cotangents(plain)
    gradients = pullback(*(variants(w)[kind] for w in weights))
    for a, b in zip(results, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(gradients, plain_pullback(*weights), strict=True):
        np.testing.assert_array_equal(a, b)
    for name, value in strided.items():
        np.testing.assert_array_equal(value, before[name], f"{name} was changed")


def test_out_is_written_and_returned(cell: Cell) -> None:
    values = arguments(cell, Sizes(5, 4, 3, 18))
    room = np.full((5, 4, 25), 9.0)
    y, *_ = op(cell)(**values, out=room[..., 3:21])
    assert np.shares_memory(y, room)
    np.testing.assert_array_equal(room[..., 3:21], op(cell)(**values)[0])
    np.testing.assert_array_equal(room[..., [0, 1, 2, 21, 22, 23, 24]], 9.0)


def test_nan_and_inf_stay_in_their_row(cell: Cell, isa: str) -> None:
    values = arguments(cell, Sizes(4, 9, 3, 18))
    clean = op(cell)(**values)[0]
    values["x"][1, 4, 0] = np.nan
    values["x"][1, 7, 0] = np.inf
    y = op(cell)(**values)[0]
    others = [b for b in range(9) if b not in (4, 7)]
    np.testing.assert_array_equal(y[:, others], clean[:, others])
    np.testing.assert_array_equal(y[0], clean[0])
    assert np.isnan(y[1:, 4]).all()


@pytest.mark.parametrize("name", ["x", "h0"])
def test_inf_does_not_reach_gradients_through_padding(cell: Cell, isa: str, name: str) -> None:
    """Gradients are finite where the reference's are."""
    values = arguments(cell, Sizes(6, 2, 3, 5))
    values[name][..., 0, 1] = -np.inf
    with np.errstate(all="ignore"):
        results, pullback = op(cell, "_vjp")(**values)
        expected, expected_pullback = op(cell, "_vjp", reference)(**values)
        weights = cotangents(results)
        gradients = pulled(cell, pullback, weights)
        expected_gradients = pulled(cell, expected_pullback, weights)
    np.testing.assert_array_equal(np.isfinite(results[0]), np.isfinite(expected[0]))
    for field, e in expected_gradients.items():
        assert (np.isfinite(gradients[field]) >= np.isfinite(e)).all(), field


@pytest.mark.parametrize("H", [48, 64])  # whole vectors anywhere
@pytest.mark.parametrize(("name", "per_unit"), [("lstm", 5), ("gru", 4), ("rnn_tanh", 0)])
def test_memory_saved_for_backward(name: str, per_unit: int, H: int, dtype: np.dtype) -> None:
    """An LSTM saves 5·H values a step and row and a GRU 4·H; multiples of 1 KB have a line
    more.
    """
    rows = len(CELLS[name].gates) * H
    arrays = [np.zeros((rows, 3), dtype), np.zeros((rows, H), dtype), *[None] * 8]
    saved, layers = per_unit * H, _cpu.Layers(name, [arrays])
    padded = per_unit and saved * dtype.itemsize % 1024 == 0
    expected = saved + (64 // dtype.itemsize if padded else 0)
    assert layers.saved_bytes(reference.Options()) == expected * dtype.itemsize


def test_a_call_takes_what_needs_no_preparing() -> None:
    """The kernels take arrays that need no preparing, and leave all others to Python,
    which converts them or says what is wrong.
    """
    values = arguments(CELLS["lstm"], Sizes(6, 4, 5, 8))
    parameters = [*[values[n] for n in PARAMETERS[:4]], *[None] * 6]
    layers = _cpu.Layers("lstm", [parameters], layered=False)
    options = reference.Options()
    x, h0, c0 = values["x"], values["h0"], values["c0"]

    def run(x: Any, h0: Any, c0: Any, *masks: Any) -> Any:
        given = (*masks, None, None, None)[:3]
        return layers.forward(x, (h0, c0), *given, options, None, False)

    lengths, resets = np.array([6, 0, 2, 3]), np.zeros((6, 4), bool)
    assert run(x, h0, c0) is not None
    assert run(x[::2], h0, c0) is not None
    assert run(x, None, c0, lengths, resets) is not None
    wrong = [
        (x[..., ::2], h0, c0),
        (x[..., :4], h0, c0),
        (x[0], h0, c0),
        (x.astype(np.float32), h0, c0),
        (x.astype(x.dtype.newbyteorder()), h0, c0),
        (np.ma.masked_array(x), h0, c0),
        (x.tolist(), h0, c0),
        (x, h0[:2], c0),
        (x, h0[:, ::-1], c0),
        (x, h0, c0.astype(np.float32)),
        (x, h0, c0, lengths + 1),
        (x, h0, c0, lengths - 1),
        (x, h0, c0, lengths.astype(np.int32)),
        (x, h0, c0, lengths[:2]),
        (x, h0, c0, lengths, resets.T),
        (x, h0, c0, lengths, resets.astype(int)),
        (x, h0, c0, None, None, resets.T),
        (x, h0, c0, lengths, None, ~resets),
    ]
    assert all(run(*arrays) is None for arrays in wrong)
    nothing = (None, None, None)
    assert layers.forward(x, [h0, c0], *nothing, options, None, False) is None
    repeats = options._replace(repeats=True)
    assert layers.forward(x, (h0, c0), *nothing, repeats, None, False) is None
    (y, state), tape = layers.forward(x, (h0, c0), *nothing, options, None, True)
    assert not y.flags.writeable
    assert tape.backward(y, state, None) is not None
    assert tape.backward(y, (None, state[1]), None) is not None
    for d in ((y[1:], None, None), (y, h0, None), (y, state, y), (y.tolist(), state, None)):
        assert tape.backward(*d) is None


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("weight_ih", lambda a: a[:-1].copy()),
        ("weight_hh", lambda a: a[:-1].copy()),
        ("weight_hh", lambda a: a.T.copy().T),
        ("weight_hh", lambda a: a.astype(np.float32)),
        ("bias_hh", lambda a: a[:-1].copy()),
    ],
)
def test_wrong_parameters_are_refused(name: str, changed: Any) -> None:
    """The kernels refuse parameters of wrong shapes, strides or dtypes."""
    values = arguments(CELLS["lstm"], Sizes(6, 4, 5, 8))
    values[name] = changed(values[name])
    with pytest.raises(ValueError, match=name if name != "weight_ih" else "weight"):
        _cpu.Layers("lstm", [[*[values[n] for n in PARAMETERS[:4]], *[None] * 6]])
