"""The fuzzers: some of their calls and files, and that they notice a fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
from fuzz_files import TARGETS, read_damaged

import fusedrnn as fr
from fusedrnn import checks

KINDS = [kind for kind in fuzz.KINDS if kind != "torch"]


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The instruction set that a call draws is its own; tests have one thread each."""
    monkeypatch.setattr(fr, "set_num_threads", lambda n: checks.integer("n", n, 0, 4096))
    yield
    fr.set_isa(None)


@pytest.mark.parametrize("kind", KINDS)
def test_some_calls(kind: str) -> None:
    """Calls that are drawn at random agree with the reference or are refused by name."""
    for number in range(6):
        assert "failure" not in fuzz.run_number(1, number, kind)


def first_failure(kind: str) -> str:
    answers = (fuzz.run_number(1, number, kind) for number in range(60))
    return next((answer["failure"] for answer in answers if "failure" in answer), "")


def wrong_y(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last y of an op is off by little more than its tolerance."""
    whole = fr.functional._forward

    def off(*args: Any) -> Any:
        y, *others = whole(*args)
        y = y.copy()
        y.reshape(-1)[-1:] += y.dtype.type(1e-3)
        return (y, *others)

    monkeypatch.setattr(fr.functional, "_forward", off)


def wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's gradient of x is that of the steps before."""
    whole = fr.LSTM.vjp

    def off(self: Any, *args: Any, **kwargs: Any) -> Any:
        results, pullback = whole(self, *args, **kwargs)

        def pull(*gradients: Any) -> Any:
            found = pullback(*gradients)
            return found._replace(x=np.roll(found.x, 1, 0))

        return results, pull

    for kind in (fr.LSTM, fr.GRU, fr.RNN):
        monkeypatch.setattr(kind, "vjp", off)


def lost_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream forgets which rows start from zeros."""
    monkeypatch.setattr(fr.Stream, "reset", lambda self, rows=None: None)


def unchecked_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """What should be a bool is taken for one."""
    monkeypatch.setattr(checks, "flag", lambda name, value: bool(value))


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (wrong_y, "op", "op: "),
        (wrong_gradient, "layer", "x: error"),
        (lost_state, "stream", "steps of a stream"),
        (unchecked_flag, "wrong", "was not refused"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_is_noticed(
    fault: Any, kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results that are off and arguments that are not refused are failures."""
    fault(monkeypatch)
    assert text in first_failure(kind)


@pytest.mark.parametrize(
    ("planted", "limit", "text"),
    [("abort", 60, "the process died of SIGABRT"), ("hang", 6, "no answer in 6 s")],
)
def test_a_process_that_ends_or_hangs(planted: str, limit: int, text: str) -> None:
    """The number that ended the process is recorded, and the next ones still run."""
    fuzzer = Path(fuzz.__file__)
    numbers = [n for n in range(20) if fuzz.kind_of(1, n) != "torch"][:3]
    command = [sys.executable, str(fuzzer), "--case", f"1:{numbers[0]}-{numbers[2]}"]
    command += ["--kinds", "torch", "--limit", str(limit)]
    command += ["--plant", f"{planted}:{numbers[1]}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == f"FAILURE {text}"
    assert lines[1].split() == ["python", "tests/fuzz.py", "--case", f"1:{numbers[1]}"]
    assert f"{numbers[2] - numbers[0] + 1} numbers" in lines[2]
    assert "1 failures" in lines[2]


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(name: str) -> None:
    """A damaged file is read or refused by one error, and nothing changes."""
    if name != "stream":
        pytest.importorskip("rich" if name == "compare" else "onnx")
    for number in range(60):
        read_damaged(TARGETS[name], 1, number)
