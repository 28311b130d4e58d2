"""Options of `pytest bench`, the cases of its suite, and the tables at the end."""

from __future__ import annotations

import pathlib

import pytest

import fusedrnn as fr
from fusedrnn import floor, machine
from fusedrnn.bench.cases import SUITES, cases_of
from fusedrnn.bench.command import commit
from fusedrnn.bench.contenders import PEERS
from fusedrnn.bench.tables import tables


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=SUITES, default="shapes", help="of fusedrnn bench")
    parser.addoption("--report", type=pathlib.Path, help="write the tables to this file")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        suite = SUITES[metafunc.config.getoption("--suite")]
        metafunc.parametrize("case", cases_of(suite), ids=str)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = getattr(config, "_benchmarksession", None)
    results = [b.extra_info for b in session.benchmarks] if session else []
    if not results:
        return
    versions = machine.versions((*PEERS, "numpy"))
    lines = [
        machine.summary(),
        " · ".join([f"fusedrnn {fr.__version__}", *versions, *commit()]),
        floor.summary(floor.rates(max(result["threads"] for result in results))),
    ]
    lines += [line for table in tables(results) for line in table.markdown()]
    terminalreporter.write_line("")
    for line in lines:
        terminalreporter.write_line(line)
    report = config.getoption("--report")
    if report:
        report.write_text("\n".join(lines) + "\n", "utf-8")
