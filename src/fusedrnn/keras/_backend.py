"""The check of Keras and its backend, before anything else of Keras is imported."""

from __future__ import annotations

BACKENDS = ("torch", "numpy")
_CHOICE = (
    "set the environment variable KERAS_BACKEND to torch or numpy before keras is imported"
)


def check_backend() -> None:
    """Raise ImportError if Keras is missing or has a backend without our kernels."""
    try:
        import keras
    except ModuleNotFoundError as missing:
        if missing.name == "keras":
            raise ImportError(
                'fusedrnn.keras needs Keras 3: pip install "fusedrnn[keras]"'
            ) from missing
        raise ImportError(f"keras cannot be imported, {missing}: {_CHOICE}") from missing
    backend = keras.backend.backend()
    if backend not in BACKENDS:
        raise ImportError(
            f"fusedrnn.keras runs on Keras' backends torch and numpy, got {backend}: {_CHOICE}"
        )
