"""RNN, LSTM or GRU? Train the three on the tasks of the other examples, from several seeds.

    pip install "fusedrnn[examples]"
    python examples/compare.py

Prints Markdown tables: the error on what was held out, from the mean of the seeds the least and
the greatest; the parameters of the layer; the median seconds of an epoch. For digits and topics
a seed also draws which part is held out. On stderr it says what it is doing. The pictures have
one dot for each seed.
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
from common import CELLS, COLOURS, Outcome, keep

from fusedrnn.files import UserError, check_output


class Task(NamedTuple):
    """What is trained, and how often.

    run: takes a cell, epochs and a seed.
    epochs: as they are, and with --short.
    """

    name: str
    error: str
    run: Callable[[str, int, int], Outcome]
    epochs: tuple[int, int]
    seeds: int


def _characters(cell: str, epochs: int, seed: int) -> Outcome:
    steps = 5 if epochs == 1 else None
    return characters.train(cell, epochs, seed, batch=32, hidden=128, steps=steps)[-1]


TASKS = (
    Task("daily weather", "°C", lambda *a: daily_weather.train(*a)[-1], (10, 1), 5),
    Task("hourly weather", "°F", lambda *a: streaming.train(*a)[-1], (8, 1), 3),
    Task("digits", "% wrong", lambda *a: digits.train(*a)[-1], (40, 1), 5),
    Task("topics", "% wrong", lambda *a: topics.train(*a)[-1], (25, 1), 3),
    Task("characters", "bits", _characters, (3, 1), 2),
    Task("recall", "% wrong turns", lambda *a: recall.train(*a)[-1], (150, 1), 3),
)


def draw(found: dict[str, dict[str, list[Outcome]]], output: Path) -> None:
    """Draw the errors, a panel a task, a dot a seed."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
    for task, panel in zip(TASKS, axes.flat, strict=True):
        ticks = []
        for i, cell in enumerate(CELLS):
            results = found[task.name][cell]
            errors = [one.error for one in results]
            panel.bar(i, np.mean(errors), color=COLOURS[cell], alpha=0.35)
            panel.plot([i] * len(errors), errors, "o", color=COLOURS[cell], ms=5)
            ticks.append(f"{cell}\n{np.median([one.epoch_seconds for one in results]):.2g} s")
        panel.set_xticks(range(3), ticks)
        panel.set(title=task.name, ylabel=f"error, {task.error}")
        panel.grid(axis="y", alpha=0.3)
    figure.suptitle("Errors held out: bars are means, dots are seeds; below, seconds an epoch")
    keep(figure, output)


def table(heading: str, rows: list[tuple[str, list[str]]]) -> str:
    """Return a table in Markdown with a column for each cell."""
    lines = [(heading, list(CELLS)), ("---", ["---:"] * len(CELLS)), *rows]
    return "\n".join(f"| {' | '.join([name, *values])} |" for name, values in lines) + "\n"


def main() -> None:
    """Train all, print the tables, and draw."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--output", type=Path, default=Path("compare.png"), metavar="PNG")
    made.add_argument("--short", action="store_true", help="an epoch and a seed of each")
    given = made.parse_args()
    try:
        check_output("--output", given.output, ".png")
    except UserError as error:
        made.error(str(error))
    found: dict[str, dict[str, list[Outcome]]] = {}
    for task in TASKS:
        found[task.name] = {}
        for cell in CELLS:
            print(task.name, cell, file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(sys.stderr):  # what the examples say meanwhile
                found[task.name][cell] = [
                    task.run(cell, task.epochs[given.short], seed)
                    for seed in range(1 if given.short else task.seeds)
                ]

    def rows(tell: Callable[[list[Outcome]], str]) -> list[tuple[str, list[str]]]:
        return [(t.name, [tell(found[t.name][cell]) for cell in CELLS]) for t in TASKS]

    def spread(results: list[Outcome]) -> str:
        errors = [one.error for one in results]
        return f"{np.mean(errors):.2f} ({min(errors):.2f} to {max(errors):.2f})"

    errors = zip(TASKS, rows(spread), strict=True)
    named = [(f"{task.name}, {task.error}", values) for task, (_, values) in errors]
    print(table("error, held out", named))
    print(table("parameters of the layer", rows(lambda results: f"{results[0].parameters:,}")))

    def seconds(results: list[Outcome]) -> str:
        return f"{np.median([one.epoch_seconds for one in results]):.3f}"

    print(table("seconds an epoch", rows(seconds)))
    draw(found, given.output)


if __name__ == "__main__":
    main()
