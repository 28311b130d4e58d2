"""Whole models with layers of fusedrnn.keras: files, copies, swap and restore.

The backend of Keras is torch, or that of the process which `test_numpy_backend` starts.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="Keras is not installed")
pytest.importorskip("fusedrnn.keras", reason="Keras has a backend without our kernels")

from keras_inputs import (  # noqa: E402
    ACTIVATIONS,
    HAS_GRADIENTS,
    ON_TORCH,
    H,
    I,
    T,
    drawn,
    in_float64,  # noqa: F401
)

import fusedrnn.keras as fk  # noqa: E402


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
