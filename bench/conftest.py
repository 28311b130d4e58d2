"""The table at the end of a run, and `--report` for the same in Markdown."""

from __future__ import annotations

import pathlib

import pytest
from turns import commit

import fusedrnn as fr
from fusedrnn import floor, machine
from fusedrnn.bench.contenders import PEERS
from fusedrnn.bench.tables import tables


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=pathlib.Path, help="write the table to this file")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = getattr(config, "_benchmarksession", None)
    results = [b.extra_info for b in session.benchmarks] if session else []
    if not results:
        return
    lines = [
        f"{machine.summary()} · commit {commit()}",
        " · ".join([f"fusedrnn {fr.__version__}", *machine.versions((*PEERS, "numpy"))]),
        floor.summary(floor.rates(max(result["threads"] for result in results))),
    ]
    lines += [line for table in tables(results) for line in table.markdown()]
    terminalreporter.write_line("")
    for line in lines:
        terminalreporter.write_line(line)
    report = config.getoption("--report")
    if report:
        report.write_text("\n".join(lines) + "\n", "utf-8")
