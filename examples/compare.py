"""RNN, LSTM or GRU? Compare them on the tasks of the other examples, each at its own rate.

    pip install "fusedrnn[examples]"
    python examples/compare.py

For each task and cell the learning rate is chosen first: the cell is trained at every rate of
one grid, for the same number of epochs, and the rate with the least error on a validation part
of the training data is taken. Then the cell is trained at that rate from several seeds, and the
errors on the held-out data, which were not used before, are reported. The LSTM has two columns:
with biases drawn as torch draws them, and with forget_bias=1.

The script prints Markdown tables and draws one dot for each seed; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import characters
import daily_weather
import digits
import matplotlib.pyplot as plt
import numpy as np
import recall
import streaming
import topics
from common import CELLS, COLOURS, Outcome, keep, options

from fusedrnn.files import UserError, check_output

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
WITH_BIAS = "LSTM, forget_bias=1"
COLUMNS = {cell: (cell, {}) for cell in CELLS} | {WITH_BIAS: ("LSTM", options("LSTM"))}
BARS = COLOURS | {WITH_BIAS: "tab:purple"}


class Task(NamedTuple):
    """One task, and how much training it gets.

    run: takes a cell, epochs, seed, rate, whether to validate, and options of the layer.
    epochs: the number in the full run, and with --short.
    searches: how many seeds each rate of the search is trained from.
    seeds: how many seeds the reported errors are from.
    """

    name: str
    error: str
    run: Callable[..., Outcome]
    epochs: tuple[int, int]
    searches: int
    seeds: int


def _daily(
    cell: str, epochs: int, seed: int, rate: float, validate: bool, **extra: float
) -> Outcome:
    year = 2014 if validate else 2015
    return daily_weather.train(cell, epochs, seed, year, rate, **extra)[-1]


def _characters(cell: str, epochs: int, seed: int, *how: float, **extra: float) -> Outcome:
    steps = 5 if epochs == 1 else None
    return characters.train(cell, epochs, seed, 16, 128, steps, *how, **extra)[-1]


def _recall(
    cell: str, epochs: int, seed: int, rate: float, validate: bool, **extra: float
) -> Outcome:
    seed += 1000 * validate  # the search walks other corridors than the reported seeds
    return recall.train(cell, epochs, seed, rate=rate, **extra)[-1]


TASKS = (
    Task("daily weather", "°C", _daily, (10, 1), 3, 5),
    Task("hourly weather", "°F", lambda *a, **k: streaming.train(*a, **k)[-1], (5, 1), 1, 3),
    Task("digits", "% wrong", lambda *a, **k: digits.train(*a, **k)[-1], (30, 1), 1, 4),
    Task("topics", "% wrong", lambda *a, **k: topics.train(*a, **k)[-1], (15, 1), 1, 3),
    Task("characters", "bits", _characters, (2, 1), 1, 2),
    Task("recall", "% wrong turns", _recall, (120, 1), 1, 3),
)


class Result(NamedTuple):
    """The validation error of each rate, the rate chosen, and the outcome of each seed."""

    validation: dict[float, float]
    rate: float
    outcomes: list[Outcome]


def measure(task: Task, column: str, short: bool) -> Result:
    """Choose a learning rate on the validation part, then train at it from several seeds."""
    cell, extra = COLUMNS[column]
    epochs, searches, seeds = (task.epochs[1], 1, 1) if short else (task.epochs[0], *task[-2:])

    def train(rate: float, validate: bool, count: int) -> list[Outcome]:
        return [task.run(cell, epochs, s, rate, validate, **extra) for s in range(count)]

    validation = {}
    for rate in RATES[1:2] if short else RATES:
        error = float(np.mean([one.error for one in train(rate, True, searches)]))
        validation[rate] = error if np.isfinite(error) else np.inf
        print(f"{task.name}, {column}: rate {rate:g}, validation {error:.3f}", flush=True)
    best = min(validation, key=validation.__getitem__)
    return Result(validation, best, train(best, False, seeds))


def draw(found: dict[str, dict[str, Result]], output: Path) -> None:
    """Draw the errors: one panel for each task, one dot for each seed."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained")
    for task, panel in zip(TASKS, axes.flat, strict=True):
        ticks = []
        for i, (column, result) in enumerate(found[task.name].items()):
            errors = [one.error for one in result.outcomes]
            panel.bar(i, np.mean(errors), color=BARS[column], alpha=0.35)
            panel.plot([i] * len(errors), errors, "o", color=BARS[column], ms=5)
            ticks.append(f"{column.replace(', forget_', chr(10))}\n{result.rate:g}")
        panel.set_xticks(range(len(ticks)), ticks)
        panel.set(title=task.name, ylabel=f"error, {task.error}")
        panel.grid(axis="y", alpha=0.3)
    figure.suptitle("Held-out errors: bars are means, dots are seeds; below, the rate chosen")
    keep(figure, output)


def table(heading: str, rows: list[tuple[str, list[str]]]) -> str:
    """Return a table in Markdown with a column for each cell."""
    lines = [(heading, list(COLUMNS)), ("---", ["---:"] * len(COLUMNS)), *rows]
    return "\n".join(f"| {' | '.join([name, *values])} |" for name, values in lines) + "\n"


def spread(result: Result) -> str:
    errors = [one.error for one in result.outcomes]
    return f"{np.mean(errors):.2f} ({min(errors):.2f} to {max(errors):.2f})"


def seconds(result: Result) -> str:
    return f"{np.median([one.epoch_seconds for one in result.outcomes]):.3f}"


def main() -> None:
    """Train every cell on every task, print the tables, and draw."""
    arg_parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arg_parser.add_argument("--output", type=Path, default=Path("compare.png"), metavar="PNG")
    arg_parser.add_argument("--short", action="store_true", help="one epoch, rate and seed")
    args = arg_parser.parse_args()
    try:
        check_output("--output", args.output, ".png")
    except UserError as error:
        arg_parser.error(str(error))
    found: dict[str, dict[str, Result]] = {}
    for task in TASKS:
        with contextlib.redirect_stdout(sys.stderr):  # the examples print progress, too
            found[task.name] = {c: measure(task, c, args.short) for c in COLUMNS}

    def rows(form: Callable[[Result], str], unit: bool = False) -> list[tuple[str, list[str]]]:
        names = [f"{task.name}, {task.error}" if unit else task.name for task in TASKS]
        results = (found[task.name].values() for task in TASKS)
        return [(n, [form(one) for one in r]) for n, r in zip(names, results, strict=True)]

    print(table("error, held out", rows(spread, unit=True)))
    print(table("learning rate chosen", rows(lambda result: f"{result.rate:g}")))
    validation = [
        (f"{task.name}, {rate:g}", [f"{r.validation[rate]:.2f}" for r in results.values()])
        for task, results in zip(TASKS, found.values(), strict=True)
        for rate in results["RNN"].validation
    ]
    print(table("validation error at each rate", validation))
    print(table("parameters of the layer", rows(lambda r: f"{r.outcomes[0].parameters:,}")))
    print(table("seconds an epoch", rows(seconds)))
    draw(found, args.output)


if __name__ == "__main__":
    main()
