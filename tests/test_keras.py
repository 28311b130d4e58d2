"""Layers of fusedrnn.keras against Keras' own: results, gradients, training.

The backend of Keras is fixed for a process: conftest.py chooses torch, and
`test_numpy_backend` runs the tests of this file and of test_keras_models.py on NumPy in another
process.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TOLERANCE, assert_close

keras = pytest.importorskip("keras", reason="Keras is not installed")
pytest.importorskip("fusedrnn.keras", reason="Keras has a backend without our kernels")

from keras import ops  # noqa: E402
from keras_inputs import (  # noqa: E402
    ACTIVATIONS,
    HAS_GRADIENTS,
    ON_TORCH,
    B,
    H,
    I,
    T,
    drawn,
    in_float64,  # noqa: F401
)

import fusedrnn.keras as fk  # noqa: E402
from fusedrnn.bench import keras as race_of_keras  # noqa: E402

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "GRU-before": ("GRU", {"reset_after": False}),
    "SimpleRNN": ("SimpleRNN", {}),
}
KERAS = TOLERANCE["Keras in float64"]
# All steps; right padding; left padding; gaps; no step at all; the first step alone.
MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1],
        [0, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def layer_of(source: Any, kind: str, dtype: Any = None, **options: Any) -> Any:
    """A layer of keras.layers or fusedrnn.keras, with random weights."""
    name, given = KINDS[kind]
    layer = getattr(source, name)(H, dtype=dtype, **given, **options)
    layer.build((B, T, I))
    layer.set_weights([drawn(*w.shape, seed=n) / 2 for n, w in enumerate(layer.get_weights())])
    return layer


def results_of(layer: Any, x: np.ndarray, *states: np.ndarray, **call: Any) -> dict[str, Any]:
    """The outputs of a call and, on torch, the gradients of a function of them."""
    inputs = [ops.convert_to_tensor(a) for a in (x, *states)]
    if HAS_GRADIENTS:
        inputs = [a.requires_grad_() for a in inputs]
    if states:
        call["initial_state"] = inputs[1:]
    outputs = keras.tree.flatten(layer(inputs[0], **call))
    found = {f"output {n}": ops.convert_to_numpy(a) for n, a in enumerate(outputs)}
    if HAS_GRADIENTS:
        import torch

        of = [*inputs, *(v.value for v in layer.trainable_variables)]
        loss = sum((a * ops.convert_to_tensor(drawn(*a.shape, seed=9))).sum() for a in outputs)
        gradients = torch.autograd.grad(loss, of, allow_unused=True)
        for n, (a, g) in enumerate(zip(of, gradients, strict=True)):
            found[f"gradient {n}"] = (torch.zeros_like(a) if g is None else g).numpy()
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        is_gradient = name.startswith("gradient")
        assert_close(value, expected[name], "Keras in float64", name, is_gradient)


def states_of(kind: str, seed: int = 5) -> list[np.ndarray]:
    return [drawn(B, H, seed=seed + n) for n in range(2 if kind == "LSTM" else 1)]


FLAGS = ("return_sequences", "return_state", "go_backwards", "masked", "from_state")


@pytest.mark.parametrize("zero_output_for_mask", [False, True])
def test_like_keras(kind: str, zero_output_for_mask: bool) -> None:
    """Every combination of these arguments gives Keras' results and gradients."""
    for values in itertools.product([False, True], repeat=len(FLAGS)):
        options = dict(zip(FLAGS, values, strict=True))
        call = {"mask": MASK} if options.pop("masked") else {}
        states = states_of(kind) if options.pop("from_state") else []
        options["zero_output_for_mask"] = zero_output_for_mask
        expected, found = (
            results_of(layer_of(source, kind, **options), drawn(B, T, I), *states, **call)
            for source in (keras.layers, fk)
        )
        assert_equal(found, expected)


def test_masks_of_numbers(kind: str) -> None:
    """A mask of numbers that are 0 or 1 is the same as one of bool."""
    layer = layer_of(fk, kind, return_sequences=True)
    expected = ops.convert_to_numpy(layer(drawn(B, T, I), mask=MASK))
    for dtype in ("int32", "uint8", "float32"):
        assert_close(layer(drawn(B, T, I), mask=MASK.astype(dtype)), expected)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("steps", [1, 2])
def test_without_bias_and_short(kind: str, use_bias: bool, steps: int) -> None:
    """Layers without a bias and short sequences give Keras' results."""
    expected, found = (
        results_of(layer_of(source, kind, use_bias=use_bias), drawn(2, steps, I))
        for source in (keras.layers, fk)
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_stateful(kind: str, masked: bool) -> None:
    """A stateful layer carries its state from call to call until it is reset."""
    call = {"mask": MASK} if masked else {}
    layers = [layer_of(source, kind, stateful=True) for source in (keras.layers, fk)]
    # Keras' faster loop assigns the new state to a tensor that backward reads.
    layers[0].use_cudnn = False
    for n in range(3):
        expected, found = (
            results_of(layer, drawn(B, T, I, seed=n), **call) for layer in layers
        )
        assert_equal(found, expected)
    for layer in layers:
        layer.reset_state()
    expected, found = (results_of(layer, drawn(B, T, I), **call) for layer in layers)
    assert_equal(found, expected)


@pytest.mark.parametrize("merge_mode", ["concat", "sum", "mul", "ave", None])
@pytest.mark.parametrize("return_sequences", [False, True])
def test_bidirectional(kind: str, merge_mode: str | None, return_sequences: bool) -> None:
    """Bidirectional runs our layers and gives Keras' results, with masks and states."""
    name, given = KINDS[kind]
    wrapped = []
    for source in (keras.layers, fk):
        inner = getattr(source, name)(
            H, return_sequences=return_sequences, return_state=True, **given
        )
        layer = keras.layers.Bidirectional(inner, merge_mode)
        layer.build((B, T, I))
        weights = [drawn(*w.shape, seed=n) for n, w in enumerate(layer.get_weights())]
        layer.set_weights(weights)
        assert type(layer.forward_layer) is type(layer.backward_layer) is getattr(source, name)
        wrapped.append(layer)
    states = [*states_of(kind), *states_of(kind, 7)]
    for call in ({}, {"mask": ops.convert_to_tensor(MASK)}):
        expected, found = (
            results_of(layer, drawn(B, T, I), *states, **call) for layer in wrapped
        )
        assert_equal(found, expected)


def test_activations(kind: str) -> None:
    """Every activation that the error names gives Keras' results, by name or as a function."""
    with pytest.raises(ValueError, match=", ".join(ACTIVATIONS)):
        layer_of(fk, kind, activation="gelu")
    x = drawn(B, 3, I) / 4
    x[:, 0] = 0  # where a slope may jump
    for name in ACTIVATIONS:
        options: dict[str, Any] = {"activation": getattr(keras.activations, name)}
        if kind != "SimpleRNN":
            options["recurrent_activation"] = "hard_sigmoid" if name == "tanh" else name
        expected, found = (
            results_of(layer_of(source, kind, use_bias=name != "elu", **options), x)
            for source in (keras.layers, fk)
        )
        assert_equal(found, expected)
    assert layer_of(fk, kind, activation=None).activation is keras.activations.linear


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "float64"])
def test_precisions(kind: str, policy: str) -> None:
    """Every policy of dtypes gives results of its type, near those of Keras."""
    theirs, ours = (layer_of(source, kind, policy) for source in (keras.layers, fk))
    x = drawn(B, T, I)
    found, expected = ours(x, mask=MASK), theirs(x, mask=MASK)
    dtype = policy.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    # Keras rounds h, c and the gates of each step to 16 bits.
    limit = {"bfloat16": 0.05, "float16": 5e-3}.get(dtype, KERAS.results)
    difference = ops.convert_to_numpy(ops.cast(found - expected, "float64"))
    assert np.abs(difference).max() <= limit


# Dropout


def test_dropout_of_inputs(kind: str) -> None:
    """The same seed draws Keras' masks of the inputs, in each call others."""
    layers = [layer_of(source, kind, dropout=0.4, seed=3) for source in (keras.layers, fk)]
    seen = []
    for _ in range(2):
        expected, found = (results_of(layer, drawn(B, T, I), training=True) for layer in layers)
        assert_equal(found, expected)
        seen.append(found["output 0"])
    assert not np.array_equal(*seen)


def test_recurrent_dropout(kind: str) -> None:
    """Recurrent dropout follows the layer's seed, is active in training alone, and drops a
    unit of the state at every step: with the rate near 1 a layer is one without a past.
    """
    x = drawn(B, T, I)

    def run(rate: float, seed: int = 3, training: bool = True) -> Any:
        layer = layer_of(
            fk, kind, recurrent_dropout=rate, seed=seed, return_sequences=True, use_bias=False
        )
        return ops.convert_to_numpy(layer(x, training=training))

    assert np.array_equal(run(0.5), run(0.5))
    assert not np.array_equal(run(0.5), run(0.5, seed=4))
    assert np.array_equal(run(0.5, training=False), run(0.0))
    if kind == "SimpleRNN":
        alone = layer_of(fk, kind, return_sequences=True, use_bias=False)
        one_by_one = alone(x.reshape(B * T, 1, I))
        assert_close(run(1 - 1e-12).reshape(B * T, 1, H), ops.convert_to_numpy(one_by_one))


# Files and configurations


def test_same_configuration(kind: str) -> None:
    """The configuration is Keras' own, and makes the layer again."""
    options = {
        "dropout": 0.1,
        "recurrent_dropout": 0.2,
        "unroll": True,
        "kernel_regularizer": "l2",
        "bias_constraint": "non_neg",
        "name": "layer",
    }
    theirs, ours = (layer_of(source, kind, **options) for source in (keras.layers, fk))
    assert ours.get_config() == theirs.get_config()
    again = type(ours).from_config(ours.get_config())
    assert again.get_config() == ours.get_config()
    assert [w.path for w in ours.weights] == [w.path for w in theirs.weights]


def reviews(source: Any) -> Any:
    """A classifier of padded sequences of words."""
    words = np.random.default_rng(0).integers(1, 50, (48, 12))
    words[np.arange(12) < np.arange(48)[:, None] % 8] = 0  # padding comes first
    model = keras.Sequential(
        [
            keras.layers.Embedding(50, 8, mask_zero=True),
            keras.layers.Bidirectional(source.LSTM(8, return_sequences=True)),
            keras.layers.Dropout(0.2, seed=1),
            source.GRU(8, dropout=0.2),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    return model, words, (words > 25).sum(1) > 5


def weather(source: Any) -> Any:
    """A forecast from the days before."""
    model = keras.Sequential(
        [
            keras.Input((24, 4)),
            source.LSTM(16, return_sequences=True, kernel_regularizer="l2"),
            source.SimpleRNN(
                8, bias_constraint="non_neg", activity_regularizer="l2", go_backwards=True
            ),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.RMSprop(0.003, clipnorm=1.0), "mae")
    x = drawn(40, 24, 4).cumsum(1)
    return model, x / 5, x[:, -1, 0] / 5


def text(source: Any) -> Any:
    """A stateful model that predicts the next value, one part of a sequence after the other."""
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(4, 10, 2)),
            source.GRU(8, stateful=True, return_sequences=True, reset_after=False),
            keras.layers.Dense(2),
        ]
    )
    model.compile("sgd", "mse")
    x = drawn(16, 11, 2)
    return model, x[:, :-1], x[:, 1:]


@ON_TORCH
@pytest.mark.parametrize("example", [reviews, weather, text])
def test_the_same_losses(example: Any) -> None:
    """A tutorial's model trains with the same losses on ours and on Keras' layers."""
    histories = []
    keras.config.set_dtype_policy("float64")
    try:
        for source in (keras.layers, fk):
            keras.utils.set_random_seed(1)
            model, x, y = example(source)
            batches = {
                "batch_size": 4 if example is text else 16,
                "shuffle": example is not text,
            }
            fitted = model.fit(x, y, epochs=3, verbose=0, **batches)
            evaluated = model.evaluate(x, y, verbose=0, batch_size=batches["batch_size"])
            histories.append([*fitted.history["loss"], *np.ravel(evaluated)])
    finally:
        keras.config.set_dtype_policy("float32")
    assert np.allclose(*histories, rtol=1e-4, atol=0)
    assert len(set(histories[0])) == len(histories[0])


@ON_TORCH
def test_calls_on_several_threads(kind: str) -> None:
    """Layers of the same sizes compute with their own weights, on several threads at a time."""
    import torch

    x = ops.convert_to_tensor(drawn(B, T, I))
    layers = [layer_of(fk, kind) for _ in range(4)]
    for n, layer in enumerate(layers):
        layer.set_weights([w + n for w in layer.get_weights()])

    def call(n: int) -> np.ndarray:
        with torch.no_grad():
            return layers[n % 4](x).numpy()

    expected = [call(n) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for n, found in enumerate(pool.map(call, range(80))):
            assert np.array_equal(found, expected[n % 4])


@ON_TORCH
def test_another_batch_and_frozen_weights(kind: str) -> None:
    """A layer takes batches of any size, also while its weights are frozen."""
    theirs, ours = (layer_of(source, kind) for source in (keras.layers, fk))
    for layer in (theirs, ours):
        layer.trainable = False
    for rows in (1, 5, 2):
        expected, found = (results_of(layer, drawn(rows, T, I)) for layer in (theirs, ours))
        assert_equal(found, expected)


# Errors


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK[:, :-1], rf"mask must have shape \(B, T\) = \({B}, {T}\), got \({B}, {T - 1}\)"),
        (MASK[0], rf"mask must have shape \(B, T\) = \({B}, {T}\), got \({T},\)"),
        (MASK * 2, "mask must be bool or numbers that are 0 or 1, got 2"),
        (MASK.astype("complex64"), "mask must be bool or numbers"),
    ],
)
def test_wrong_masks(kind: str, mask: np.ndarray, message: str) -> None:
    layer = layer_of(fk, kind)
    with pytest.raises((TypeError, ValueError), match=message):
        layer(drawn(B, T, I), mask=ops.convert_to_tensor(mask))


def test_unknown_activations() -> None:
    with pytest.raises(ValueError, match=r"^recurrent_activation must .* got <lambda>: use"):
        fk.LSTM(3, recurrent_activation=lambda x: x)
    with pytest.raises(ValueError, match=r"got silu: use keras\.layers\.SimpleRNN for it$"):
        fk.SimpleRNN(3, activation="silu")


@pytest.mark.parametrize("change", [fk.swap, fk.restore])
def test_swap_refuses(change: Any) -> None:
    with pytest.raises(TypeError, match=r"^model must be a Keras model or layer, got list$"):
        change([keras.layers.LSTM(3)])


def test_backends_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends without our kernels, and a Keras that is missing, are named."""
    from fusedrnn.keras import _backend

    for name in ("tensorflow", "jax", "openvino"):
        with monkeypatch.context() as patch:
            patch.setattr(keras.backend, "backend", lambda name=name: name)
            message = f"backends torch and numpy, got {name}: set the .* KERAS_BACKEND to torch"
            with pytest.raises(ImportError, match=message):
                _backend.check_backend()
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match=r'needs Keras 3: pip install "fusedrnn\[keras\]"'):
        _backend.check_backend()


# Other processes


def run_pytest(*arguments: str, **environment: str) -> None:
    """Run tests in another process, which imports the plugins in this folder."""
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def require_numpy_backend() -> None:
    if not importlib.util.find_spec("jax"):
        pytest.skip("Keras' NumPy backend imports jax, which is not installed")


@ON_TORCH
def test_numpy_backend() -> None:
    """The tests of both files that need no gradients hold on Keras' NumPy backend."""
    require_numpy_backend()
    models = Path(__file__).with_name("test_keras_models.py")
    run_pytest(__file__, str(models), "-k", "not keras_s_own", KERAS_BACKEND="numpy")


KERAS_TESTS = [
    Path(keras.__file__).parent / "src" / "layers" / "rnn" / f"{name}_test.py"
    for name in ("lstm", "gru", "simple_rnn", "bidirectional")
]


@ON_TORCH
@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_keras_s_own(backend: str) -> None:
    """Keras' tests of its layers pass with ours in their place."""
    if backend == "numpy":
        require_numpy_backend()
    missing = [path.name for path in KERAS_TESTS if not path.exists()]
    if missing:
        pytest.skip(f"the installed package of Keras has no {', '.join(missing)}")
    arguments = ["-p", "keras_with_ours", "-W", "ignore", "-c", os.devnull]
    run_pytest(*arguments, *map(str, KERAS_TESTS), KERAS_BACKEND=backend)


@ON_TORCH
@pytest.mark.parametrize("module", ["", ".layers", ".swapping"])
def test_docstrings(module: str) -> None:
    """Examples in docstrings run and give what they say."""
    results = doctest.testmod(importlib.import_module(f"fusedrnn.keras{module}"))
    assert results.attempted > 0
    assert results.failed == 0


@ON_TORCH
@pytest.mark.parametrize("masked", race_of_keras.MASKS)
def test_bench(monkeypatch: pytest.MonkeyPatch, masked: str) -> None:
    """The benchmark compares models that predict the same."""
    monkeypatch.setattr(race_of_keras, "ROUNDS", 2)
    keras.config.set_dtype_policy("float32")
    for layer in race_of_keras.LAYERS:
        times = race_of_keras.race(layer, (4, 2, 3, 5), masked, 1)
        assert [np.shape(of_call) for of_call in times.values()] == [(2, 2), (2, 2)]
