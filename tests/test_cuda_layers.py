"""Layers on a GPU, wrong arguments, arrays of any framework, streams and captures."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu import (
    EMULATED,
    EXCHANGES,
    GPU,
    assert_same_bits,
    put,
)
from helpers import (
    Sizes,
    arguments,
    assert_close,
    masks,
    present,
)

import fusedrnn as fr
from fusedrnn import cuda
from fusedrnn.cells import CELLS

pytestmark = GPU


@pytest.fixture(autouse=True)
def _default_plan() -> Iterator[None]:
    yield
    cuda._module().wish()


# Layers


LAYERS = [
    {},
    {"bidirectional": True},
    {"num_layers": 3, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("output", ["zero", "last"])
@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("kind", [fr.LSTM, fr.GRU])
def test_masked_layers(kind: Any, options: dict[str, Any], output: Any) -> None:
    """A masked call agrees with that on the CPU, with gates and every c, and has the bits of a
    call with lengths whose rows have no gaps.
    """
    layer = kind(3, 10, rng=0, **options)
    rng, B = np.random.default_rng(1), 4
    mask = masks("mask", Sizes(6, B, 3, 10))["mask"]
    mask[:, 0], x = True, rng.normal(size=(6, B, 3)).astype(np.float32)
    given = {"mask": mask, "resets": rng.random((6, B)) < 0.2}
    if layer.batch_first:
        x, given = x.swapaxes(0, 1).copy(), {k: v.T.copy() for k, v in given.items()}
    n = layer.num_layers * (1 + layer.bidirectional)
    h0 = rng.normal(size=(n, B, 10)).astype(np.float32)
    asked = {"trace": True} | ({"return_cells": True} if kind is fr.LSTM else {})
    state = (h0, h0 / 2) if kind is fr.LSTM else h0

    def run(put: Any) -> list[np.ndarray]:
        placed = tuple(map(put, state)) if kind is fr.LSTM else put(state)
        arrays = {"masked_output": output} | given
        results, pullback = layer.vjp(put(x), placed, **arrays, **asked)
        y, end, *others = results
        gates = others.pop()
        d_cells = [put(np.ones_like(c)) for c in map(np.asarray, map(on_host, others))]
        grads = pullback(y, end, *d_cells)
        flat = [y, grads.x, *others, *gates.values(), *grads.parameters.values()]
        for s in (end, grads.state):
            flat += s if isinstance(s, tuple) else [s]
        return [on_host(a) for a in flat]

    expected = run(lambda a: a)
    layer.to("cuda")
    found = run(cuda.array)
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e, "float32 on both")
    y, _ = layer(cuda.array(x), None, **given)
    time = int(layer.batch_first)
    order = np.argsort(~given["mask"], axis=time, kind="stable")  # the steps of a row first

    def compact(a: np.ndarray) -> np.ndarray:
        return np.take_along_axis(a, order.reshape(*order.shape, *[1] * (a.ndim - 2)), time)

    rows = cuda.array(compact(x)), None, mask.sum(0), compact(given["resets"])
    np.testing.assert_array_equal(compact(y.numpy()), layer(*rows)[0].numpy())


def on_host(a: Any) -> np.ndarray:
    return a.numpy() if hasattr(a, "numpy") else np.asarray(a)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("kind", [fr.LSTM, fr.GRU, fr.RNN])
def test_layers_agree_with_the_cpu(kind: Any, options: dict[str, Any], recompute: bool) -> None:
    """A layer moved to the GPU agrees with itself on the CPU, forward and backward."""
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
        assert_close(b, a, "float32 on both")
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
    """A stream on the GPU agrees with one on the CPU, and each loads the other's state."""
    layer = STREAMED[kind]()
    rows = () if B is None else (B,)
    x = np.random.default_rng(1).normal(size=(6, *rows, 3)).astype(np.float32)
    on_cpu = fr.Stream(layer, B)
    on_gpu = fr.Stream(copy.deepcopy(layer).to("cuda"), B)

    def agree(steps: np.ndarray) -> None:
        for x_t in steps:
            a, b = on_cpu.step(x_t), on_gpu.step(cuda.array(x_t))
            assert_close(b, a, "float32 on both")
        states = on_cpu.state, on_gpu.state
        for a, b in zip(*(s if isinstance(s, tuple) else (s,) for s in states), strict=True):
            assert isinstance(b, cuda.Array)
            assert_close(b, a, "float32 on both")

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
    """A layer moves between devices and dtypes, is pickled and copied, and keeps its
    parameters.
    """
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
    assert layer.dtype == "bfloat16"
    layer.to("cuda", "float16").to("cpu")
    assert layer.dtype == np.float32
    assert not layer.weight_ih_l0.flags.writeable


def test_layers_take_new_parameters() -> None:
    """A parameter that is assigned counts in the next call; a wrong one is refused."""
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
        (("cuda:99",), ValueError, "device must be from 0 to 0"),
        (("cuda", "int8"), TypeError, "dtype must be one of float32, float64, bfloat16"),
        (("cpu", "float16"), TypeError, "dtype must be one of float32, float64, bfloat16, got"),
        (("cuda", None, "fast"), ValueError, 'precision must be "exact" or "tf32"'),
        (("cuda", "float64", "tf32"), ValueError, 'precision must be "exact" for'),
        (("cpu", None, "tf32"), ValueError, 'precision must be "exact" on the CPU, got "tf32"'),
    ],
)
def test_layers_refuse_places(arguments: Any, error: type[Exception], message: str) -> None:
    """A layer refuses a device, dtype or precision that it cannot have, and stays where it
    is.
    """
    if "99" in str(arguments):
        message = f"device must be from 0 to {cuda.count() - 1}"
    layer = fr.LSTM(3, 4)
    with pytest.raises(error, match=message):
        layer.to(*arguments)
    assert layer.device == "cpu"
    assert layer(np.zeros((2, 1, 3), np.float32))[0].shape == (2, 1, 4)


def test_layers_refuse_input_from_elsewhere() -> None:
    """A layer refuses arrays that are on another device or of another dtype."""
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
    """A wrong argument is named, and the next call works."""
    values = {k: cuda.array(np.zeros(s), "float32") for k, s in GOOD.items()}
    wrong, error, message = wrong_arguments()[kind]
    with pytest.raises(error, match=message):
        fr.lstm(**(values | wrong))
    fr.lstm(**values)[0].numpy()  # nothing is lost


def test_tf32_is_for_float32() -> None:
    """Only float32 can be multiplied as tf32."""
    values = put(arguments(CELLS["lstm"], Sizes(2, 2, 3, 4)), "bfloat16")
    with pytest.raises(ValueError, match='precision must be "exact" for bfloat16, got "tf32"'):
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
    """Arrays of any library with DLPack or CUDA's array interface give the same bits."""
    on_gpu = put(arguments(CELLS["lstm"], Sizes(5, 2, 3, 6)), "float32")
    foreign = {k: library(v) for k, v in on_gpu.items()}
    results, pullback = fr.lstm_vjp(**on_gpu)
    same, same_pullback = fr.lstm_vjp(**foreign)
    gradients, same_gradients = present(pullback(*results)), present(same_pullback(*same))
    assert all(isinstance(a, cuda.Array) for a in (*same, *same_gradients))
    assert_same_bits((*results, *gradients), (*same, *same_gradients))
    del foreign, same, same_pullback
    gc.collect()


def test_a_layer_takes_arrays_of_any_library() -> None:
    """A layer takes x and gradients by DLPack, too."""
    layer = fr.GRU(3, 4, bidirectional=True, rng=0).to("cuda")
    x = cuda.array(np.random.default_rng(0).normal(size=(5, 2, 3)), "float32")
    (y, h_n), pullback = layer.vjp(x)
    (same_y, _), same_pullback = layer.vjp(OnlyDLPack(x))
    gradients, same = pullback(y, h_n), same_pullback(OnlyDLPack(y), OnlyDLPack(h_n))
    assert_same_bits((y, *gradients.parameters.values()), (same_y, *same.parameters.values()))


# Streams and captures


def test_a_pullback_runs_on_the_stream_that_is_current(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pullback runs on the stream that is current when it is called."""
    if not EMULATED:
        pytest.skip("streams are made up here")
    on_gpu = put(arguments(CELLS["lstm"], Sizes(5, 4, 3, 6)), "float32")
    results, pullback = fr.lstm_vjp(**on_gpu)
    expected = present(pullback(*results))
    ordered = []
    monkeypatch.setattr(cuda._module(), "order", lambda *args: ordered.append(args))
    monkeypatch.setattr(cuda._Own, "stream", lambda self, a, device: 7)
    assert_same_bits(present(pullback(*results)), expected)
    assert (0, 0, 7) in ordered


def test_another_framework_keeps_memory_of_ours() -> None:
    """Memory of ours beside an x of torch's, as lengths from the host, is recorded on its
    stream.
    """

    streams: list[int] = []
    memory = types.SimpleNamespace(used_on=streams.append)
    cuda._Torch(pytest.importorskip("torch")).used_on(memory, 0, 7)
    assert streams == [7]


def test_a_capture_refuses_what_it_cannot_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's capture refuses a first call, and masks that are on the host."""
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
    """Values come back from the GPU as rounded to their dtype, and slices with them."""
    values = np.array([[0, 1, -2.5], [1e-3, 3.1415927, 65000]])
    array = cuda.array(values, dtype)
    assert array.shape == (2, 3)
    back = array.numpy()
    bits = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}[dtype]
    relative = 0 if dtype == "float64" else 2.0**-bits  # to the nearest number of that format
    np.testing.assert_allclose(back, values, rtol=relative)
    np.testing.assert_array_equal(array.swapaxes(0, 1).numpy(), back.T)
    np.testing.assert_array_equal(array[:, 1:].numpy(), back[:, 1:])
    np.testing.assert_array_equal(array[1].numpy(), back[1])


def test_explain_tells_the_plan() -> None:
    """explain says how a call is laid out, and refuses what cannot be called."""
    plan = cuda.explain("lstm", 100, 16, 64, 64, "bfloat16")
    assert plan["exchange"] in EXCHANGES
    assert cuda.explain("gru_before", 100, 16, 64, 64) == cuda.ROW_WISE
    layer = fr.LSTM(8, 16, peephole=True, zoneout=0.1, clip=5.0).to("cuda")
    summary = layer.explain(100, 16, training=True, recompute=True)
    assert summary["plans"]["l0"]["exchange"] in EXCHANGES
    assert summary["way"] == "plain kernels"
    for wrong, message in (
        (("gated", 1, 1, 1, 1), "cell must be one of lstm, lstm_coupled, gru, gru_before"),
        (("lstm", 1, 0, 1, 1), "B must be from 1 to"),
        (("lstm", 1, 1, 1, 1, "int8"), "dtype must be one of float32"),
        (("lstm", 1, 1, 1, 1, "bfloat16", "tf32"), 'precision must be "exact" for'),
        (("lstm", 1, 1, 1, 1, "float32", "half"), 'precision must be "exact" or "tf32"'),
        (("lstm", 1, 1, 1, 1, "float32", "exact", False, 99), "device must be from 0 to"),
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
        (([1.0], "float32", -1), ValueError, "device must be from 0 to"),
    ],
)
def test_array_refuses(arguments: Any, error: type[Exception], message: str) -> None:
    """cuda.array refuses what is no array of numbers, an unknown dtype and an absent device."""
    with pytest.raises(error, match=message):
        cuda.array(*arguments)
