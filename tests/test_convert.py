"""Conversions of weights keep what a layer computes, from each library and back.

The libraries themselves are the oracles. Haste needs a GPU, so its equations are written out.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onednn
import pytest
from helpers import assert_close

import fusedrnn as fr
from fusedrnn import convert

T, B, I, H = 6, 4, 3, 7
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
LAYERS: dict[str, Any] = {"lstm": fr.LSTM, "gru": fr.GRU, "rnn": fr.RNN}
BOTH = pytest.mark.parametrize("D", [1, 2])
CELL = pytest.mark.parametrize("cell", list(GATES))


def random(*shape: int, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    """Return asymmetric values, so that neither a wrong order nor a transposition can hide."""
    values = np.random.default_rng([seed, *shape]).normal(size=shape) / 2
    return values.astype(dtype)


def layer_of(cell: str, dtype: Any = np.float32, **options: Any) -> Any:
    """Return a layer with random biases, too, two layers deep unless options say otherwise."""
    return LAYERS[cell](I, H, **{"num_layers": 2, **options}, dtype=dtype, rng=0)


def time_major(layer: Any, x: np.ndarray) -> np.ndarray:
    """Return a layer's y (T, B, …) for x (T, B, I)."""
    y: np.ndarray = (
        layer(x.swapaxes(0, 1))[0].swapaxes(0, 1) if layer.batch_first else layer(x)[0]
    )
    return y


# There and back


def is_offered(library: str, cell: str, options: dict[str, Any]) -> bool:
    """Whether a library has a layer."""
    if library == "haste" and (cell == "rnn" or not options.get("reset_after", True)):
        return False
    if "proj_size" in options or "peephole" in options:
        having = {"torch": options, "onednn": options, "onnx": ["peephole"]}
        return cell == "lstm" and all(o in having.get(library, []) for o in options)
    if "reset_after" in options:
        return cell == "gru" and library in ("torch", "keras", "onnx", "onednn")
    return True


FORMS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"reset_after": False},
    {"peephole": True},
    {"proj_size": 5},
]
LIBRARIES = ("torch", "keras", "onnx", "flax", "haste", "mlx", "onednn", "cudnn")
THERE_AND_BACK = [
    (library, cell, options)
    for library, cell, options in itertools.product(LIBRARIES, GATES, FORMS)
    if is_offered(library, cell, options)
]


@BOTH
@pytest.mark.parametrize(("library", "cell", "options"), THERE_AND_BACK, ids=str)
def test_there_and_back(library: str, cell: str, options: dict[str, Any], D: int) -> None:
    """A layer that is converted to a library's form and back computes the same."""
    if library == "torch":
        pytest.importorskip("torch")
    layer = layer_of(cell, np.float64, bidirectional=D == 2, **options)
    made = getattr(convert, f"to_{library}")(layer)
    read: Any = getattr(convert, f"from_{library}")
    named = {"reset_after": False} if "reset_after" in options else {}
    if library == "keras":
        back = [read(*made, cell=cell, **named)]
    elif library == "torch":
        tensors = {f"encoder.{name}": a for name, a in made.items()}
        back = [read({**tensors, "head.weight": 1}, prefix="encoder.", **named)]
    elif library == "onnx":
        parts = [node._asdict() | node._asdict().pop("attributes") for node in made]
        back = [read(**{k: v for k, v in part.items() if k != "attributes"}) for part in parts]
    elif library == "onednn":
        after = layer.reset_after if cell == "gru" else True
        kind = {"rnn": "vanilla_rnn", "gru": "lbr_gru" if after else "gru"}.get(cell, cell)
        back = [read(kind, *made)]
    elif library == "cudnn":
        back = [read(cell, made, I, H, 2, D == 2)]
    else:
        back = [read(*made)]
    x = random(T, B, I)
    y = x
    for one in back:
        assert type(one) is type(layer)
        y = time_major(one, y)
    assert_close(y, layer(x)[0])


@BOTH
@pytest.mark.parametrize("api", ["nnx", "nnx_optimized"])
def test_there_and_back_in_nnx(api: str, D: int) -> None:
    """The forms of Flax's newer API can be read, too."""
    layer = layer_of("lstm", np.float64, bidirectional=D == 2)
    x = random(T, B, I)
    assert_close(time_major(convert.from_flax(*convert.to_flax(layer, api)), x), layer(x)[0])


# torch


@BOTH
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_torch(kind: str, D: int) -> None:
    """A layer with a module's weights and arguments computes what the module does."""
    torch = pytest.importorskip("torch")
    options = {"num_layers": 2, "bidirectional": D == 2, "batch_first": True}
    if kind == "LSTM":
        options["proj_size"] = 5
    if kind == "RNN":
        options["nonlinearity"] = "relu"
    module = getattr(torch.nn, kind)(I, H, dtype=torch.float64, **options)
    layer = convert.from_torch(module)
    x = random(B, T, I)
    assert_close(layer(x)[0], module(torch.tensor(x))[0].detach().numpy())
    other = getattr(torch.nn, kind)(I, H, dtype=torch.float64, **options)
    other.load_state_dict(convert.to_torch(layer))
    assert_close(layer(x)[0], other(torch.tensor(x))[0].detach().numpy())


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_torch_cells(kind: str) -> None:
    """A layer with the weights of a cell computes its steps."""
    torch = pytest.importorskip("torch")
    cell = getattr(torch.nn, kind)(I, H, dtype=torch.float64)
    x = random(1, B, I)
    h = cell(torch.tensor(x[0]))
    expected = (h[0] if isinstance(h, tuple) else h).detach().numpy()
    assert_close(convert.from_torch(cell)(x)[0][0], expected)


def test_torch_options() -> None:
    """A module of fusedrnn.torch keeps its options, and a layer can be loaded by one."""
    torch = pytest.importorskip("torch")
    import fusedrnn.torch as ft

    options: dict[str, Any] = {
        "peephole": True,
        "layer_norm": True,
        "clip": 0.7,
        "recurrent_activation": ("hard_sigmoid", 0.2, 0.5),
    }
    module = ft.LSTM(I, H, 2, dtype=torch.float64, forget_bias=1.0, **options)
    layer = convert.from_torch(module)
    x = random(T, B, I)
    expected = module(torch.tensor(x))[0].detach().numpy()
    assert_close(layer(x)[0], expected)
    other = ft.LSTM(I, H, 2, dtype=torch.float64, **options)
    other.load_state_dict(convert.to_torch(layer))
    assert_close(other(torch.tensor(x))[0].detach().numpy(), expected)


# Keras


def lstm_by_hand(x: Any, kernel: Any, recurrent: Any, bias: Any, order: str) -> np.ndarray:
    """Return what the LSTMs of Keras and Haste compute, each with its order of gates."""
    h, c, hs = np.zeros((B, H)), np.zeros((B, H)), []
    for x_t in x:
        blocks = np.split(x_t @ kernel + h @ recurrent + bias, 4, axis=-1)
        a = dict(zip(order, blocks, strict=True))
        c = sigmoid(a["f"]) * c + sigmoid(a["i"]) * np.tanh(a["g"])
        h = sigmoid(a["o"]) * np.tanh(c)
        hs.append(h)
    return np.stack(hs)


def gru_by_hand(
    x: Any, kernel: Any, recurrent: Any, bias: Any, recurrent_bias: Any, after: bool = True
) -> np.ndarray:
    """Return what the GRUs of Keras and, resetting after the matmul, Haste compute."""
    h, hs = np.zeros((B, H)), []
    for x_t in x:
        x_z, x_r, x_n = np.split(x_t @ kernel + bias, 3, axis=-1)
        h_z, h_r, h_n = np.split(h @ recurrent + recurrent_bias, 3, axis=-1)
        z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
        inner = r * h_n if after else (r * h) @ recurrent[:, 2 * H :]
        h = z * h + (1 - z) * np.tanh(x_n + inner)
        hs.append(h)
    return np.stack(hs)


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def test_keras_by_hand() -> None:
    """Weights as Keras 1 to 3 have them compute its equations, in float64."""
    x, weights = random(T, B, I), [random(I, 4 * H), random(H, 4 * H), random(4 * H)]
    layer = convert.from_keras(weights, cell="lstm")
    assert_close(time_major(layer, x), lstm_by_hand(x, *weights, "ifgo"))
    for after in (True, False):
        bias = random(2, 3 * H) if after else random(3 * H)
        weights = [random(I, 3 * H), random(H, 3 * H), bias]
        layer = convert.from_keras(weights, cell="gru")
        biases = bias if after else (bias, 0.0)
        expected = gru_by_hand(x, *weights[:2], *biases, after)
        assert_close(time_major(layer, x), expected)
    weights = [random(I, H), random(H, H)]
    y = time_major(convert.from_keras(weights, cell="rnn"), x)
    assert_close(y[0], np.tanh(x[0] @ weights[0]))
    assert_close(y[1], np.tanh(x[1] @ weights[0] + y[0] @ weights[1]))


KERAS = [
    ("LSTM", {}),
    ("LSTM", {"use_bias": False, "activation": "softsign"}),
    ("GRU", {"recurrent_activation": "hard_sigmoid"}),
    ("GRU", {"reset_after": False}),
    ("SimpleRNN", {"activation": "relu"}),
]


@BOTH
@pytest.mark.parametrize("package", ["keras", "tf_keras"])
@pytest.mark.parametrize(("kind", "options"), KERAS, ids=str)
def test_keras(package: str, kind: str, options: dict[str, Any], D: int) -> None:
    """Two layers of Keras 3, or of Keras 2, become one that computes the same, and back."""
    keras: Any = pytest.importorskip(package)
    layers = []
    for n in range(2):
        layer = getattr(keras.layers, kind)(H, return_sequences=True, **options)
        layers.append(keras.layers.Bidirectional(layer) if D == 2 else layer)
        layers[-1].build((None, None, H * D if n else I))
        shapes = [w.shape for w in layers[-1].get_weights()]
        weights = [random(*shape, seed=k) for k, shape in enumerate(shapes)]
        layers[-1].set_weights(weights)
    x = random(B, T, I, dtype=np.float32)

    def run() -> np.ndarray:
        y: Any = x
        for layer in layers:
            y = layer(y)
        return np.asarray(y.detach() if hasattr(y, "detach") else y)

    ours = convert.from_keras(*layers)
    assert_close(ours(x)[0], run())
    for layer, weights in zip(layers, convert.to_keras(ours), strict=True):
        layer.set_weights([a + 1 for a in weights])
        layer.set_weights(weights)
    assert_close(ours(x)[0], run())


def test_our_keras_layers() -> None:
    """A layer of fusedrnn.keras is converted as Keras' own."""
    keras = pytest.importorskip("keras")
    fk = pytest.importorskip("fusedrnn.keras")

    layer = fk.GRU(H, return_sequences=True)
    x = random(B, T, I, dtype=np.float32)
    expected = keras.ops.convert_to_numpy(layer(x))
    assert_close(convert.from_keras(layer)(x)[0], expected)


# ONNX: test_onnx.py compares a node's weights with onnxruntime's results, test_onnx_models.py
# whole models.


@BOTH
@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("LSTM", {}),
        ("LSTM", {"input_forget": 1, "clip": 0.5}),
        ("GRU", {}),
        ("GRU", {"linear_before_reset": 1}),
        ("RNN", {}),
        ("RNN", {"activations": ["Tanh"]}),
        ("RNN", {"activations": ["Relu"]}),
        (
            "RNN",
            {"activations": ["Affine"], "activation_alpha": [0.5], "activation_beta": [0.1]},
        ),
        (
            "LSTM",
            {
                "activations": ["HardSigmoid", "ScaledTanh", "scaledtanh"],
                "activation_alpha": [0.3, 0.9, 0.9],
                "activation_beta": [0.4, 0.8, 0.8],
            },
        ),
        (
            "LSTM",
            {
                "activations": ["HardSigmoid", "Elu", "Elu"],
                "activation_alpha": [0.3, 0.9, 0.9],
                "activation_beta": [0.4],
            },
        ),
        ("GRU", {"activations": ["Sigmoid", "LeakyRelu"], "activation_alpha": [0.3]}),
        ("GRU", {"activations": ["HardSigmoid", "LeakyRelu"]}),
        (
            "GRU",
            {"activations": ["Sigmoid", "ThresholdedRelu"], "activation_alpha": [0.2]},
        ),
        ("GRU", {"activations": ["Sigmoid", "Softsign"], "layout": 0}),
        ("RNN", {"activations": ["Softplus"]}),
    ],
    ids=str,
)
def test_onnx(operator: str, attributes: dict[str, Any], D: int) -> None:
    """A node becomes a layer that computes what onnxruntime does, and the same node again."""
    from test_onnx import SIZES, run  # skips where there is none

    assert SIZES.H == H
    rows = GATES[operator.lower()] * H
    inputs = {"X": random(T, B, I), "W": random(D, rows, I), "R": random(D, rows, H)}
    inputs["B"] = random(D, 2 * rows)
    if operator == "LSTM":
        inputs["P"] = random(D, 3 * H)
    inputs = {name: a.astype(np.float32) for name, a in inputs.items()}
    # Lists have the values of each direction in turn.
    given = {n: a * D if isinstance(a, list) else a for n, a in attributes.items()}
    given["direction"] = "bidirectional" if D == 2 else "reverse"
    x = inputs.pop("X")
    layer = convert.from_onnx(operator, **inputs, **given)
    expected = run(operator, {"X": x, **inputs}, **given)[0]
    expected = expected.swapaxes(1, 2).reshape(T, B, D * H)
    assert_close(layer(x)[0], expected, "onnxruntime")
    (node,) = convert.to_onnx(layer)
    again = {n: a for n, a in node._asdict().items() if n in inputs}
    del node.attributes["hidden_size"]
    expected = run(operator, {"X": x, **again}, **node.attributes)[0]
    assert_close(layer(x)[0], expected.swapaxes(1, 2).reshape(T, B, D * H), "onnxruntime")


# Flax and MLX, oneDNN


def test_flax_and_mlx() -> None:
    """The tests of convert_with_jax.py pass, in a process of their own: a process that has
    imported JAX must not fork, as other tests do.
    """
    for package in ("flax", "mlx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    script = Path(__file__).with_name("convert_with_jax.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("lstm", {}),
        ("lstm", {"weights_peephole": (3, H)}),
        ("lstm", {"weights_projection": (H, 5)}),
        ("gru", {}),
        ("lbr_gru", {}),
        ("vanilla_rnn", {}),
    ],
    ids=str,
)
def test_onednn(kind: str, more: dict[str, Any], direction: str) -> None:
    """Weights of oneDNN become a layer that computes what its primitive does, and back."""
    if onednn.load() is None:
        pytest.skip("oneDNN is not installed: pip install onednn-cpu-gomp")
    G, D = {"lstm": 4, "vanilla_rnn": 1}.get(kind, 3), 1 + (direction == "bidirectional")
    width = 5 if "weights_projection" in more else H
    shapes = {"weights_layer": (I, G, H), "weights_iter": (width, G, H), **more}
    shapes["bias"] = (G + (kind == "lbr_gru"), H)
    weights = {n: random(1, D, *shape, dtype=np.float32) for n, shape in shapes.items()}
    x = random(T, B, I, dtype=np.float32)
    options: dict[str, Any] = {"reverse": True} if direction == "reverse" else {}
    if kind == "vanilla_rnn":
        options["nonlinearity"] = "relu"
    layer = convert.from_onednn(kind, weights, **options)
    assert_close(layer(x)[0], onednn.run(kind, x, weights, direction, "relu"))
    (made,) = convert.to_onednn(layer)
    assert set(made) == set(weights)
    for name, a in weights.items():
        np.testing.assert_allclose(made[name], a)


# cuDNN, Haste


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_cudnn_as_in_torch(kind: str) -> None:
    """PyTorch's parameters, first all matrices and then all biases, are a flat buffer."""
    torch = pytest.importorskip("torch")
    module = getattr(torch.nn, kind)(I, H, 2, bidirectional=True, dtype=torch.float64)
    parts = {name: p.detach().numpy() for name, p in module.named_parameters()}
    matrices = [p.ravel() for name, p in parts.items() if name.startswith("weight")]
    biases = [p for name, p in parts.items() if name.startswith("bias")]
    flat = np.concatenate([*matrices, *biases])
    layer = convert.from_cudnn(kind.lower(), flat, I, H, 2, True)
    x = random(T, B, I)
    assert_close(layer(x)[0], module(torch.tensor(x))[0].detach().numpy())


def test_haste() -> None:
    """Parameters of Haste compute what its kernels do."""
    x = random(T, B, I)
    names = ("kernel", "recurrent_kernel", "bias", "recurrent_bias")
    weights = [random(I, 4 * H), random(H, 4 * H), random(4 * H)]
    layer = convert.from_haste(dict(zip(names, weights, strict=False)))
    assert_close(layer(x)[0], lstm_by_hand(x, *weights, "igfo"))
    weights = [random(I, 3 * H), random(H, 3 * H), random(3 * H), random(3 * H, seed=1)]
    layer = convert.from_haste(dict(zip(names, weights, strict=True)))
    assert_close(layer(x)[0], gru_by_hand(x, *weights))


def test_haste_layer_norm() -> None:
    """A LayerNormLSTM of Haste keeps its norms: of each product, and of c before its tanh."""
    x, eps = random(T, B, I), 1e-5
    kernel, recurrent, bias = random(I, 4 * H), random(H, 4 * H), random(4 * H)
    gamma, gamma_h, beta_h = random(2, 4 * H), random(H), random(H, seed=1)

    def norm(a: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        centred = a - a.mean(-1, keepdims=True)
        return centred / np.sqrt(a.var(-1, keepdims=True) + eps) * gamma

    h, c, hs = np.zeros((B, H)), np.zeros((B, H)), []
    for x_t in x:
        a = norm(x_t @ kernel, gamma[0]) + norm(h @ recurrent, gamma[1]) + bias
        i, g, f, o = np.split(a, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(norm(c, gamma_h) + beta_h)
        hs.append(h)
    names = ("kernel", "recurrent_kernel", "bias", "gamma", "gamma_h", "beta_h")
    values = (kernel, recurrent, bias, gamma, gamma_h, beta_h)
    given = dict(zip(names, values, strict=True))
    layer = convert.from_haste(given)
    assert_close(layer(x)[0], np.stack(hs))
    (made,) = convert.to_haste(layer)
    for name, a in given.items():
        np.testing.assert_array_equal(made[name], a)


@pytest.mark.parametrize(
    "name", ["cudnn", "flax", "haste", "keras", "mlx", "onednn", "onnx", "torch"]
)
def test_examples_in_docstrings(name: str) -> None:
    """The examples in docstrings run and show what they print."""
    if name == "torch":
        pytest.importorskip("torch")
    results = doctest.testmod(importlib.import_module(f"fusedrnn.convert.{name}"))
    assert results.failed == 0
    assert results.attempted > 0


# Types


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_types_of_weights(dtype: str) -> None:
    """16-bit weights become float32, others stay as they are, and dtype= decides."""
    kind: Any = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    weights = {"Wx": random(4 * H, I).astype(kind), "Wh": random(4 * H, H).astype(kind)}
    expected = "float64" if dtype == "float64" else "float32"
    assert convert.from_mlx(weights).dtype == expected
    assert convert.from_mlx(weights, dtype="float64").dtype == "float64"


def test_to_from_tensors_of_any_kind() -> None:
    """A module of torch.nn is converted to another library in one call."""
    torch = pytest.importorskip("torch")
    module = torch.nn.GRU(I, H, 2, bidirectional=True).bfloat16()
    layer = convert.from_flax(*convert.to_flax(module))
    assert layer(random(B, T, I, dtype=np.float32))[0].shape == (B, T, 2 * H)
