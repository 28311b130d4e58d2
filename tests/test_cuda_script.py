"""The script that tests and measures on a GPU, rehearsed on the emulator; and its fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu import EMULATED, GPU

from fusedrnn import cuda

pytestmark = [
    *GPU,
    pytest.mark.skipif(not EMULATED, reason="this is a rehearsal of what a GPU is for"),
]

TESTS = Path(__file__).parent
FOLDER = TESTS.parent / "bench" / "gpu"
STAGES = ["build", "smoke", "meetings", "plans", "race", "profile", "tests", "memcheck"]
STAGES += ["options"]
NEEDED = ("torch", "rich", "scipy", "xdist", "pytest_timeout")
FILES = {
    *("results.jsonl", "race.json", "race.md", "options.json", "options.md"),
    *("costs.inc", "profile.ncu-rep", "logs.tar.gz"),
}


def rehearse(out: Path, *arguments: str) -> tuple[int, str, dict[str, str]]:
    """Run the script with small sizes; return its status, output, and the stages' problems."""
    for name in NEEDED:
        pytest.importorskip(name)
    rehearsal = TESTS / "rehearsal"
    usual = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    site = ["--site", rehearsal / "site"]
    done = subprocess.run(
        [sys.executable, FOLDER / "run.py", "--small", "--out", out, *site, *arguments],
        env=usual
        | {
            "PATH": os.pathsep.join([str(rehearsal / "bin"), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(rehearsal), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    lines = results(out)
    problems = {line["stage"]: line["problem"] for line in lines if "problem" in line}
    return done.returncode, done.stdout + done.stderr, problems


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_stage_gives_results(tmp_path: Path) -> None:
    """All stages succeed, and what they measured is in eight files."""
    status, output, problems = rehearse(tmp_path, "--seconds", "240")
    assert problems == dict.fromkeys(STAGES, ""), output
    assert status == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES
    lines = results(tmp_path)
    plans = [line for line in lines if line["stage"] == "plans" and "seconds" in line]
    assert len(plans) > 50
    assert not any(line["wrong"] for line in plans)
    smoke = [line for line in lines if line["stage"] == "smoke" and "task" in line]
    assert len(smoke) == 3
    assert sum(line.get("sigmoid ULP", 0) > 0 for line in smoke) == 1
    race = json.loads((tmp_path / "race.json").read_text())
    assert not race["interrupted"]
    assert all(case["wrong"] == {} for case in race["cases"])
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert {"tests.log", "race.log", "memcheck.log"} < set(archive.getnames())


@pytest.mark.parametrize("first", [1, 2])
def test_a_stage_that_fails_costs_only_itself(tmp_path: Path, first: int) -> None:
    """Every other stage crashes, hangs or fails; those between give their results."""
    spoilt = dict(zip(STAGES[first::2], ["hang", "crash", "fail", "crash"], strict=True))
    spoil = [f"{name}={how}" for name, how in spoilt.items()]
    # A hang takes the share of its stage.
    status, output, problems = rehearse(tmp_path, "--seconds", "90", "--spoil", *spoil)
    assert status == 1
    assert {name for name, problem in problems.items() if problem} == set(spoilt), output


def test_without_a_package_meetings_are_measured(tmp_path: Path) -> None:
    """A package that does not work leaves the meetings, which do not need it."""
    status, _, problems = rehearse(tmp_path, "--seconds", "20", "--spoil", "build=fail")
    assert status == 1
    assert problems["build"]
    assert problems["meetings"] == ""
    assert problems["race"] == "not run: the package was not built"


def test_plans_go_on_after_one_that_loses_the_gpu(tmp_path: Path) -> None:
    """The sweep notes a plan that fails, and another process measures those after it."""
    out = tmp_path / "results.jsonl"
    out.write_text('{"stage": "device"}\n')
    program = f"""
import os, sys
sys.argv = ["plans.py", {str(out)!r}, "60", "--small"]
sys.path.insert(0, {str(FOLDER)!r})
import plans
measure, count = plans.measure, 0
def faulty(problem, backward, plan):
    global count
    count += 1
    if count == 3:
        os.environ["EMULATOR_LOSES_STORE"] = "1"
    return measure(problem, backward, plan)
plans.measure = faulty
first = plans.rounds
plans.rounds = lambda *layer: [[p for p in first(*layer)[0]][:4], [], []]
sys.exit(plans.main())
"""
    before = 0
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], check=False)
        assert done.returncode == 3
        lines = [line for line in results(tmp_path) if "key" in line and "begun" not in line]
        assert len(lines) >= before + 3
        assert len({line["key"] for line in lines}) == len(lines)
        assert "the context is lost" in lines[-1]["lost"]
        assert not any("failed" in line for line in lines[before:-1])
        before = len(lines)


def test_costs_are_fitted_to_times(tmp_path: Path) -> None:
    """From times made of other costs, the fit finds costs that choose nearly the best plans."""
    pytest.importorskip("scipy")
    module = cuda._module()
    rng = np.random.default_rng(0)
    true = {name: cost * rng.uniform(0.4, 2.5) for name, cost in module.costs().items()}
    clock = 1.5e9
    lines: list[dict[str, Any]] = [{"stage": "device", "name": "made up", "clock": clock}]
    layers = 0
    for cell, dtype in (("lstm", "bfloat16"), ("gru", "bfloat16"), ("lstm", "float32")):
        for H, B, backward in (
            (40, 16, False),
            (96, 64, True),
            (200, 16, True),
            (64, 5, False),
        ):
            plans = module.Kernel(cell, dtype, 0, 0).plans(9, B, 4, H, backward)
            cycles = np.array(module.estimates(plans, true)) * rng.normal(1, 0.02, len(plans))
            shape = {"cell": cell, "dtype": dtype, "T": 9, "B": B, "I": 4, "H": H}
            for plan, cycle in zip(plans, cycles, strict=True):
                times = {"backward": backward, "seconds": cycle / clock, "wrong": False}
                lines.append({"stage": "plans", "key": "", **shape, **times, "plan": plan})
            layers += 1
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    costs = tmp_path / "costs.inc"
    done = subprocess.run(
        [sys.executable, FOLDER / "fit.py", results, "--write", costs],
        capture_output=True,
        text=True,
        check=True,
    )
    regrets = [float(line.split()[-1]) for line in done.stdout.splitlines()[1 : layers + 1]]
    assert max(regrets) < 1.1, done.stdout
    text = costs.read_text()
    assert f"{len(lines) - 1} plans of {layers} layers on made up" in text
    assert text.count("COST(") == len(true)


def test_the_costs_of_a_build_are_those_of_the_file() -> None:
    text = (TESTS.parent / "cuda" / "costs.inc").read_text()
    for name, cost in cuda._module().costs().items():
        assert f"COST({name}, {cost:g})" in text
