"""Contenders timed alternately on one case.

Every contender's result is compared with the definition in float64 before anything is timed
(options, which peers do not have, are left to the tests). A round times a short batch of calls
of each contender, after a batch that is not timed; the ratio of a peer to ours is the median
over rounds of ratios within a round. Where threads are used, all rest after each batch: the
pools of torch and ours keep their cores for some 10 ms after a call, onnxruntime's for 50 ms,
and would disturb the next contender.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .. import floor
from . import narrow
from .before import OtherBuild, bits_of
from .cases import Case
from .contenders import CONTENDERS, Inputs, Results, exact
from .forms import STRUCTURES

BATCH_SECONDS = 0.004
REST_SECONDS = {"onnxruntime": 0.06}
USUAL_REST_SECONDS = 0.015
REFERENCE_ROUNDS = 3
# The largest error, relative to one more than the largest expected value.
LIMITS = {"float32": 1e-3, "float64": 1e-9}
CHECKED = ("", *STRUCTURES)

Result = dict[str, Any]


def seconds_of(run: Callable[[], Any], calls: int) -> float:
    """Seconds of a call, over so many."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def quartiles(values: Sequence[float] | np.ndarray[Any, Any]) -> list[float]:
    """Median, lower and upper quartile."""
    return [float(q) for q in np.percentile(values, [50, 25, 75])]


def _deviation(actual: Results, expected: Results, limit: float) -> str:
    """Return the results beyond the limit in words, "" if none is; NaN always is."""
    wrong = []
    for name, values in actual.items():
        scale = 1 + np.abs(expected[name]).max()
        error = np.abs(values - expected[name]).max() / scale
        if not error < limit:
            wrong.append(f"{name} off by {error:.0e}")
    return ", ".join(wrong)


def described(case: Case) -> Result:
    """Return the fields of a result that describe its case."""
    description = asdict(case) | {"sizes": list(case.sizes)}
    more = {"label": case.label, "flops": case.flops, "bytes": case.bytes_read}
    return {"case": str(case), **description, **more}


def summed_up(times: Mapping[str, Sequence[float]]) -> Result:
    """Return seconds and ratios to ours, each [median, quartile, quartile], and the rounds."""
    mine = times.get("ours", ())
    peers = [name for name in times if name not in ("ours", "reference")]
    return {
        "rounds": len(mine),
        "seconds": {name: quartiles(t) for name, t in times.items()},
        "ratios": {name: quartiles(np.divide(times[name], mine)) for name in peers},
    }


class Race:
    """One case with its contenders; a contender with a wrong result is not timed.

    Attributes
    ----------
    wrong: by contender, the results that differ from the definition.
    errors: by contender, the largest error of y, of cases with fewer bits than float32.
    same_bits: whether the other build's results are equal, bit for bit.
    rounds: the number of rounds that take about `seconds`.
    """

    def __init__(
        self, case: Case, names: Iterable[str], seconds: float, before: str = ""
    ) -> None:
        self.case = case
        inputs = Inputs.of(case)
        expected = exact(case, inputs) if case.form in CHECKED else {}
        self.wrong: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        limit = narrow.LARGEST_ERROR if case.is_rounded else LIMITS[case.dtype]
        known = CONTENDERS | narrow.CONTENDERS
        self._runs: dict[str, Callable[[], Any]] = {}
        for name in ("ours", *names):
            run = known[name](case, inputs)
            if run is None:
                continue
            results = run()
            if name == "ours":
                bits = bits_of(results)
            is_checked = expected and name != "plain"
            deviation = _deviation(results, expected, limit) if is_checked else ""
            if case.is_rounded and expected:
                self.errors[name] = narrow.largest_error(results, expected)
            if deviation:
                self.wrong[name] = deviation
            else:
                self._runs[name] = run
        self._other: OtherBuild | None = None
        if before and "ours" in self._runs:
            self._other = self._runs["before"] = OtherBuild(before, case)
            self.same_bits = self._other.bits == bits
        self._times: dict[str, list[float]] = {}
        self.rounds = 0
        if "ours" in self.wrong:
            return

        slow = self._runs.pop("reference", None)
        if slow:
            self._times["reference"] = [seconds_of(slow, 1) for _ in range(REFERENCE_ROUNDS)]
            time.sleep(self._rest("reference"))
        self._calls: dict[str, int] = {}
        one_round = 0.0
        for name in self._runs:
            once = self._once(name)
            self._calls[name] = max(1, round(BATCH_SECONDS / once))
            one_round += self._rest(name) + 2 * self._calls[name] * once
        self.rounds = int(np.clip(seconds / one_round, 7, 100))
        self._times |= {name: [] for name in self._runs}

    def _rest(self, name: str) -> float:
        return REST_SECONDS.get(name, USUAL_REST_SECONDS) if self.case.threads > 1 else 0.0

    def _once(self, name: str) -> float:
        """Seconds of a call at best."""
        once = np.inf
        for _ in range(4):
            calls = int(np.clip(BATCH_SECONDS / once, 1, 10_000))
            once = min(once, self._seconds_of(name, calls))
        time.sleep(self._rest(name))
        return once

    def _seconds_of(self, name: str, calls: int) -> float:
        run = self._runs[name]
        return run.seconds_of(calls) if isinstance(run, OtherBuild) else seconds_of(run, calls)

    def _batch(self, name: str) -> float:
        return self._seconds_of(name, self._calls[name])

    def time_peers(self) -> None:
        """Time the peers in a round, and warm ours up."""
        for name in self._runs:
            if name != "ours":
                self._batch(name)
                self._times[name].append(self._batch(name))
                time.sleep(self._rest(name))
        self._batch("ours")

    def time_ours(self) -> None:
        """Time ours, which ends a round."""
        self._times["ours"].append(self._batch("ours"))

    def rest(self) -> None:
        """Let our threads go to sleep before the next round."""
        time.sleep(self._rest("ours"))

    def result(self) -> Result:
        """Return the result, ready for JSON."""
        case = self.case
        how: dict[str, Any] = {"training": case.training, "threads": case.threads}
        precision = "bfloat16" if case.dtype == "bfloat16" else case.quantisation[0]
        how |= {"single": case.dtype == "float32", "weights": precision or None}
        least = 0.0
        for n, sizes in enumerate(case.passes):
            operands = (
                2 if case.weights == "int8" and n < len(case.passes) // case.layers else 1
            )
            least += floor.seconds(sizes, case.gates, operands=operands, **how)
        description = described(case) | summed_up(self._times)
        if self._other:
            description["same bits"] = self.same_bits
        if self.errors:
            description["y errors"] = self.errors
        return description | {"floor": least, "wrong": self.wrong}

    def end(self) -> None:
        """End the process of the other build, if there is one."""
        if self._other:
            self._other.end()


def measure(case: Case, names: Iterable[str], seconds: float, before: str = "") -> Result:
    """Return the result of a whole race, also against the build of the interpreter `before`."""
    race = Race(case, names, seconds, before)
    try:
        for _ in range(race.rounds):
            race.time_peers()
            race.time_ours()
            race.rest()
        return race.result()
    finally:
        race.end()
