"""Shared by the examples: options of the command line, and the outcome of a training."""

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
    """The outcome of a training.

    parameters: the number of the recurrent layer's parameters.
    epoch_seconds: the median over epochs.
    error: the held-out error, in the unit that the example names.
    """

    parameters: int
    epoch_seconds: float
    error: float


def outcome(layer: Any, seconds: list[float], error: float) -> Outcome:
    """Return the outcome of training a layer of NumPy's or torch's."""
    count = sum(int(np.prod(value.shape)) for value in layer.state_dict().values())
    return Outcome(count, float(np.median(seconds)), float(error))


def options(cell: str) -> dict[str, float]:
    """Return an LSTM's forget bias: with the gate open at first it learns long spans sooner."""
    return {"forget_bias": 1.0} if cell == "LSTM" else {}


def parser(doc: str | None, picture: str, epochs: tuple[int, int]) -> argparse.ArgumentParser:
    """Return a parser with the common options; `epochs`: defaults without and with --short."""
    arg_parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    arg_parser.add_argument("--cell", choices=CELLS, default="GRU", help="default: GRU")
    defaults = f"default: {epochs[0]}; short: {epochs[1]}"
    arg_parser.add_argument("--epochs", type=int, help=defaults)
    arg_parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arg_parser.add_argument(
        "--output", type=Path, default=Path(picture), metavar="PNG", help=f"default: {picture}"
    )
    arg_parser.add_argument("--short", action="store_true", help="a quick run, as a test")
    arg_parser.set_defaults(all_epochs=epochs)
    return arg_parser


def parse(arg_parser: argparse.ArgumentParser, *counts: str) -> argparse.Namespace:
    """Parse and check the options before any work; those in `counts` must be 1 or more."""
    args = arg_parser.parse_args()
    if args.epochs is None:
        args.epochs = args.all_epochs[args.short]
    for name in ("epochs", *counts):
        count = getattr(args, name)
        if count is not None and count < 1:
            arg_parser.error(f"--{name} must be 1 or more, got {count}")
    if args.seed < 0:
        arg_parser.error(f"--seed must be 0 or more, got {args.seed}")
    try:
        check_output("--output", args.output, ".png")
    except UserError as error:
        arg_parser.error(str(error))
    return args


def keep(figure: Any, output: Path) -> None:
    """Write a picture and print its path."""
    save(figure, output, dpi=100)
    print(f"Picture: {output}")
