"""Modules are compiled, exported and traced without a break, and compute the same."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import assert_close

torch = pytest.importorskip("torch", reason="the compilers are PyTorch's")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

import fusedrnn.torch as ft  # noqa: E402

MODULES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("RNN", {"nonlinearity": "relu"}),
    ("LSTM", {"proj_size": 3, "layer_norm": True, "zoneout": 0.1}),
]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize(("name", "options"), MODULES, ids=str)
def test_compile(name: str, options: Any, backend: str) -> None:
    """A module compiles without a break, and is not compiled again for another T and B."""
    module = getattr(ft, name)(3, 4, **options).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    frames = 0
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for T, B in ((6, 4), (9, 5), (3, 8)):
        shape = (B, T, 3) if options.get("batch_first") else (T, B, 3)
        results = []
        x = torch.randn(shape, requires_grad=True)
        for call in (module, compiled):
            y, _ = call(x)
            gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
            results.append([y, *gradients])
        assert_close(results[1], results[0], gradient=True)
        frames = frames or counter.frame_count  # the first time may take a second try
    assert counter.frame_count == frames
    lengths = torch.tensor([6, 0, 3, 5])
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn((4, 6, 3) if options.get("batch_first") else (6, 4, 3))
    assert_close(compiled(x, None, lengths)[0], module(x, None, lengths)[0])
    with torch.no_grad():
        assert_close(compiled(x)[0], module(x)[0])


def test_compile_draws_and_cells() -> None:
    """Random numbers, and a loop of single steps, are in one graph."""
    module = ft.GRU(3, 4, zoneout=0.3, recurrent_dropout=0.2)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(5, 2, 3)
    for seed in (3, 4):
        y = compiled(x, seed=seed)[0]
        assert_close(y, module(x, seed=seed)[0])
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    cell = ft.LSTMCell(3, 4)

    def loop(x: Any) -> Any:
        state = None
        for x_t in x:
            state = cell(x_t, state)
        return state

    assert_close(torch.compile(loop, fullgraph=True)(x), loop(x))


@pytest.mark.parametrize(("name", "options"), MODULES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_export(name: str, options: Any, training: bool) -> None:
    """A module is exported with any T and B, saving for backward only in training."""
    module = getattr(ft, name)(3, 4, **options).train(training)
    T, B = torch.export.Dim("T", min=1), torch.export.Dim("B", min=1)
    dims = {0: B, 1: T} if options.get("batch_first") else {0: T, 1: B}
    program = torch.export.export(module, (torch.randn(6, 5, 3),), dynamic_shapes=(dims,))
    asked = [n.args[1] for n in program.graph.nodes if "fusedrnn" in str(n.target)]
    assert asked
    if hasattr(torch.compiler, "is_exporting"):
        assert all(("save" in words.split()) == training for words in asked)
    x = torch.randn(11, 8, 3)
    if not (training and "zoneout" in options):
        assert_close(program.module()(x)[0], module(x)[0])


@pytest.mark.parametrize("kind", [ft.LSTM, ft.GRU, ft.LSTMCell, ft.RNNCell])
def test_symbolic_trace_takes_modules_as_leaves(kind: Any) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(3, 4), kind(4, 5)

        def forward(self, x: Any) -> Any:
            return self.last(torch.relu(self.first(x)))[0] * 2

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    nodes = {n.target: n.op for n in traced.graph.nodes}
    assert nodes["last"] == "call_module"
    x = torch.randn(6, 2, 3) if kind in (ft.LSTM, ft.GRU) else torch.randn(2, 3)
    assert torch.equal(traced(x), model(x))


def test_what_is_exported_in_inference_can_go_back() -> None:
    """What is exported in inference computes forward again to go back."""
    module = ft.GRU(3, 4).eval()
    program = torch.export.export(module, (torch.randn(6, 5, 3),)).module()
    x = torch.randn(6, 5, 3)
    results = []
    for call in (module, program):
        y, _ = call(x)
        results.append(torch.autograd.grad(y.square().sum(), list(call.parameters())))
    by_norm = [sorted(gradients, key=lambda g: g.norm()) for gradients in results]
    assert_close(by_norm[1], by_norm[0], gradient=True)
