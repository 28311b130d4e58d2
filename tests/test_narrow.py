"""Weights of 8 and 16 bits: the definition, exactness, storage, errors."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
from helpers import Sizes, assert_close

import fusedrnn as fr
from fusedrnn import _cpu, reference
from fusedrnn.weights import PRECISIONS

# Every cell and option that inference has, the options alone and together.
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LSTM": (fr.LSTM, {}),
    "GRU": (fr.GRU, {}),
    "GRU before": (fr.GRU, {"reset_after": False}),
    "RNN": (fr.RNN, {}),
    "relu": (fr.RNN, {"nonlinearity": "relu"}),
    "no bias": (fr.GRU, {"bias": False}),
    "projection": (fr.LSTM, {"proj_size": 5}),
    "peephole": (fr.LSTM, {"peephole": True}),
    "coupled": (fr.LSTM, {"coupled_gates": True}),
    "clips": (fr.LSTM, {"clip": 0.8, "cell_clip": 0.4}),
    "zoneout": (fr.LSTM, {"zoneout": (0.2, 0.1)}),
    "LayerNorm": (fr.LSTM, {"layer_norm": True}),
    "LayerNorm before": (fr.GRU, {"layer_norm": True, "reset_after": False}),
    "together": (
        fr.LSTM,
        {
            "proj_size": 7,
            "peephole": True,
            "coupled_gates": True,
            "clip": 1.5,
            "layer_norm": True,
            "zoneout": 0.1,
        },
    ),
}
SHAPES = [Sizes(4, 1, 3, 9), Sizes(3, 5, 33, 70), Sizes(2, 40, 17, 100)]


def layer_of(name: str, sizes: Sizes, seed: int = 0, **more: Any) -> Any:
    """A layer with parameters of any size."""
    kind, arguments = LAYERS[name]
    layer = kind(sizes.I, sizes.H, rng=seed, **arguments, **more)
    rng = np.random.default_rng([seed, *sizes])
    layer.load_state_dict(
        {
            k: v * rng.uniform(0.2, 3, v.shape[:1] + (1,) * (v.ndim - 1)).astype(np.float32)
            for k, v in layer.state_dict().items()
        }
    )
    return layer


def input_of(sizes: Sizes, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng([7, seed, *sizes]).normal(size=sizes[:3])
    return x.astype(np.float32)


def state_of(layer: Any, B: int, scale: float = 1.0) -> Any:
    rng = np.random.default_rng(B)
    R, H = layer._width, layer.hidden_size
    count = layer.num_layers * (1 + layer.bidirectional)
    h = (scale * rng.normal(size=(count, B, R))).astype(np.float32)
    c = rng.normal(size=(count, B, H)).astype(np.float32)
    return (h, c) if isinstance(layer, fr.LSTM) else h


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_against_the_reference(
    name: str, precision: Any, sizes: Sizes, isa_with_units: str
) -> None:
    """Each step equals the reference's from the kernel's own state.

    A last bit of h' may flip a quantum, so errors of several steps have no bound.
    """
    layer = layer_of(name, sizes).quantize(precision)
    x, start = input_of(sizes), state_of(layer, sizes.B, 1.3)
    is_lstm = isinstance(layer, fr.LSTM)
    y, _, *cells = layer(x, start, return_cells=is_lstm)
    states = [(y, start[0] if is_lstm else start)]
    if is_lstm:
        states.append((cells[0], start[1]))
    before = [np.concatenate([first, every[:-1]]).astype(np.float64) for every, first in states]
    rows = sizes.T * sizes.B
    (parameters,) = layer._all_parameters()
    step = reference.run(
        layer._cell.reference,
        x.reshape(1, rows, -1).astype(np.float64),
        parameters,
        [s.reshape(rows, -1) for s in before],
        options=layer._options,
    )
    y = y.reshape(1, rows, -1)
    if layer.proj_size or layer._cell.resets_before:
        # A second product within the step rounds what the step has computed.
        error = np.abs(y - step.y)
        assert error.max() < 4e-3
        assert np.quantile(error, 0.9) < 5e-6
    else:
        assert_close(y, step.y.astype(np.float32), "float32", "y")
    if is_lstm:
        assert_close(cells[0].reshape(1, rows, -1), step.cells.astype(np.float32), "float32")


@pytest.mark.parametrize("x_bits", [8, 16])
def test_sums_of_int8_are_exact(isa_with_units: str, x_bits: int) -> None:
    """Results are exact for any instruction set if every scale is a power of 2."""
    B, I, H = 9, 200, 77
    rng = np.random.default_rng(3)
    W, R = (rng.integers(-127, 128, (H, n)) for n in (I, H))
    W[:, 0] = R[:, 0] = 127
    x, h = rng.integers(-127, 128, (1, B, I)), rng.integers(-127, 128, (1, B, H))
    x[..., 1] = h[..., 1] = -127
    layer = fr.RNN(I, H, nonlinearity="identity", bias=False)
    layer.weight_ih_l0, layer.weight_hh_l0 = (m.astype(np.float32) for m in (W, R))
    y, _ = layer.quantize("int8", x_bits)(x.astype(np.float32), h.astype(np.float32))
    np.testing.assert_array_equal(y[0], x[0] @ W.T + h[0] @ R.T)


def test_int8_does_not_depend_on_the_instruction_set() -> None:
    """Rows with ordinary scales have nearly the same results for every instruction set."""
    sizes = Sizes(1, 20, 90, 50)
    layer, x, results = layer_of("RNN", sizes).quantize("int8"), input_of(sizes), []
    for isa in (name for name, here in _cpu.isas().items() if here):
        fr.set_isa(isa)
        layer.load_state_dict(layer.state_dict())  # packs again
        results.append(layer(x)[0])
    fr.set_isa(None)
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=3e-7)


EXACT = ["LSTM", "GRU", "GRU before", "RNN", "projection", "together"]
LARGE = Sizes(2, 40, 40, 450)  # whose rows threads convert together


@pytest.mark.parametrize(
    "sizes", [Sizes(9, 1, 96, 160), Sizes(7, 13, 33, 100), Sizes(5, 70, 20, 48), LARGE], ids=str
)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", EXACT)
def test_exactness(name: str, precision: Any, sizes: Sizes, isa_with_units: str) -> None:
    """Threads, neighbours in the batch and chunks change no bit."""
    if isa_with_units == "portable" and sizes == LARGE:
        pytest.skip("slow, and the time loop is that of the other instruction sets")
    layer = layer_of(name, sizes, num_layers=2, bidirectional=True).quantize(precision)
    one_way = layer_of(name, sizes).quantize(precision)
    x, T, B = input_of(sizes), sizes.T, sizes.B
    results = []
    for threads in (1, 2, 5):
        fr.set_num_threads(threads)
        results.append(layer(x, state_of(layer, B))[0])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])

    def rows(state: Any, some: slice) -> Any:
        if isinstance(state, tuple):
            return tuple(s[:, some] for s in state)
        return state[:, some]

    for some in (slice(0, 1), slice(B // 3, B // 3 + 5)):
        alone, _ = layer(x[:, some], rows(state_of(layer, B), some))
        np.testing.assert_array_equal(alone, results[0][:, some])
    whole, end = one_way(x, state_of(one_way, B))
    parts, state = [], state_of(one_way, B)
    for part in (x[:1], x[1 : T // 2 + 1], x[T // 2 + 1 :]):
        if len(part):
            y, state = one_way(part, state)
            parts.append(y)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    for a, b in zip(state, end, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", EXACT)
def test_masks(name: str, precision: Any, isa_with_units: str) -> None:
    """A short row equals itself alone, and a reset starts from zeros."""
    sizes = Sizes(6, 7, 12, 30)
    layer = layer_of(name, sizes, bidirectional=True).quantize(precision)
    x, lengths = input_of(sizes), np.array([6, 0, 3, 5, 1, 6, 2])
    resets = np.random.default_rng(0).random((6, 7)) < 0.3
    y, _ = layer(x, lengths=lengths, resets=resets, trace=True)[:2]
    for b, n in enumerate(lengths):
        alone, _ = layer(x[:n, b], resets=resets[:n, b])
        np.testing.assert_array_equal(y[:n, b], alone)
        assert not y[n:, b].any()
    taken = np.random.default_rng(1).random((6, 7)) < 0.6
    y, _ = layer(x, mask=taken)
    for b, steps in enumerate(taken.T):
        np.testing.assert_array_equal(y[steps, b], layer(x[steps, b])[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_that_are_not_finite(precision: Any, isa_with_units: str) -> None:
    """A NaN or an infinity in x makes that row NaN from then on, and no other."""
    sizes = Sizes(4, 6, 20, 40)
    layer = layer_of("GRU", sizes).quantize(precision)
    clean, x = input_of(sizes), input_of(sizes)
    x[1, 2, 5], x[2, 4, 19] = np.nan, np.nan
    expected, y = layer(clean)[0], layer(x)[0]
    wrong = np.zeros((4, 6), bool)
    wrong[1:, 2] = wrong[2:, 4] = True
    assert np.isnan(y[wrong]).all()
    np.testing.assert_array_equal(y[~wrong], expected[~wrong])
    if precision == "int8":
        x = input_of(sizes)
        x[0, 3, 0] = np.inf
        y = layer(x)[0]
        assert np.isnan(y[:, 3]).all()
        np.testing.assert_array_equal(y[:, :3], expected[:, :3])


def test_quantised_rows_add_up() -> None:
    """Two operands have an error of at most half a part of a quantum."""
    x = input_of(Sizes(4, 6, 50, 1))
    (q, s), (r, t) = reference.narrow.quantised(x, 2)
    quantum = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(q * s - x) <= quantum * 0.501).all()
    assert (np.abs(q * s + r * t - x) <= quantum / 254 * 0.501 + 1e-7).all()
    assert np.abs(q).max() <= 127
    assert np.abs(r).max() <= 127


@pytest.mark.parametrize("precision", PRECISIONS)
def test_storage(precision: Any) -> None:
    """state_dict, npz and pickle keep a layer; its arrays have the narrow dtype."""
    sizes = Sizes(3, 2, 7, 11)
    source = layer_of("projection", sizes, num_layers=2, bidirectional=True)
    layer = source.quantize(precision)
    x = input_of(sizes)
    expected = layer(x)[0]
    file = io.BytesIO()
    np.savez(file, **layer.state_dict())
    file.seek(0)
    other = fr.LSTM(7, 11, 2, bidirectional=True, proj_size=5).quantize(precision)
    other.load_state_dict(np.load(file))
    for same in (other, pickle.loads(pickle.dumps(layer)), layer.to("cpu")):
        np.testing.assert_array_equal(same(x)[0], expected)
        assert repr(same) == repr(layer)
    assert layer.weight_hh_l1_reverse.dtype == {"int8": np.int8, "bfloat16": np.uint16}.get(
        precision, np.float16
    )
    assert hasattr(layer, "scale_hr_l0") == (precision == "int8")
    assert f"weights={precision}" in repr(layer)
    np.testing.assert_array_equal(source(x)[0], source(x)[0])
    assert source.weights is None


@pytest.mark.parametrize("precision", [None, *PRECISIONS])
@pytest.mark.parametrize("name", ["LSTM", "GRU before", "RNN", "together"])
def test_weights_of_ops(name: str, precision: Any) -> None:
    """Ops that take `Weights` equal a layer."""
    sizes = Sizes(5, 3, 6, 20)
    layer = layer_of(name, sizes)
    p = {k: v for k, v in layer._all_parameters()[0]._asdict().items() if v is not None}
    weights = fr.Weights(**p, weights=precision)
    narrow = layer.quantize(precision) if precision else layer
    options = {k: v for k, v in LAYERS[name][1].items() if k not in ("proj_size", "peephole")}
    options.pop("layer_norm", None)
    op, x = getattr(fr, layer._cell.op), input_of(sizes)
    for _ in range(2):
        y, *_ = op(x, weights, **options)
        expected, _ = narrow(x)
        np.testing.assert_array_equal(y, expected)
    backward, _ = op(x[::-1], weights, reverse=True, **options)[:2]
    np.testing.assert_array_equal(backward[::-1], expected)
    stream = fr.Stream(narrow, batch_size=3)
    np.testing.assert_array_equal(np.stack([stream.step(part) for part in x]), expected)
    assert repr(weights).startswith("Weights(weight_ih (")
    again, *_ = op(x, pickle.loads(pickle.dumps(weights)), **options)
    np.testing.assert_array_equal(again, expected)


def test_weights_keep_gradients_of_floats() -> None:
    """Float `Weights` have a pullback."""
    sizes = Sizes(5, 3, 6, 20)
    layer = layer_of("LSTM", sizes)
    p = layer._all_parameters()[0]
    (y, *_), pullback = fr.lstm_vjp(input_of(sizes), fr.Weights(*p[:4]))
    (again, *_), other = fr.lstm_vjp(input_of(sizes), *p[:4])
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(pullback(y).weight_hh, other(y).weight_hh)


def test_bfloat16_of_another_package() -> None:
    """Arrays of ml_dtypes.bfloat16 are taken as weights."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    layer = fr.GRU(3, 5, rng=0)
    bits = reference.narrow.to_bfloat16(layer.weight_hh_l0)
    theirs = layer.weight_hh_l0.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(theirs.view(np.uint16), bits)
    narrow = layer.quantize("bfloat16")
    narrow.weight_hh_l0 = theirs
    np.testing.assert_array_equal(narrow.weight_hh_l0, bits)


def test_explain() -> None:
    """An explanation names precision, unit, bytes and floor."""
    layer = fr.LSTM(40, 64, rng=0)
    narrow = layer.quantize("int8")
    found = narrow.explain(10, 2)
    assert found["weights"] == "int8, x of 16 bits"
    assert found["plans"]["l0"]["unit"]
    assert found["weight_bytes"] < layer.explain(10, 2)["weight_bytes"] / 3
    assert 0 < found["floor"] < 1
    assert "int8" in str(found)


def test_errors() -> None:
    """Wrong calls name the argument, what was expected and what came."""
    layer = fr.LSTM(3, 4, rng=0)
    x = np.zeros((2, 1, 3), np.float32)

    def fails(kind: type[Exception], message: str, call: Any) -> None:
        with pytest.raises(kind, match=message):
            call()

    fails(
        ValueError,
        'weights must be one of "int8", "bfloat16", "float16", got \'int4\'',
        lambda: layer.quantize("int4"),
    )
    fails(ValueError, "x_bits must be None with .float16", lambda: layer.quantize("float16", 8))
    fails(ValueError, "x_bits must be 8 or 16, got 12", lambda: layer.quantize("int8", 12))
    narrow = layer.quantize("int8")
    fails(ValueError, "vjp needs float32 or float64 weights", lambda: narrow.vjp(x))
    fails(ValueError, "training=True needs float32", lambda: narrow(x, training=True))
    fails(ValueError, "already has int8 weights", lambda: narrow.quantize("int8"))
    fails(ValueError, "must stay on the CPU in float32", lambda: narrow.to("cpu", "float64"))
    fails(
        TypeError,
        "x must be float32 like the layer, got float64",
        lambda: narrow(x.astype(np.float64)),
    )
    double = fr.LSTM(3, 4, dtype=np.float64)
    fails(TypeError, "must be float32, got float64", lambda: double.quantize("int8"))
    for value in (np.nan, np.inf):
        wrong = fr.LSTM(3, 4, rng=0)
        weight = wrong.weight_hh_l0.copy()
        weight[2, 1] = value
        wrong.weight_hh_l0 = weight
        for precision in PRECISIONS:
            fails(
                ValueError,
                f"weight_hh_l0 must be finite, got {value}",
                lambda w=wrong, p=precision: w.quantize(p),
            )
    weight[2, 1] = 1e6
    wrong.weight_hh_l0 = weight
    fails(
        ValueError,
        "weight_hh_l0 must be within the range of float16, got 1000000",
        lambda: wrong.quantize("float16"),
    )
    scale = narrow.scale_hh_l0.copy()
    scale[1] = np.nan
    fails(
        ValueError, "scale_hh_l0 must be finite", lambda: setattr(narrow, "scale_hh_l0", scale)
    )
    fails(
        ValueError,
        "scale_hh_l0 must not be negative",
        lambda: setattr(narrow, "scale_hh_l0", -np.abs(narrow.scale_hh_l0)),
    )
    fails(
        TypeError,
        "weight_hh_l0 must be int8 like the layer's, got float32",
        lambda: setattr(narrow, "weight_hh_l0", layer.weight_hh_l0),
    )
    fails(KeyError, "missing", lambda: narrow.load_state_dict(layer.state_dict()))
    weights = fr.Weights(layer.weight_ih_l0, layer.weight_hh_l0, weights="int8")
    fails(ValueError, "gradients need float32", lambda: fr.lstm_vjp(x, weights))
    fails(
        ValueError,
        "training must be False with int8 weights",
        lambda: fr.lstm(x, weights, training=True, weight_dropout=0.5),
    )
    for dtype in (np.float16, np.uint16, np.int8):
        W, R = (layer.state_dict()[f"weight_{n}_l0"].astype(dtype) for n in ("ih", "hh"))
        fails(
            TypeError,
            f"weight_ih must be float32 like x, got {np.dtype(dtype)}",
            lambda W=W, R=R: fr.lstm(x, W, R),
        )
    fails(
        TypeError,
        "weight_hh must be None with Weights",
        lambda: fr.lstm(x, weights, layer.weight_hh_l0),
    )
    fails(
        TypeError,
        "x must be float32 with int8 weights, got float64",
        lambda: fr.lstm(x.astype(np.float64), weights),
    )
    fails(ValueError, r"weight_ih must have shape \(3\*H, I\)", lambda: fr.gru(x, weights))
    fails(TypeError, "no argument 'beta'", lambda: fr.Weights(scale, scale, beta=scale))
