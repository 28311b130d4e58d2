"""Every option, alone and combined, agrees with the reference, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import (
    CASE_IDS,
    CASES,
    PARAMETERS,
    Sizes,
    assert_close,
    cotangents,
    double,
    op,
    options_of,
    present,
    pulled,
    spoil_padding,
    with_options,
)

import fusedrnn as fr
from fusedrnn import _cpu, reference
from fusedrnn.cells import CELLS, Cell

SHAPES = [Sizes(5, 3, 4, 7), Sizes(7, 1, 9, 33), Sizes(6, 20, 7, 50), Sizes(3, 9, 33, 64)]


def check(
    cell: Cell, sizes: Sizes, names: list[str], dtype: Any, reverse: bool = False, seed: int = 0
) -> None:
    """Results, every gradient, and the same results without a pullback."""
    values, given = with_options(cell, sizes, names, dtype, seed)
    spoil_padding(values["x"], given)
    given["reverse"] = reverse
    expected, expected_pullback = op(cell, "_vjp", reference)(**double(values), **given)
    results, pullback = op(cell, "_vjp")(**values, **given)
    inference = op(cell)(
        **values, **{k: v for k, v in given.items() if k not in ("bptt", "recompute")}
    )
    for a, b, e in zip(results, inference, expected, strict=True):
        if isinstance(e, dict):
            assert list(a) == list(e)
            for k in e:
                assert_close(a[k], e[k], dtype, k)
                np.testing.assert_array_equal(a[k], b[k])
        else:
            assert_close(a, e, dtype, "result")
            np.testing.assert_array_equal(a, b)
    weights = cotangents(results, seed)
    spoil_padding(weights[0], given)
    if "return_cells" in names:
        spoil_padding(weights[-1], given)
    gradients = pulled(cell, pullback, weights)
    wide = [w.astype(np.float64) for w in weights]
    expected_gradients = pulled(cell, expected_pullback, wide)
    assert set(gradients) == set(expected_gradients)
    for name, e in expected_gradients.items():
        assert_close(gradients[name], e, dtype, f"d{name}")


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_each_option(cell: Cell, sizes: Sizes, dtype: np.dtype, isa: str) -> None:
    for name in options_of(cell):
        check(cell, sizes, [name], dtype)


@pytest.mark.parametrize(("name", "row"), CASES, ids=CASE_IDS)
def test_options_combine(name: str, row: tuple[Any, ...], isa: str) -> None:
    *flags, reverse, dtype, sizes, threads = row
    fr.set_num_threads(threads)
    try:
        check(CELLS[name], sizes, [f for f in flags if f], np.dtype(dtype), reverse, seed=1)
    finally:
        fr.set_num_threads(0)


TOGETHER = {
    "lstm": ["projection", "peephole", "clip", "zoneout", "recurrent_dropout", "resets"],
    "lstm_coupled": ["layer_norm", "cell_clip", "zoneout", "return_cells", "lengths"],
    "gru": ["layer_norm", "zoneout", "weight_dropout", "recompute", "lengths", "resets"],
    "gru_before": ["recurrent_dropout", "clip", "trace", "lengths"],
    "rnn_tanh": ["clip", "zoneout", "recurrent_dropout", "resets"],
}


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("sizes", [Sizes(9, 13, 33, 100), Sizes(6, 70, 20, 48)], ids=str)
def test_any_number_of_threads(name: str, sizes: Sizes, dtype: np.dtype, isa: str) -> None:
    """The same bits, random masks among them."""
    values, given = with_options(CELLS[name], sizes, TOGETHER[name], dtype)
    everything = []
    for count in (1, 2, 3, 7):
        fr.set_num_threads(count)
        results, pullback = op(CELLS[name], "_vjp")(**values, **given)
        everything.append(
            [r for r in results if not isinstance(r, dict)]
            + present(pullback(*cotangents(results)[:2]))
        )
    fr.set_num_threads(0)
    for other in everything[1:]:
        for a, b in zip(other, everything[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", TOGETHER)
def test_any_neighbours_and_chunks(name: str, dtype: np.dtype, isa: str) -> None:
    """In inference a row does not know those beside it, nor a chunk the whole."""
    cell, sizes = CELLS[name], Sizes(9, 13, 33, 100)
    values, given = with_options(
        cell, sizes, [n for n in TOGETHER[name] if n != "recompute"], dtype
    )
    given |= {"training": False, "trace": False}
    lengths, resets = given.pop("lengths", None), given.pop("resets", None)
    y, *final = op(cell)(**values, **given, lengths=lengths, resets=resets)
    rows = slice(2, 7)
    part = {
        k: v[:, rows] if k == "x" else v[rows] if k in ("h0", "c0") else v
        for k, v in values.items()
    }
    alone, *_ = op(cell)(
        **part,
        **given,
        lengths=None if lengths is None else lengths[rows],
        resets=None if resets is None else resets[:, rows],
    )
    np.testing.assert_array_equal(alone, y[:, rows])
    x, at = values.pop("x"), 0
    names = [f"{letter}0" for letter in cell.states]
    for length in (1, 3, 5):
        chunk = slice(at, at + length)
        end, *state = op(cell)(
            x[chunk],
            **values,
            **given,
            lengths=None if lengths is None else np.clip(lengths - at, 0, length),
            resets=None if resets is None else resets[chunk],
        )
        np.testing.assert_array_equal(end, y[chunk])
        values |= dict(zip(names, state, strict=False))
        at += length
    for a, b in zip(state[: len(names)], final[: len(names)], strict=True):
        np.testing.assert_array_equal(a, b)


def test_seeds(cell: Cell) -> None:
    """The same seed gives the same, another seed another, none another each time."""
    names = ["zoneout", "recurrent_dropout", "weight_dropout"]
    values, given = with_options(cell, Sizes(6, 5, 4, 40), names)
    del given["seed"]
    run = op(cell)
    same, again, other = (run(**values, **given, seed=s)[0] for s in (3, 3, 4))
    np.testing.assert_array_equal(same, again)
    assert (same != other).any()
    assert (run(**values, **given)[0] != run(**values, **given)[0]).any()
    calm = given | {"training": False}
    np.testing.assert_array_equal(
        run(**values, **calm, seed=3)[0], run(**values, **calm, seed=4)[0]
    )


def test_options_without_effect_change_nothing(cell: Cell, dtype: np.dtype, isa: str) -> None:
    """Bounds that nothing reaches: the kernels with options compute what the plain ones do."""
    sizes = Sizes(7, 9, 5, 50)
    values, _ = with_options(cell, sizes, [], dtype)
    for reverse in (False, True):
        everything = []
        for given in ({}, {"clip": 1e6}):
            results, pullback = op(cell, "_vjp")(**values, **given, reverse=reverse)
            everything.append([*results, *present(pullback(*cotangents(results)))])
        for a, b in zip(*everything, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_layers_draw_apart(kind: str, dtype: np.dtype) -> None:
    """Two bidirectional layers in training, against the reference put together by hand."""
    options = {"zoneout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.1}
    layer = getattr(fr, kind.upper())(
        4, 9, num_layers=2, dropout=0.4, bidirectional=True, dtype=dtype, rng=5, **options
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3, 4)).astype(dtype)
    lengths = [6, 2, 0]
    (y, _), pullback = layer.vjp(x, lengths=lengths, seed=11)
    dy = rng.normal(size=y.shape).astype(dtype)
    gradients = pullback(dy)

    cell, p = layer._cell, double(layer.state_dict())
    below, pulls, masks = x.astype(np.float64), [], []
    for l in range(2):
        if l:
            masks.append(reference.dropout(below, 0.4, seed=11, where=0))
            below = below * masks[-1]
        sides = []
        for d, suffix in enumerate((f"l{l}", f"l{l}_reverse")):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weights = [p[f"{n}_{suffix}"] for n in names]
            asked = options | {"lengths": lengths, "reverse": d == 1, "seed": 11}
            results, pull = reference.op(
                cell.reference,
                below,
                weights,
                [None] * len(cell.states),
                where=2 * l + d,
                **asked,
            )
            sides.append(results[0])
            pulls.append((suffix, pull))
        below = np.concatenate(sides, -1)
    assert_close(y, below, dtype, "y")
    d_below = dy.astype(np.float64)
    for l in (1, 0):
        halves, d_x = np.split(d_below, 2, -1), 0
        for (suffix, pull), half in zip(pulls[2 * l : 2 * l + 2], halves, strict=True):
            grads = pull(half)
            d_x = d_x + grads.x
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                actual = gradients.parameters[f"{name}_{suffix}"]
                assert_close(actual, getattr(grads, name), dtype, f"{name}_{suffix}")
        d_below = d_x * masks[0] if l else d_x
    assert_close(gradients.x, d_below, dtype, "dx")


def test_trace_and_cells_of_a_layer() -> None:
    layer = fr.LSTM(3, 6, num_layers=2, bidirectional=True, batch_first=True, rng=0)
    x = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
    y, (_, c_n), cells, trace = layer(x, lengths=[5, 3], return_cells=True, trace=True)
    suffixes = [f"l{l}{d}" for l in range(2) for d in ("", "_reverse")]
    assert list(trace) == [f"{g}_{s}" for s in suffixes for g in "ifgo"]
    assert all(a.shape == (2, 5, 6) for a in trace.values())
    np.testing.assert_array_equal(cells[0, -1, :6], c_n[2, 0])
    np.testing.assert_array_equal(cells[1, 2, :6], c_n[2, 1])
    np.testing.assert_array_equal(cells[:, 0, 6:], c_n[3])
    assert (cells[1, 3:] == 0).all()
    for side, suffix in ((slice(6), "l1"), (slice(6, 12), "l1_reverse")):
        h = trace[f"o_{suffix}"] * np.tanh(cells[..., side])
        np.testing.assert_allclose(h, y[..., side], rtol=1e-6, atol=1e-7)
    one = fr.GRU(3, 6, rng=0)
    _, _, gates = one(x[0], trace=True)
    assert {k: v.shape for k, v in gates.items()} == dict.fromkeys(
        ("r_l0", "z_l0", "n_l0"), (5, 6)
    )


def test_recomputing_keeps_little(dtype: np.dtype) -> None:
    """Of an LSTM h and c, of a GRU h."""
    for name, kept in (("lstm", 1), ("gru", 0)):
        shapes = CELLS[name].parameter_shapes(4, 64)
        parameters = [np.zeros(shapes[n].lengths, dtype) for n in PARAMETERS[:4]]
        layers = _cpu.Layers(name, [[*parameters, *[None] * 6]])
        options = reference.Options(training=True, recompute=True)
        assert layers.saved_values(options) == kept * 64


def test_initialisation() -> None:
    lstm = fr.LSTM(3, 8, proj_size=5, forget_bias=1.0, orthogonal=True, rng=0)
    p = lstm.state_dict()
    np.testing.assert_array_equal((p["bias_ih_l0"] + p["bias_hh_l0"])[8:16], 1)
    assert (np.abs(p["bias_ih_l0"][:8]) <= 8**-0.5).all()
    for block in np.split(p["weight_hh_l0"], 4):
        np.testing.assert_allclose(block.T @ block, np.eye(5), atol=1e-6)
    norm = fr.LSTM(3, 8, layer_norm=True, peephole=True, bidirectional=True, rng=0)
    shapes = {k: v.shape for k, v in norm.state_dict().items() if "_l0_reverse" in k}
    assert shapes["weight_ch_l0_reverse"] == (24,)
    assert shapes["gamma_ih_l0_reverse"] == (32,)
    assert (norm.gamma_c_l0 == 1).all()
    assert (norm.beta_c_l0 == 0).all()
    assert list(fr.LSTM(3, 8, proj_size=5).state_dict()) == [
        "weight_ih_l0",
        "weight_hh_l0",
        "bias_ih_l0",
        "bias_hh_l0",
        "weight_hr_l0",
    ]
    assert "proj_size=5" in repr(lstm)
