"""The activations that the kernels have, by Keras' functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from ..convert.keras import ACTIVATIONS

Activation = str | tuple[str, float]

# Older versions of Keras do not have hard_tanh.
OURS = {name: ours for name, ours in ACTIVATIONS.items() if hasattr(keras.activations, name)}
_BY_FUNCTION = {getattr(keras.activations, name): ours for name, ours in OURS.items()}


def counterpart(argument: str, function: Callable[..., Any], of: str) -> Activation:
    """Return our name of one of Keras' activation functions.

    Raises
    ------
    ValueError: the kernels lack the function, which came as `argument` of the Keras layer `of`.
    """
    try:
        return _BY_FUNCTION[function]  # type: ignore[no-any-return]
    except (KeyError, TypeError):  # TypeError: a callable that has no hash
        name = getattr(function, "__name__", repr(function))
        raise ValueError(
            f"{argument} must be one of {', '.join(sorted(OURS))}, got {name}: "
            f"use keras.layers.{of} for it"
        ) from None
