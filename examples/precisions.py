"""The errors of weights of 8 and 16 bits: the other examples' tasks in each precision.

    pip install "fusedrnn[examples]"
    python examples/precisions.py

Each model is trained in float32, from several seeds, and then makes its held-out predictions in
float32 and with the recurrent weights in each narrow precision. The script prints a Markdown
table of mean errors and of the largest difference from float32 that any seed has; progress goes
to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import characters
import daily_weather
import digits
import numpy as np
import topics
import torch
from common import CELLS, options

import fusedrnn.torch as ft

# The arguments of `quantize`.
PRECISIONS: dict[str, tuple[Any, ...]] = {
    "int8": ("int8",),
    "int8, x_bits=8": ("int8", 8),
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
}
Errors = dict[str, float]


def in_each(model: torch.nn.Module, error: Callable[[torch.nn.Module], float]) -> Errors:
    """Return the error of a model in float32 and in each precision."""
    models = {"float32": model.eval()}
    for name, arguments in PRECISIONS.items():
        models[name] = ft.quantize(model, *arguments).model
    with torch.no_grad():
        return {name: error(one) for name, one in models.items()}


def of_digits(cell: str, seed: int, short: bool) -> Errors:
    """Per cent of wrong digits."""
    model, _ = digits.train(cell, 2 if short else 40, seed)
    _, _, unseen, answers = digits.split()

    def error(one: Any) -> float:
        wrong = digits.probabilities(one, unseen)[-1].argmax(-1) != answers
        return 100 * float(wrong.float().mean())

    return in_each(model, error)


def of_topics(cell: str, seed: int, short: bool) -> Errors:
    """Per cent of wrong topics."""
    model, _, held = topics.fit(cell, 1 if short else 15, seed)
    return in_each(model, lambda one: topics.wrong(topics.predict(one, held), held))


def of_characters(cell: str, seed: int, short: bool) -> Errors:
    """Bits per character."""
    steps = 5 if short else None
    how = (cell, 1 if short else 2, seed, 16, 128, steps)
    model, *_ = characters.train(*how, **options(cell))
    text = characters.in_rows(16)
    held = text[-(len(text) // 20) :]
    return in_each(model.cpu(), lambda one: float(characters.loss_of(one, held, None)[0]))


def of_weather(cell: str, seed: int, short: bool) -> Errors:
    """Mean absolute error of daily temperatures in °C."""

    def quantised(arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
        return lambda layer: layer.quantize(*arguments)

    convert: Mapping[str, Any] = {n: quantised(a) for n, a in PRECISIONS.items()}
    epochs = 1 if short else 10
    forecasts, _ = daily_weather.train(cell, epochs, seed, convert=convert)
    _, table, first = daily_weather.read_days(2015)
    truth = daily_weather.ahead(table[:, 0])[first:]
    named = {"float32": forecasts[cell]} | {name: forecasts[name] for name in PRECISIONS}
    return {name: float(np.abs(forecast - truth).mean()) for name, forecast in named.items()}


TASKS: dict[str, Callable[[str, int, bool], Errors]] = {
    "digits, % wrong": of_digits,
    "topics, % wrong": of_topics,
    "characters, bits": of_characters,
    "daily weather, °C": of_weather,
}


def main() -> None:
    """Train every cell on every task and print the table."""
    arg_parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arg_parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    arg_parser.add_argument("--short", action="store_true", help="one seed, one epoch")
    args = arg_parser.parse_args()
    if args.seeds < 1:
        arg_parser.error(f"--seeds must be 1 or more, got {args.seeds}")
    names = ["float32", *PRECISIONS]
    print(f"| task | cell | {' | '.join(names)} |")
    print("|---" * (2 + len(names)) + "|")
    for task, run in TASKS.items():
        for cell in CELLS:
            with contextlib.redirect_stdout(sys.stderr):
                seeds = range(1 if args.short else args.seeds)
                found = [run(cell, seed, args.short) for seed in seeds]
            entries = [f"{np.mean([one['float32'] for one in found]):.3f}"]
            for name in PRECISIONS:
                mean = np.mean([one[name] for one in found])
                worst = max((one[name] - one["float32"] for one in found), key=abs)
                entries.append(f"{mean:.3f} ({worst:+.3f})")
            print(f"| {task} | {cell} | {' | '.join(entries)} |", flush=True)


if __name__ == "__main__":
    main()
