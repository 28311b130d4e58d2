"""What the examples share: options of the command line, and what a training came to."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from fusedrnn.demo import save
from fusedrnn.files import UserError, check_output

matplotlib.use("Agg")
COLOURS = {"RNN": "tab:green", "GRU": "tab:orange", "LSTM": "tab:blue"}
CELLS = tuple(COLOURS)


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    parameters: of the recurrent layer alone.
    epoch_seconds: the median over epochs.
    error: held out, in the unit that the example names.
    """

    parameters: int
    epoch_seconds: float
    error: float


def outcome(layer: Any, seconds: list[float], error: float) -> Outcome:
    """Count the parameters of a layer of NumPy's or torch's, and sum up its training."""
    count = sum(int(np.prod(value.shape)) for value in layer.state_dict().values())
    return Outcome(count, float(np.median(seconds)), float(error))


def options(cell: str) -> dict[str, float]:
    """Let an LSTM begin with its forget gate open: it learns long spans sooner."""
    return {"forget_bias": 1.0} if cell == "LSTM" else {}


def parser(doc: str | None, picture: str, epochs: tuple[int, int]) -> argparse.ArgumentParser:
    """Return the options that all have; `epochs`: as they are and with --short."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--cell", choices=CELLS, default="GRU", help="default: GRU")
    made.add_argument("--epochs", type=int, help=f"default: {epochs[0]}; short: {epochs[1]}")
    made.add_argument("--seed", type=int, default=0, help="default: 0")
    made.add_argument(
        "--output", type=Path, default=Path(picture), metavar="PNG", help=f"default: {picture}"
    )
    made.add_argument("--short", action="store_true", help="less work, to see that it runs")
    made.set_defaults(all_epochs=epochs)
    return made


def parse(made: argparse.ArgumentParser, *counts: str) -> argparse.Namespace:
    """Parse, and refuse before any work what cannot be; `counts`: options of 1 or more."""
    given = made.parse_args()
    if given.epochs is None:
        given.epochs = given.all_epochs[given.short]
    for name in ("epochs", *counts):
        count = getattr(given, name)
        if count is not None and count < 1:
            made.error(f"--{name} must be 1 or more, got {count}")
    if given.seed < 0:
        made.error(f"--seed must be 0 or more, got {given.seed}")
    try:
        check_output("--output", given.output, ".png")
    except UserError as error:
        made.error(str(error))
    return given


def keep(figure: Any, output: Path) -> None:
    """Write a picture and say where."""
    save(figure, output, dpi=100)
    print(f"Picture: {output}")
