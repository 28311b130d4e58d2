"""The table at the end of a run, and `--report` for the same in Markdown."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from cases import CASES, Case

import fusedrnn as fr


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=pathlib.Path, help="write the table to this file")


def cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    return f"{found.get('model name')} (family {found.get('cpu family')})"


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
    peers = ("torch", "onnxruntime", "numpy")
    versions = [f"fusedrnn {fr.__version__}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in peers]
    config = fr.show_config("dict")
    yield f"{cpu_name()} · {config['isa']} · {config['compiler']} · commit {commit()}"
    yield f"{' · '.join(versions)} · float32"
    groups: dict[tuple[int, str, str], list[Case]] = {}
    for case in results:
        groups.setdefault((case.threads, case.cell, case.mode), []).append(case)
    for (threads, cell, mode), cases in groups.items():
        s = "s" if threads > 1 else ""
        yield ""
        yield f"### {cell} {mode}, {threads} thread{s}"
        yield ""
        columns = ("T, B, I, H", "ms", "GFLOP/s", "× torch", "× onnxruntime", "× best peer")
        yield f"| {' | '.join((*columns, '× reference'))} |"
        yield "|---" * 7 + "|"
        for case in cases:
            info = results[case]
            seconds, ratios = info["seconds"], info["ratios"]
            best = min(r[0] for r in ratios.values())
            yield (
                f"| {', '.join(map(str, case.sizes))} | {seconds['ours'] * 1e3:.3f} "
                f"| {case.flops / seconds['ours'] / 1e9:.0f} | {ratio(ratios.get('torch'))} "
                f"| {ratio(ratios.get('onnxruntime'))} | {best:.2f} "
                f"| {seconds['reference'] / seconds['ours']:.0f} |"
            )
        means = []
        for peer in ("torch", "onnxruntime"):
            medians = [
                results[c]["ratios"][peer][0] for c in cases if peer in results[c]["ratios"]
            ]
            if medians:
                means.append(
                    f"× {peer} {geometric_mean(medians):.2f} (least {min(medians):.2f})"
                )
        yield ""
        yield f"Geometric mean: {', '.join(means)}"


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
