"""Batch inference by Ray Data gives the bits of one process, in the example and on the page."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

if not importlib.util.find_spec("ray"):
    pytest.skip('Ray is not installed: pip install "fusedrnn[ray]"', allow_module_level=True)

CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import ray
from ray_batches import write_sequences

ray.init(num_cpus=3, include_dashboard=False, logging_level="warning")
write_sequences("sequences", 300, 20)

{page}

def check(folder, key, worker, tolerance):
    found = {{row["id"]: row[key] for row in ray.data.read_parquet(folder).take_all()}}
    assert len(found) == 300
    for batch in data.iter_batches(batch_size=77):  # other batches than the page's
        for n, value in zip(batch["id"], worker(batch)[key]):
            np.testing.assert_allclose(found[n], value, rtol=0, atol=tolerance)


check("states", "h", Encode(layer), 0)
check("scores", "score", Predict(model), 1e-6)  # PyTorch's Linear depends on the batch
print("the same")
"""


def run(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_the_example(tmp_path: Path) -> None:
    """Two workers on a local cluster compute the states of one process, bit for bit."""
    printed = run(str(ROOT / "examples" / "ray_batches.py"), "--short", folder=tmp_path)
    assert "2 workers: " in printed
    assert "the same bits in all 300 states" in printed


def test_the_page(tmp_path: Path) -> None:
    """The workers of docs/many-machines.md compute what their layers compute here."""
    pytest.importorskip("torch", reason="an example of the page uses PyTorch")
    page = (ROOT / "docs" / "many-machines.md").read_text("utf-8").partition("### Speed")[0]
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.S | re.M)
    (tmp_path / "page.py").write_text(CHECK.format(page="\n".join(blocks)), "utf-8")
    assert "the same" in run("page.py", str(ROOT / "examples"), folder=tmp_path)
