"""The cases of a suite of `fusedrnn bench` under pytest-benchmark.

pytest bench                              the suite "shapes", tables at the end
pytest bench --suite options              another one
pytest bench -k "LSTM and training"       some cases
pytest bench --report bench/results/x.md  the tables as Markdown, too
"""

from __future__ import annotations

from typing import Any

import pytest

from fusedrnn.bench.cases import SUITES, Case
from fusedrnn.bench.contenders import PEERS, missing
from fusedrnn.bench.race import Race


def test_speed(case: Case, benchmark: Any, pytestconfig: pytest.Config) -> None:
    suite = SUITES[pytestconfig.getoption("--suite")]
    names = [name for name in suite.against or (*PEERS, "reference") if not missing(name)]
    race = Race(case, names, suite.seconds)
    assert not race.wrong

    def before() -> None:
        race.rest()
        race.time_peers()

    benchmark.group = f"{case.cell} {case.mode} {case.threads}"
    benchmark.pedantic(race.time_ours, setup=before, rounds=race.rounds, iterations=1)
    benchmark.extra_info |= race.result()
