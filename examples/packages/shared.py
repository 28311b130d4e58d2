"""Shared by the scripts of this folder: a package's own call raced against the same on ours."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

import fusedrnn as fr
from fusedrnn.bench.race import USUAL_REST_SECONDS, quartiles, seconds_of

NOT_INSTALLED = 77  # the exit status if no package of a script is installed
BATCH_SECONDS = 0.02
FEWEST_ROUNDS = 3
FLOAT32 = 1e-5  # the largest difference of results in float32


class Pair(NamedTuple):
    """Two functions without arguments that compute the same."""

    own: Callable[[], Any]
    ours: Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A call of a package, by its own code and on our kernels.

    name: what differs between the cases of a package.
    lines: how many lines the user changes or adds, without imports.
    difference: of the results, as `difference` measures it.
    whole, recurrent: the whole call, and its recurrent part if it can be called alone.
    limit: the largest difference that is allowed.
    metric: what the results are for, in words, where they are rounded.
    """

    name: str
    lines: int
    difference: float
    whole: Pair
    recurrent: Pair | None = None
    limit: float = FLOAT32
    metric: str = ""


Cases = Callable[[bool], Iterator[Case]]  # takes whether the run is short


@dataclass(frozen=True)
class Package:
    """A package, the modules of it and of others that are imported, and how to install it."""

    name: str
    modules: tuple[str, ...]
    install: str

    @property
    def missing(self) -> str:
        """The first module that is not installed, or ""."""
        modules = ("threadpoolctl", *self.modules)
        return next((module for module in modules if not find_spec(module)), "")


def difference(actual: Any, expected: Any) -> float:
    """Return the largest difference of two elements, relative to 1 + the expected size."""
    a, e = (np.asarray(values, np.float64) for values in (actual, expected))
    return float((np.abs(a - e) / (1 + np.abs(e))).max())


def speech(seconds: float, pitch: float, seed: int = 0) -> Any:
    """Return sound like a voice, 16,000 samples a second: vowels in words, pauses between them.

    The harmonics of a pitch in Hz are louder near three formants, which change by syllable.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(int(16_000 * seconds)) / 16_000
    place = t / 0.2  # in syllables
    syllable = place.astype(int)
    formants = rng.uniform((250, 800, 2200), (850, 2200, 3300), (syllable[-1] + 1, 3))
    spoken = rng.uniform(size=syllable[-1] + 1) < 0.75
    f0 = pitch * (1 + 0.1 * np.sin(4 * t) + 0.02 * np.sin(30 * t))
    phase = 2 * np.pi * np.cumsum(f0) / 16_000
    voice = np.zeros_like(t)
    for k in range(1, int(4000 / pitch)):
        near = (k * f0[:, None] - formants[syllable]) / 100
        voice += (1 / (1 + near**2)).sum(1) / k**0.5 * np.sin(k * phase)
    voice *= np.sin(np.pi * place) ** 2 * spoken[syllable]
    voice += rng.normal(0, 0.005, len(t))
    return (0.5 * voice / np.abs(voice).max()).astype(np.float32)


def set_threads(count: int) -> None:
    """Let NumPy's products, PyTorch and our kernels use so many threads."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
    fr.set_num_threads(count)


def ratio(pair: Pair, seconds: float, rest: float) -> list[float]:
    """Return the quartiles of own time over ours, from batches that alternate; median first."""
    calls = [max(1, round(BATCH_SECONDS / seconds_of(run, 1))) for run in pair]
    ratios: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or (seconds and len(ratios) < FEWEST_ROUNDS):
        times = []
        for run, count in zip(pair, calls, strict=True):
            times.append(seconds_of(run, count))
            time.sleep(rest)
        ratios.append(times[0] / times[1])
    return quartiles(ratios) if ratios else []


def as_text(quartiles: list[float]) -> str:
    """Return a ratio for the table; one inside the spread of the rounds is not resolved."""
    if not quartiles:
        return "–"
    median, low, high = quartiles
    return f"{median:.2f}" + " (not resolved)" * (low < 1 < high)


def row(package: Package, case: Case, seconds: float, threads: list[int]) -> list[str]:
    """Return the cells of a case in the table, after checking its results."""
    if not case.difference <= case.limit:
        raise SystemExit(
            f"{package.name}, {case.name}: results differ by {case.difference:.1e}, more than "
            f"{case.limit:.0e}"
        )
    ratios = []
    for pair in (case.whole, case.recurrent):
        for count in threads:
            set_threads(count)
            rest = USUAL_REST_SECONDS if count > 1 else 0.0
            ratios.append(as_text(ratio(pair, seconds, rest) if pair else []))
    found = f"{case.difference:.0e}" + f", {case.metric}" * bool(case.metric)
    return [
        f"{package.name} {version(package.name)}",
        case.name,
        str(case.lines),
        found,
        *ratios,
    ]


def header(threads: list[int]) -> str:
    """Return the first two lines of the table."""
    names = ["package", "case", "lines", "difference"]
    for part in ("whole call", "recurrent part"):
        names += [f"{part}, {n} thread{'s' * (n > 1)}" for n in threads]
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts have."""
    arg_parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    arg_parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    arg_parser.add_argument(
        "--seconds", type=float, default=4.0, help="for each ratio (default: 4)"
    )
    arg_parser.add_argument("--short", action="store_true", help="compare only, at small sizes")
    return arg_parser


def parse(arg_parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse and check the options."""
    args = arg_parser.parse_args()
    for name, least in (("threads", min(args.threads)), ("seconds", args.seconds)):
        if least <= 0:
            arg_parser.error(f"--{name} must be above 0, got {least}")
    return args


def main(doc: str | None, packages: Mapping[Package, Cases]) -> None:
    """Print the table of the packages that are installed, and how to install the others."""
    args = parse(parser(doc))
    installed = [package for package in packages if not package.missing]
    for package in packages:
        if package not in installed:
            print(f"{package.name} needs {package.missing}; {package.install}")
    if not installed:
        sys.exit(NOT_INSTALLED)
    print(header(args.threads))
    for package in installed:
        for case in packages[package](args.short):
            cells = row(package, case, 0.0 if args.short else args.seconds, args.threads)
            print(f"| {' | '.join(cells)} |", flush=True)
