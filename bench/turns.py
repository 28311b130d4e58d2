"""Times by turns, and a report of them."""

from __future__ import annotations

import pathlib
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import fusedrnn as fr
from fusedrnn import machine
from fusedrnn.bench.race import seconds_of


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"


def in_turn(
    runs: list[Callable[[], Any]], rounds: int = 15, at_least: float = 0.0
) -> np.ndarray:
    """Seconds of each run in each round, (rounds, runs); a turn lasts `at_least` so long."""
    calls = []
    for run in runs:
        run()
        calls.append(max(2, int(at_least / seconds_of(run, 2))))
    found = []
    for n in range(rounds):
        order = range(len(runs)) if n % 2 else reversed(range(len(runs)))
        seconds = {i: seconds_of(runs[i], calls[i]) for i in order}
        found.append([seconds[i] for i in range(len(runs))])
    return np.array(found)


def spread(ratios: np.ndarray, digits: int = 3) -> str:
    """The median of the rounds' ratios, and their quartiles."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def report(
    arguments: list[str],
    title: str,
    of_threads: Callable[[int], Iterable[str]],
    at_last: Callable[[], Iterable[str]] = tuple,
) -> None:
    """Print lines for each count of threads, and write them to the file after --report."""
    file = None
    if "--report" in arguments:
        at = arguments.index("--report")
        file = pathlib.Path(arguments[at + 1])
        del arguments[at : at + 2]
    counts = [int(a) for a in arguments] or [1, 2]
    lines = []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    tell(f"# {title}\n")
    tell(f"{machine.summary()} · commit {commit()}\n")
    for count in counts:
        fr.set_num_threads(count)
        for line in of_threads(count):
            tell(line)
    for line in at_last():
        tell(line)
    if file:
        file.write_text("\n".join(lines) + "\n")
