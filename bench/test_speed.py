"""The cases of `fusedrnn bench --suite shapes` under pytest-benchmark.

pytest bench                              all cases, a table at the end
pytest bench -k "LSTM and training"       some
pytest bench --report bench/results/x.md  the table as Markdown, too
"""

from __future__ import annotations

from typing import Any

import pytest

from fusedrnn.bench.cases import SUITES, Case, cases_of
from fusedrnn.bench.contenders import CONTENDERS
from fusedrnn.bench.race import Race

SUITE = SUITES["shapes"]


@pytest.mark.parametrize("case", cases_of(SUITE), ids=str)
def test_speed(case: Case, benchmark: Any) -> None:
    race = Race(case, [name for name in CONTENDERS if name != "ours"], SUITE.seconds)
    assert not race.wrong

    def before() -> None:
        race.rest()
        race.time_peers()

    benchmark.group = f"{case.cell} {case.mode} {case.threads}"
    benchmark.pedantic(race.time_ours, setup=before, rounds=race.rounds, iterations=1)
    benchmark.extra_info |= race.result()
