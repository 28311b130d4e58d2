"""Layers of fusedrnn.keras against Keras' own: results, gradients, files, whole models.

The backend of Keras is fixed for a process: conftest.py chooses torch, and
`test_numpy_backend` runs the tests of this file on NumPy in another process.
"""

from __future__ import annotations

import copy
import doctest
import importlib
import importlib.util
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TOLERANCE, assert_close

keras = pytest.importorskip("keras", reason="Keras is not installed")
pytest.importorskip("fusedrnn.keras", reason="Keras has a backend without our kernels")

from keras import ops  # noqa: E402

import fusedrnn.keras as fk  # noqa: E402
from fusedrnn.bench import keras as race_of_keras  # noqa: E402

HAS_GRADIENTS = keras.backend.backend() == "torch"
ON_TORCH = pytest.mark.skipif(not HAS_GRADIENTS, reason="Keras trains on torch alone here")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "GRU-before": ("GRU", {"reset_after": False}),
    "SimpleRNN": ("SimpleRNN", {}),
}
KERAS = TOLERANCE["Keras in float64"]
B, T, I, H = 6, 7, 3, 5
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


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    """Let arrays, layers and models have float64 unless a test says otherwise."""
    keras.utils.set_random_seed(1)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


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


ACTIVATIONS = [
    "elu",
    "hard_sigmoid",
    "hard_tanh",
    "leaky_relu",
    "linear",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "softplus",
    "softsign",
    "tanh",
]


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


def model_of(source: Any) -> Any:
    """A model with every kind of layer, some of them within others."""
    inputs = keras.Input((None, I))
    inner = keras.Sequential([keras.Input((None, H)), source.GRU(H, return_sequences=True)])
    a = keras.layers.Bidirectional(source.LSTM(H, return_sequences=True), "sum")(inputs)
    b = inner(a)
    c = keras.layers.TimeDistributed(source.SimpleRNN(2))(keras.layers.Reshape((-1, H, 1))(b))
    d = source.GRU(H, reset_after=False)(keras.layers.Concatenate()([b, c]))
    model = keras.Model(inputs, keras.layers.Dense(1)(d))
    model.compile("adam", keras.losses.MeanSquaredError())
    return model


def classes_in(model: Any) -> set[str]:
    """The modules of the recurrent layers' classes."""
    return {
        type(layer).__module__.partition(".")[0]
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.RNN)
    }


X, TARGET = drawn(8, T, I).astype("float32"), drawn(8, 1, seed=1).astype("float32")


def assert_predicts(model: Any, expected: np.ndarray) -> None:
    assert np.allclose(model.predict(X, verbose=0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # Keras' own, of HDF5 files
@pytest.mark.parametrize("file", ["model.keras", "model.h5"])
def test_files_of_models(file: str, tmp_path: Path) -> None:
    """A file of ours or of Keras' can be loaded as ours or as Keras'."""
    if file.endswith("h5"):
        pytest.importorskip("h5py")
    path = str(tmp_path / file)
    model = model_of(fk)
    expected = model.predict(X, verbose=0)
    model.save(path)
    for load in (keras.saving.load_model, fk.load_model):
        loaded = load(path)
        assert classes_in(loaded) == {"fusedrnn"}
        assert_predicts(loaded, expected)
    fk.save_model(model, path)
    assert classes_in(model) == {"fusedrnn"}
    for load, source in ((keras.saving.load_model, "keras"), (fk.load_model, "fusedrnn")):
        loaded = load(path)
        assert classes_in(loaded) == {source}
        assert_predicts(loaded, expected)


def test_a_file_needs_no_fusedrnn(tmp_path: Path) -> None:
    """A file of save_model is loaded where this package is missing; one of model.save is not,
    and the error names it.
    """
    model = model_of(fk)
    fk.save_model(model, tmp_path / "keras.keras")
    model.save(tmp_path / "ours.keras")
    code = f"""
import sys
sys.modules["fusedrnn"] = None
import keras
keras.saving.load_model({str(tmp_path / "keras.keras")!r})
try:
    keras.saving.load_model({str(tmp_path / "ours.keras")!r})
except TypeError as error:
    assert "fusedrnn" in str(error)
else:
    raise AssertionError("loaded")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_files_of_weights(tmp_path: Path) -> None:
    """Weights are saved and loaded in both directions."""
    pytest.importorskip("h5py")
    theirs, ours = model_of(keras.layers), model_of(fk)
    for source, target in ((theirs, ours), (ours, theirs)):
        source.set_weights([drawn(*w.shape, seed=len(w.shape)) for w in source.get_weights()])
        source.save_weights(tmp_path / "model.weights.h5")
        target.load_weights(tmp_path / "model.weights.h5")
        assert_predicts(target, source.predict(X, verbose=0))


@pytest.mark.filterwarnings("ignore")  # Keras' own, of an optimizer that has not trained yet
@pytest.mark.parametrize("copied", ["clone", "deepcopy", "pickle"])
def test_copies(copied: str) -> None:
    """clone_model, deepcopy and pickle copy our layers."""
    model = model_of(fk)
    model.predict(X, verbose=0)
    if copied == "clone":
        new = keras.models.clone_model(model)
        new.set_weights(model.get_weights())
    else:
        new = (
            copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
        )
    assert classes_in(new) == {"fusedrnn"}
    assert_predicts(new, model.predict(X, verbose=0))


# Replacing


class Own(keras.layers.LSTM):
    """A user's layer."""


def test_swap_and_restore() -> None:
    """swap replaces every layer in place, says what it leaves alone, and restore undoes it."""
    model = model_of(keras.layers)
    expected = model.predict(X, verbose=0)
    layers = model._flatten_layers()
    done = fk.swap(model)
    kinds = [str(done).splitlines()[n].rpartition(": ")[2] for n in range(5)]
    assert sorted(kinds) == ["GRU(5)", "GRU(5)", "LSTM(5)", "LSTM(5)", "SimpleRNN(2)"]
    assert "bidirectional" in str(done).partition("/forward_lstm")[0]
    assert not done.kept
    assert classes_in(model) == {"fusedrnn"}
    assert all(a is b for a, b in zip(layers, model._flatten_layers(), strict=True))
    assert_predicts(model, expected)
    assert str(fk.swap(model)) == "no recurrent layer to replace"
    assert str(fk.swap(keras.layers.LSTM(3, name="alone"))) == "alone: LSTM(3)"
    assert list(fk.restore(model).replaced) == list(done.replaced)
    assert classes_in(model) == {"keras"}
    assert_predicts(model, expected)


def test_swap_says_what_it_keeps() -> None:
    """swap keeps subclasses, other cells and unknown activations, with the reason."""
    model = keras.Sequential(
        [
            keras.layers.GRU(3, activation="gelu", return_sequences=True, name="a"),
            Own(3, return_sequences=True, name="b"),
            keras.layers.RNN(keras.layers.GRUCell(3), name="c"),
        ]
    )
    assert str(fk.swap(model)) == (
        f"a: kept, activation must be one of {', '.join(ACTIVATIONS)}, got gelu: "
        "use keras.layers.GRU for it\n"
        "b: kept, Own is not one of keras.layers.LSTM, GRU and SimpleRNN\n"
        "c: kept, RNN is not one of keras.layers.LSTM, GRU and SimpleRNN"
    )


@ON_TORCH
def test_swap_in_the_middle_of_training() -> None:
    """The optimizer's state stays valid when the layers are replaced."""
    histories = []
    for swaps in (False, True):
        keras.utils.set_random_seed(2)
        model = model_of(keras.layers)
        losses = model.fit(X, TARGET, epochs=2, verbose=0, shuffle=False).history["loss"]
        if swaps:
            fk.swap(model)
        losses += model.fit(X, TARGET, epochs=3, verbose=0, shuffle=False).history["loss"]
        histories.append(losses)
    assert np.allclose(*histories, rtol=1e-4)


def test_saving_within_training(tmp_path: Path) -> None:
    """save_model in a callback leaves the training and the layers as they are."""

    class Save(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            fk.save_model(self.model, tmp_path / "model.keras")

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            (fk.restore if epoch else fk.swap)(self.model)

    model = model_of(fk)
    if HAS_GRADIENTS:
        model.fit(X, TARGET, epochs=2, verbose=0, callbacks=[Save()])
        assert classes_in(model) == {"keras"}
    fk.swap(model)
    fk.save_model(model, tmp_path / "model.keras")
    assert classes_in(model) == {"fusedrnn"}


class Twins(keras.layers.Layer):
    """A layer with two layers of one name."""

    def __init__(self) -> None:
        super().__init__(name="twins")
        self.one, self.two = (keras.layers.GRU(3, name="gru") for _ in range(2))

    # Without these two, Keras calls the layer with uninitialised arrays, which may overflow.
    def build(self, shape: Any) -> None:
        self.one.build(shape)
        self.two.build(shape)

    def compute_output_shape(self, shape: Any) -> Any:
        return (shape[0], 3)

    def call(self, x: Any) -> Any:
        return self.one(x) + self.two(x)


def test_layers_of_one_name(tmp_path: Path) -> None:
    """swap names both, and save_model leaves both as they were."""
    model = keras.Sequential([keras.Input((4, 2)), Twins()])
    assert list(fk.swap(model).replaced) == ["twins/gru", "twins/gru (2)"]
    fk.save_model(model, tmp_path / "model.keras")
    assert type(model.layers[0].one) is type(model.layers[0].two) is fk.GRU


# Training


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
    """The tests of this file that need no gradients hold on Keras' NumPy backend."""
    require_numpy_backend()
    run_pytest(__file__, "-k", "not keras_s_own", KERAS_BACKEND="numpy")


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
