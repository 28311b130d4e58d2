"""Inputs of the tests of fusedrnn.keras, in float64. Keras must be installed."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
import pytest

HAS_GRADIENTS = keras.backend.backend() == "torch"
ON_TORCH = pytest.mark.skipif(not HAS_GRADIENTS, reason="Keras trains on torch alone here")
B, T, I, H = 6, 7, 3, 5
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


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """Let arrays, layers and models have float64 unless a test says otherwise."""
    keras.utils.set_random_seed(1)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)
