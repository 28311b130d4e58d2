"""Forecast a day of temperature with Lightning, from New York's hourly weather of 2013.

    pip install "fusedrnn[demo,lightning]"
    python examples/lightning_weather.py

A GRU reads four days of an airport's observations; at each hour a linear head predicts how each
of the next 24 temperatures will differ from the present one. It is trained on January to
October; the errors are those of November and December, beside those of a forecast of no change.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import fusedrnn.torch as ft
from fusedrnn.demo import Weather, read_weather, weather_file
from fusedrnn.files import UserError

WINDOW, HORIZON, HELD_OUT = 96, 24, 61 * 24  # hours


class Forecaster(lightning.LightningModule):
    """A GRU with layer normalisation and zoneout, which the fused kernels compute, too."""

    def __init__(self, features: int, hidden: int = 48) -> None:
        super().__init__()
        self.rnn = ft.GRU(features, hidden, batch_first=True, layer_norm=True, zoneout=0.05)
        self.head = nn.Linear(hidden, HORIZON)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, features) to the predicted changes (B, T, HORIZON)."""
        return self.head(self.rnn(x)[0])

    def error(self, batch: list[Tensor]) -> Tensor:
        """Return the mean absolute error in °F, from the second day of a window on."""
        x, change = batch
        return (self(x) - change)[:, 24:].abs().mean()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.error(batch)
        self.log("training", loss, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Log the error, and that of a forecast of no change."""
        self.log_dict(
            {"held out": self.error(batch), "no change": batch[1][:, 24:].abs().mean()}
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def windows(weather: Weather, first: int, last: int) -> TensorDataset:
    """Return overlapping windows of the hours [first, last), and each hour's targets."""
    features = torch.tensor(weather.features, dtype=torch.float32)
    features = (features - features.mean(0)) / features.std(0)
    temperature = torch.tensor(weather.temperature, dtype=torch.float32)
    ahead = temperature[1:].unfold(0, HORIZON, 1)
    change = ahead - temperature[: len(ahead), None]
    last = min(last, len(ahead))
    cut = (features[first:last], change[first:last])
    x, y = (a.unfold(0, WINDOW, WINDOW // 4).transpose(1, 2).contiguous() for a in cut)
    return TensorDataset(x, y)


def main() -> None:
    """Train, and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--precision", default="32-true", help='or "bf16-mixed" and so on')
    args = parser.parse_args()
    try:
        airports = read_weather(weather_file())
    except UserError as error:
        parser.error(str(error))
    hours = len(airports["JFK"].temperature)
    training = ConcatDataset(windows(w, 0, hours - HELD_OUT) for w in airports.values())
    held_out = windows(airports["JFK"], hours - HELD_OUT, hours)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    model = Forecaster(airports["JFK"].features.shape[1])
    trainer.fit(model, DataLoader(training, 64, shuffle=True), DataLoader(held_out, 64))
    errors = trainer.callback_metrics
    print(
        f"JFK, {HELD_OUT // 24} held-out days, mean absolute error of the next {HORIZON} "
        f"hours: {errors['held out']:.2f} °F (no change: {errors['no change']:.2f} °F)"
    )


if __name__ == "__main__":
    main()
