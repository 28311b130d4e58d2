"""fusedrnn.torch's modules stand in the place of torch.nn's."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import numpy as np
import pytest
from helpers import Sizes, assert_close, masks

import fusedrnn as fr
from fusedrnn import machine

torch = pytest.importorskip("torch", reason="the modules are PyTorch's")
pytest.importorskip("expecttest", reason="torch.testing._internal needs it")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence  # noqa: E402
from torch.testing._internal import common_modules  # noqa: E402

import fusedrnn.torch as ft  # noqa: E402

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
LAYERS = NAMES[:3]
DOUBLE = torch.float64
FORMS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.4},
]


def pair(name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Torch's module and ours, made from the same random numbers."""
    modules = []
    for home in (nn, ft):
        torch.manual_seed(3)
        modules.append(getattr(home, name)(*args, **options))
    return modules[0], modules[1]


def flat(results: Any) -> list[Any]:
    if isinstance(results, (tuple, list)) and not isinstance(results, PackedSequence):
        return [a for r in results for a in flat(r)]
    return [results.data if isinstance(results, PackedSequence) else results]


def assert_same(theirs: Any, ours: Any, *inputs: Any) -> None:
    """Results and the gradients of inputs and parameters, the random numbers alike."""
    found = []
    for module in (theirs, ours):
        leaves = [a for a in flat(inputs) if a is not None]
        for a in leaves:
            a.grad = None
        torch.manual_seed(5)
        results = flat(module(*inputs))
        torch.manual_seed(6)
        sum((r * torch.randn_like(r)).sum() for r in results).backward()
        gradients = [a.grad for a in leaves] + [p.grad for p in module.parameters()]
        found.append(([r.detach() for r in results], gradients))
    for gradient, (expected, actual) in enumerate(zip(*found, strict=True)):
        assert_close(actual, expected, gradient=bool(gradient))


# Torch's own tests' inputs


def sampled(kind: str) -> list[Any]:
    """What torch's own tests give to a module, or expect it to refuse."""
    found = []
    for info in common_modules.module_db:
        name = info.module_cls.__name__
        if name not in NAMES or info.module_cls.__module__ != "torch.nn.modules.rnn":
            continue
        samples = getattr(info, f"module_{kind}_func")(
            info, device="cpu", dtype=DOUBLE, requires_grad=kind == "inputs", training=True
        )
        found += [pytest.param(name, m, id=f"{name}-{i}") for i, m in enumerate(samples)]
    return found


@pytest.mark.parametrize(("name", "sample"), sampled("inputs"))
def test_torchs_own_inputs(name: str, sample: Any) -> None:
    """Modules agree with torch.nn on the inputs of torch's own tests."""
    constructor, call = sample.constructor_input, sample.forward_input
    theirs, ours = pair(name, *constructor.args, **constructor.kwargs, dtype=DOUBLE)
    assert_same(theirs, ours, *call.args)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_torchs_own_packed_inputs(name: str, bidirectional: bool) -> None:
    """Modules agree with torch.nn on the packed inputs of torch's own tests."""
    info = next(m for m in common_modules.module_db if m.module_cls is getattr(nn, name))
    if name == "LSTM":
        data = common_modules.make_packed_sequence(
            torch.randn(5, 5, 2, dtype=DOUBLE), torch.tensor([5, 3, 3, 2, 2])
        )
        theirs, ours = pair(name, 2, 3, 2, bidirectional=bidirectional, dtype=DOUBLE)
        assert_same(theirs, ours, data.detach() if hasattr(data, "detach") else data)
        return
    for sample in info.module_inputs_func(
        info,
        device="cpu",
        dtype=DOUBLE,
        requires_grad=False,
        training=True,
        with_packed_sequence=True,
    ):
        constructor, call = sample.constructor_input, sample.forward_input
        if isinstance(call.args[0], PackedSequence):
            theirs, ours = pair(name, *constructor.args, **constructor.kwargs, dtype=DOUBLE)
            assert_close(flat(ours(*call.args)), flat(theirs(*call.args)))


@pytest.mark.parametrize(("name", "sample"), sampled("error_inputs"))
def test_what_torch_refuses(name: str, sample: Any) -> None:
    """What torch.nn refuses is refused with the same type of exception."""
    wrong = sample.module_error_input
    constructor = wrong.constructor_input

    def make_and_call() -> None:
        module = getattr(ft, name)(*constructor.args, **constructor.kwargs)
        module(*wrong.forward_input.args)

    with pytest.raises(sample.error_type) as refused:
        make_and_call()
    assert type(refused.value) is sample.error_type
    assert len(str(refused.value)) > 10


# The same module


@pytest.mark.parametrize("name", NAMES)
def test_arguments(name: str) -> None:
    """Arguments have torch's order; ours come after, by keyword."""
    ours = inspect.signature(getattr(ft, name).__init__).parameters
    documented = {
        "LSTM": "input_size hidden_size num_layers bias batch_first dropout bidirectional "
        "proj_size device dtype",
        "GRU": "input_size hidden_size num_layers bias batch_first dropout bidirectional "
        "device dtype",
        "RNN": "input_size hidden_size num_layers nonlinearity bias batch_first dropout "
        "bidirectional device dtype",
        "LSTMCell": "input_size hidden_size bias device dtype",
        "GRUCell": "input_size hidden_size bias device dtype",
        "RNNCell": "input_size hidden_size bias nonlinearity device dtype",
    }[name]
    assert list(ours) == ["self", *documented.split(), "options"]
    assert not issubclass(getattr(ft, name), nn.RNNBase)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_parameters(name: str, options: dict[str, Any]) -> None:
    """Parameters have torch's names, order and first values, and state dicts fit both ways."""
    theirs, ours = pair(name, 3, 5, **options)
    for a, b in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    assert [len(w) for w in ours.all_weights] == [len(w) for w in theirs.all_weights]
    assert ours.extra_repr() == theirs.extra_repr()
    ours.flatten_parameters()
    fresh = getattr(ft, name)(3, 5, **options)
    fresh.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(fresh.state_dict())
    assert all(map(torch.equal, theirs.parameters(), fresh.parameters()))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed", "sorted"])
@pytest.mark.parametrize("has_state", [False, True])
def test_agrees_with_torch(name: str, options: Any, kind: str, has_state: bool) -> None:
    """Modules agree with torch.nn in every form of input, and dropout draws the same
    numbers.
    """
    theirs, ours = pair(name, 3, 5, **options, dtype=DOUBLE)
    rng = torch.Generator().manual_seed(1)
    first, count = options.get("batch_first", False), 4 if len(options) > 1 else 1
    T, B = 7, 4
    x = torch.randn((B, T, 3) if first else (T, B, 3), generator=rng, dtype=DOUBLE)
    if kind == "unbatched":
        x = x[0] if first else x[:, 0]
    x = x.contiguous().requires_grad_()
    batch = () if kind == "unbatched" else (B,)
    states = [
        torch.randn((count, *batch, 5), generator=rng, dtype=DOUBLE).requires_grad_()
        for _ in range(2 if name == "LSTM" else 1)
    ]
    hx = (tuple(states) if name == "LSTM" else states[0]) if has_state else None
    if kind in ("packed", "sorted"):
        lengths = [7, 4, 4, 1] if kind == "sorted" else [4, 7, 1, 4]
        leaf = pack_padded_sequence(x.detach(), lengths, first, kind == "sorted")
        x = PackedSequence(leaf.data.requires_grad_(), *leaf[1:])
        x_theirs, x_ours = (module(x, hx)[0] for module in (theirs, ours))
        if not options.get("dropout"):
            assert_close(x_ours.data, x_theirs.data)
        assert torch.equal(x_ours.batch_sizes, x_theirs.batch_sizes)
        assert (x_ours.unsorted_indices is None) == (x_theirs.unsorted_indices is None)

    def call(module: Any) -> Any:
        def forward(*_: Any) -> Any:
            return module(x, hx)

        forward.parameters = module.parameters  # type: ignore[attr-defined]
        return forward

    leaves = [x.data if isinstance(x, PackedSequence) else x, *(states if has_state else [])]
    assert_same(call(theirs), call(ours), *leaves)


@pytest.mark.parametrize("name", NAMES[3:])
@pytest.mark.parametrize("has_state", [False, True])
def test_cells_agree_with_torch(name: str, has_state: bool) -> None:
    """LSTMCell, GRUCell and RNNCell agree with torch.nn's, and have the same names and repr."""
    theirs, ours = pair(name, 3, 5, dtype=DOUBLE)
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
    states = [torch.randn(4, 5, dtype=DOUBLE, requires_grad=True) for _ in range(2)]
    hx = (tuple(states) if name == "LSTMCell" else states[0]) if has_state else None
    assert_same(theirs, ours, torch.randn(4, 3, dtype=DOUBLE, requires_grad=True), hx)
    if name == "RNNCell":
        theirs, ours = pair(name, 3, 5, nonlinearity="relu")
        assert repr(ours) == repr(theirs)
        assert repr(ft.RNN(3, 5, nonlinearity="relu")) == "RNN(3, 5, nonlinearity=relu)"
    bare = getattr(ft, name)(3, 5, bias=False)
    assert bare.state_dict().keys() == getattr(nn, name)(3, 5, bias=False).state_dict().keys()
    assert repr(bare) == repr(getattr(nn, name)(3, 5, bias=False))


# Our options

LAYER_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "LSTM": [
        {"peephole": True, "proj_size": 4, "cell_clip": 0.6},
        {"coupled_gates": True, "clip": 1.5},
        {"layer_norm": True, "zoneout": (0.2, 0.3)},
    ],
    "GRU": [
        {"reset_after": False, "recurrent_dropout": 0.3},
        {"layer_norm": True, "clip": 1.5, "weight_dropout": 0.2},
    ],
    "RNN": [{"nonlinearity": "identity", "zoneout": 0.3}, {"nonlinearity": "relu"}],
}
OPTION_CASES = [(name, options) for name, all_of in LAYER_OPTIONS.items() for options in all_of]


@pytest.mark.parametrize(("name", "options"), OPTION_CASES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_options_agree_with_our_layers(name: str, options: Any, training: bool) -> None:
    """Options give the bits of NumPy's layers, masked, through two layers in both
    directions.
    """
    more = {"num_layers": 2, "bidirectional": True, "batch_first": True, **options}
    module = getattr(ft, name)(3, 6, **more, dtype=DOUBLE).train(training)
    layer = getattr(fr, name)(3, 6, **more, dtype=np.float64)
    layer.load_state_dict(module.state_dict())
    assert list(layer.state_dict()) == list(module.state_dict())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 8, 3))
    both = masks("both", Sizes(8, 5, 3, 6))
    both["resets"] = both["resets"].T.copy()
    options_of_call: dict[str, Any] = {"trace": True, "seed": 2**63 + 5}
    if name == "LSTM":
        options_of_call["return_cells"] = True
    expected, pullback = layer.vjp(x, **both, **options_of_call, training=training, bptt=3)
    x_t = torch.from_numpy(x).requires_grad_()
    both_t = {k: torch.from_numpy(v) for k, v in both.items()}
    found = module(x_t, **both_t, **options_of_call, bptt=3)
    results = [r for r in flat(expected) if not isinstance(r, dict)]
    ours = [r for r in flat(found) if not isinstance(r, dict)]
    for a, e in zip(ours, results, strict=True):
        np.testing.assert_array_equal(a.detach().numpy(), e)
    assert list(found[-1]) == list(expected[-1])
    for letter, gate in found[-1].items():
        np.testing.assert_array_equal(gate.numpy(), expected[-1][letter])
        assert not gate.requires_grad
    d = [rng.normal(size=r.shape) for r in results]
    torch.autograd.backward(ours, list(map(torch.from_numpy, d)))
    d_state = tuple(d[1:3]) if name == "LSTM" else d[1]
    grads = pullback(d[0], d_state, *d[3:])
    np.testing.assert_array_equal(x_t.grad.numpy(), grads.x)
    for key, p in module.named_parameters():
        np.testing.assert_array_equal(p.grad.numpy(), grads.parameters[key], err_msg=key)


def test_random_masks_come_from_torchs_generator() -> None:
    module, x = ft.LSTM(3, 4, zoneout=0.3, recurrent_dropout=0.2), torch.randn(5, 2, 3)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(module(x)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    plain = ft.GRU(3, 4)
    state = torch.get_rng_state()
    module.eval()(x)
    plain(x)
    assert torch.equal(torch.get_rng_state(), state)


RANDOM = [("zoneout", 0.3), ("recurrent_dropout", 0.3), ("weight_dropout", 0.3)]


@pytest.mark.parametrize(("option", "p"), RANDOM)
@pytest.mark.parametrize("name", LAYERS)
def test_draws_without_gradients_too(name: str, option: str, p: float) -> None:
    """Options draw in training mode under no_grad (Monte Carlo dropout), not in evaluation."""
    module, x = getattr(ft, name)(3, 9, **{option: p}), torch.randn(5, 2, 3)
    with torch.no_grad():
        drawn = [module(x, seed=seed)[0] for seed in (1, 2)]
        still = [module.eval()(x, seed=seed)[0] for seed in (1, 2)]
    assert torch.equal(module.train()(x, seed=1)[0], drawn[0])
    assert not torch.equal(*drawn)
    assert torch.equal(*still)


def test_recompute_and_checkpoints_change_nothing() -> None:
    module, x = ft.LSTM(3, 8, zoneout=0.2, num_layers=2), torch.randn(6, 2, 3)
    gradients = []
    for way in ("saved", "recompute", "checkpoint"):
        module.zero_grad()
        torch.manual_seed(0)
        if way == "checkpoint":
            y, _ = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
        else:
            y, _ = module(x, recompute=way == "recompute")
        y.square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for others in gradients[1:]:
        assert_close(others, gradients[0], gradient=True)


def test_init_options() -> None:
    """Initial values follow the options, which cannot be changed afterwards."""
    lstm = ft.LSTM(3, 4, forget_bias=1.0, orthogonal=True, layer_norm=True)
    both = lstm.bias_ih_l0 + lstm.bias_hh_l0
    assert torch.equal(both[4:8], torch.ones(4))
    for block in lstm.weight_hh_l0.split(4):
        assert_close(block @ block.T, torch.eye(4))
    assert torch.equal(lstm.gamma_ih_l0, torch.ones(16))
    assert torch.equal(lstm.beta_c_l0, torch.zeros(4))
    assert lstm.layer_norm is True
    with pytest.raises(AttributeError):
        lstm.layer_norm = False


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batches_and_sequences(name: str) -> None:
    module = getattr(ft, name)(3, 4)
    x = torch.zeros(5, 0, 3, requires_grad=True)
    y, _ = module(x)
    assert y.shape == (5, 0, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for T, B in ((0, 2), (0, 0)):
        with pytest.raises(RuntimeError, match="at least one step"):
            module(torch.zeros(T, B, 3))
    x = torch.randn(5, 2, 3, requires_grad=True)  # of rows that take none
    y, last = module(x, lengths=[0, 0])
    assert not y.any()
    assert not flat(last)[0].any()
    y.sum().backward()
    assert not x.grad.any()


def test_other_strides() -> None:
    """Views and parameters that are not contiguous are taken."""
    theirs, ours = pair("LSTM", 3, 4, dtype=DOUBLE)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().T.contiguous().T)
    wide = torch.randn(6, 5, 7, dtype=DOUBLE)
    x = wide[::2, :, 1:7:2].detach().requires_grad_()
    h = torch.randn(4, 5, 1, dtype=DOUBLE).permute(2, 1, 0).detach().requires_grad_()
    assert_same(theirs, ours, x, (h, h))
    with torch.no_grad():
        assert_close(ours(x, (h, h)), theirs(x, (h, h)))


# Around it


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_files(name: str) -> None:
    """A module that was copied, pickled or saved computes the same."""
    module = getattr(ft, name)(3, 4, clip=2.0)
    x = torch.randn(5, 3)
    expected = flat(module(x))[0]
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = getattr(ft, name)(3, 4, clip=2.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    whole = io.BytesIO()
    torch.save(module, whole)
    whole.seek(0)
    for again in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        other,
        torch.load(whole, weights_only=False),
    ):
        assert torch.equal(flat(again(x))[0], expected)
        assert repr(again) == repr(module)


def test_parametrize() -> None:
    """A weight may be computed anew at each call, also by a weight drop that deletes
    parameters.
    """
    theirs, ours = pair("LSTM", 3, 4, dtype=DOUBLE)
    for module in (theirs, ours):
        nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        parametrize.register_parametrization(module, "weight_ih_l0", Half())
    x = torch.randn(5, 2, 3, dtype=DOUBLE, requires_grad=True)
    assert_same(theirs, ours, x)
    results = []
    for module in pair("GRU", 3, 4):
        raw = module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", raw)
        module.weight_hh_l0 = raw * 0
        results.append(module(torch.ones(1, 1, 3))[0])
    assert_close(results[1], results[0])


class Half(nn.Module):
    def forward(self, w: Any) -> Any:
        return w / 2


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RMSprop"])
def test_optimizers(name: str, optimizer: str) -> None:
    """Training has the losses of torch.nn with each optimizer."""
    losses = []
    for module in pair(name, 3, 8, dtype=DOUBLE):
        step = getattr(torch.optim, optimizer)(module.parameters(), lr=0.01)
        torch.manual_seed(0)
        x = torch.randn(6, 4, 3, dtype=DOUBLE)
        for _ in range(5):
            loss = (module(x)[0] - x.sum(-1, keepdim=True)).square().mean()
            step.zero_grad()
            loss.backward()
            step.step()
        losses.append(loss.item())
    assert_close(losses[1], losses[0], "training")


@pytest.mark.parametrize("name", NAMES)
def test_float16_on_the_cpu(name: str) -> None:
    """float16 is computed in float32, as close as the rounding of what goes in and out."""
    module, half = getattr(ft, name)(3, 4), torch.float16
    x = torch.randn(5, 2, 3) if name in LAYERS else torch.randn(5, 3)
    expected = flat(module(x))[0].detach()
    with torch.autocast("cpu", half):
        y = flat(module(x.to(half)))[0]
    assert y.dtype == (half if name in LAYERS else torch.float32)
    assert_close(y, expected, str(half).removeprefix("torch."), "under autocast")
    y.sum().backward()
    assert next(module.parameters()).grad.dtype == torch.float32
    y = flat(module.to(half)(x.to(half)))[0]
    assert y.dtype == half
    assert_close(y, expected, str(half).removeprefix("torch."))
    y.float().sum().backward()
    with torch.no_grad():
        assert torch.equal(flat(module(x.to(half)))[0], y)


def test_inference_takes_weights_as_they_are_now() -> None:
    """Inference takes weights as they are, even if written to behind autograd's back."""
    module, x = ft.LSTM(3, 4), torch.randn(9, 2, 3)
    with torch.no_grad():
        before = module(x)[0]
        module.weight_hh_l0.data.mul_(2)
        after = module(x)[0]
    assert not torch.equal(before, after)
    assert_close(after, module(x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_threads_follow_torch(name: str) -> None:
    """Calls take as many threads as torch does, until a user chooses another number.

    torch's are at most as many as there are processors.
    """
    before = torch.get_num_threads()
    module, x = getattr(ft, name)(3, 4), torch.randn(5, 2, 3)
    try:
        for threads in (1, machine.cores(), machine.cores() + 1):
            torch.set_num_threads(threads)
            module(x)
            assert fr.get_num_threads() == min(threads, machine.cores())
        fr.set_num_threads(2)
        module(x)
        assert fr.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
