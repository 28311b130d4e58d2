"""The examples run, in a short form."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the examples use PyTorch")

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one", "torchrun"])
def test_characters(launcher: tuple[str, ...]) -> None:
    """One process and two tell the same losses, but for dropout."""
    told = run(*launcher, str(EXAMPLES / "characters.py"), "--epochs=1", "--steps=15")
    found = re.search(r"training (\S+) bits a character  held out (\S+)", told)
    assert found
    assert 4.5 < float(found[2]) < float(found[1]) < 6
    assert len(told.partition("\n\n")[2]) > 100


@pytest.mark.skipif(not importlib.util.find_spec("lightning"), reason="needs lightning")
def test_lightning_weather() -> None:
    told = run(str(EXAMPLES / "lightning_weather.py"), "--epochs=2", "--precision=bf16-mixed")
    found = re.search(r"error of the next 24 hours: (\S+) °F \(no change: (\S+) °F\)", told)
    assert found
    assert float(found[1]) < float(found[2])
