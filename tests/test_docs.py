"""What the pages say is so: examples run, links lead somewhere, messages are those that come,
pictures are as drawn.

Sphinx is not needed; CI builds the site apart.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedrnn as fr

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks_of(page: Path) -> list[str]:
    """The examples of a page that are meant to run; "py" marks pieces that are not."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def run_page(page: Path) -> dict[str, Any]:
    """Run a page's examples, of which one goes on from the other; return their names."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks_of(page):
        if "cuda" in block and not fr.cuda.is_available():
            continue
        for needed in re.findall(
            r"^(?:import|from) (torch|onnx|onnxruntime|matplotlib|keras|fusedrnn\.onnx)\b",
            block,
            re.M,
        ):
            pytest.importorskip(needed, reason=f"an example of {page.name} uses {needed}")
        exec(compile(block, name_of(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=name_of)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of a page run, one after the other."""
    monkeypatch.chdir(tmp_path)  # where an example may leave a file
    monkeypatch.setenv("MPLBACKEND", "agg")
    run_page(page)


# Links


def prose_of(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link within the repository leads to a page and a heading that exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        if anchor and "{include}" not in found.read_text("utf-8"):
            assert anchor in anchors_of(found), target


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set()
    for index in DOCS.rglob("*.md"):
        for toctree in re.findall(
            r"^```\{toctree\}(.*?)^```", index.read_text("utf-8"), re.S | re.M
        ):
            for entry in re.findall(r"^(?:.*<)?([\w*/-]+)>?$", toctree, re.M):
                listed |= {p.resolve() for p in index.parent.glob(f"{entry}.md")}
    assert set(DOCS.rglob("*.md")) - listed == {DOCS / "index.md"}


def test_pictures_are_as_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures in docs/images are those that docs/diagrams.py draws."""
    drawn = runpy.run_path(str(DOCS / "diagrams.py"), run_name="diagrams")
    draws = [f for name, f in drawn.items() if name.startswith("draw_")]
    for draw in draws:
        monkeypatch.setitem(draw.__globals__, "FOLDER", tmp_path)
        draw()
    for picture in tmp_path.iterdir():
        kept = DOCS / "images" / picture.name
        assert kept.read_bytes() == picture.read_bytes(), "run: python docs/diagrams.py"
    assert len(list(tmp_path.iterdir())) == len(draws)


def test_the_cell_of_a_page_is_the_one_that_is_tested() -> None:
    """docs/extending.md shows code that tests/extending.sh builds."""
    page = (DOCS / "extending.md").read_text("utf-8").partition("## An option")[0]
    files = [p.read_text("utf-8") for p in (ROOT / "tests" / "extending").iterdir()]
    blocks = re.findall(r"^```(?:py|cpp)\n(.*?)^```", page, re.S | re.M)
    parts = [part for block in blocks for part in block.split("\n\n\n")]
    assert len(parts) == 3
    for part in parts:
        assert any(part in text for text in files), part


# Messages

X = np.zeros((10, 4, 8), np.float32)
W, R = np.zeros((256, 8), np.float32), np.zeros((256, 64), np.float32)


def swap_a_module() -> None:
    torch = pytest.importorskip("torch")
    import fusedrnn.torch as ft

    ft.swap(torch.nn.LSTM(8, 64))


def give_lengths_twice() -> None:
    torch = pytest.importorskip("torch")
    import fusedrnn.torch as ft

    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(3, 8)])
    ft.LSTM(8, 64)(packed, lengths=[3])


def give_a_tensor_with_gradient() -> None:
    torch = pytest.importorskip("torch")
    fr.LSTM(8, 64)(torch.zeros(10, 4, 8, requires_grad=True))


def write_to_a_parameter() -> None:
    fr.LSTM(8, 64).weight_hh_l0[0] = 1


def move_a_layer() -> None:
    if not fr.cuda.status().startswith("off: this build"):
        pytest.skip("this build has a CUDA backend")
    fr.LSTM(8, 64).to("cuda")


def mix_devices() -> None:
    layer = fr.LSTM(8, 64, num_layers=2)
    layer.__dict__["device"] = "cuda:0"
    layer(X)


MISTAKES: list[Callable[[], Any]] = [
    lambda: fr.LSTM(8, 64)(X.astype(np.int64)),
    lambda: fr.LSTM(8, 64)(X.astype(np.float64)),
    lambda: fr.LSTM(8, 64)(X[:, :, 1:]),
    lambda: fr.lstm(X, W, R.T),
    lambda: fr.LSTM(8, 64)(X, (R[:4], R[:4])),
    lambda: fr.LSTM(8, 64)(X, R[None, :4]),  # type: ignore[arg-type]
    lambda: fr.LSTM(8, 64)(X, lengths=[1.0] * 4),
    lambda: fr.LSTM(8, 64)(X, lengths=[11] * 4),
    lambda: fr.LSTM(8, 64)(X, resets=np.full((10, 4), 0.5)),
    lambda: fr.LSTM(8, 64, dropout=0.5),
    lambda: fr.gru(X, W[:192], R[:192], cell_clip=1.0),  # type: ignore[call-arg]
    swap_a_module,
    give_lengths_twice,
    give_a_tensor_with_gradient,
    write_to_a_parameter,
    move_a_layer,
    mix_devices,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_messages_are_those_that_come(mistake: Callable[[], Any]) -> None:
    """Each mistake gives a message that the page on troubleshooting quotes."""
    page = " ".join((DOCS / "troubleshooting.md").read_text("utf-8").split())
    with pytest.raises(Exception) as caught:  # noqa: PT011 — the page says which
        mistake()
    said = f"{type(caught.value).__name__}: {caught.value}".rstrip(".")
    assert said in page
