"""Replacing the recurrent layers of a model by ours and back, and its files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import keras

from .layers import KERAS, activations_of

_OURS = {theirs: ours for ours, theirs in KERAS.items()}


class Swapped(NamedTuple):
    """The result of `swap` and `restore`; it prints as text.

    Attributes
    ----------
    replaced: the layers that were replaced, by their names in the model.
    kept: the reasons why other recurrent layers were not, by their names.
    """

    replaced: dict[str, Any]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{path}: {type(layer).__name__}({layer.units})"
            for path, layer in self.replaced.items()
        ]
        lines += [f"{path}: kept, {why}" for path, why in self.kept.items()]
        return "\n".join(lines) or "no recurrent layer to replace"


def swap(model: Any) -> Swapped:
    """Replace every LSTM, GRU and SimpleRNN of `keras.layers` in a model by ours.

    The layers stay the same objects and only their class changes. So their weights, the
    optimizer's state, shared layers and every reference to a layer stay valid. Layers within
    Bidirectional, TimeDistributed, models and layers of models are replaced, too.

    Parameters
    ----------
    model: a Keras model or layer, which is changed in place.

    Returns
    -------
    The layers that were replaced, and the reasons why others were not; print it.

    Raises
    ------
    TypeError: model is neither a model nor a layer.

    >>> import keras, fusedrnn.keras as fk
    >>> model = keras.Sequential([keras.layers.GRU(4, name="gru"), keras.layers.Dense(1)])
    >>> print(fk.swap(model))
    gru: GRU(4)
    """
    return _renewed(model, _replace(model, _ours)[0])


def _ours(layer: Any) -> Any:
    """Return our class for a layer, or None if it has it."""
    if type(layer) in KERAS:
        return None
    if type(layer) not in _OURS:
        name = type(layer).__name__
        raise ValueError(f"{name} is not one of keras.layers.LSTM, GRU and SimpleRNN")
    activations_of(layer.cell)
    return _OURS[type(layer)]


def _theirs(layer: Any) -> Any:
    """Return Keras' class for a layer of ours, or None for any other layer."""
    return KERAS.get(type(layer))


def restore(model: Any) -> Swapped:
    """Replace every layer of ours in a model by the layer of `keras.layers`: the way back.

    Parameters, returns and errors are those of `swap`. A model saved after `restore` can be
    loaded where this package is not installed.

    >>> import keras, fusedrnn.keras as fk
    >>> model = keras.Sequential([fk.GRU(4, name="gru"), keras.layers.Dense(1)])
    >>> print(fk.restore(model))
    gru: GRU(4)
    """
    return _renewed(model, _replace(model, _theirs)[0])


def load_model(filepath: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a model by `keras.saving.load_model`, with its recurrent layers replaced by ours.

    Parameters and errors are those of `keras.saving.load_model`; the replacement is `swap`'s.

    >>> import keras, tempfile, fusedrnn.keras as fk
    >>> path = tempfile.mkdtemp() + "/model.keras"
    >>> keras.Sequential([keras.Input((5, 3)), keras.layers.GRU(4)]).save(path)
    >>> type(fk.load_model(path).layers[0]) is fk.GRU
    True
    """
    model = keras.saving.load_model(filepath, *args, **kwargs)
    swap(model)
    return model


def save_model(model: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
    """Save a model by `keras.saving.save_model`, with Keras' own recurrent layers in the file.

    The file can be loaded where this package is not installed. Parameters and errors are those
    of `keras.saving.save_model`. The layers have Keras' classes while the file is written, so
    no other thread may use the model meanwhile.

    >>> import keras, tempfile, fusedrnn.keras as fk
    >>> path = tempfile.mkdtemp() + "/model.keras"
    >>> fk.save_model(keras.Sequential([keras.Input((5, 3)), fk.GRU(4)]), path)
    >>> type(keras.saving.load_model(path).layers[0]) is keras.layers.GRU
    True
    """
    _, restored = _replace(model, _theirs)
    try:
        keras.saving.save_model(model, filepath, *args, **kwargs)
    finally:
        for layer in restored:
            layer.__class__ = _OURS[type(layer)]


def _replace(model: Any, kind_of: Callable[[Any], Any]) -> tuple[Swapped, list[Any]]:
    """Give each recurrent layer in a model the class that `kind_of` returns.

    `kind_of` returns None for a layer to leave, or raises ValueError with the reason. Returns
    the names, and the layers that were changed.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a Keras model or layer, got {type(model).__name__}")
    done, changed = Swapped({}, {}), []
    for path, layer in _layers_in(model, "", set()):
        if not isinstance(layer, keras.layers.RNN):
            continue
        name = _unique(path, {**done.replaced, **done.kept})
        try:
            kind = kind_of(layer)
        except ValueError as reason:
            done.kept[name] = str(reason)
            continue
        if kind is not None:
            layer.__class__ = kind
            done.replaced[name] = layer
            changed.append(layer)
    return done, changed


def _unique(path: str, used: Collection[str]) -> str:
    """Return a name that is not used: layers within a layer may have equal names."""
    names = itertools.chain([path], (f"{path} ({n})" for n in itertools.count(2)))
    return next(name for name in names if name not in used)


def _renewed(model: Any, done: Swapped) -> Swapped:
    """Let Keras make again the functions that it compiled from a model's layers."""
    for _, layer in _layers_in(model, "", set()) if done.replaced else ():
        for name in ("train", "test", "predict"):
            if getattr(layer, f"{name}_function", None) is not None:
                getattr(layer, f"make_{name}_function")(force=True)
    return done


def _layers_in(layer: Any, path: str, visited: set[int]) -> Iterator[tuple[str, Any]]:
    """Iterate over a layer and all layers within it, each once, with their paths."""
    visited.add(id(layer))
    yield path or layer.name, layer
    # Keras has no public list of the layers within a layer that is not a model.
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        if id(inner) not in visited:
            yield from _layers_in(
                inner, f"{path}/{inner.name}" if path else inner.name, visited
            )
