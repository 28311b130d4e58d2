"""What the pages say is so: examples run, links lead somewhere, messages are those that come,
conversions of weights agree with the libraries that they are from, pictures are as drawn.

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
from helpers import assert_close

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
            r"^(?:import|from) (torch|onnx|matplotlib|keras)\b", block, re.M
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


# Conversions

T, B, I, H = 6, 4, 3, 7


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Asymmetric values, so that neither a wrong order nor a transposition can hide."""
    return np.random.default_rng([seed, *shape]).normal(size=shape) / 2


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The functions of the page."""
    return run_page(DOCS / "migrating.md")


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def lstm_by_hand(
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray,
    order: str,
) -> np.ndarray:
    """What Keras's LSTMCell and Haste's LSTM compute, each with its order of gates."""
    h, c, hs = np.zeros((B, H)), np.zeros((B, H)), []
    for x_t in x:
        blocks = np.split(x_t @ kernel + h @ recurrent_kernel + bias, 4, axis=-1)
        a = dict(zip(order, blocks, strict=True))
        c = sigmoid(a["f"]) * c + sigmoid(a["i"]) * np.tanh(a["g"])
        h = sigmoid(a["o"]) * np.tanh(c)
        hs.append(h)
    return np.stack(hs)


def gru_by_hand(
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray,
    recurrent_bias: np.ndarray | float = 0.0,
    reset_after: bool = True,
) -> np.ndarray:
    """What Keras's GRUCell and, resetting after, Haste's GRU compute."""
    h, hs = np.zeros((B, H)), []
    for x_t in x:
        x_z, x_r, x_n = np.split(x_t @ kernel + bias, 3, axis=-1)
        h_z, h_r, h_n = np.split(h @ recurrent_kernel + recurrent_bias, 3, axis=-1)
        z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
        inner = r * h_n if reset_after else (r * h) @ recurrent_kernel[:, 2 * H :]
        h = z * h + (1 - z) * np.tanh(x_n + inner)
        hs.append(h)
    return np.stack(hs)


def result(layer: Any, state_dict: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    layer.load_state_dict(state_dict)
    y: np.ndarray = layer(x)[0]
    return y


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_weights_from_torch(cell: str) -> None:
    """A layer with torch's weights computes what torch's module does."""
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    module = getattr(torch.nn, cell)(I, H, dtype=torch.float64, **options)
    layer = getattr(fr, cell)(I, H, dtype=np.float64, **options)
    x = random(B, T, I)
    expected = module(torch.tensor(x))[0].detach().numpy()
    assert_close(result(layer, module.state_dict(), x), expected)


# By hand compared with Keras 3.15.1 (on PyTorch): equal to 1e-6, in float32.


def test_weights_from_keras_lstm(page: dict[str, Any]) -> None:
    """The conversion from Keras's LSTM keeps what it computes."""
    x, weights = random(T, B, I), [random(I, 4 * H), random(H, 4 * H), random(4 * H)]
    y = result(fr.LSTM(I, H, dtype=np.float64), page["from_keras"](weights, "lstm"), x)
    assert_close(y, lstm_by_hand(x, *weights, "ifgo"))


@pytest.mark.parametrize("reset_after", [True, False])
def test_weights_from_keras_gru(page: dict[str, Any], reset_after: bool) -> None:
    """The conversion from Keras's GRU keeps what it computes, resetting before or after."""
    bias = random(2, 3 * H) if reset_after else random(3 * H)
    x, weights = random(T, B, I), [random(I, 3 * H), random(H, 3 * H), bias]
    layer = fr.GRU(I, H, reset_after=reset_after, dtype=np.float64)
    y = result(layer, page["from_keras"](weights, "gru"), x)
    biases = bias if reset_after else (bias, 0.0)
    expected = gru_by_hand(x, *weights[:2], *biases, reset_after=reset_after)
    assert_close(y, expected)


def test_weights_from_keras_without_bias(page: dict[str, Any]) -> None:
    """The conversion from Keras works for layers without bias."""
    x, weights = random(T, B, I), [random(I, H), random(H, H)]
    y = result(fr.RNN(I, H, dtype=np.float64), page["from_keras"](weights, "rnn"), x)
    assert_close(y[0], np.tanh(x[0] @ weights[0]))
    assert_close(y[1], np.tanh(x[1] @ weights[0] + y[0] @ weights[1]))


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(
    ("operator", "options", "attributes"),
    [
        ("LSTM", {}, {}),
        ("LSTM", {"peephole": True}, {}),
        ("LSTM", {"coupled_gates": True}, {"input_forget": 1}),
        ("LSTM", {"coupled_gates": True, "peephole": True}, {"input_forget": 1}),
        ("GRU", {"reset_after": False}, {}),
        ("GRU", {"reset_after": True}, {"linear_before_reset": 1}),
        ("RNN", {}, {}),
    ],
)
def test_weights_from_onnx(
    page: dict[str, Any],
    operator: str,
    options: dict[str, bool],
    attributes: dict[str, int],
    D: int,
) -> None:
    """The conversion from ONNX keeps what onnxruntime computes, with its approximate σ and
    tanh.
    """
    from test_onnx import SIZES, run  # skips where there is none

    assert SIZES.H == H
    rows = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator] * H
    inputs = {"X": random(T, B, I), "W": random(D, rows, I), "R": random(D, rows, H)}
    inputs["B"] = random(D, 2 * rows)
    if options.get("peephole"):
        inputs["P"] = random(D, 3 * H)
    inputs = {name: a.astype(np.float32) for name, a in inputs.items()}
    direction = "bidirectional" if D == 2 else "forward"
    expected = run(operator, inputs, direction=direction, **attributes)
    layer = getattr(fr, operator)(I, H, bidirectional=D == 2, **options)
    x = inputs.pop("X")
    found = page["from_onnx"](operator, **inputs, input_forget="input_forget" in attributes)
    y = result(layer, found, x)
    assert_close(y, page["y_from_onnx"](expected[0]), "onnxruntime")


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_weights_from_cudnn(page: dict[str, Any], cell: str) -> None:
    """The conversion from cuDNN keeps what PyTorch computes, whose weights are laid out as
    the page says of cuDNN: its own buffer needs a GPU.
    """
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    options = {"num_layers": 2, "bidirectional": True}
    module = getattr(torch.nn, cell)(I, H, dtype=torch.float64, **options)
    parts = {name: p.detach().numpy() for name, p in module.named_parameters()}
    matrices = [p.ravel() for name, p in parts.items() if name.startswith("weight")]
    biases = [p for name, p in parts.items() if name.startswith("bias")]
    flat = np.concatenate([*matrices, *biases])
    gates = {"LSTM": 4, "GRU": 3}[cell]
    found = page["from_cudnn"](flat, I, H, gates, layers=2, directions=2)
    x = random(T, B, I)
    expected = module(torch.tensor(x))[0].detach().numpy()
    y = result(getattr(fr, cell)(I, H, dtype=np.float64, **options), found, x)
    assert_close(y, expected)
    with pytest.raises(ValueError, match="flat must have"):
        page["from_cudnn"](flat[1:], I, H, gates, layers=2, directions=2)


def test_weights_from_haste(page: dict[str, Any]) -> None:
    """The conversion from Haste keeps what its kernels compute, written out: they need a
    GPU.
    """
    x, weights = random(T, B, I), [random(I, 4 * H), random(H, 4 * H), random(4 * H)]
    y = result(fr.LSTM(I, H, dtype=np.float64), page["from_haste"]("lstm", *weights), x)
    assert_close(y, lstm_by_hand(x, *weights, "igfo"))

    biases = random(3 * H), random(3 * H, seed=1)
    weights = [random(I, 3 * H), random(H, 3 * H), *biases]
    y = result(fr.GRU(I, H, dtype=np.float64), page["from_haste"]("gru", *weights), x)
    assert_close(y, gru_by_hand(x, *weights))
