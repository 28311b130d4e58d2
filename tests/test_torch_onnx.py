"""`torch.onnx.export` of models with our modules writes LSTM, GRU and RNN nodes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_close

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is the oracle")
pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")

from torch import nn  # noqa: E402

import fusedrnn.onnx as fo  # noqa: E402
import fusedrnn.torch as ft  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of PyTorch's exporter
I, H = 3, 5
DIM = torch.export.Dim


class Model(nn.Module):
    """A recurrent module, called with keyword arguments, and a layer after it."""

    def __init__(self, module: Any, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options
        D = 1 + getattr(module, "bidirectional", False)
        self.head = nn.Linear(getattr(module, "proj_size", 0) or H * D, 2)

    def forward(
        self, x: Any, hx: Any = None, lengths: Any = None, resets: Any = None, mask: Any = None
    ) -> Any:
        y, state = self.module(x, hx, lengths, resets, mask, **self.options)[:2]
        return self.head(y), state


def export(model: Any, arguments: tuple[Any, ...], path: Path, **options: Any) -> Any:
    """Export a model and return a session of onnxruntime."""
    torch.onnx.export(model.eval(), arguments, path, dynamo=True, verbose=False, **options)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"peephole": True, "coupled_gates": True, "activation": "softsign"}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("GRU", {"reset_after": False, "clip": 0.5, "batch_first": True}),
    ("GRU", {"recurrent_activation": ("hard_sigmoid", 0.2, 0.5), "bias": False}),
    ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_modules(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A module becomes a node for each layer, with any T and B and with constant weights."""
    model = Model(getattr(ft, kind)(I, H, **options))
    names = ("B", "T") if options.get("batch_first") else ("T", "B")
    axes = dict(enumerate(map(DIM, names)))
    path = tmp_path / "model.onnx"
    session = export(model, (torch.randn(4, 6, I),), path, dynamic_shapes={"x": axes})
    assert operators(path).count(kind) == options.get("num_layers", 1)
    for sizes in ((4, 6), (7, 2), (1, 1)):
        x = torch.randn(*sizes, I)
        y, state = model(x)
        expected = [y, *(state if isinstance(state, tuple) else [state])]
        results = session.run(None, {"x": x.numpy()})
        assert_close(results, [a.detach().numpy() for a in expected], "onnxruntime")
    found = fo.layers(path)
    assert not found.refused
    assert len(found.layers) == options.get("num_layers", 1)


def test_swapped_models_with_states_and_lengths(tmp_path: Path) -> None:
    """A swapped model is exported with states and lengths as inputs."""
    model = Model(nn.LSTM(I, H, 2, bidirectional=True))
    ft.swap(model)
    B = DIM("B")
    x, h, c = torch.randn(6, 4, I), torch.randn(4, 4, H), torch.randn(4, 4, H)
    given = {"lengths": torch.tensor([6, 2, 1, 4])}
    shapes = {"x": {0: DIM("T"), 1: B}, "hx": ({1: B}, {1: B}), "lengths": {0: B}}
    path = tmp_path / "model.onnx"
    arguments = (x, (h, c))
    session = export(model, arguments, path, kwargs=given, dynamic_shapes=shapes)
    x, h, c, lengths = torch.randn(9, 2, I), torch.randn(4, 2, H), torch.randn(4, 2, H), [9, 3]
    names = [value.name for value in session.get_inputs()]
    values = [x.numpy(), h.numpy(), c.numpy(), np.array(lengths)]
    y, state = model(x, (h, c), lengths=torch.tensor(lengths))
    results = session.run(None, dict(zip(names, values, strict=True)))
    assert_close(results, [a.detach().numpy() for a in (y, *state)], "onnxruntime")
    node = next(n for n in onnx.load(path).graph.node if n.op_type == "LSTM")
    assert node.input[4], "sequence_lens"


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(kind: str, tmp_path: Path) -> None:
    """A cell becomes a node of one step."""
    cell = getattr(ft, kind)(I, H)
    h = torch.randn(4, H)
    hx = (h, torch.randn(4, H)) if kind == "LSTMCell" else h
    x, path = torch.randn(4, I), tmp_path / "cell.onnx"
    session = export(cell, (x, hx), path)
    names = [value.name for value in session.get_inputs()]
    values = [a.numpy() for a in (x, *(hx if isinstance(hx, tuple) else [hx]))]
    after = cell(x, hx)
    expected = [a.detach().numpy() for a in (after if isinstance(after, tuple) else [after])]
    results = session.run(None, dict(zip(names, values, strict=True)))
    assert_close(results, expected, "onnxruntime")


RESETS = torch.zeros(6, 4, dtype=torch.bool)
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (lambda: Model(ft.LSTM(I, H, proj_size=2)), {}, "layer must not have proj_size=2"),
    (lambda: Model(ft.GRU(I, H, layer_norm=True)), {}, "layer must not have layer_norm=True"),
    (lambda: Model(ft.GRU(I, H, zoneout=0.1)), {}, "layer must not have zoneout=0.1"),
    (lambda: Model(ft.GRU(I, H)), {"resets": RESETS}, "the call must not have resets"),
    (lambda: Model(ft.GRU(I, H)), {"mask": RESETS}, "the call must not have mask"),
    (lambda: Model(ft.GRU(I, H), trace=True), {}, "the call must not have trace"),
    (
        lambda: ft.quantize(Model(ft.GRU(I, H)), "int8").model,
        {},
        "layer must not have weights='int8'",
    ),
]


@pytest.mark.parametrize(("make", "given", "message"), REFUSED)
def test_what_onnx_lacks(
    make: Any, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Options that ONNX lacks are refused by name."""
    with pytest.raises(Exception, match=re.escape(message)):
        export(make(), (torch.randn(6, 4, I),), tmp_path / "model.onnx", kwargs=given)
    assert not (tmp_path / "model.onnx").exists()


def test_the_old_exporter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter by tracing is refused with the argument that helps."""
    # PyTorch switches the cache off for the trace, and not on again after an error.
    monkeypatch.setattr(torch, "set_autocast_cache_enabled", lambda enabled: None)
    with pytest.raises(RuntimeError, match="needs dynamo=True for modules of"):
        torch.onnx.export(
            Model(ft.GRU(I, H)).eval(),
            (torch.randn(6, 4, I),),
            tmp_path / "m.onnx",
            dynamo=False,
        )
