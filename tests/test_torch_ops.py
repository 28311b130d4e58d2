"""The operators: what PyTorch asks of one, every derivative, compilers, memory."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers import Sizes, masks, options_of, with_options

import fusedrnn as fr
from fusedrnn.cells import CELLS, Cell

torch = pytest.importorskip("torch", reason="the operators are PyTorch's")

from torch import library  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402

import fusedrnn.torch as ft  # noqa: E402
from fusedrnn.torch import kernels, ops  # noqa: E402
from fusedrnn.torch.call import SMOOTH, Inputs  # noqa: E402

SIZES = Sizes(4, 3, 3, 5)

# Every cell with every option alone, with masks, with all at once, and in reverse.
CASES = [
    (name, options)
    for name, cell in CELLS.items()
    for options in [
        *([o] for o in ["plain", *options_of(cell), "lengths", "resets", "reverse"]),
        [o for o in [*options_of(cell), "both"] if o not in ("zoneout in inference", "bptt")],
    ]
]


def call_of(cell: Cell, names: list[str]) -> tuple[str, list[Any]]:
    """The string and the tensors of a call with options; floating ones need gradients."""
    names = [n for n in names if n not in ("plain", "reverse")] + names * ("reverse" in names)
    known = [n for n in names if n != "reverse"]
    arrays, given = with_options(cell, SIZES, known)
    asked: dict[str, Any] = {"cell": cell.name, "save": True}
    tensors = dict.fromkeys(Inputs._fields)
    for name, value in (arrays | given).items():
        if name in ("lengths", "resets"):
            tensors[name] = torch.from_numpy(value)
        elif name == "seed":
            tensors[name] = torch.tensor([value])
        elif isinstance(value, np.ndarray):
            tensors[name] = torch.from_numpy(value).requires_grad_()
        elif value is not None:
            asked[name] = value
    if "reverse" in names:
        asked["reverse"] = True
    return json.dumps(asked), list(tensors.values())


def smooth(text: str, results: Any) -> tuple[Any, ...]:
    """Those that have gradients and are there."""
    is_there = ops.parse(text).is_there
    return tuple(r for r, here in zip(results, is_there, strict=False) if here)


def leaves_of(tensors: list[Any]) -> tuple[list[int], list[Any]]:
    at = [n for n, a in enumerate(tensors[:SMOOTH]) if a is not None]
    return at, [tensors[n] for n in at]


def function_of(text: str, tensors: list[Any], way: Any = ops.run_forward) -> Any:
    at, _ = leaves_of(tensors)

    def function(*values: Any) -> Any:
        changed = list(tensors)
        for n, value in zip(at, values, strict=True):
            changed[n] = value
        return smooth(text, way(text, *changed))

    return function


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gradients(name: str, options: list[str]) -> None:
    """Against finite differences; bptt cuts on purpose what they see."""
    text, tensors = call_of(CELLS[name], options)
    function = function_of(text, tensors)
    _, leaves = leaves_of(tensors)
    if "bptt" not in options:
        assert gradcheck(function, leaves, fast_mode=True)
    by_kernels = torch.autograd.grad(sum(r.sum() for r in function(*leaves)), leaves)
    defined = function_of(text, tensors, ops.define)(*leaves)
    by_definition = torch.autograd.grad(sum(r.sum() for r in defined), leaves)
    for a, e in zip(by_kernels, by_definition, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_second_and_forward_derivatives(name: str, options: list[str]) -> None:
    text, tensors = call_of(CELLS[name], options)
    function = function_of(text, tensors)
    _, leaves = leaves_of(tensors)
    if "bptt" not in options:
        assert gradgradcheck(function, leaves, fast_mode=True)
    torch.manual_seed(0)
    directions = [torch.randn_like(a) for a in leaves]
    values, tangents = torch.func.jvp(function, tuple(leaves), tuple(directions))
    results = function(*leaves)
    weights = [torch.randn_like(r) for r in results]
    gradients = torch.autograd.grad(results, leaves, weights)
    pulled = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    pushed = sum((w * t).sum() for w, t in zip(weights, tangents, strict=True))
    torch.testing.assert_close(pushed, pulled)
    for a, e in zip(values, results, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_opcheck(name: str, options: list[str]) -> None:
    """Schema, shapes of fakes, autograd's registration, tracing with sizes that vary."""
    text, tensors = call_of(CELLS[name], options)
    library.opcheck(ops.forward, (text, *tensors))
    with torch.no_grad():
        y, h_n, c_n, cells, _, saved = ops.compute_forward(text, *tensors)
    is_there = ops.parse(text).is_there
    made = zip((y, h_n, c_n, cells), is_there, strict=True)
    d = [torch.randn_like(a).requires_grad_() if here else None for a, here in made]
    at, _ = leaves_of(tensors)
    wanted = sum(1 << n for n in at)
    # Traced backward twice it takes long, and a tracer cannot know a seed's masks.
    if len(options) > 1 or options[0] not in ("plain", "lengths"):
        tensors, d = ([a if a is None else a.detach() for a in of] for of in (tensors, d))
    library.opcheck(ops.backward, (text, wanted, *d, y, cells, saved, *tensors))


@pytest.mark.parametrize("name", CELLS)
def test_operators_and_what_stands_for_them_agree(name: str) -> None:
    """Called by autograd, by an operator, within a transform: the same bits."""
    text, tensors = call_of(CELLS[name], ["lengths"])
    _, leaves = leaves_of(tensors)
    ways = []
    for way in (ops.run_forward, ops.forward):
        results = function_of(text, tensors, way)(*leaves)
        ways.append([*results, *torch.autograd.grad(sum(r.sum() for r in results), leaves)])
    function = function_of(text, tensors)
    of_transform = torch.func.grad(lambda values: sum(r.sum() for r in function(*values)))(
        leaves
    )
    assert all(map(torch.equal, ways[0], ways[1]))
    assert all(map(torch.equal, ways[0][-len(leaves) :], of_transform))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("has_lengths", [False, True])
def test_gradients_per_sample(name: str, has_lengths: bool) -> None:
    module = getattr(ft, name)(3, 4, num_layers=2, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    lengths = torch.tensor([5, 1, 0, 3, 5, 2]) if has_lengths else torch.full((6,), 5)

    def loss(parameters: Any, x: Any, length: Any) -> Any:
        given = (x.unsqueeze(1), None, length.unsqueeze(0))
        y, _ = torch.func.functional_call(module, parameters, given)
        return y.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    found = per_sample(parameters, x, lengths)
    for b in range(6):
        module.zero_grad()
        loss(dict(module.named_parameters()), x[b], lengths[b]).backward()
        for key, p in module.named_parameters():
            torch.testing.assert_close(found[key][b], p.grad)


def test_ensembles_and_batches_of_calls() -> None:
    modules = [ft.GRU(3, 4, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    base = ft.GRU(3, 4, dtype=torch.float64, device="meta")
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def call(p: Any, b: Any, x: Any) -> Any:
        return torch.func.functional_call(base, (p, b), (x,))[0]

    y = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    for one, module in zip(y, modules, strict=True):
        assert torch.equal(one, module(x)[0])
    stacked = torch.randn(5, 7, 2, 3, dtype=torch.float64)
    y = torch.vmap(lambda x: modules[0](x)[0], in_dims=1, out_dims=1)(stacked)
    for n in range(7):
        assert torch.equal(y[:, n], modules[0](stacked[:, n])[0])


def test_hessian_and_jacobians() -> None:
    module = ft.LSTM(2, 3, dtype=torch.float64)
    x = torch.randn(3, 1, 2, dtype=torch.float64)
    expected = torch.nn.LSTM(2, 3, dtype=torch.float64)
    expected.load_state_dict(module.state_dict())
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        found = transform(lambda x: module(x)[0])(x)
        torch.testing.assert_close(found, torch.func.jacrev(lambda x: expected(x)[0])(x))
    hessian = torch.func.hessian(lambda x: module(x)[0].square().sum())(x)
    theirs = torch.func.hessian(lambda x: expected(x)[0].square().sum())(x)
    torch.testing.assert_close(hessian, theirs)
    with forward_ad.dual_level():
        y, _ = module(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(y).tangent is not None


# What is not wanted


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("options", [[], ["clip"], ["layer_norm"], ["projection"]], ids=str)
def test_each_gradient_alone(name: str, options: list[str]) -> None:
    """A gradient does not depend on which others are asked for."""
    cell = CELLS[name]
    if not set(options) <= set(options_of(cell)):
        pytest.skip("not an option of this cell")
    text, tensors = call_of(cell, options)
    at, leaves = leaves_of(tensors)
    results = function_of(text, tensors)(*leaves)
    total = sum(r.sum() for r in results)
    together = torch.autograd.grad(total, leaves, retain_graph=True)
    for leaf, expected in zip(leaves, together, strict=True):
        (alone,) = torch.autograd.grad(total, [leaf], retain_graph=True)
        assert torch.equal(alone, expected)
    for n, leaf in zip(at, leaves, strict=True):
        leaf.requires_grad_(Inputs._fields[n] in ("weight_hh", "x"))
    total = sum(r.sum() for r in function_of(text, tensors)(*leaves))
    total.backward()
    assert [a.grad is not None for a in leaves] == [a.requires_grad for a in leaves]


def test_frozen_parameters_and_inputs_are_not_computed(monkeypatch: Any) -> None:
    asked = []
    real = ops.compute_backward

    def watched(text: str, wanted: int, *tensors: Any) -> Any:
        asked.append(wanted)
        return real(text, wanted, *tensors)

    monkeypatch.setattr(ops, "compute_backward", watched)
    module = ft.LSTM(3, 4)
    module.weight_ih_l0.requires_grad_(False)
    module(torch.randn(5, 2, 3))[0].sum().backward()
    names = [n for k, n in enumerate(Inputs._fields) if asked[0] >> k & 1]
    assert names == ["weight_hh", "bias_ih", "bias_hh"]
    module.requires_grad_(False)
    y, _ = module(torch.randn(5, 2, 3))
    assert not y.requires_grad


def test_backward_twice() -> None:
    y, _ = ft.LSTM(3, 4)(torch.randn(5, 2, 3))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_changed_results_are_noticed() -> None:
    y, _ = ft.LSTM(3, 4)(torch.randn(5, 2, 3))
    total = y.sum()
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("options", [{}, {"clip": 1.0}], ids=["plain", "options"])
def test_saved_memory_is_freed(options: Any) -> None:
    """By backward, and with the graph that nobody went back through."""
    module, x = ft.LSTM(3, 8, **options), torch.randn(50, 4, 3)
    for goes_back in (True, False):
        y, _ = module(x)
        tensors = [a for a in y.grad_fn.saved_tensors if a is not None]
        kept = weakref.ref(max(tensors, key=lambda a: a.numel()))
        total = y.sum()
        del y, tensors, _
        assert kept() is not None
        if goes_back:
            total.backward()
        else:
            del total
        gc.collect()
        assert kept() is None


# Compilers

MODULES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("RNN", {"nonlinearity": "relu"}),
    ("LSTM", {"proj_size": 3, "layer_norm": True, "zoneout": 0.1}),
]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize(("name", "options"), MODULES, ids=str)
def test_compile(name: str, options: Any, backend: str) -> None:
    """Without a break, and without compiling again for another T and B."""
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
        torch.testing.assert_close(results[1], results[0])
        frames = frames or counter.frame_count  # the first time may take a second try
    assert counter.frame_count == frames
    lengths = torch.tensor([6, 0, 3, 5])
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn((4, 6, 3) if options.get("batch_first") else (6, 4, 3))
    torch.testing.assert_close(compiled(x, None, lengths)[0], module(x, None, lengths)[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], module(x)[0])


def test_compile_draws_and_cells() -> None:
    """Random numbers, and a loop of single steps, in one graph."""
    module = ft.GRU(3, 4, zoneout=0.3, recurrent_dropout=0.2)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(5, 2, 3)
    for seed in (3, 4):
        y = compiled(x, seed=seed)[0]
        torch.testing.assert_close(y, module(x, seed=seed)[0])
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    cell = ft.LSTMCell(3, 4)

    def loop(x: Any) -> Any:
        state = None
        for x_t in x:
            state = cell(x_t, state)
        return state

    torch.testing.assert_close(torch.compile(loop, fullgraph=True)(x), loop(x))


@pytest.mark.parametrize(("name", "options"), MODULES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_export(name: str, options: Any, training: bool) -> None:
    module = getattr(ft, name)(3, 4, **options).train(training)
    T, B = torch.export.Dim("T", min=1), torch.export.Dim("B", min=1)
    dims = {0: B, 1: T} if options.get("batch_first") else {0: T, 1: B}
    program = torch.export.export(module, (torch.randn(6, 5, 3),), dynamic_shapes=(dims,))
    told = [n.args[0] for n in program.graph.nodes if "fusedrnn" in str(n.target)]
    assert told
    if hasattr(torch.compiler, "is_exporting"):
        assert all(("save" in json.loads(t)) == training for t in told)
    x = torch.randn(11, 8, 3)
    if not (training and "zoneout" in options):
        torch.testing.assert_close(program.module()(x)[0], module(x)[0])


def test_what_is_exported_in_inference_can_go_back() -> None:
    """Then forward is computed again."""
    module = ft.GRU(3, 4).eval()
    program = torch.export.export(module, (torch.randn(6, 5, 3),)).module()
    x = torch.randn(6, 5, 3)
    results = []
    for call in (module, program):
        y, _ = call(x)
        results.append(torch.autograd.grad(y.square().sum(), list(call.parameters())))
    for a, e in zip(
        sorted(results[1], key=lambda g: g.norm()),
        sorted(results[0], key=lambda g: g.norm()),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.skipif(not hasattr(ops.forward, "register_autocast"), reason="PyTorch 2.6")
def test_autocast_of_the_operator() -> None:
    text, tensors = call_of(CELLS["lstm"], [])
    halves = [a if a is None else a.detach().to(torch.bfloat16) for a in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.forward(text, *halves)[0]
    assert y.dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(4, 3, 2)}, ValueError, "wrong dtype or shape"),
        ({"weight_hh": torch.zeros(20, 5)}, ValueError, "wrong dtype or shape"),
        ({"lengths": torch.tensor([1, 2, 9])}, ValueError, "lengths must be from 0 to T = 4"),
    ],
    ids=["shape", "dtype", "lengths"],
)
def test_wrong_tensors(changed: Any, error: Any, message: str) -> None:
    """Nothing is read out of bounds."""
    text, tensors = call_of(CELLS["lstm"], [])
    with pytest.raises(error, match=message):
        ops.forward(text, *(Inputs(*tensors)._replace(**changed)))


def test_no_row_takes_a_step() -> None:
    text, tensors = call_of(CELLS["lstm"], [])
    given = Inputs(*tensors)._replace(lengths=torch.zeros(SIZES.B, dtype=torch.int64))
    library.opcheck(ops.forward, (text, *given))


def test_the_definition_of_halves() -> None:
    """States are float32 beside an x of 16 bits, as on a GPU."""
    text, tensors = call_of(CELLS["lstm"], ["return_cells"])
    exact = ops.define(text, *tensors)
    given = Inputs(*(a if a is None else a.detach().to(torch.bfloat16) for a in tensors))
    given = given._replace(h0=given.h0.float(), c0=given.c0.float())
    made = ops.define(text, *given)
    kinds = [torch.bfloat16, *[torch.float32] * 3]
    assert [a.dtype for a in made[:4]] == kinds
    torch.testing.assert_close(made[0].double(), exact[0], atol=0.05, rtol=0.05)


def test_wrong_strings() -> None:
    with pytest.raises(KeyError):
        ops.parse('{"cell": "transformer"}')
    with pytest.raises(TypeError, match="no option 'speed'"):
        ops.parse('{"cell": "lstm", "speed": 11}')
    text, tensors = call_of(CELLS["gru"], ["zoneout"])
    with pytest.raises(ValueError, match="seed must be a tensor"):
        ops.run_forward(text, *tensors[:-1], None)


def test_masks_of_any_kind() -> None:
    """lengths as int32, a list; resets of a view."""
    module, x = ft.LSTM(3, 4), torch.randn(6, 3, 3)
    both = masks("both", Sizes(6, 3, 3, 4))
    expected = module(
        x, None, torch.from_numpy(both["lengths"]), torch.from_numpy(both["resets"])
    )
    wide = torch.from_numpy(both["resets"]).repeat_interleave(2, 1)[:, ::2]
    for lengths in (both["lengths"].tolist(), torch.from_numpy(both["lengths"]).int()):
        torch.testing.assert_close(module(x, None, lengths, wide), expected)
    y, _ = module(x[:, 0], None, 4, torch.zeros(6, dtype=torch.bool))
    assert not y[4:].any()
    assert fr.get_num_threads() >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="threads are shared on Linux alone")
def test_calls_run_on_torchs_threads(threads: int) -> None:
    """And give the same bits on any number of them, from several threads of Python at once."""
    assert kernels.share_team()
    module, x = ft.GRU(20, 150), torch.randn(40, 9, 20)
    torch.relu(torch.randn(1000, 1000))  # its threads spin now
    expected = module(x)[0]
    fr.set_num_threads(1)
    assert torch.equal(module(x)[0], expected)
    fr.set_num_threads(threads)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: module(x)[0], range(12)))
    assert all(torch.equal(y, expected) for y in found)
