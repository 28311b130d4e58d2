"""fusedrnn.torch in bfloat16 on the CPU: modules, autocast, graphs, derivatives."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import Bfloat16, assert_close, options_of

torch = pytest.importorskip("torch", reason="the modules are PyTorch's")

from torch import library, nn  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_sequence  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_calls import CASES, SIZES, call_of, detached  # noqa: E402

import fusedrnn.torch as ft  # noqa: E402
from fusedrnn.cells import CELLS  # noqa: E402
from fusedrnn.torch import ops  # noqa: E402
from fusedrnn.torch.call import parse  # noqa: E402

BF16 = torch.bfloat16
LAYERS = ("LSTM", "GRU", "RNN")
FORMS: list[dict[str, Any]] = [
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "bidirectional": True},
]


def flat(results: Any) -> list[Any]:
    if isinstance(results, (tuple, list)) and not isinstance(results, PackedSequence):
        return [a for r in results for a in flat(r)]
    return [results.data if isinstance(results, PackedSequence) else results]


def run(module: Any, x: Any, autocast: bool = False) -> list[Any]:
    """The results, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        results = flat(module(x))
    weights = [torch.linspace(-1, 1, r.numel()).view_as(r) for r in results]
    total = sum((r.double() * w).sum() for r, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(total, [x, *module.parameters()])]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", [*LAYERS, "LSTMCell", "GRUCell", "RNNCell"])
def test_against_torch_nn_in_float64(name: str, form: dict[str, Any]) -> None:
    """A module of bfloat16, and one of float32 under autocast, have the error of bfloat16."""
    is_layer = name in LAYERS
    form = form if is_layer else {k: v for k, v in form.items() if k == "bias"}
    module = getattr(ft, name)(7, 20, **form)
    exact = getattr(nn, name)(7, 20, **form).double()
    x = torch.randn((9, 5, 7) if is_layer else (5, 7)).to(BF16)
    exact.load_state_dict(module.state_dict())
    under_autocast = run(module, x.float(), autocast=True)
    assert_close(under_autocast, run(exact, x.double()), "bfloat16", factor=2)
    states = under_autocast[1 : -1 - len(list(module.parameters()))]
    assert {a.dtype for a in states} <= {BF16 if is_layer else torch.float32}
    assert under_autocast[0].dtype == (BF16 if is_layer else torch.float32)
    assert next(iter(reversed(under_autocast))).dtype == torch.float32
    module.to(BF16)
    exact.load_state_dict(module.state_dict())
    found = run(module, x)
    assert {a.dtype for a in found} == {BF16}
    assert_close(found, run(exact, x.double()), "bfloat16", factor=2)
    with torch.no_grad():
        assert torch.equal(flat(module(x))[0], found[0])
        state = flat(module(x))[1:] or flat(module(x))
    given = tuple(state) if "LSTM" in name else state[0]
    if is_layer:
        with torch.no_grad():
            again = flat(module(x, given))
        assert_close(again, flat(module(x, given)))


def test_autocast_copies_no_whole_tensor() -> None:
    """Weights and x of float32 reach the kernels as they are, y as it leaves them."""
    module, x = ft.LSTM(64, 96), torch.randn(20, 8, 64)
    copied = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func._schema.name in ("aten::_to_copy", "aten::clone", "aten::copy_"):
                copied.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", BF16), Watch():
        y, _ = module(x)
        y.backward(torch.ones_like(y))
    assert y.dtype == BF16
    assert max(copied, default=0) <= 8 * 96  # states


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_operator(name: str, options: list[str]) -> None:
    """The operator agrees with its definition, for x of bfloat16 and for one of float32."""
    call, tensors = call_of(CELLS[name], options)
    layers, asked = call.text
    factor = Bfloat16().factor(call.cell, {*options} & {*options_of(call.cell)})
    for words, dtype in ((asked, BF16), (f"{asked} bfloat16", torch.float32)):
        given = detached(tensors, dtype)
        wide = [None if a is None else a.float() for a in given[1:3]]
        given = given._replace(h0=wide[0], c0=wide[1])
        leaves = [a for a in given.smooth if a is not None]
        for a in leaves:
            a.requires_grad_()
        found = []
        for way in (ops.run_forward, ops.define):
            made = way(parse(layers, words), *given)
            smooth = [a for a in made[:4] if a.numel()]
            d = [torch.linspace(-1, 1, a.numel()).view_as(a).to(a.dtype) for a in smooth]
            found.append([*smooth, *torch.autograd.grad(smooth, leaves, d)])
        for a, e in zip(*found, strict=True):
            assert a.dtype == e.dtype
            assert_close(a, e, "bfloat16", gradient=True, factor=2 * factor)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_the_operator_is_sound(dtype: Any) -> None:
    """PyTorch's own checks of an operator: its fake results, and autograd through graphs."""
    call, tensors = call_of(CELLS["gru"], ["trace"], SIZES)
    layers, asked = call.text
    given = detached(tensors, dtype)
    given = given._replace(h0=given.h0.float())
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    library.opcheck(ops.forward, (layers, f"{asked} bfloat16", *given), test_utils=checks)


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_and_export(autocast: bool) -> None:
    """A module compiles without a break and is exported, and computes the same."""
    module, x = ft.GRU(3, 40, num_layers=2), torch.randn(6, 4, 3)
    if not autocast:
        module, x = module.to(BF16), x.to(BF16)

    def call(x: Any) -> Any:
        with torch.autocast("cpu", BF16, enabled=autocast):
            return module(x)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = []
    for way in (call, compiled):
        y = way(x)
        found.append([y, *torch.autograd.grad(y.float().sum(), [*module.parameters()])])
    for eager, of_graph in zip(*found, strict=True):
        assert eager.dtype == of_graph.dtype
        assert torch.equal(eager, of_graph)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, x: Any) -> Any:
            with torch.autocast("cpu", BF16, enabled=autocast):
                return self.layers(x)[0]

    program = torch.export.export(Model().eval(), (x,))
    assert torch.equal(program.module()(x), call(x))


def test_amp_with_a_scaler() -> None:
    """Mixed precision with float32 weights and a scaler learns, as torch.nn does."""
    found = []
    for home in (ft, nn):
        torch.manual_seed(0)
        model = home.LSTM(3, 16)
        head = nn.Linear(16, 1)
        step = torch.optim.Adam([*model.parameters(), *head.parameters()], 0.02)
        scaler = torch.amp.GradScaler("cpu")
        x, losses = torch.randn(20, 8, 3), []
        for _ in range(20):
            with torch.autocast("cpu", BF16):
                loss = (head(model(x)[0]) - x.sum(-1, keepdim=True)).square().mean()
            step.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(step)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(step)
            scaler.update()
            losses.append(loss.item())
        assert model.weight_hh_l0.dtype == torch.float32
        found.append(losses)
    assert_close(found[0], found[1], "bfloat16", factor=3)
    assert found[0][-1] < 0.8 * found[0][0]


def test_packed_sequences_and_second_derivatives() -> None:
    """Packed data keep their type; second derivatives are those of the definition."""
    module = ft.GRU(3, 8).to(BF16)
    sequences = [torch.randn(n, 3).to(BF16) for n in (5, 3, 1)]
    y, _ = module(pack_sequence(sequences))
    assert y.data.dtype == BF16
    alone, _ = module(sequences[1])
    assert torch.equal(y.data[1], alone[0])
    x = torch.randn(4, 2, 3, dtype=BF16, requires_grad=True)
    (first,) = torch.autograd.grad(module(x)[0].float().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.float().square().sum(), x)
    exact = ft.GRU(3, 8).double()
    exact.load_state_dict(module.state_dict())
    wide = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(exact(wide)[0].sum(), wide, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), wide)
    assert_close(second, expected, "bfloat16", gradient=True, factor=3)
