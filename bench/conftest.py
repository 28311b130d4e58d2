"""The table at the end of a run, and `--report` for the same in Markdown."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from cases import CASES, CONTENDERS, Case

import fusedrnn as fr
from fusedrnn import floor


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=pathlib.Path, help="write the table to this file")


def cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    numbers = (f"{key} {found[key]}" for key in ("cpu family", "model") if key in found)
    return f"{found.get('model name')} ({', '.join(numbers)})"


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"


def ratio(quartiles: list[float] | None) -> str:
    """Return median ratio (quartiles); not resolved where 1 lies inside them."""
    if quartiles is None:
        return "–"
    median, low, high = quartiles
    text = f"{median:.2f} ({low:.2f}–{high:.2f})"
    return text + " not resolved" if low < 1 < high else text


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def table(results: dict[Case, dict]) -> Iterator[str]:
    peers = [name for name in CONTENDERS if name not in ("ours", "reference")]
    versions = [f"fusedrnn {fr.__version__}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in (*peers, "numpy")]
    config = fr.show_config("dict")
    yield f"{cpu_name()} · {config['isa']} · {config['compiler']} · commit {commit()}"
    yield f"{' · '.join(versions)} · float32"
    yield floor.rates(max(case.threads for case in results))
    groups: dict[tuple[int, str, str], list[Case]] = {}
    for case in results:
        groups.setdefault((case.threads, case.cell, case.mode), []).append(case)
    for (threads, cell, mode), cases in groups.items():
        s = "s" if threads > 1 else ""
        yield ""
        yield f"### {cell} {mode}, {threads} thread{s}"
        yield ""
        shown = [n for n in peers if any(n in results[c]["ratios"] for c in cases)]
        columns = ["T, B, I, H", "ms", "GFLOP/s", "of floor", *(f"× {n}" for n in shown)]
        columns += ["× best peer", "× reference"]
        yield f"| {' | '.join(columns)} |"
        yield "|---" * len(columns) + "|"
        for case in cases:
            info = results[case]
            ours, ratios = info["seconds"]["ours"], info["ratios"]
            cells = [
                ", ".join(map(str, case.sizes)),
                f"{ours * 1e3:.4f}",
                f"{case.flops / ours / 1e9:.0f}",
                f"{info['floor'] / ours:.2f}",
                *(ratio(ratios.get(name)) for name in shown),
                f"{best(info):.2f}",
                f"{info['seconds']['reference'] / ours:.0f}",
            ]
            yield f"| {' | '.join(cells)} |"
        medians = {name: [results[c]["ratios"][name][0] for c in cases] for name in shown}
        medians["best peer"] = [best(results[c]) for c in cases]
        means = (
            f"× {name} {geometric_mean(values):.2f} (least {min(values):.2f})"
            for name, values in medians.items()
        )
        yield ""
        yield f"Geometric mean: {', '.join(means)}"


def best(info: dict) -> float:
    """Return the ratio to the fastest peer."""
    return min(quartiles[0] for quartiles in info["ratios"].values())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = getattr(config, "_benchmarksession", None)
    found = {b.extra_info["case"]: b.extra_info for b in session.benchmarks} if session else {}
    results = {case: found[str(case)] for case in CASES if str(case) in found}
    if not results:
        return
    lines = list(table(results))
    terminalreporter.write_line("")
    for line in lines:
        terminalreporter.write_line(line)
    report = config.getoption("--report")
    if report:
        report.write_text("\n".join(lines) + "\n", "utf-8")
