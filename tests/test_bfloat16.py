"""Layers of bfloat16 on the CPU: the definition, exactness, memory, types and errors."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pytest
from helpers import (
    Bfloat16,
    Sizes,
    as_double,
    assert_close,
    check_against_reference,
    cotangents,
    factor_of_rounding,
    op,
    options_of,
    present,
    with_options,
)

import fusedrnn as fr
from fusedrnn import _cpu, reference
from fusedrnn import bfloat16 as package
from fusedrnn.cells import CELLS, Cell

pytest.importorskip("ml_dtypes")
BF16 = package.bfloat16()
SHAPES = [Sizes(1, 1, 1, 1), Sizes(5, 3, 7, 33), Sizes(9, 40, 20, 48), Sizes(3, 17, 65, 100)]
PLACE = Bfloat16()


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_against_float64(cell: Cell, sizes: Sizes, isa_with_units: str) -> None:
    """Results and gradients have the error of bfloat16, with and without masks."""
    check_against_reference(cell, sizes, PLACE)
    check_against_reference(cell, sizes, PLACE, ["both"], reverse=True)


@pytest.mark.parametrize("sizes", [Sizes(7, 5, 6, 20), Sizes(4, 33, 40, 48)], ids=str)
def test_options(cell: Cell, sizes: Sizes, isa_with_units: str) -> None:
    """Each option, and all that may stand together, have it too."""
    for name in options_of(cell):
        check_against_reference(cell, sizes, PLACE, [name])
    check_against_reference(cell, sizes, PLACE, ["zoneout", "recurrent_dropout", "both"])


def tape_of(cell: Cell, arrays: dict[str, Any], asked: dict[str, Any], module: Any = fr) -> Any:
    """Results and gradients, in lists of arrays."""
    results, pullback = op(cell, "_vjp", module)(**arrays, **asked)
    kinds = [r for r in results if not isinstance(r, dict)]
    d = [w.astype(r.dtype) for w, r in zip(cotangents(results), kinds, strict=True)]
    return kinds, present(pullback(*d))


@pytest.mark.parametrize(
    "names", [[], ["both"], ["zoneout"], ["clip"], ["projection"]], ids=str
)
def test_against_the_definition(cell: Cell, names: list[str], isa_with_units: str) -> None:
    """The reference of bfloat16 rounds alike, so that the errors are smaller."""
    if not {*names} - {"both"} <= {*options_of(cell)}:
        pytest.skip(f"{cell.name} has no {names[0]}")
    sizes = Sizes(6, 9, 12, 40)
    arrays, asked = with_options(cell, sizes, names)
    arrays = PLACE.put_all(arrays)
    actual, expected = (tape_of(cell, arrays, asked, m) for m in (fr, reference))
    for found, wanted, is_gradient in zip(actual, expected, (False, True), strict=True):
        for a, e in zip(found, wanted, strict=True):
            assert a.dtype == e.dtype
            factor = factor_of_rounding(cell, names)
            assert_close(a, e, "bfloat16 rounded alike", gradient=is_gradient, factor=factor)


def assert_equal(actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(as_double(a), as_double(e))


LARGE = Sizes(2, 40, 40, 450)  # whose rows threads convert together
EXACT = [Sizes(9, 1, 96, 160), Sizes(7, 13, 33, 100), Sizes(6, 70, 20, 48), LARGE]


@pytest.mark.parametrize("sizes", EXACT, ids=str)
@pytest.mark.parametrize("options", [[], ["zoneout", "recurrent_dropout"]], ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru", "gru_before", "rnn_tanh"])
def test_exactness(name: str, options: list[str], sizes: Sizes, isa_with_units: str) -> None:
    """Threads change no bit of results and gradients; neighbours and chunks none of results."""
    if isa_with_units == "portable" and sizes == LARGE:
        pytest.skip("slow, and the time loop is that of the other instruction sets")
    cell = CELLS[name]
    arrays, asked = with_options(cell, sizes, options)
    arrays, found = PLACE.put_all(arrays), []
    for threads in (1, 2, 5):
        fr.set_num_threads(threads)
        found.append(tape_of(cell, arrays, asked))
    for results, gradients in found[1:]:
        assert_equal(results, found[0][0])
        assert_equal(gradients, found[0][1])
    if options:
        return
    states = [n for n in ("h0", "c0") if n in arrays]
    some = slice(sizes.B // 3, sizes.B // 3 + 5)
    alone = arrays | {"x": arrays["x"][:, some].copy()}
    alone |= {n: arrays[n][some].copy() for n in states}
    assert_equal([tape_of(cell, alone, asked)[0][0]], [found[0][0][0][:, some]])
    first = arrays | {"x": arrays["x"][:2]}
    _, *ends = op(cell)(**first)
    rest = arrays | {"x": arrays["x"][2:]} | dict(zip(states, ends, strict=True))
    results = op(cell)(**rest)
    assert_equal(results[1:], found[0][0][1:])
    assert_equal([results[0]], [found[0][0][0][2:]])


@pytest.mark.parametrize("options", [[], ["layer_norm"], ["peephole"], ["zoneout"]], ids=str)
def test_recomputing_changes_no_bit(
    cell: Cell, options: list[str], isa_with_units: str
) -> None:
    """Gates that backward computes again are those that it would have read, clipped or not.

    R then multiplies a rounded h', which it does in forward, too, unless the cell or dropout
    changes h' first.
    """
    if not {*options} <= {*options_of(cell)} or cell.resets_before:
        pytest.skip("the cell has no such option, or changes h'")
    arrays, asked = with_options(cell, Sizes(7, 9, 5, 40), options)
    arrays = PLACE.put_all(arrays)
    for clip in (None, 0.3, 1.3):
        if clip is not None:
            asked["clip"] = clip
        found = [tape_of(cell, arrays, asked | {"recompute": r}) for r in (False, True)]
        assert_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("H", [48, 64, 256, 512])
@pytest.mark.parametrize(("name", "most"), [("lstm", 0.62), ("gru", 0.55)])
def test_memory_saved_for_backward(name: str, most: float, H: int, isa_with_units: str) -> None:
    """Gates have half of the bytes, c has as many as in float32."""
    saved = []
    for dtype in (np.dtype(np.float32), BF16):
        rows = len(CELLS[name].gates) * H
        arrays = [np.zeros((rows, 3), dtype), np.zeros((rows, H), dtype), *[None] * 8]
        saved.append(_cpu.Layers(name, [arrays]).saved_bytes(reference.Options()))
    assert saved[1] <= most * saved[0]


LAYERS: list[tuple[Any, dict[str, Any]]] = [
    (fr.LSTM, {"proj_size": 5, "peephole": True}),
    (fr.LSTM, {"coupled_gates": True, "layer_norm": True, "weight_dropout": 0.2}),
    (fr.GRU, {"reset_after": False, "zoneout": 0.2}),
    (fr.RNN, {"nonlinearity": "relu", "clip": 2.0}),
]


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
def test_layers(kind: Any, options: dict[str, Any]) -> None:
    """Two layers in both directions, with dropout between, against a layer of float64."""
    shape: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    layer = kind(7, 20, dropout=0.3, dtype="bfloat16", rng=0, **shape, **options)
    exact = kind(7, 20, dropout=0.3, dtype=np.float64, **shape, **options)
    exact.load_state_dict(layer.state_dict())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 9, 7)).astype(BF16)
    lengths = np.array([9, 3, 0, 1, 9, 5])
    runs = []
    for each in (layer, exact):
        (y, state), pullback = each.vjp(x.astype(each.dtype), lengths=lengths, seed=3)
        d = np.random.default_rng(1).normal(size=y.shape).astype(BF16).astype(each.dtype)
        runs.append((y, state, pullback(d)))
    (y, state, gradients), (exact_y, exact_state, exact_gradients) = runs
    assert (y.dtype, gradients.x.dtype) == (BF16, BF16)
    several = 3  # layers round one after the other, and LayerNorm widens small rows
    factor = 40 if kind is fr.RNN else several
    assert_close(y, exact_y, "bfloat16", "y", factor=several)
    for a, e in zip(state, exact_state, strict=True):
        assert_close(a, e, "bfloat16", factor=several)
    assert_close(gradients.x, exact_gradients.x, "bfloat16", "dx", True, factor)
    for name, gradient in gradients.parameters.items():
        assert gradient.dtype == np.float32, name
        expected = exact_gradients.parameters[name]
        assert_close(gradient, expected, "bfloat16", name, True, factor)


def test_a_layer_is_converted_and_stored() -> None:
    """`to`, pickle, deep assignments, a stream and `out` keep the type."""
    layer = fr.LSTM(3, 4, rng=0)
    weights = layer.weight_hh_l0.copy()
    assert repr(layer.to("cpu", "bfloat16")) == "LSTM(3, 4, dtype=bfloat16)"
    assert layer.dtype == layer.weight_hh_l0.dtype == BF16
    np.testing.assert_array_equal(layer.weight_hh_l0, weights.astype(BF16))
    x = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(BF16)
    y, (h_n, c_n) = layer(x)
    assert (y.dtype, h_n.dtype, c_n.dtype) == (BF16, np.float32, np.float32)
    again = pickle.loads(pickle.dumps(layer))
    assert_equal([again(x)[0]], [y])
    assert_equal([fr.LSTM(3, 4, dtype=BF16, rng=0)(x)[0]], [y])
    stream = fr.Stream(layer, 2)
    assert_equal([np.stack([stream.step(step) for step in x])], [y])
    assert layer.to("cpu", "float32").dtype == np.float32
    layer.load_state_dict(again.state_dict())
    assert_close(layer(x.astype(np.float32))[0], y, "bfloat16")
    out = np.zeros((5, 2, 4), BF16)
    p = again.state_dict()
    arrays = [p[f"{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    made, *_ = fr.lstm(x, *arrays, out=out)
    assert made is out
    assert_equal([out], [y])
    assert_equal([fr.lstm(x, fr.Weights(*arrays))[0]], [y])
    explained, wide = (one.explain(50, 4, training=True) for one in (again, layer))
    assert explained["saved_bytes"] < wide["saved_bytes"]
    units = ("AMX", "AVX-512 BF16", "NEON BF16", "FMA")
    assert explained["plans"]["l0"]["unit"] in units


def test_any_strides() -> None:
    """x and dy may be views; a single sequence and no step are served, too."""
    layer = fr.GRU(3, 5, dtype="bfloat16", rng=0)
    wide = np.random.default_rng(0).normal(size=(4, 6, 6)).astype(BF16)
    for x in (wide[::2, :, :3], wide.swapaxes(0, 1)[..., 1:4], wide[..., ::2]):
        (y, _), pullback = layer.vjp(x)
        (same, _), of_copy = layer.vjp(x.copy())
        assert_equal([y, pullback(y).x], [same, of_copy(same).x])
    assert_equal([layer(wide[:, 0, :3])[0]], [layer(wide[:, :1, :3])[0][:, 0]])
    y, h_n = layer(wide[:0, :, :3])
    assert (y.shape, h_n.shape) == ((0, 6, 5), (1, 6, 5))


def test_values_beyond_the_range(isa_with_units: str) -> None:
    """An infinity stays one, and neither it nor NaN reaches another row or the padding."""
    layer = fr.RNN(5, 7, nonlinearity="identity", bias=False, dtype="bfloat16", rng=0)
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(BF16)
    clean, _ = layer(x)
    x[:, 1], x[:, 3] = np.inf, np.nan
    layer.weight_ih_l0 = np.abs(layer.weight_ih_l0)
    y, _ = layer(x)
    assert np.isposinf(y[0, 1].astype(float)).all()
    assert np.isnan(y[:, 3].astype(float)).all()
    assert np.isfinite(y[:, [0, 2]].astype(float)).all()
    assert np.isfinite(clean.astype(float)).all()
    (y, _), pullback = layer.vjp(x)
    gradients = pullback(y).parameters["weight_ih_l0"]
    assert np.isnan(gradients).all()
    large = fr.RNN(1, 7, nonlinearity="identity", bias=False, dtype="bfloat16", rng=0)
    large.weight_ih_l0 = np.full((7, 1), 3e38, np.float32)
    (y, _), pullback = large.vjp(np.full((1, 2, 1), 2, BF16))
    assert np.isposinf(y.astype(float)).all()
    gradients = pullback(np.full(y.shape, 1, BF16))
    assert np.isposinf(gradients.x.astype(float)).all()
    assert np.isfinite(gradients.parameters["weight_ih_l0"]).all()


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed types are refused by name, and the package that is missing is named."""
    layer = fr.LSTM(3, 4, dtype="bfloat16", rng=0)
    x = np.zeros((5, 2, 3), BF16)

    def fails(kind: type[Exception], message: str, call: Any) -> None:
        with pytest.raises(kind, match=message):
            call()

    fails(
        TypeError,
        "x must be bfloat16 like the layer, got float32",
        lambda: layer(x.astype("f4")),
    )
    state = tuple(np.zeros((1, 2, 4), BF16) for _ in "hc")
    fails(
        TypeError,
        "h0 must be float32 like the states of x, got bfloat16",
        lambda: layer(x, state),
    )
    (y, _), pullback = layer.vjp(x)
    fails(
        TypeError, "dy must be bfloat16 like x, got float32", lambda: pullback(y.astype("f4"))
    )
    p = [v.astype(np.float32) for v in layer.state_dict().values()]
    fails(TypeError, "weight_ih must be bfloat16 like x, got float32", lambda: fr.lstm(x, *p))
    fails(
        TypeError,
        "weight_ih must be float32 like x, got bfloat16",
        lambda: fr.lstm(x.astype("f4"), *layer.state_dict().values()),
    )
    fails(TypeError, "the layer must be float32, got bfloat16", lambda: layer.quantize("int8"))
    fails(
        TypeError,
        "out must be bfloat16 like x, got float32",
        lambda: fr.lstm(x, *layer.state_dict().values(), out=np.zeros((5, 2, 4), "f4")),
    )
    package.bfloat16.cache_clear()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for call in (
        lambda: fr.GRU(3, 4, dtype="bfloat16"),
        lambda: fr.GRU(3, 4).to("cpu", "bfloat16"),
    ):
        fails(
            ImportError,
            r'needs the package ml_dtypes .*pip install "fusedrnn\[bfloat16\]"',
            call,
        )
    monkeypatch.undo()
    assert fr.GRU(3, 4).to("cpu", "bfloat16").dtype == BF16
