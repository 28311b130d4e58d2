"""The CUDA backend agrees with the reference in float64, in every precision and plan.

On a machine without a GPU these tests are skipped; tests/emulate.sh runs them on the kernels
compiled for the host, where blocks and threads are fibers that arrive in a random order.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import types
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import hypothesis
import numpy as np
import pytest
from helpers import (
    CASE_IDS,
    CASES,
    MASKS,
    Sizes,
    arguments,
    cotangents,
    masks,
    op,
    options_of,
    present,
    pulled,
    spoil_padding,
    with_options,
)
from hypothesis import strategies as st

import fusedrnn as fr
from fusedrnn import cuda, reference
from fusedrnn.cells import CELLS, Cell

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda.is_available(), reason=f"no GPU to test on: {cuda.status()}"),
]
EMULATED = cuda.status().startswith("emulator")

# The largest norm of an error against float64 on the inputs as rounded, relative to that of
# the expected array. The slope of relu jumps: where an h is rounded to 0 it is another. So
# does that of a clip.
TOLERANCE = {"float32": 2e-6, "float64": 1e-13, "tf32": 2e-3, "bfloat16": 2e-2, "float16": 3e-3}
PRECISIONS = list(TOLERANCE)
EXCHANGES = {"cluster": 0, "grid": 1, "step": 2}

# Around tiles of 8 rows and row groups of 32, groups of 8 and 16 units, blocks of depth of 32.
SHAPES = [
    Sizes(1, 1, 1, 1),
    Sizes(5, 3, 4, 7),
    Sizes(4, 13, 5, 40),
    Sizes(3, 37, 6, 70),
    Sizes(6, 9, 3, 33),
]
if not EMULATED:
    SHAPES += [Sizes(40, 16, 64, 256), Sizes(20, 100, 30, 768), Sizes(9, 65, 128, 1100)]


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _no_wish() -> Iterator[None]:
    yield
    cuda._module().wish()


def storage(precision: str) -> str:
    return "float32" if precision == "tf32" else precision


def put(values: dict[str, Any], precision: str) -> dict[str, Any]:
    """The arguments of an op on the GPU; states are at least float32."""
    state = "float64" if precision == "float64" else "float32"
    return {
        k: v
        if v is None or k in MASKS
        else cuda.array(v, state if k in ("h0", "c0") else storage(precision))
        for k, v in values.items()
    }


def got(values: dict[str, Any]) -> dict[str, Any]:
    """The values as rounded, in float64."""
    return {
        k: v.numpy().astype(np.float64) if isinstance(v, cuda.Array) else v
        for k, v in values.items()
    }


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a.numpy(), e.numpy())


def norm_error(actual: np.ndarray, expected: np.ndarray) -> float:
    difference = np.linalg.norm(actual.astype(np.float64) - expected)
    # Of what nearly cancels, as a single dx may, the error is seen beside what does.
    return float(difference / max(np.linalg.norm(expected), 0.02 * expected.size**0.5, 1e-30))


def wish(**wishes: Any) -> None:
    """Choose a plan; skip where no plan is like that."""
    exchange = wishes.pop("exchange", None)
    cuda._module().wish(exchange=-1 if exchange is None else EXCHANGES[exchange], **wishes)


def exists(cell: Cell, precision: str, sizes: Sizes) -> bool:
    """Whether there is a plan that meets the wishes, forward and backward."""
    with contextlib.suppress(RuntimeError):
        explain(cell, sizes, precision)
        explain(cell, sizes, precision, backward=True)
        return True
    return False


def explain(cell: Cell, sizes: Sizes, precision: str, backward: bool = False) -> dict[str, Any]:
    mode = "tf32" if precision == "tf32" else "exact"
    return cuda.explain(cell.name, *sizes, storage(precision), mode, backward)


def check_against_reference(
    cell: Cell,
    sizes: Sizes,
    precision: str,
    reverse: bool = False,
    bias: bool = True,
    seed: int = 0,
    mask: dict[str, np.ndarray] | None = None,
    names: list[str] | None = None,
    factor: float = 1.0,
) -> None:
    mask = mask or {}
    if names is None:
        values, asked = arguments(cell, sizes, np.float64, seed, bias), {}
    else:
        values, asked = with_options(cell, sizes, names, np.float64, seed)
        mask = {k: asked.pop(k) for k in MASKS if k in asked}
    expected_x = put(values, precision)["x"].numpy().astype(np.float64)
    spoil_padding(values["x"], mask)
    given = put(values, precision)
    rounded = got(given) | {"x": expected_x} | mask | asked
    options = {"reverse": reverse, **mask, **asked}
    mode = {"precision": "tf32" if precision == "tf32" else "exact"}
    expected, expected_pullback = op(cell, "_vjp", reference)(**rounded, reverse=reverse)
    results, pullback = op(cell, "_vjp")(**given, **options, **mode)
    of_vjp = ("bptt", "recompute")
    inference = op(cell)(
        **given, **{k: v for k, v in options.items() if k not in of_vjp}, **mode
    )

    rows = cotangents(expected, seed)
    spoilt = [r.copy() for r in rows]
    for part in [spoilt[0], *spoilt[1 + len(cell.states) :]]:
        spoil_padding(part, mask)
    kinds = ("x", "h0", "c0")[: 1 + len(cell.states)]
    weights = [as_one(k, r, precision) for k, r in zip_longest(kinds, rows, fillvalue="c0")]
    spoilt = [as_one(k, r, precision) for k, r in zip_longest(kinds, spoilt, fillvalue="c0")]
    gradients = pulled(cell, pullback, spoilt)
    wide = [w.numpy().astype(np.float64) for w in weights]
    expected_gradients = pulled(cell, expected_pullback, wide)

    tolerance = TOLERANCE[precision] * factor
    jumps = cell.reference.jumps or "clip" in asked
    if jumps and tolerance > 1e-5:
        tolerance *= 30
    if cell.name == "lstm_coupled":  # da_i is of g - c', which may nearly cancel
        tolerance *= 2
    for n, (a, b, e) in enumerate(zip(results, inference, expected, strict=True)):
        for of_a, of_b, of_e in (
            zip(a.values(), b.values(), e.values(), strict=True)
            if isinstance(e, dict)
            else [(a, b, e)]
        ):
            np.testing.assert_array_equal(of_a.numpy(), of_b.numpy(), str(n))
            assert norm_error(of_b.numpy(), of_e) <= tolerance, n
            assert norm_error(of_a.numpy(), of_e) <= tolerance, n
        if not isinstance(e, dict):
            assert a.dtype == (storage(precision) if n == 0 else given["h0"].dtype)
    assert set(gradients) == set(expected_gradients)
    for name, e in expected_gradients.items():
        assert gradients[name].shape == e.shape, name
        assert norm_error(gradients[name].numpy(), e) <= tolerance, f"d{name}"


def as_one(name: str, value: np.ndarray, precision: str) -> cuda.Array:
    return put({name: value}, precision)[name]


@pytest.mark.parametrize("sizes", [Sizes(5, 3, 4, 7), Sizes(3, 2, 5, 70)], ids=str)
def test_each_option(cell: Cell, precision: str, sizes: Sizes) -> None:
    for name in options_of(cell):
        check_against_reference(cell, sizes, precision, names=[name])


@pytest.mark.parametrize(("name", "row"), CASES, ids=CASE_IDS)
def test_options_combine(name: str, row: tuple[Any, ...]) -> None:
    *flags, reverse, dtype, sizes, _ = row
    names = [f for f in flags if f]
    check_against_reference(CELLS[name], sizes, dtype, reverse, seed=1, names=names, factor=3)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_agrees_with_reference(cell: Cell, precision: str, exchange: str, sizes: Sizes) -> None:
    wish(exchange=exchange)
    if not exists(cell, precision, sizes):
        pytest.skip(f"no plan with {exchange} for {sizes}")
    check_against_reference(cell, sizes, precision, reverse=sizes.T % 2 == 0)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_masks(cell: Cell, precision: str, kind: str, reverse: bool) -> None:
    sizes = Sizes(6, 11, 3, 20)
    check_against_reference(cell, sizes, precision, reverse, mask=masks(kind, sizes))


# Options that leave a recurrence its plan.
OF_A_UNIT = [
    "clip",
    "cell_clip",
    "peephole",
    "zoneout",
    "zoneout in inference",
    "recurrent_dropout",
    "weight_dropout",
    "return_cells",
    "trace",
    "recompute",
    "bptt",
]


@hypothesis.given(
    sizes=st.builds(
        Sizes, st.integers(1, 7), st.integers(1, 40), st.integers(1, 12), st.integers(1, 70)
    ),
    name=st.sampled_from(list(CELLS)),
    precision=st.sampled_from(PRECISIONS),
    exchange=st.sampled_from(list(EXCHANGES)),
    tiles=st.sampled_from([0, 1, 4]),
    resident=st.sampled_from([-1, 0, 1]),
    staged=st.sampled_from([-1, -1, 0, 1]),
    groups=st.sampled_from([0, 1, 2, 4]),
    splits=st.sampled_from([0, 1, 2, 4]),
    reverse=st.booleans(),
    bias=st.booleans(),
    kind=st.sampled_from([None, *MASKS]),
    options=st.one_of(st.just([]), st.lists(st.sampled_from(OF_A_UNIT), unique=True)),
)
@hypothesis.settings(max_examples=300 if EMULATED else 1000, deadline=None, derandomize=True)
def test_agrees_with_reference_on_any_plan(
    sizes: Sizes,
    name: str,
    precision: str,
    reverse: bool,
    bias: bool,
    kind: Any,
    options: list[str],
    **plan: Any,
) -> None:
    cell = CELLS[name]
    wish(**plan)
    if not exists(cell, precision, sizes):
        return
    if options:
        names = [n for n in options if n in options_of(cell)] + [kind] * (kind is not None)
        check_against_reference(cell, sizes, precision, reverse, names=names, factor=3)
    else:
        mask = {} if kind is None else masks(kind, sizes)
        check_against_reference(cell, sizes, precision, reverse, bias, 3, mask)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_integers_are_exact(precision: str, exchange: str) -> None:
    """A linear recurrence on small integers: every index and tail, without tolerance."""
    rng = np.random.default_rng(7)
    T, B, I, H = sizes = Sizes(2, 9, 3, 19)
    wish(exchange=exchange)
    assert exists(CELLS["rnn_identity"], precision, sizes)
    shapes = {"x": (T, B, I), "weight_ih": (H, I), "weight_hh": (H, H)}
    shapes |= {"bias_ih": (H,), "bias_hh": (H,), "h0": (B, H)}
    values = {k: rng.integers(-1, 2, shape).astype(np.float64) for k, shape in shapes.items()}
    mask = {"lengths": rng.integers(0, T + 1, B), "resets": rng.random((T, B)) < 0.3}
    expected, _ = reference.rnn_vjp(**values, **mask, nonlinearity="identity")
    mode = "tf32" if precision == "tf32" else "exact"
    results, _ = fr.rnn_vjp(
        **put(values, precision), **mask, nonlinearity="identity", precision=mode
    )
    for a, e in zip(results, expected, strict=True):
        np.testing.assert_array_equal(a.numpy(), e)


@pytest.mark.parametrize(
    "sizes", [Sizes(0, 3, 4, 5), Sizes(3, 0, 4, 5), Sizes(0, 0, 1, 1)], ids=str
)
def test_empty_sequences_and_batches(cell: Cell, precision: str, sizes: Sizes) -> None:
    check_against_reference(cell, sizes, precision)


def test_missing_states_and_gradients_are_zeros(cell: Cell) -> None:
    values = put(arguments(cell, Sizes(5, 4, 3, 18)), "float32")
    states = {k: v for k, v in values.items() if k in ("h0", "c0")}
    given = {k: v for k, v in values.items() if k not in states}
    zeros = {k: cuda.array(np.zeros(v.shape, np.float32)) for k, v in states.items()}
    results, pullback = op(cell, "_vjp")(**given)
    same, same_pullback = op(cell, "_vjp")(**given, **zeros)
    weights = [cuda.array(w) for w in cotangents(tuple(r.numpy() for r in results))]
    partial = [weights[0], *(None for _ in weights[1:])]
    filled = [weights[0], *(cuda.array(np.zeros(w.shape, np.float32)) for w in weights[1:])]
    assert_same_bits(
        (*results, *present(pullback(*partial))), (*same, *present(same_pullback(*filled)))
    )


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_repetitions_are_bit_identical(precision: str, exchange: str) -> None:
    """Whatever the order in which blocks and threads arrive."""
    wish(exchange=exchange, tiles=1)
    given = put(arguments(CELLS["lstm"], Sizes(5, 10, 4, 40)), precision)
    mode = "tf32" if precision == "tf32" else "exact"
    first = None
    for _ in range(3 if EMULATED else 1000):
        results, pullback = fr.lstm_vjp(**given, precision=mode)
        bits = [a.numpy().tobytes() for a in (*results, *present(pullback(*results)))]
        first = first or bits
        assert bits == first


def test_exchanges_give_the_same_bits(precision: str) -> None:
    """Over more steps than a graph holds, calls queued at once, some warps without a unit."""
    mode = {"precision": "tf32" if precision == "tf32" else "exact"}
    plain = put(arguments(CELLS["gru"], Sizes(70, 3, 2, 40)), precision)
    names = ["peephole", "clip", "zoneout", "recurrent_dropout", "return_cells"]
    sizes = Sizes(70, 3, 2, 20 if precision == "float64" else 40)  # what fits the emulator
    values, options = with_options(CELLS["lstm"], sizes, names)
    values = put(values, precision)

    def run(exchange: str) -> list[Any]:
        staged = exchange == "staged grid"
        wish(
            exchange="grid" if staged else exchange,
            staged=staged,
            tiles=1,
            groups=2 if precision == "float64" else 4,  # 4 do not fit the emulator
            splits=1,
            resident=0,
        )
        queued = [fr.gru_vjp(**plain, **mode), fr.lstm_vjp(**values, **mode, **options)]
        return [
            a for results, pullback in queued for a in (*results, *present(pullback(*results)))
        ]

    expected = run("step")
    for exchange in ("grid", "staged grid", "cluster"):
        assert_same_bits(run(exchange), expected)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_no_nan_is_taken_for_nothing(precision: str, exchange: str) -> None:
    """Blocks wait until words have not all bits set, which a state that is NaN may have."""
    wish(exchange=exchange, tiles=1)
    values = arguments(CELLS["gru"], Sizes(6, 4, 2, 20))
    values["h0"][1:3] = np.uint64(2**64 - 1).view(np.float64)
    given = put(values, precision)
    if precision != "float64":
        bits = given["h0"].numpy().view(np.uint32)
        bits[1:3] = 2**32 - 1
        given["h0"] = cuda.array(bits.view(np.float32))
    mode = "tf32" if precision == "tf32" else "exact"
    (y, h_n), pullback = fr.gru_vjp(**given, precision=mode, lengths=np.array([6, 6, 0, 2]))
    dx = pullback(y, h_n).x
    assert np.isnan(h_n.numpy()).any(axis=1).tolist() == [False, True, True, False]
    for a in (y, dx):
        is_nan = np.isnan(a.numpy().astype(np.float32)).any(axis=(0, 2))
        assert is_nan.tolist() == [False, True, False, False]


def test_unbatched_is_a_batch_of_one(cell: Cell) -> None:
    values = arguments(cell, Sizes(5, 1, 3, 18), np.float32)
    alone = {k: v[..., 0, :] if k in ("x", "h0", "c0") else v for k, v in values.items()}
    mask = {"lengths": 4, "resets": np.array([False, True, False, False, False])}
    many = {"lengths": np.array([4]), "resets": mask["resets"][:, None]}
    results, pullback = op(cell, "_vjp")(**put(values, "float32"), **many)
    single, single_pullback = op(cell, "_vjp")(**put(alone, "float32"), **mask)
    for a, b in zip(
        (*results, *present(pullback(*results))),
        (*single, *present(single_pullback(*single))),
        strict=True,
    ):
        np.testing.assert_array_equal(a.numpy().reshape(b.shape), b.numpy())


def test_strided_input_and_gradient(cell: Cell) -> None:
    """Rows in any order and distance; only the last axis must be contiguous."""
    values = arguments(cell, Sizes(5, 4, 3, 18), np.float32)
    given = put(values, "float32")
    batch_major = cuda.array(np.concatenate([values["x"].swapaxes(0, 1)] * 2, axis=-1))
    strided = given | {"x": batch_major.swapaxes(0, 1)[..., :3]}
    results, pullback = op(cell, "_vjp")(**given)
    same, same_pullback = op(cell, "_vjp")(**strided)
    dy = np.random.default_rng(2).normal(size=(5, 4, 18)).astype(np.float32)
    sideways = cuda.array(dy.swapaxes(0, 1)).swapaxes(0, 1)
    assert_same_bits(
        (*results, *present(pullback(cuda.array(dy)))),
        (*same, *present(same_pullback(sideways))),
    )


def test_masks_may_be_on_the_gpu() -> None:
    sizes = Sizes(6, 5, 3, 8)
    given = put(arguments(CELLS["gru"], sizes), "float32")
    both = masks("both", sizes)
    y, _ = fr.gru(**given, **both)
    for dtype in ("int32", "int64"):
        lengths = cuda._upload(both["lengths"].astype(dtype), dtype, 0, 0)
        resets = cuda._upload(both["resets"], "bool", 0, 0)
        same, _ = fr.gru(**given, lengths=lengths, resets=resets)
        np.testing.assert_array_equal(y.numpy(), same.numpy())


# Layers


LAYERS = [
    {},
    {"bidirectional": True},
    {"num_layers": 3, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("kind", [fr.LSTM, fr.GRU, fr.RNN])
def test_layers_agree_with_the_cpu(kind: Any, options: dict[str, Any], recompute: bool) -> None:
    layer = kind(3, 10, rng=0, **options)
    x = np.random.default_rng(1).normal(size=(5, 4, 3)).astype(np.float32)
    T, B = (4, 5) if "batch_first" in options else (5, 4)
    mask = masks("both", Sizes(T, B, 3, 10))
    mask["resets"] = mask["resets"].reshape(5, 4)
    (y, state), pullback = layer.vjp(x, None, **mask)
    gradients = pullback(y, state)
    layer.to("cuda")
    again = {"recompute": recompute}
    (y_gpu, state_gpu), pullback_gpu = layer.vjp(cuda.array(x), None, **mask, **again)
    one = not isinstance(state, tuple)
    d_state = cuda.array(state) if one else tuple(cuda.array(s) for s in state)
    gradients_gpu = pullback_gpu(cuda.array(y), d_state)
    pairs = [(y, y_gpu), (gradients.x, gradients_gpu.x)]
    for a, b in ((state, state_gpu), (gradients.state, gradients_gpu.state)):
        pairs += [(a, b)] if one else list(zip(a, b, strict=True))
    names = gradients.parameters
    pairs += [(names[name], gradients_gpu.parameters[name]) for name in names]
    for a, b in pairs:
        assert b.shape == a.shape
        assert norm_error(b.numpy(), a) < 1e-5
    if not recompute:
        y_called, _ = layer(cuda.array(x), None, **mask)
        np.testing.assert_array_equal(y_called.numpy(), y_gpu.numpy())


STREAMED = {
    "lstm": lambda: fr.LSTM(3, 10, 2, batch_first=True, rng=0),
    "gru": lambda: fr.GRU(3, 10, rng=0),
    "row by row": lambda: fr.LSTM(3, 10, proj_size=4, zoneout=0.1, layer_norm=True, rng=0),
}


@pytest.mark.parametrize("B", [None, 4])
@pytest.mark.parametrize("kind", STREAMED)
def test_streams_agree_with_the_cpu(kind: str, B: int | None) -> None:
    layer = STREAMED[kind]()
    rows = () if B is None else (B,)
    x = np.random.default_rng(1).normal(size=(6, *rows, 3)).astype(np.float32)
    on_cpu = fr.Stream(layer, B)
    on_gpu = fr.Stream(copy.deepcopy(layer).to("cuda"), B)

    def agree(steps: np.ndarray) -> None:
        for x_t in steps:
            a, b = on_cpu.step(x_t), on_gpu.step(cuda.array(x_t))
            assert b.shape == a.shape
            assert norm_error(b.numpy(), a) < 1e-5
        states = on_cpu.state, on_gpu.state
        for a, b in zip(*(s if isinstance(s, tuple) else (s,) for s in states), strict=True):
            assert isinstance(b, cuda.Array)
            assert b.shape == a.shape
            assert norm_error(b.numpy(), a) < 1e-5

    agree(x[:2])
    for stream in (on_cpu, on_gpu):
        stream.reset([0])
    agree(x[:0])
    agree(x[2:4])
    memory = io.BytesIO()
    on_gpu.save(memory)
    memory.seek(0)
    on_cpu.load(memory)
    on_gpu.state = on_gpu.state
    agree(x[4:5])
    on_gpu.state = on_cpu.state
    agree(x[5:])
    before = on_cpu.state
    with pytest.raises(ValueError, match="x must be on cuda:0 like the layer"):
        on_gpu.step(x[0])
    with pytest.raises(ValueError, match=r"x must have shape"):
        on_gpu.step(cuda.array(x[:1]))
    for stream in (on_cpu, on_gpu):
        stream.state = before
    agree(x[:1])


def test_layers_move_and_keep_their_parameters() -> None:
    layer = fr.LSTM(3, 4, rng=0)
    before = layer.state_dict()
    assert layer.to("cuda") is layer
    assert repr(layer) == "LSTM(3, 4, device=cuda:0)"
    for name, value in layer.state_dict().items():
        assert isinstance(value, cuda.Array)
        np.testing.assert_array_equal(value.numpy(), before[name])
    x = cuda.array(np.ones((2, 1, 3), np.float32))
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        np.testing.assert_array_equal(twin(x)[0].numpy(), layer(x)[0].numpy())
    layer.to("cuda", "bfloat16")
    assert repr(layer) == "LSTM(3, 4, dtype=bfloat16, device=cuda:0)"
    y, (_, c_n) = layer(cuda.array(np.ones((2, 1, 3)), "bfloat16"))
    assert (y.dtype, c_n.dtype) == ("bfloat16", "float32")
    layer.to("cpu")
    assert layer.dtype == np.float32
    assert not layer.weight_ih_l0.flags.writeable


def test_layers_take_new_parameters() -> None:
    layer = fr.GRU(3, 4, rng=0).to("cuda", precision="tf32")
    x = cuda.array(np.ones((2, 1, 3), np.float32))
    before = layer(x)[0].numpy()
    value = layer.weight_hh_l0.numpy()
    layer.weight_hh_l0 = value / 2
    halved = layer(x)[0].numpy()
    assert (halved != before).any()
    layer.weight_hh_l0 = cuda.array(value)
    np.testing.assert_array_equal(layer(x)[0].numpy(), before)
    for wrong, error, message in (
        (cuda.array(value, "bfloat16"), TypeError, "must be float32 like the layer"),
        (cuda.array(value[:2]), ValueError, "weight_hh_l0 must have shape"),
        (cuda.array(value.T.copy()).swapaxes(0, 1), ValueError, "must be contiguous"),
    ):
        with pytest.raises(error, match=message):
            layer.weight_hh_l0 = wrong
    np.testing.assert_array_equal(layer(x)[0].numpy(), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), TypeError, "device must be a string, got int"),
        (("gpu",), ValueError, 'device must be "cpu", "cuda" or "cuda:<number>"'),
        (("cuda:x",), ValueError, "got 'cuda:x'"),
        (("cuda:99",), ValueError, "device must be one of 1 GPUs"),
        (("cuda", "int8"), TypeError, "dtype must be one of float32, float64, bfloat16"),
        (("cpu", "bfloat16"), TypeError, "dtype must be one of float32, float64, got"),
        (("cuda", None, "fast"), ValueError, 'precision must be "exact" or "tf32"'),
        (("cuda", "float64", "tf32"), ValueError, '"tf32" is for float32 on a GPU'),
        (("cpu", None, "tf32"), ValueError, 'precision must be "exact" on the CPU, got "tf32"'),
    ],
)
def test_layers_refuse_places(arguments: Any, error: type[Exception], message: str) -> None:
    if "99" in str(arguments):
        message = f"device must be one of {cuda.count()} GPUs"
    layer = fr.LSTM(3, 4)
    with pytest.raises(error, match=message):
        layer.to(*arguments)
    assert layer.device == "cpu"
    assert layer(np.zeros((2, 1, 3), np.float32))[0].shape == (2, 1, 4)


def test_layers_refuse_input_from_elsewhere() -> None:
    layer = fr.LSTM(3, 4)
    x = np.zeros((2, 1, 3), np.float32)
    with pytest.raises(ValueError, match="x must be on cpu like the layer, got one on cuda:0"):
        layer(cuda.array(x))
    layer.to("cuda")
    with pytest.raises(ValueError, match="x must be on cuda:0 like the layer, got one on cpu"):
        layer(x)
    with pytest.raises(TypeError, match="h0 must be on cuda:0 like x, got ndarray on the host"):
        layer(cuda.array(x), (np.zeros((1, 1, 4), np.float32), None))
    with pytest.raises(TypeError, match="x must be float32 like the layer, got bfloat16"):
        layer(cuda.array(x, "bfloat16"))


# Errors


GOOD = {"x": (5, 2, 3), "weight_ih": (16, 3), "weight_hh": (16, 4)}


def wrong_arguments() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    def array(*shape: int, dtype: str = "float32") -> Any:
        return cuda.array(np.zeros(shape), dtype)

    def integers(values: Any, dtype: str) -> Any:
        return cuda._upload(np.array(values, dtype), dtype, 0, 0)

    sideways = array(4, 16).swapaxes(0, 1)
    return {
        "host": ({"weight_ih": np.zeros((16, 3), "f4")}, TypeError, "must be on cuda:0 like x"),
        "none": ({"weight_hh": None}, TypeError, "weight_hh must be an array, got None"),
        "dtype": ({"weight_hh": array(16, 4, dtype="float64")}, TypeError, "like x, got float"),
        "int": ({"x": integers([[[1]]], "int32")}, TypeError, "x must be one of float32,"),
        "shape": ({"weight_hh": array(16, 5)}, ValueError, "weight_hh must have shape"),
        "strides": (
            {"weight_hh": sideways},
            ValueError,
            "weight_hh must be contiguous on",
        ),
        "rows": (
            {"x": array(3, 2, 5).swapaxes(0, 2)},
            ValueError,
            "x must be contiguous al",
        ),
        "rank": ({"x": array(3)}, ValueError, "x must have shape"),
        "state": ({"h0": array(2, 4, dtype="float64")}, TypeError, "h0 must be float32 like x"),
        "half state": (
            {
                k: array(*s, dtype="bfloat16")
                for k, s in {
                    "x": (5, 2, 3),
                    "weight_ih": (16, 3),
                    "weight_hh": (16, 4),
                    "h0": (2, 4),
                }.items()
            },
            TypeError,
            "h0 must be float32 for x of bfloat16",
        ),
        "lengths": ({"lengths": [1, 9]}, ValueError, "lengths must be from 0 to T = 5, got 9"),
        "device lengths": (
            {"lengths": array(2)},
            TypeError,
            "lengths must be int32 or int64 on a GPU, got float32",
        ),
        "length of lengths": (
            {"lengths": integers([1, 2, 3], "int32")},
            ValueError,
            "lengths must have shape",
        ),
        "resets": ({"resets": integers([[1]], "int32")}, TypeError, "resets must be bool"),
        "out": ({"out": array(5, 2, 4)}, ValueError, "out must be None for arrays on a GPU"),
        "precision": ({"precision": "half"}, ValueError, 'must be "exact" or "tf32"'),
    }


@pytest.mark.parametrize("kind", wrong_arguments() if cuda.is_available() else [])
def test_wrong_arguments_are_refused(kind: str) -> None:
    values = {k: cuda.array(np.zeros(s), "float32") for k, s in GOOD.items()}
    wrong, error, message = wrong_arguments()[kind]
    with pytest.raises(error, match=message):
        fr.lstm(**(values | wrong))
    fr.lstm(**values)[0].numpy()  # nothing is lost


def test_tf32_is_for_float32() -> None:
    values = put(arguments(CELLS["lstm"], Sizes(2, 2, 3, 4)), "bfloat16")
    with pytest.raises(ValueError, match='"tf32" is for float32 on a GPU, got bfloat16'):
        fr.lstm(**values, precision="tf32")


def test_out_of_memory_leaves_the_device_usable() -> None:
    with pytest.raises(MemoryError):
        cuda._empty((1 << 44,), "float32", 0, 0)
    assert cuda.array([1.0, 2.0]).numpy().tolist() == [1.0, 2.0]


# Arrays


class OnlyDLPack:
    """Any library's array, as far as DLPack shows it."""

    def __init__(self, array: cuda.Array) -> None:
        self.array = array

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        return self.array.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class OnlyInterface:
    """Any library's array, as far as `__cuda_array_interface__` shows it."""

    def __init__(self, array: cuda.Array) -> None:
        self.array = array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.array.__cuda_array_interface__


@pytest.mark.parametrize("library", [OnlyDLPack, OnlyInterface])
def test_arrays_of_any_library(library: Any) -> None:
    given = put(arguments(CELLS["lstm"], Sizes(5, 2, 3, 6)), "float32")
    foreign = {k: library(v) for k, v in given.items()}
    results, pullback = fr.lstm_vjp(**given)
    same, same_pullback = fr.lstm_vjp(**foreign)
    gradients, same_gradients = present(pullback(*results)), present(same_pullback(*same))
    assert all(isinstance(a, cuda.Array) for a in (*same, *same_gradients))
    assert_same_bits((*results, *gradients), (*same, *same_gradients))
    del foreign, same, same_pullback
    gc.collect()


def test_a_layer_takes_arrays_of_any_library() -> None:
    layer = fr.GRU(3, 4, bidirectional=True, rng=0).to("cuda")
    x = cuda.array(np.random.default_rng(0).normal(size=(5, 2, 3)), "float32")
    (y, h_n), pullback = layer.vjp(x)
    (same_y, _), same_pullback = layer.vjp(OnlyDLPack(x))
    gradients, same = pullback(y, h_n), same_pullback(OnlyDLPack(y), OnlyDLPack(h_n))
    assert_same_bits((y, *gradients.parameters.values()), (same_y, *same.parameters.values()))


class HostTorch:
    """PyTorch on the emulator, whose memory is the host's."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.cuda = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.torch, name)

    def current_stream(self, device: int) -> Any:
        return type("Stream", (), {"cuda_stream": 0})

    def empty(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        assert device == "cuda:0"
        return self.torch.empty(shape, dtype=dtype)


@pytest.mark.skipif(not EMULATED, reason="a real GPU has test_torch_tensors")
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_torch_tensors_on_the_emulator(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    plain = cuda.framework_of
    framework = cuda._Torch(HostTorch(torch))
    monkeypatch.setattr(
        cuda, "framework_of", lambda a: framework if isinstance(a, torch.Tensor) else plain(a)
    )
    values = put(arguments(CELLS["lstm"], Sizes(5, 4, 3, 6)), dtype)
    tensors = {
        k: torch.tensor(v.numpy()).to(getattr(torch, v.dtype)) for k, v in values.items()
    }
    results, pullback = fr.lstm_vjp(**values)
    same, same_pullback = fr.lstm_vjp(**tensors)
    gradients, same_gradients = present(pullback(*results)), present(same_pullback(*same))
    for a, b in zip((*results, *gradients), (*same, *same_gradients), strict=True):
        assert isinstance(b, torch.Tensor)
        np.testing.assert_array_equal(a.numpy(), b.to(torch.float64).numpy())


TORCH_OPTIONS = [
    ("lstm", []),
    ("gru", ["lengths", "reverse"]),
    ("rnn_relu", ["resets", "bptt"]),
    ("rnn_tanh", ["zoneout in inference"]),
    ("lstm", ["zoneout", "recurrent_dropout", "weight_dropout", "peephole", "trace"]),
    ("lstm_coupled", ["clip", "recompute", "both"]),
    ("lstm", ["return_cells", "recompute"]),
    ("lstm", ["projection", "layer_norm", "cell_clip"]),
    ("gru_before", ["layer_norm", "zoneout", "lengths"]),
]


@pytest.mark.skipif(not EMULATED, reason="a real GPU runs PyTorch's own tests")
@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize(("name", "options"), TORCH_OPTIONS, ids=str)
def test_torch_operators_on_the_emulator(
    name: str, options: list[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an operator's kernels make is of the form that its fake says, and is right."""
    torch = pytest.importorskip("torch")
    from test_torch_ops import call_of

    from fusedrnn.torch import kernels, ops
    from fusedrnn.torch.call import Inputs

    plain, framework = cuda.framework_of, cuda._Torch(HostTorch(torch))
    monkeypatch.setattr(
        cuda, "framework_of", lambda a: framework if isinstance(a, torch.Tensor) else plain(a)
    )
    monkeypatch.setattr(Inputs, "is_on_gpu", property(lambda _: True))
    kernels._saved_bytes.cache_clear()
    call, exact = call_of(CELLS[name], options)
    kind = getattr(torch, dtype)
    wide = torch.float64 if dtype == "float64" else torch.float32

    def as_kind(a: Any, to: Any) -> Any:
        return a if a is None or not a.is_floating_point() else a.detach().to(to)

    given = Inputs(
        as_kind(exact.x, kind),
        as_kind(exact.h0, wide),
        as_kind(exact.c0, wide),
        [as_kind(p, kind) for p in exact.parameters],
        *exact[4:],
    )
    made = kernels.compute_forward(call, *given)
    fake = ops._fake_forward(*call.text, *given)
    form = [(tuple(a.shape), a.dtype) for a in fake]
    assert [(tuple(a.shape), a.dtype) for a in made] == form
    leaves = [a if a is None else a.double().requires_grad_() for a in given.smooth]
    expected = ops.define(call, *leaves[:3], leaves[3:], *given[4:])
    outputs = list(zip(made[:4], expected[:4], call.is_there, strict=True))
    pairs = [(a, e) for a, e, here in outputs if here]
    for a, e in pairs:
        assert norm_error(a.double().numpy(), e.detach().numpy()) <= TOLERANCE[dtype]
    torch.manual_seed(0)
    d = [torch.randn_like(a) if here else None for a, _, here in outputs]
    smooth = [n for n, a in enumerate(leaves) if a is not None]
    for wanted_of in (smooth, smooth[-1:], smooth[:1], smooth[1:-1]):
        wanted = [n in wanted_of for n in range(len(leaves))]
        read = (*d, made[0], made[3], made[5], *given)
        gradients = kernels.compute_backward(call, wanted, *read)
        fakes = ops._fake_backward(*call.text, wanted, *read)
        forms = [(tuple(a.shape), a.dtype) for a in fakes]
        assert [(tuple(a.shape), a.dtype) for a in gradients] == forms
        right = torch.autograd.grad(
            [e for _, e in pairs],
            [leaves[n] for n in wanted_of],
            [g.double() for g in d if g is not None],
            retain_graph=True,
        )
        for n, a, e in zip(wanted_of, gradients, right, strict=True):
            error = norm_error(a.double().numpy(), e.numpy())
            assert error <= 3 * TOLERANCE[dtype], n


# Streams and captures


def test_a_pullback_runs_on_the_stream_that_is_current(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not EMULATED:
        pytest.skip("streams are made up here")
    given = put(arguments(CELLS["lstm"], Sizes(5, 4, 3, 6)), "float32")
    results, pullback = fr.lstm_vjp(**given)
    expected = present(pullback(*results))
    ordered = []
    monkeypatch.setattr(cuda._module(), "order", lambda *args: ordered.append(args))
    monkeypatch.setattr(cuda._Own, "stream", lambda self, a, device: 7)
    assert_same_bits(present(pullback(*results)), expected)
    assert (0, 0, 7) in ordered


def test_another_framework_keeps_memory_of_ours() -> None:
    """Lengths from the host are, beside an x of torch's."""

    streams: list[int] = []
    memory = types.SimpleNamespace(used_on=streams.append)
    cuda._Torch(pytest.importorskip("torch")).used_on(memory, 0, 7)
    assert streams == [7]


def test_a_capture_refuses_what_it_cannot_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fr.LSTM(3, 4).to("cuda")
    x = cuda.array(np.zeros((5, 2, 3), np.float32))
    monkeypatch.setattr(cuda._module(), "is_capturing", lambda device, stream: True)
    with pytest.raises(RuntimeError, match="make that call before a graph is captured"):
        layer(x)
    monkeypatch.undo()
    layer(x)
    monkeypatch.setattr(cuda._module(), "is_capturing", lambda device, stream: True)
    layer(x)
    with pytest.raises(RuntimeError, match="lengths must be on cuda:0 while a graph"):
        layer(x, lengths=[5, 4])
    with pytest.raises(RuntimeError, match="resets must be on cuda:0 while a graph"):
        layer(x, resets=np.zeros((5, 2), bool))


@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_array_goes_there_and_back(dtype: str) -> None:
    values = np.array([[0, 1, -2.5], [1e-3, 3.1415927, 65000]])
    array = cuda.array(values, dtype)
    assert array.shape == (2, 3)
    back = array.numpy()
    relative = {"float64": 0, "float32": 6e-8, "float16": 5e-4, "bfloat16": 4e-3}[dtype]
    np.testing.assert_allclose(back, values, rtol=relative)
    np.testing.assert_array_equal(array.swapaxes(0, 1).numpy(), back.T)
    np.testing.assert_array_equal(array[:, 1:].numpy(), back[:, 1:])
    np.testing.assert_array_equal(array[1].numpy(), back[1])


def test_explain_tells_the_plan() -> None:
    told = cuda.explain("lstm", 100, 16, 64, 64, "bfloat16")
    assert told["exchange"] in EXCHANGES
    assert cuda.explain("gru_before", 100, 16, 64, 64) == cuda.ROW_WISE
    layer = fr.LSTM(8, 16, peephole=True, zoneout=0.1, clip=5.0).to("cuda")
    asked = layer.explain(100, 16, training=True, recompute=True)
    assert asked["plans"]["l0"]["exchange"] in EXCHANGES
    assert asked["way"] == "fused product and cell"
    for wrong, message in (
        (("gated", 1, 1, 1, 1), "cell must be one of lstm, lstm_coupled, gru, gru_before"),
        (("lstm", 1, 0, 1, 1), "B must be from 1 to"),
        (("lstm", 1, 1, 1, 1, "int8"), "dtype must be one of float32"),
        (("lstm", 1, 1, 1, 1, "bfloat16", "tf32"), '"tf32" is for float32 on a GPU'),
        (("lstm", 1, 1, 1, 1, "float32", "half"), 'precision must be "exact" or "tf32"'),
        (("lstm", 1, 1, 1, 1, "float32", "exact", False, 99), "device must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.explain(*wrong)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0], [1.0, 2.0]],), TypeError, "a must be an array"),
        ((["x"],), TypeError, "a must be an array of numbers"),
        (([1.0], "int8"), TypeError, "dtype must be one of float32"),
        (([1.0], "float32", "cuda"), TypeError, "device must be an integer, got str"),
        (([1.0], "float32", -1), ValueError, "device must be one of"),
    ],
)
def test_array_refuses(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cuda.array(*arguments)


# With PyTorch, on a real GPU


def torch_cuda() -> Any:
    torch = pytest.importorskip("torch")
    if EMULATED or not torch.cuda.is_available():
        pytest.skip("PyTorch has no GPU here")
    return torch


@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_torch_tensors(dtype: str) -> None:
    torch = torch_cuda()
    values = arguments(CELLS["lstm"], Sizes(9, 5, 7, 33))
    state = torch.float64 if dtype == "float64" else torch.float32
    tensors = {
        k: torch.tensor(
            v, device="cuda", dtype=state if k[1:] == "0" else getattr(torch, dtype)
        )
        for k, v in values.items()
    }
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results, pullback = fr.lstm_vjp(**tensors)
        gradients = present(pullback(*results))
    stream.synchronize()
    assert all(isinstance(a, torch.Tensor) and a.is_cuda for a in (*results, *gradients))
    expected = reference.lstm(**{k: v.double().cpu().numpy() for k, v in tensors.items()})
    for a, e in zip(results, expected, strict=True):
        assert norm_error(a.double().cpu().numpy(), e) <= TOLERANCE[dtype]


def test_cuda_graph() -> None:
    torch = torch_cuda()
    values = arguments(CELLS["gru"], Sizes(9, 5, 7, 33), np.float32)
    tensors = {k: torch.tensor(v, device="cuda") for k, v in values.items()}

    def train() -> Any:
        results, pullback = fr.gru_vjp(**tensors)
        return (*results, *present(pullback(*results)))

    expected = [a.clone() for a in train()]
    train()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train()
    for a in captured:
        a.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, e in zip(captured, expected, strict=True):
        assert torch.equal(a, e)


LAYERS = {
    "lstm": lambda: fr.LSTM(
        4,
        9,
        num_layers=2,
        dropout=0.4,
        bidirectional=True,
        proj_size=5,
        peephole=True,
        layer_norm=True,
        zoneout=(0.1, 0.3),
        recurrent_dropout=0.2,
        weight_dropout=0.2,
        dtype=np.float64,
        rng=1,
    ),
    "coupled": lambda: fr.LSTM(
        4,
        9,
        coupled_gates=True,
        peephole=True,
        clip=1.0,
        cell_clip=0.7,
        dtype=np.float64,
        rng=1,
    ),
    "gru": lambda: fr.GRU(
        4,
        9,
        num_layers=2,
        dropout=0.3,
        reset_after=False,
        layer_norm=True,
        zoneout=0.2,
        dtype=np.float64,
        rng=1,
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_with_options_is_the_same_on_both(kind: str) -> None:
    """The same seed gives the same masks, and all else is the same to rounding."""
    layer = LAYERS[kind]()
    there = copy.deepcopy(layer).to("cuda")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3, 4))
    asked: dict[str, Any] = {"lengths": [6, 0, 4], "seed": 9, "trace": True, "bptt": 2}
    has_c = kind != "gru"
    if has_c:
        asked["return_cells"] = True
    (y, _, *more), pullback = layer.vjp(x, **asked)
    (y_there, _, *more_there), pullback_there = there.vjp(cuda.array(x), **asked)
    assert norm_error(y_there.numpy(), y) <= 1e-12
    assert list(more[-1]) == list(more_there[-1])
    for name, gate in more[-1].items():
        assert norm_error(more_there[-1][name].numpy(), gate) <= 1e-12, name
    d = {"dy": rng.normal(size=y.shape)}
    if has_c:
        d["d_cells"] = rng.normal(size=more[0].shape)
    expected = pullback(**d)
    gradients = pullback_there(**{k: cuda.array(v) for k, v in d.items()})
    assert norm_error(gradients.x.numpy(), expected.x) <= 1e-12
    assert list(gradients.parameters) == list(expected.parameters)
    for name, e in expected.parameters.items():
        assert norm_error(gradients.parameters[name].numpy(), e) <= 1e-11, name
