"""`fit` and `predict` of a Keras model on our layers against the same on Keras' own.

The model has one recurrent layer and a Dense layer, so a call includes what Keras itself takes.
Keras is imported by the functions here alone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from .forms import Sizes
from .race import quartiles, seconds_of

LAYERS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "GRU": {},
    "GRU, reset_after=False": {"reset_after": False},
    "SimpleRNN": {},
}
SHAPES: tuple[Sizes, ...] = ((20, 32, 16, 32), (100, 32, 32, 64), (96, 64, 7, 64))
MASKS = ("none", "left padding", "gaps")  # of half of the steps
# The number of batches of a call, whose own cost most training spreads over more batches.
BATCHES = {"fit": 8, "predict": 16}
ROUNDS = 5
LARGEST_DIFFERENCE = 1e-4  # of a prediction

Array = np.ndarray[Any, Any]


def race(layer: str, sizes: Sizes, masked: str, threads: int) -> dict[str, list[list[float]]]:
    """Return seconds of each round by what was called: ours, then Keras'.

    Raises
    ------
    RuntimeError: the predictions differ.
    """
    os.environ["KERAS_BACKEND"] = "torch"  # read when keras is imported
    import keras
    import torch

    import fusedrnn.keras

    torch.set_num_threads(threads)
    (inputs, target), (long, _) = (_data(sizes, masked, n) for n in BATCHES.values())
    models = [_model(source, layer, sizes, masked) for source in (fusedrnn.keras, keras.layers)]
    models[0].set_weights(models[1].get_weights())
    batch = {"batch_size": sizes[1], "verbose": 0}
    ours, theirs = (model.predict(inputs, **batch) for model in models)
    if not np.abs(ours - theirs).max() < LARGEST_DIFFERENCE:
        raise RuntimeError(f"predictions of {layer} at {sizes}, mask: {masked}, differ")
    calls: dict[str, Callable[[Any], Any]] = {
        "fit": lambda model: model.fit(inputs, target, **batch),
        "predict": lambda model: model.predict(long, **batch),
    }
    return {name: _rounds(call, models) for name, call in calls.items()}


def _rounds(call: Callable[[Any], Any], models: list[Any]) -> list[list[float]]:
    """Return seconds of a call of each model, in turn, after one that is not timed."""
    for model in models:
        call(model)
    return [[seconds_of(partial(call, m), 1) for m in models] for _ in range(ROUNDS)]


def _data(sizes: Sizes, masked: str, batches: int) -> tuple[list[Array], Array]:
    T, B, I, _ = sizes
    rng, N = np.random.default_rng(0), B * batches
    x, target = rng.normal(size=(N, T, I)), rng.normal(size=(N, 1))
    inputs: list[Array] = [x.astype(np.float32)]
    if masked == "left padding":
        inputs.append(np.arange(T) >= rng.integers(0, T, (N, 1)))
    elif masked == "gaps":
        inputs.append(rng.random((N, T)) < 0.5)
    return inputs, target.astype(np.float32)


def _model(source: Any, layer: str, sizes: Sizes, masked: str) -> Any:
    import keras

    T, _, I, H = sizes
    kind = getattr(source, layer.partition(",")[0])
    inputs = [keras.Input((T, I))]
    if masked != "none":
        inputs.append(keras.Input((T,), dtype="bool"))
    y = kind(H, **LAYERS[layer])(inputs[0], mask=inputs[1] if len(inputs) > 1 else None)
    model = keras.Model(inputs, keras.layers.Dense(1)(y))
    model.compile("adam", "mse")
    return model


def rows() -> Iterator[tuple[Any, ...]]:
    """Yield the columns' names, then a row of each layer, mask, shape and number of threads."""
    heads = [f"{name} {what}" for name in ("fit", "predict") for what in ("ms", "× Keras")]
    yield "layer", "mask", "T, B, I, H", "threads", *heads
    for count, layer, masked, sizes in itertools.product((1, 2), LAYERS, MASKS, SHAPES):
        cells: list[str] = []
        for times in race(layer, sizes, masked, count).values():
            median, low, high = quartiles([theirs / ours for ours, theirs in times])
            ms = np.median([ours for ours, _ in times]) * 1e3
            cells += [f"{ms:.1f}", f"{median:.1f} ({low:.1f}–{high:.1f})"]
        yield layer, masked, ", ".join(map(str, sizes)), count, *cells
