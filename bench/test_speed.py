"""Ours against the peers, alternating within one run.

    pytest bench                              all cases, a table at the end
    pytest bench -k "LSTM and training"       some
    pytest bench --report bench/results/x.md  the table as Markdown, too

Every contender's result is compared with ours before anything is timed. A round times a
short batch of calls of each contender, after a batch that is not timed; the ratio of a peer
to us is the median over rounds of ratios within a round. Where threads are used, a rest
comes first: the pools of torch and ours keep their cores for some 10 ms after a call,
onnxruntime's for 50 ms, and would disturb the next contender.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from cases import CASES, CONTENDERS, Case, Inputs, Run, seconds_of

from fusedrnn import floor

BATCH_SECONDS = 0.004
ROUNDS_SECONDS = 1.5
REST_SECONDS = 0.06
REFERENCE_ROUNDS = 3


def calls_for(run: Run, rest: float) -> int:
    """How many calls make a batch, undisturbed by whatever ran before."""
    once = np.inf
    for _ in range(4):
        time.sleep(rest)
        once = min(once, seconds_of(run, int(np.clip(BATCH_SECONDS / once, 1, 10_000))))
    return max(1, round(BATCH_SECONDS / once))


def check(results: dict[str, dict[str, np.ndarray]]) -> None:
    for contender, arrays in results.items():
        for name, expected in arrays.items():
            ours = results["ours"][name]
            scale = 1 + np.abs(expected).max()
            error = np.abs(ours - expected).max() / scale
            assert error < 1e-3, f"{contender} disagrees on {name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_speed(case: Case, benchmark) -> None:
    inputs = Inputs.of(case)
    runs = {}
    for name, make in CONTENDERS.items():
        run = make(case, inputs)
        if run is not None:
            runs[name] = run
    check({name: run() for name, run in runs.items()})

    slow = runs.pop("reference")
    times: dict[str, list[float]] = {name: [] for name in runs}
    times["reference"] = [seconds_of(slow, 1) for _ in range(REFERENCE_ROUNDS)]
    rest = REST_SECONDS if case.threads > 1 else 0.0
    calls = {name: calls_for(run, rest) for name, run in runs.items()}
    one_round = sum(rest + 2 * calls[n] * seconds_of(runs[n], 1) for n in runs)
    rounds = int(np.clip(ROUNDS_SECONDS / one_round, 7, 100))

    def warm(name: str) -> None:
        time.sleep(rest)
        seconds_of(runs[name], calls[name])

    def peers() -> None:
        for name in runs:
            if name != "ours":
                warm(name)
                times[name].append(seconds_of(runs[name], calls[name]))
        warm("ours")

    def ours() -> None:
        times["ours"].append(seconds_of(runs["ours"], calls["ours"]))

    benchmark.group = f"{case.cell} {case.mode} {case.threads}"
    benchmark.pedantic(ours, setup=peers, rounds=rounds, iterations=1)
    mine = np.array(times["ours"])
    benchmark.extra_info |= {
        "case": str(case),
        "sizes": case.sizes,
        "flops": case.flops,
        "calls": calls["ours"],
        "floor": floor.seconds(case.sizes, case.gates, case.mode == "training", case.threads),
        "seconds": {name: float(np.median(t)) for name, t in times.items()},
        "ratios": {
            name: [float(q) for q in np.percentile(np.array(t) / mine, [50, 25, 75])]
            for name, t in times.items()
            if name not in ("ours", "reference")
        },
    }
