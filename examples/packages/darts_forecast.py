"""Train darts' RNNModel to forecast a series, and the same on our kernels.

    pip install --no-deps darts
    pip install holidays nfoursid pandas pytorch-lightning requests scikit-learn
    pip install statsmodels threadpoolctl xarray
    python examples/packages/darts_forecast.py

darts makes its network when `fit` begins, so a callback of Lightning swaps the modules there.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from shared import Case, Package, Pair, difference, main

PACKAGE = Package(
    "darts",
    ("darts", "holidays", "nfoursid", "pytorch_lightning", "statsmodels", "xarray"),
    "pip install --no-deps darts, and holidays nfoursid pandas pytorch-lightning requests "
    "scikit-learn statsmodels threadpoolctl xarray",
)

# Training adds the rounding of each step, and Adam scales up that of small gradients.
TRAINED = 1e-4


def cases(short: bool) -> Iterator[Case]:
    """Yield cells and sizes; darts' default is 25 units."""
    import pandas as pd
    import pytorch_lightning
    from darts import TimeSeries
    from darts.models import RNNModel

    import fusedrnn.torch as ft

    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "darts"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Swap(pytorch_lightning.Callback):
        """Swap the network's modules before its optimizer is made."""

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            ft.swap(pl_module)

    hours = np.arange(400 if short else 3000)
    rng = np.random.default_rng(0)
    noise = np.convolve(rng.normal(size=len(hours) + 23), np.ones(24) / 24, "valid")
    values = np.sin(hours * (2 * np.pi / 24)) + np.sin(hours * (2 * np.pi / 168)) + noise
    times = pd.date_range("2020-01-01", periods=len(hours), freq="h")
    series = TimeSeries.from_times_and_values(times, values.astype(np.float32))

    def model(cell: str, size: int, callbacks: list[Any]) -> Any:
        """Return a model after one epoch."""
        trainer = {"accelerator": "cpu", "callbacks": callbacks, "logger": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        made = RNNModel(
            72,
            cell,
            hidden_dim=size,
            training_length=96,
            batch_size=32,
            random_state=0,
            pl_trainer_kwargs=trainer | quiet,
        )
        return made.fit(series, epochs=1)

    for cell, size in (("LSTM", 25), ("GRU", 25), ("RNN", 25), ("LSTM", 128), ("GRU", 128)):
        own, ours = model(cell, size, []), model(cell, size, [Swap()])
        error = difference(ours.predict(24).values(), own.predict(24).values())
        yield Case(
            f"{cell}, {size} units, an epoch",
            lines=4,
            difference=error,
            limit=TRAINED,
            whole=Pair(
                lambda m=own: m.fit(series, epochs=1), lambda m=ours: m.fit(series, epochs=1)
            ),
        )
    yield Case(
        f"{cell}, {size} units, a forecast of 24 steps",
        lines=4,
        difference=error,
        limit=TRAINED,
        whole=Pair(lambda: own.predict(24), lambda: ours.predict(24)),
    )


if __name__ == "__main__":
    main(__doc__, {PACKAGE: cases})
