"""Models of ONNX: reading their nodes, writing layers, exporting modules; onnxruntime is the
oracle.
"""

from __future__ import annotations

import doctest
import importlib
import itertools
import random as random_module
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_close

import fusedrnn as fr
from fusedrnn import cli

onnx = pytest.importorskip("onnx", reason="the models are of ONNX")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is the oracle")

import fusedrnn.onnx as fo  # noqa: E402

I, H = 3, 5
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
helper = onnx.helper


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def session_of(model: Any) -> Any:
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


# Writing


def as_list(results: tuple[Any, Any]) -> list[np.ndarray]:
    """Return y and the states of a call as one list."""
    y, state = results
    return [y, *state] if isinstance(state, tuple) else [y, state]


FORMS: list[dict[str, Any]] = [
    {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    for num_layers, bidirectional, batch_first in itertools.product(
        (1, 2), (False, True), (False, True)
    )
]


@pytest.mark.parametrize("opset", [14, 17, 22])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", [fr.LSTM, fr.GRU, fr.RNN])
def test_export(kind: Any, form: dict[str, Any], opset: int, tmp_path: Path) -> None:
    """A layer's model computes the same in onnxruntime, for any T and B, with states and
    lengths, and reading it back gives the layers.
    """
    layer = kind(I, H, **form, rng=0)
    path = tmp_path / "layer.onnx"
    fo.export(layer, path, opset, lengths=True)
    onnx.checker.check_model(path, full_check=True)
    session = session_of(path)
    count = layer.num_layers * (1 + layer.bidirectional)
    for T, B in ((6, 4), (1, 1), (3, 2)):
        x = random(*(B, T, I) if layer.batch_first else (T, B, I))
        states = [random(count, B, H, seed=n) for n in range(2 if kind is fr.LSTM else 1)]
        lengths = np.array([max(1, T - 2 * b) for b in range(B)], np.int32)
        feeds = dict(zip(("h0", "c0"), states, strict=False))
        results = session.run(None, {"x": x, "lengths": lengths, **feeds})
        state = tuple(states) if len(states) > 1 else states[0]
        expected = as_list(layer(x, state, lengths=lengths))
        assert_close(results, expected, "onnxruntime")
    found = fo.layers(path)
    assert not found.refused
    assert len(found.layers) == layer.num_layers
    x = random(6, 4, I)
    y = x
    for one in found.layers.values():
        y = one(y)[0]
    expected_y = layer(x.swapaxes(0, 1))[0].swapaxes(0, 1) if layer.batch_first else layer(x)[0]
    np.testing.assert_array_equal(y, expected_y)


OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    (fr.LSTM, {"peephole": True, "clip": 0.5}),
    (fr.LSTM, {"coupled_gates": True, "peephole": True, "bias": False}),
    (fr.LSTM, {"activation": "softsign", "recurrent_activation": ("hard_sigmoid", 0.3, 0.4)}),
    (fr.LSTM, {"num_layers": 2, "dropout": 0.5, "reverse": True}),
    (fr.GRU, {"reset_after": False, "bidirectional": True}),
    (fr.GRU, {"activation": ("leaky_relu", 0.2), "bidirectional": True}),
    (fr.RNN, {"nonlinearity": "relu"}),
    (fr.RNN, {"nonlinearity": "identity"}),
    (fr.RNN, {"activation": ("tanh", 0.9, 0.8), "reverse": True}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_export_options(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """Options that ONNX has are written and read back."""
    layer = kind(I, H, **options, rng=0)
    fo.export(layer, tmp_path / "layer.onnx", state=False)
    x = random(6, 4, I)
    results = session_of(tmp_path / "layer.onnx").run(None, {"x": x})
    assert_close(results, as_list(layer(x)), "onnxruntime")
    y = x
    for one in fo.layers(tmp_path / "layer.onnx").layers.values():
        y = one(y)[0]
    assert_close(y, layer(x)[0])


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("kind", [fr.LSTM, fr.GRU])
def test_export_of_a_stream(kind: Any, batch_size: int | None, tmp_path: Path) -> None:
    """A stream's model takes a step from the stream's state, or from one that is given."""
    stream = fr.Stream(kind(I, H, 2, batch_first=True, rng=0), batch_size)
    x = random(3, *() if batch_size is None else (batch_size,), I)
    stream.step(x[0])
    fo.export(stream, tmp_path / "step.onnx")
    onnx.checker.check_model(tmp_path / "step.onnx", full_check=True)
    session = session_of(tmp_path / "step.onnx")
    y, *state = session.run(None, {"x": x[1]})
    assert_close(y, stream.step(x[1]), "onnxruntime")
    feeds = dict(zip(("h0", "c0"), state, strict=False))
    assert_close(session.run(None, {"x": x[2], **feeds})[0], stream.step(x[2]), "onnxruntime")


def test_export_of_modules(tmp_path: Path) -> None:
    """Modules of PyTorch are written, too."""
    torch = pytest.importorskip("torch")
    module = torch.nn.GRU(I, H, 2, bidirectional=True)
    fo.export(module, tmp_path / "gru.onnx", state=False)
    x = random(6, 4, I)
    expected = [a.detach().numpy() for a in module(torch.tensor(x))]
    assert_close(session_of(tmp_path / "gru.onnx").run(None, {"x": x}), expected, "onnxruntime")


def test_export_of_cells(tmp_path: Path) -> None:
    """A cell of PyTorch is written as a layer of one step or more."""
    torch = pytest.importorskip("torch")
    fo.export(torch.nn.GRUCell(I, H), tmp_path / "cell.onnx")
    assert str(fo.layers(tmp_path / "cell.onnx")) == f"gru_0: GRU({I}, {H})"


REFUSED: list[tuple[Callable[[Path], Any], type[Exception], str]] = [
    (lambda p: fo.export(fr.LSTM(I, H, proj_size=2), p), ValueError, "not have proj_size=2"),
    (lambda p: fo.export(fr.LSTM(I, H, layer_norm=True), p), ValueError, "layer_norm=True"),
    (lambda p: fo.export(fr.GRU(I, H, zoneout=0.1), p), ValueError, "zoneout=0.1"),
    (lambda p: fo.export(fr.LSTM(I, H, cell_clip=1.0), p), ValueError, "cell_clip=1.0"),
    (lambda p: fo.export(fr.GRU(I, H, activation="selu"), p), ValueError, "activation 'selu'"),
    (lambda p: fo.export(fr.GRU(I, H).quantize("int8"), p), ValueError, "got int8 weights"),
    (lambda p: fo.export(fr.GRU(I, H, dtype="float64"), p), TypeError, "layer must be float32"),
    (lambda p: fo.export("layer", p), TypeError, "layer must be an LSTM, GRU or RNN"),
    (lambda p: fo.export(fr.GRU(I, H), p, 13), ValueError, "opset must be from 14"),
    (lambda p: fo.export(fr.GRU(I, H), p, 10**6), ValueError, "opset must be from 14"),
    (lambda p: fo.export(fr.GRU(I, H), p, lengths=1), TypeError, "lengths must be a bool"),
    (
        lambda p: fo.export(fr.GRU(I, H), p.parent / "no" / "a.onnx"),
        OSError,
        "No such file or directory",
    ),
    (
        lambda p: fo.export(fr.Stream(fr.GRU(I, H)), p, lengths=True),
        ValueError,
        "lengths False for a Stream",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_export_refuses(call: Any, kind: type[Exception], message: str, tmp_path: Path) -> None:
    """A layer that cannot be written is refused by name, and an existing file stays."""
    path = tmp_path / "layer.onnx"
    path.write_bytes(b"before")
    with pytest.raises(kind, match=message):
        call(path)
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("name", ["reading", "writing"])
def test_examples_in_docstrings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples in docstrings run and show what they print."""
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(f"fusedrnn.onnx.{name}"))
    assert results.failed == 0
    assert results.attempted > 0


# Reading


def lstm_node(suffix: str = "", **attributes: Any) -> Any:
    names = [f"{name}{suffix}" for name in ("x", "W", "R", "B")]
    outputs = [f"Y{suffix}", f"Y_h{suffix}"]
    name = f"lstm{suffix}"
    return helper.make_node("LSTM", names, outputs, name, hidden_size=H, **attributes)


def weights_of(suffix: str = "") -> list[Any]:
    """Return initializers W, R and B of an LSTM node."""
    shapes = {"W": (1, 4 * H, I), "R": (1, 4 * H, H), "B": (1, 8 * H)}
    return [
        onnx.numpy_helper.from_array(random(*shape), f"{name}{suffix}")
        for name, shape in shapes.items()
    ]


def model_of(nodes: list[Any], initializers: list[Any], opset: int = 17, **more: Any) -> Any:
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["T", "B", I])]
    inputs += [helper.make_tensor_value_info(n, *a) for n, a in more.pop("inputs", {}).items()]
    output = more.pop("output", "Y")
    graph = helper.make_graph(
        nodes,
        "model",
        inputs,
        [helper.make_tensor_value_info(output, FLOAT, None)],
        initializers,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9, **more
    )


def run(model: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    y: np.ndarray = session_of(model.SerializeToString()).run(None, feeds)[0]
    return y


@pytest.mark.parametrize("source", ["path", "string", "bytes", "model"])
def test_sources(source: str, tmp_path: Path) -> None:
    """A model may be a path, bytes or a model."""
    model = model_of([lstm_node()], weights_of())
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    given: Any = {"path": path, "string": str(path), "bytes": path.read_bytes(), "model": model}
    found = fo.layers(given[source])
    assert list(found.layers) == ["lstm"]
    x = random(6, 4, I)
    assert_close(found.layers["lstm"](x)[0], run(model, {"x": x})[:, 0], "onnxruntime")


def test_weights_in_another_file(tmp_path: Path) -> None:
    """Weights beside a model are read from its path, and asked for without it."""
    model = model_of([lstm_node()], weights_of())
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    assert list(fo.layers(path).layers) == ["lstm"]
    refused = fo.layers(path.read_bytes()).refused["lstm"]
    assert refused == "W is stored in another file: give the model as a path"
    (tmp_path / "weights").unlink()
    with pytest.raises(ValueError, match="model must have its external data beside it"):
        fo.layers(path)


def test_bodies() -> None:
    """Nodes within If and Loop are found; weights may be within or outside of the body."""
    shape = [None, None, None, None]
    result = [helper.make_tensor_value_info("Y_then", FLOAT, shape)]
    then = helper.make_graph(
        [helper.make_node("LSTM", ["x", "W_then", "R_then", "B"], ["Y_then"], hidden_size=H)],
        "then", [], result, weights_of("_then"),
    )  # fmt: skip
    result = [helper.make_tensor_value_info("Y_else", FLOAT, shape)]
    other = helper.make_graph(
        [helper.make_node("LSTM", ["x", "W", "R", "B"], ["Y_else"], "inner", hidden_size=H)],
        "else", [], result,
    )  # fmt: skip
    branch = helper.make_node("If", ["c"], ["Y"], "if", then_branch=then, else_branch=other)
    model = model_of([branch], weights_of(), inputs={"c": (onnx.TensorProto.BOOL, [])})
    found = fo.layers(model)
    branches = {"if/then_branch/Y_then": True, "if/else_branch/inner": False}
    assert set(found.layers) == set(branches)
    x = random(6, 4, I)
    for name, condition in branches.items():
        expected = run(model, {"x": x, "c": np.array(condition)})
        assert_close(found.layers[name](x)[0], expected[:, 0], "onnxruntime")


def test_weights_that_operators_join() -> None:
    """Weights that operators like Concat and Unsqueeze make from constants are computed."""
    W, R, B = (onnx.numpy_helper.to_array(t) for t in weights_of())
    half = 2 * H
    constants = {"W0": W[:, :half], "W1": W[:, half:], "R0": R[0], "axes": np.array([0])}
    constants |= {"B": B, "order": np.arange(8 * H)}
    nodes = [
        helper.make_node("Concat", ["W0", "W1"], ["W"], axis=1),
        helper.make_node("Unsqueeze", ["R0", "axes"], ["R"]),
        helper.make_node("Gather", ["B", "order"], ["B1"], axis=1),
        helper.make_node("LSTM", ["x", "W", "R", "B1"], ["Y"], "lstm", hidden_size=H),
    ]
    tensors = [onnx.numpy_helper.from_array(a, name) for name, a in constants.items()]
    x = random(6, 4, I)
    layer = fo.layers(model_of(nodes, tensors)).layers["lstm"]
    assert_close(layer(x)[0], run(model_of(nodes, tensors), {"x": x})[:, 0], "onnxruntime")


def test_functions_are_inlined() -> None:
    """A node within a function of the model is found."""
    function = helper.make_function(
        "mine", "Encoder", ["x", "W", "R", "B"], ["Y"],
        [helper.make_node("LSTM", ["x", "W", "R", "B"], ["Y"], hidden_size=H)],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    call = helper.make_node("Encoder", ["x", "W", "R", "B"], ["Y"], domain="mine")
    model = model_of([call], weights_of(), functions=[function])
    model.opset_import.append(helper.make_opsetid("mine", 1))
    assert len(fo.layers(model).layers) == 1
    model.functions[0].opset_import[0].version = 14
    found = fo.layers(model)
    assert found.layers or "another version of operators" in found.refused["Encoder"]


def test_dequantized_weights() -> None:
    """Weights of 8 bits that DequantizeLinear makes float32 are computed."""
    _, R, B = weights_of()
    values = np.random.default_rng(0).integers(-127, 128, (1, 4 * H, I)).astype(np.int8)
    scale = np.float32(0.01)
    constants = {"W8": values, "scale": scale, "zero": np.int8(0)}
    tensors = [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()]
    node = helper.make_node("DequantizeLinear", ["W8", "scale", "zero"], ["W"])
    layer = fo.layers(model_of([node, lstm_node()], [R, B, *tensors], opset=13)).layers["lstm"]
    np.testing.assert_allclose(layer.weight_ih_l0[:H], values[0, :H] * scale, rtol=1e-6)


@pytest.mark.parametrize("layout", [0, 1])
def test_constant_states(layout: int) -> None:
    """Constant initial states come in the layer's form; zeros do not come at all."""
    B = 4
    h0, c0 = random(1, B, H), random(1, B, H, seed=1)
    given = [a.swapaxes(0, 1) if layout else a for a in (h0, c0)]
    states = [onnx.numpy_helper.from_array(a, n) for n, a in zip("hc", given, strict=True)]
    inputs = ["x", "W", "R", "B", "", "h", "c"]
    node = helper.make_node("LSTM", inputs, ["Y"], "lstm", hidden_size=H, layout=layout)
    found = fo.layers(model_of([node], [*weights_of(), *states]))
    layer, state = found.layers["lstm"], found.states["lstm"]
    assert layer.batch_first is bool(layout)
    for a, e in zip(state, (h0, c0), strict=True):
        np.testing.assert_array_equal(a, e)
    node.input[6] = ""  # c0 is 0 then
    found = fo.layers(model_of([node], [*weights_of(), *states]))
    np.testing.assert_array_equal(found.states["lstm"][0], h0)
    assert not found.states["lstm"][1].any()
    node.input[6] = "c"
    zeros = [onnx.numpy_helper.from_array(0 * a, n) for n, a in zip("hc", given, strict=True)]
    assert not fo.layers(model_of([node], [*weights_of(), *zeros])).states


def test_refused_nodes() -> None:
    """Nodes that cannot be layers are listed with the reason, beside those that can."""
    dynamic = helper.make_node("LSTM", ["x", "V", "R", "B"], ["Y1"], "dynamic", hidden_size=H)
    computed = helper.make_node("Relu", ["W"], ["U"])
    made = helper.make_node("LSTM", ["x", "U", "R", "B"], ["Y2"], "made", hidden_size=H)
    quantized = helper.make_node(
        "DynamicQuantizeLSTM", ["x"], ["Y3"], "int8", domain="com.microsoft", hidden_size=H
    )
    mixed = helper.make_node(
        "LSTM", ["x", "W", "R", "B"], ["Y4"], "mixed", activations=["Sigmoid", "Relu", "Tanh"]
    )
    unknown = helper.make_node("LSTM", ["x", "W", "R", "B"], ["Y5"], "new", gates=4)
    lacking = helper.make_node("LSTM", ["x", "W"], ["Y6"], "lacking")
    absent = helper.make_node("LSTM", ["x", "W", "R", "nothing"], ["Y7"], "absent")
    nodes = [lstm_node(), dynamic, computed, made, quantized, mixed, unknown, lacking, absent]
    inputs = {"V": (FLOAT, [1, 4 * H, I])}
    found = fo.layers(model_of(nodes, weights_of(), inputs=inputs))
    assert list(found.layers) == ["lstm"]
    reasons = {
        "dynamic": "its weights are not constants: V is an input of its graph",
        "made": "its weights are not constants: U is computed by Relu",
        "int8": "DynamicQuantizeLSTM of com.microsoft is not an operator of ONNX",
        "mixed": "activations must be equal for g and h",
        "new": "LSTM of version 17 has no attribute gates",
        "lacking": "it must have W and R",
        "absent": "nothing in the model computes nothing",
    }
    assert set(found.refused) == set(reasons)
    for name, reason in reasons.items():
        assert reason in found.refused[name]
    assert "dynamic: refused, its weights are not constants" in str(found)


def test_equal_names() -> None:
    """Nodes with equal names, or none, are all found."""
    nodes = [lstm_node(), lstm_node(), helper.make_node("LSTM", ["x", "W", "R"], [""])]
    found = fo.layers(model_of(nodes, weights_of()))
    assert list(found.layers) == ["lstm", "lstm (2)", "node 2"]


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (b"\x08garbage", ValueError, "model must be a model of ONNX: "),
        (b"", ValueError, "model must be a model of ONNX, got one without a graph"),
        (7, TypeError, "model must be a path, bytes or an onnx.ModelProto, got int"),
        ("nothing.onnx", FileNotFoundError, "nothing.onnx"),
        (".", ValueError, "model must be a file, got the folder"),
    ],
)
def test_what_is_no_model(model: Any, kind: type[Exception], message: str) -> None:
    """A source that is no model of ONNX is refused with one sentence."""
    with pytest.raises(kind, match=message):
        fo.layers(model)


@pytest.mark.parametrize("opset", [6, 10**4])
def test_unknown_versions(opset: int) -> None:
    """Versions of the operators that are too old or not known are refused."""
    with pytest.raises(ValueError, match=f"of one version from 7 to .*, got {opset}"):
        fo.layers(model_of([lstm_node()], weights_of(), opset))


def test_models_without_a_recurrent_node() -> None:
    """A model without a recurrent node is refused."""
    model = model_of([helper.make_node("Relu", ["x"], ["Y"])], [])
    with pytest.raises(ValueError, match="model must have an LSTM, GRU or RNN node, got none"):
        fo.layers(model)


# Broken and hostile files


def changed_bytes(data: bytes, draw: random_module.Random) -> bytes:
    """Return bytes of which some are changed, removed or inserted."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at, how = draw.randrange(len(changed)), draw.randrange(3)
        if how == 0:
            changed[at] = draw.randrange(256)
        elif how == 1:
            del changed[at : at + draw.randrange(1, 20)]
        else:
            changed[at:at] = bytes(draw.randrange(256) for _ in range(4))
    return bytes(changed)


def change_fields(model: Any, draw: random_module.Random) -> None:
    """Change, remove or repeat some fields of a model, which stays one of ONNX."""
    integers = [0, 1, -1, 7, 2**31, 2**40, 2**62, -(2**40), *range(2, 20)]
    texts = ["", "x", "W", "LSTM", "Concat", "Gather", "If", "layout", "lstm"]
    fields: list[tuple[Any, Any]] = []

    def collect(message: Any) -> None:
        for field, value in message.ListFields():
            fields.append((message, field))
            if field.message_type is not None:
                for inner in value if hasattr(value, "add") else [value]:
                    collect(inner)

    collect(model)
    message, field = draw.choice(fields)
    value = getattr(message, field.name)
    choices: list[Any] = texts if field.cpp_type == field.CPPTYPE_STRING else integers
    choice = draw.choice(choices)
    if field.type == field.TYPE_BYTES:
        choice = choice.encode()
    try:
        if hasattr(value, "add"):
            (value.add().CopyFrom if draw.random() < 0.5 else value.remove)(draw.choice(value))
        elif field.message_type is not None:
            message.ClearField(field.name)
        elif hasattr(value, "append"):
            value[draw.randrange(len(value))] = choice
        else:
            setattr(message, field.name, choice)
    except (TypeError, ValueError):  # a value that the field cannot have
        pass


@pytest.mark.parametrize("seed", range(8))
def test_broken_files(seed: int, tmp_path: Path) -> None:
    """Files that are broken at random give layers, reasons or one ValueError, and no crash."""
    fo.export(fr.LSTM(I, H, 2, peephole=True, clip=0.5), tmp_path / "a.onnx", lengths=True)
    W, R, B = weights_of()
    nodes = [helper.make_node("Concat", ["W", "W"], ["V"], axis=0)]
    nodes += [helper.make_node("Gather", ["V", "order"], ["U"], axis=0)]
    nodes += [helper.make_node("LSTM", ["x", "U", "R", "B"], ["Y"], hidden_size=H)]
    order = onnx.numpy_helper.from_array(np.array([0]), "order")
    data = [(tmp_path / "a.onnx").read_bytes()]
    data += [model_of(nodes, [W, R, B, order]).SerializeToString()]
    draw = random_module.Random(seed)
    for n in range(100):
        if n % 2:
            given: Any = changed_bytes(draw.choice(data), draw)
        else:
            given = onnx.load_model_from_string(draw.choice(data))
            for _ in range(draw.choice([1, 2, 4])):
                change_fields(given, draw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, of values that overflow
            try:
                fo.layers(given)
            except ValueError as error:
                assert str(error).startswith("model must ")  # noqa: PT017


def test_hostile_files() -> None:
    """Files that ask for much memory or deep recursion are refused."""
    huge = onnx.TensorProto(name="W", data_type=FLOAT, dims=[2**40, 2**20])
    _, R, B = weights_of()
    found = fo.layers(model_of([lstm_node()], [huge, R, B]))
    assert found.refused["lstm"].startswith("W is broken")
    doubled = [
        helper.make_node("Concat", [f"W{n}", f"W{n}"], [f"W{n + 1}"], axis=0) for n in range(60)
    ]
    first = onnx.numpy_helper.from_array(random(1, 4 * H, I), "W0")
    node = helper.make_node("LSTM", ["x", "W60", "R", "B"], ["Y"], "lstm", hidden_size=H)
    found = fo.layers(model_of([*doubled, node], [first, R, B]))
    assert "elements, more than" in found.refused["lstm"]
    chain = [helper.make_node("Identity", [f"W{n}"], [f"W{n + 1}"]) for n in range(20_000)]
    node = helper.make_node("LSTM", ["x", "W20000", "R", "B"], ["Y"], "lstm", hidden_size=H)
    found = fo.layers(model_of([*chain, node], [first, R, B]))
    assert "lstm" in {**found.layers, **found.refused}
    node = helper.make_node("Gather", [], ["W"])
    found = fo.layers(model_of([node, lstm_node()], [R, B]))
    assert found.refused["lstm"].startswith("W cannot be computed by Gather")
    loop = [
        helper.make_node("Identity", ["V"], ["W"]),
        helper.make_node("Identity", ["W"], ["V"]),
    ]
    found = fo.layers(model_of([*loop, lstm_node()], [R, B]))
    assert found.refused["lstm"] == "its weights are computed by too many operators"


# The command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command tells what is inside and what can run here."""
    dynamic = helper.make_node("LSTM", ["x", "V", "R", "B"], ["Y1"], "dynamic", hidden_size=H)
    inputs = {"V": (FLOAT, [1, 4 * H, I])}
    path = tmp_path / "model.onnx"
    onnx.save(model_of([lstm_node(), dynamic], weights_of(), inputs=inputs), path)
    assert cli.main(["convert", str(path)]) == 0
    text = capsys.readouterr().out
    assert "model.onnx: 2 nodes, operators of version 17" in text
    assert "1 of 2 recurrent nodes can be layers and run on the kernels of fusedrnn" in text
    assert f"runs as LSTM({I}, {H})" in text
    assert "cannot be a layer: its weights are not constants: V is an input" in text


@pytest.mark.parametrize(("name", "why"), [("no.onnx", "No such file"), ("x.onnx", "ONNX")])
def test_command_errors(
    name: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is missing or is no model gives one line and status 2."""
    (tmp_path / "x.onnx").write_bytes(b"\x08garbage")
    assert cli.main(["convert", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fusedrnn convert: ")
    assert why in error
    assert error.count("\n") == 1
