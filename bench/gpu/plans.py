"""Measure recurrences by many plans, not only by the one that an estimate chooses.

    python plans.py RESULTS SECONDS [--small]

A line of RESULTS gets a layer, a direction, a plan, and the seconds of a step: the median over
repetitions of the time of the recurrence alone, on the device, over its steps. The result of
each plan is compared with that of a launch for each step. Plans whose estimate is low come
first, for all layers, then some of the others.

A plan that fails may cost the process: a line says before that it was begun. So the process can
be followed by another, which leaves out the plans that were begun, and all of an exchange in a
direction that cost two processes.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from smoke import EXCHANGES, append, error

import fusedrnn as fr
from fusedrnn import cuda

CHOICES = ("exchange", "tiles", "resident", "on_chip", "staged", "groups", "splits")
LIMITS = {"bfloat16": 5e-2, "float32": 1e-4}
REPETITIONS = 5
MOST_SECONDS = 10  # of a plan
WARM_UP_SECONDS = 0.5
MOST_LOST = 2
STEP = EXCHANGES["step"]
FIRST = 12  # plans of a layer and direction
EVERY = 4  # of the others, in the second round


class Problem(NamedTuple):
    """A layer: cell, dtype, T, B, I, H."""

    cell: str
    dtype: str
    T: int
    B: int
    I: int
    H: int


def problems(small: bool) -> list[Problem]:
    """Return the layers, in the order of their worth."""
    cells = ("lstm", "gru")
    if small:
        return [Problem("gru", "bfloat16", 3, 9, 4, 24)]
    widths = [(768, 16), (512, 16), (1024, 16), (256, 16), (768, 64), (512, 64), (1024, 64)]
    found = [
        Problem(cell, "bfloat16", 256, B, 64, H)
        for (H, B), cell in itertools.product([*widths, (256, 64)], cells)
    ]
    return found[:4] + [Problem(c, "float32", 256, 64, 64, 512) for c in cells] + found[4:]


@cache
def arguments(problem: Problem) -> dict[str, Any]:
    """Draw a layer's arrays."""
    rng = np.random.default_rng(0)
    gates = {"lstm": 4, "gru": 3}[problem.cell]
    _, _, T, B, I, H = problem
    shapes = {"x": (T, B, I), "weight_ih": (gates * H, I), "weight_hh": (gates * H, H)}
    shapes |= {"bias_ih": (gates * H,), "bias_hh": (gates * H,)}

    def drawn(name: str, shape: tuple[int, ...]) -> Any:
        scale = 1 if name == "x" else H**-0.5
        return cuda.array(rng.uniform(-scale, scale, shape), problem.dtype)

    return {name: drawn(name, shape) for name, shape in shapes.items()}


@cache
def measured(problem: Problem, backward: bool) -> tuple[Any, Any]:
    """Return a function that runs a direction, and its result by a launch for each step."""
    cuda._module().wish(exchange=STEP)
    op = getattr(fr, problem.cell + "_vjp" * backward)
    if backward:
        _, _, T, B, _, H = problem
        dy = cuda.array(np.random.default_rng(1).normal(size=(T, B, H)), problem.dtype)
        _, pullback = op(**arguments(problem))

        def run() -> Any:
            return pullback(dy).bias_hh
    else:

        def run() -> Any:
            return op(**arguments(problem))[1]

    return run, run().numpy().astype(np.float64)


def measure(problem: Problem, backward: bool, plan: dict[str, int]) -> dict[str, Any]:
    """Return the seconds of a step by a plan, and how far its result is from the other."""
    module = cuda._module()
    run, expected = measured(problem, backward)
    module.wish(**{name: plan[name] for name in CHOICES})
    try:
        apart = error(run(), expected)
        seconds = [sum(module.time_recurrences(run)) for _ in range(REPETITIONS)]
    finally:
        module.wish()
    steps = problem.T + backward
    wrong = not apart < LIMITS[problem.dtype]
    return {"seconds": statistics.median(seconds) / steps, "error": apart, "wrong": wrong}


def rounds(problem: Problem, backward: bool) -> list[list[dict[str, int]]]:
    """Return a layer's plans, those with the lowest estimates first."""
    module = cuda._module()
    module.wish()
    kernel = module.Kernel(problem.cell, problem.dtype, 0, 0)
    plans = kernel.plans(*problem[2:], backward)
    order = np.argsort(module.estimates(plans, {}), kind="stable")
    ordered = [plans[i] for i in order]
    first, others = ordered[:FIRST], ordered[FIRST:]
    rest = [plan for n, plan in enumerate(others) if n % EVERY]
    return [first, others[::EVERY], rest]


def warm_up(results: Path, problem: Problem) -> None:
    """Run for a while, so that the clock is up, and append what it is."""
    cuda._module().wish(exchange=STEP)
    end = time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < end:
        getattr(fr, problem.cell)(**arguments(problem))
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=5)
        append(results, stage="clock", text=done.stdout.splitlines())
    except (OSError, subprocess.SubprocessError) as error:
        append(results, stage="clock", failed=str(error))


def begun_already(results: Path) -> tuple[set[str], Counter[tuple[bool, int]]]:
    """Return the keys of plans that were begun, and how many processes they cost.

    That is counted by direction and exchange.
    """
    begun = {}
    if results.exists():
        for text in results.read_text().splitlines():
            line = json.loads(text)
            if "key" in line:
                begun[line["key"]] = line
    cost = [line for line in begun.values() if "begun" in line or "lost" in line]
    return set(begun), Counter((line["backward"], line["plan"]["exchange"]) for line in cost)


def main() -> int:
    """Measure until the time is over."""
    results, end = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
    known, lost = begun_already(results)
    layers = list(itertools.product(problems("--small" in sys.argv), (False, True)))
    warm_up(results, layers[0][0])
    plans_of = {layer: rounds(*layer) for layer in layers}
    for n, layer in itertools.product(range(3), layers):
        problem, backward = layer
        for plan in plans_of[layer][n]:
            key = " ".join(map(str, (*problem, backward, *(plan[k] for k in CHOICES))))
            if key in known or lost[backward, plan["exchange"]] >= MOST_LOST:
                continue
            if time.monotonic() > end:
                return 0
            line = {"stage": "plans", "key": key, **problem._asdict(), "backward": backward}
            line["plan"] = plan
            append(results, **line, begun=True)
            signal.alarm(MOST_SECONDS)  # ends the process
            try:
                line |= measure(problem, backward, plan)
            except (RuntimeError, MemoryError) as failure:
                line["failed"] = str(failure)
            signal.alarm(0)
            try:
                cuda._module().synchronize(0, 0)
            except RuntimeError as failure:
                append(results, **line, lost=str(failure))
                os._exit(3)
            append(results, **line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
