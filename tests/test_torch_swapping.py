"""swap and restore replace modules and nothing else; files and other tools know ours."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from helpers import assert_close

torch = pytest.importorskip("torch", reason="the modules are PyTorch's")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize  # noqa: E402

import fusedrnn.torch as ft  # noqa: E402

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
FORMS: list[dict[str, Any]] = [
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.4},
    {"bias": False, "dropout": 0.0},
    {},
]
CASES = [(name, form) for name in NAMES[:3] for form in FORMS]
CASES += [(name, form) for name in NAMES[3:] for form in ({"bias": False}, {})]
CASES += [("LSTM", {"proj_size": 2}), ("RNN", {"nonlinearity": "relu"})]
CASES += [("RNNCell", {"nonlinearity": "relu"})]


def name_of(case: Any) -> str:
    return case if isinstance(case, str) else "-".join(case) or "plain"


def inputs(name: str) -> Any:
    torch.manual_seed(1)
    return torch.randn(5, 3) if "Cell" in name else torch.randn(5, 2, 3)


def first(results: Any) -> Any:
    return results[0] if isinstance(results, tuple) else results


def identities(model: Any) -> dict[str, int]:
    return {name: id(p) for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # torch.nn's own
@pytest.mark.parametrize(("name", "form"), CASES, ids=name_of)
def test_there_and_back(name: str, form: Any) -> None:
    """swap and restore change the class alone: results are the same bits after both, and the
    parameters, their order and every attribute of a module are those from before.
    """
    torch.manual_seed(0)
    model = nn.Sequential(getattr(nn, name)(3, 4, **form))
    old, x = model[0], inputs(name)
    parameters, attributes = identities(model), copy.deepcopy(vars(old))
    torch.manual_seed(2)
    y = first(model(x))
    assert list(ft.swap(model).replaced) == list(ft.restore(model).replaced) == ["0"]
    new = model[0]
    assert type(new) is type(old)
    assert new is not old
    assert identities(model) == parameters
    assert list(vars(new)) == list(attributes)
    for key, value in attributes.items():
        if key not in ("_parameters", "_flat_weights", "_flat_weight_refs"):
            assert vars(new)[key] == value, key
    torch.manual_seed(2)
    assert torch.equal(first(model(x)), y)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_flat_weights(name: str) -> None:
    """torch.nn's own list of the weights is right after restore: assignments, conversions,
    copies and loaded values reach the next call.
    """
    model = nn.Sequential(getattr(ft, name)(3, 4, num_layers=2))
    x = inputs(name)
    ft.restore(model)
    flat = model[0]._flat_weights
    assert len(flat) == 8
    assert all(p is q for p, q in zip(flat, model.parameters(), strict=True))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    other = nn.Sequential(getattr(nn, name)(3, 4, num_layers=2))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x)[0], other(x)[0])
    model[0].weight_hh_l1 = nn.Parameter(torch.zeros_like(model[0].weight_hh_l1))
    assert not torch.equal(model(x)[0], other(x)[0])
    assert model.double()(x.double())[0].dtype == torch.float64
    for one in copies:
        assert all(p is q for p, q in zip(one[0]._flat_weights, one.parameters(), strict=True))
        assert not torch.equal(one(x)[0], other(x)[0])


@pytest.mark.parametrize("change", [ft.swap, ft.restore])
def test_what_a_module_had(change: Any) -> None:
    """Parameters, hooks, buffers, modes, submodules and attributes stay; a module used twice is
    replaced by one.
    """
    home, away = (nn, ft) if change is ft.swap else (ft, nn)
    shared = home.LSTM(3, 4, 2, dropout=0.1)
    x = torch.ones(5, 2, 3, requires_grad=True)
    called: list[Any] = []
    handle = shared.register_forward_hook(lambda module, *_: called.append(type(module)))
    shared.register_full_backward_hook(lambda module, *_: called.append(type(module)))
    shared.register_load_state_dict_pre_hook(lambda module, *_: called.append(type(module)))
    shared.weight_hh_l0.requires_grad_(False)
    shared.adapter, shared.tag = nn.Sequential(home.GRU(4, 2)), "mine"
    shared.register_buffer("mean", torch.ones(3))
    shared.register_buffer("cache", torch.ones(3), persistent=False)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])}).eval()
    shared.adapter.train()
    parameters, state = identities(model), copy.deepcopy(model.state_dict())
    y = model["a"](x)[0]
    y.sum().backward()
    assert str(change(model)) == (
        "a: LSTM(3, 4, num_layers=2, dropout=0.1)\n"
        "a.adapter.0: GRU(4, 2)\n"
        "b.0: LSTM(3, 4, num_layers=2, dropout=0.1)"
    )
    new = model["a"]
    assert new is model["b"][0]
    assert [m.training for m in (new, new.adapter, new.adapter[0])] == [False, True, True]
    assert type(new.adapter[0]) is away.GRU
    assert identities(model) == parameters
    assert list(model.state_dict()) == list(state)
    assert list(new.buffers()) == list(shared.buffers())
    assert new.tag == "mine"
    again = new(x)[0]
    assert_close(again, y, "float32")
    again.sum().backward()
    assert called == [home.LSTM, home.LSTM, away.LSTM, away.LSTM]
    del shared
    model.load_state_dict(state)
    assert called[4:] == [away.LSTM] * 2  # once for each name
    handle.remove()
    assert len(new._forward_hooks) == 0


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_parametrizations(name: str) -> None:
    """A parametrization, its parameters and its mode stay, there and back."""
    model = nn.Sequential(getattr(nn, name)(3, 4))
    weight = "weight_hh" + "_l0" * ("Cell" not in name)
    parametrizations.weight_norm(model[0], weight)
    x, parameters = inputs(name), identities(model)
    y = first(model.eval()(x))
    for change, home in ((ft.swap, ft), (ft.restore, nn)):
        change(model)
        assert identities(model) == parameters
        assert parametrize.type_before_parametrizations(model[0]) is getattr(home, name)
        assert not any(m.training for m in model.modules())
        assert_close(first(model(x)), y, "float32")


def test_weights_that_are_plain_attributes() -> None:
    """A weight that other code computes and sets as an attribute stays one."""
    model = nn.Sequential(nn.LSTM(3, 4))
    raw = model[0]._parameters.pop("weight_hh_l0")
    model[0].register_parameter("raw", raw)
    model[0].weight_hh_l0 = raw.detach() / 2
    x = inputs("LSTM")
    y = model(x)[0]
    for change in (ft.swap, ft.restore):
        change(model)
        assert "weight_hh_l0" not in model[0]._parameters
        assert_close(model(x)[0], y, "float32")
    model[0].weight_hh_l0 = raw.detach()
    assert not torch.equal(model(x)[0], y)


def test_training_goes_on() -> None:
    """An optimizer made before goes on, whichever modules a model has at each step."""
    losses: list[list[float]] = []
    for changes in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({"rnn": nn.GRU(3, 4, 2), "cell": nn.LSTMCell(4, 2)}).double()
        step = torch.optim.Adam(model.parameters(), lr=0.05)
        losses.append([])
        for n in range(8):
            if changes:
                (ft.restore if n % 2 else ft.swap)(model)
            h, _ = model["cell"](model["rnn"](torch.randn(5, 6, 3).double())[0][-1])
            loss = (h - 0.5).square().mean()
            step.zero_grad()
            loss.backward()
            step.step()
            losses[-1].append(loss.item())
    assert_close(losses[1], losses[0], "training")


def narrow(module: Any) -> Any:
    return ft.quantize(module, "int8").model


class Own(ft.GRU):
    """A subclass of ours."""


KEPT: list[tuple[Callable[[], Any], str]] = [
    (lambda: ft.LSTM(3, 4, peephole=True), "torch.nn.LSTM has no peephole=True"),
    (lambda: ft.LSTM(3, 4, clip=1.0, cell_clip=2.0), "has no clip=1.0, cell_clip=2.0"),
    (lambda: ft.LSTM(3, 4, coupled_gates=True), "has no coupled_gates=True"),
    (lambda: ft.LSTM(3, 4, precision="tf32"), "has no precision=tf32"),
    (lambda: ft.GRU(3, 4, layer_norm=True), "torch.nn.GRU has no layer_norm=True"),
    (lambda: ft.GRU(3, 4, reset_after=False), "has no reset_after=False"),
    (lambda: ft.GRU(3, 4, activation="relu"), "has no activation=relu"),
    (lambda: ft.GRU(3, 4, zoneout=0.1), "has no zoneout=0.1"),
    (lambda: ft.RNN(3, 4, recurrent_dropout=0.1), "has no recurrent_dropout=0.1"),
    (lambda: ft.RNN(3, 4, nonlinearity="identity"), "has no nonlinearity=identity"),
    (lambda: ft.RNNCell(3, 4, nonlinearity="identity"), "torch.nn.RNNCell has no"),
    (lambda: ft.GRUCell(3, 4, weight_dropout=0.1), "torch.nn.GRUCell has no"),
    (lambda: narrow(ft.LSTM(3, 4)), "torch.nn.LSTM has no weights=int8"),
    (lambda: narrow(nn.GRUCell(3, 4)), "torch.nn.GRUCell has no weights=int8"),
    (lambda: Own(3, 4), "Own is a subclass"),
]


@pytest.mark.parametrize(("make", "why"), KEPT)
def test_restore_keeps(make: Any, why: str) -> None:
    """restore keeps a module that torch.nn cannot have, and says the option."""
    model = nn.Sequential(nn.Linear(3, 3), make(), ft.GRU(4, 5))
    module = model[1]
    done = ft.restore(model)
    assert model[1] is module
    assert why in done.kept["1"]
    assert str(done) == f"2: GRU(4, 5)\n1: kept, {done.kept['1']}"
    with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile") as caught:
        torch.jit.script(module)
    assert why in str(caught.value)


def test_initial_values_do_not_keep_a_module() -> None:
    """restore replaces modules whose options chose initial values only."""
    model = nn.Sequential(ft.LSTM(3, 4, forget_bias=1.0, orthogonal=True))
    weights = copy.deepcopy(model.state_dict())
    assert str(ft.restore(model)) == "0: LSTM(3, 4)"
    assert all(torch.equal(a, weights[n]) for n, a in model.state_dict().items())


class Encoder(nn.LSTM):
    """A subclass of torch.nn's."""


class Base(nn.RNNBase):
    """A recurrent layer that is none of torch.nn's."""


def with_forward(module: Any) -> Any:
    module.forward = module.forward
    return module


def compiled(module: Any) -> Any:
    module.compile(backend="eager")
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.ao.quantization
@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
def test_swap_keeps() -> None:
    """swap and quantize keep subclasses, modules that torch.ao.quantization changed and those
    whose calls other code changed, and say so.
    """
    dynamic = torch.ao.quantization.quantize_dynamic
    model = nn.ModuleDict(
        {
            "encoder": Encoder(3, 4),
            "base": Base("GRU", 3, 4),
            "changed": with_forward(nn.GRU(3, 4)),
            "compiled": compiled(nn.GRU(3, 4)),
            "int8": dynamic(nn.Sequential(nn.LSTM(3, 4)))[0],
            "head": nn.Linear(4, 1),
        }
    )
    expected = (
        "encoder: kept, Encoder is a subclass\n"
        "base: kept, Base is a subclass\n"
        "changed: kept, its attribute forward was set by other code\n"
        "compiled: kept, it was compiled by its method compile(): compile it afterwards\n"
        "int8: kept, it is one of torch.ao.quantization: swap before that"
    )
    assert str(ft.swap(model)) == expected
    for change in (ft.swap, lambda m: ft.quantize(m, "int8")):
        assert str(change(Encoder(3, 4))) == "the model: kept, Encoder is a subclass"
        assert str(change(nn.Sequential(nn.Linear(2, 2)))).startswith("no recurrent module")
    assert str(ft.restore(nn.Sequential(with_forward(ft.RNN(3, 4))))).startswith("0: kept, its")
    done = ft.quantize(nn.Sequential(with_forward(ft.RNN(3, 4))), "int8")
    assert str(done).startswith("0: kept, its attribute forward")


def test_quantize_keeps_what_a_module_had() -> None:
    """A module with narrow weights has the user's modules, buffers and their modes."""
    lstm = nn.LSTM(3, 4)
    lstm.adapter = nn.Linear(4, 2)
    lstm.register_buffer("cache", torch.ones(3), persistent=False)
    lstm.eval().adapter.train()
    found = ft.quantize(nn.Sequential(lstm), "int8").model[0]
    assert torch.equal(found.adapter.weight, lstm.adapter.weight)
    assert found.adapter.training
    assert torch.equal(found.cache, lstm.cache)
    assert "cache" not in found.state_dict()


CHANGES = [ft.swap, ft.restore, lambda model: ft.quantize(model, "int8")]


@pytest.mark.parametrize("change", CHANGES, ids=["swap", "restore", "quantize"])
@pytest.mark.parametrize("model", [None, nn.LSTM, "lstm"], ids=["none", "class", "text"])
def test_what_is_no_model(change: Any, model: Any) -> None:
    """An argument that is not a module is refused."""
    with pytest.raises(TypeError, match="model must be a module, got"):
        change(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_itself(name: str) -> None:
    """A module cannot be replaced where it stands, and the message says what to do."""
    for change, home, away in ((ft.swap, nn, ft), (ft.restore, ft, nn)):
        kind = f"{'fusedrnn.' * (away is ft)}torch.{'nn.' * (away is nn)}{name}"
        with pytest.raises(TypeError) as caught:
            change(getattr(home, name)(3, 4))
        assert f"got {name}(3, 4) itself: build {kind} and load its state_dict" in str(
            caught.value
        )


def test_nothing_changes_before_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that cannot be made leaves the others as they are."""
    model = nn.Sequential(nn.GRU(3, 4), nn.RNNCell(4, 5))
    model[1].nonlinearity = "sine"
    with pytest.raises(ValueError, match="nonlinearity"):
        ft.swap(model)
    assert type(model[0]) is nn.GRU


# TorchScript


@pytest.fixture
def _quiet() -> Any:
    """TorchScript's warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", r".*torch\.jit\.", DeprecationWarning)
        yield


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("change", CHANGES, ids=["swap", "restore", "quantize"])
def test_torchscript_is_not_changed(change: Any) -> None:
    """A model of TorchScript is refused, one within another model is reported."""
    scripted = torch.jit.script(nn.Sequential(nn.GRU(3, 4)).eval())
    traced = torch.jit.trace(
        nn.Sequential(ft.GRU(3, 4)).eval(), inputs("GRU"), check_trace=False
    )
    for model in (scripted, traced, torch.jit.freeze(scripted)):
        with pytest.raises(
            TypeError, match=r"model must not be TorchScript.*: change the model"
        ):
            change(model)
        parts = [model, nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2))]
        assert str(change(nn.Sequential(*parts))) == (
            "0: kept, it is TorchScript: change the model before torch.jit.script or "
            "torch.jit.trace"
        )


@pytest.mark.filterwarnings("ignore:.*_flat_weights:UserWarning")  # PyTorch's own
def test_graphs_are_not_changed() -> None:
    """A graph of torch.export that calls a recurrent layer is reported."""
    program = torch.export.export(nn.Sequential(nn.LSTM(3, 4)).eval(), (inputs("LSTM"),))
    reason = "kept, its graph has the calls: change the model before torch.export"
    assert str(ft.swap(program.module())) == f"the model: {reason}"
    assert str(ft.swap(nn.Sequential(program.module()))) == f"0: {reason}"


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("name", NAMES)
def test_jit_script(name: str) -> None:
    """torch.jit.script compiles torch.nn's module with the same parameters, says so, and swap
    brings ours back.
    """
    model, x = nn.Sequential(getattr(ft, name)(3, 4)), inputs(name)
    module, y = model[0], first(model(x))
    says = f"torch.jit.script compiles torch.nn.{name} in the place of fusedrnn.torch.{name}"
    with pytest.warns(UserWarning, match=says):
        assert torch.jit.script(module).original_name == name
    with pytest.warns(UserWarning, match=says):
        scripted = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert_close(first(torch.jit.load(file)(x)), y, "float32")
    assert type(model[0]) is getattr(nn, name)
    ft.swap(model)
    assert type(model[0]) is getattr(ft, name)
    assert torch.equal(first(model(x)), y)


# torch.fx and torch.compile


def test_graphs_and_compiled_models() -> None:
    """swap and restore work on a graph of torch.fx, and on a model that is compiled, of which
    the next call compiles the new modules.
    """
    x, model = inputs("LSTM"), nn.Sequential(nn.LSTM(3, 4))
    y = model(x)[0]
    traced = torch.fx.symbolic_trace(model)
    optimized = torch.compile(model, backend="eager")
    for one in (traced, optimized):
        assert_close(one(x)[0], y, "float32")
        for change, home in ((ft.swap, ft), (ft.restore, nn)):
            assert len(change(one).replaced) == 1
            assert home.LSTM in {type(m) for m in one.modules()}
            assert_close(one(x)[0], y, "float32")
    assert torch.equal(torch.fx.symbolic_trace(model)(x)[0], y)


def test_a_compiled_module_can_be_copied() -> None:
    """A module that was compiled by its method compile() can be copied and pickled."""
    module, x = compiled(ft.GRU(3, 4)), inputs("GRU")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x)[0], module(x)[0])


# Several processes


@pytest.fixture
def _in_a_group() -> Any:
    """A group of processes, of which this is the only one."""
    distributed = torch.distributed
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_in_a_group")
def test_data_parallel_models() -> None:
    """swap and restore work on a model that DistributedDataParallel has wrapped."""
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.LSTM(3, 4)))
    gradients = []
    for change in (ft.swap, ft.restore):
        assert list(change(model).replaced) == ["module.0"]
        model.zero_grad()
        model(inputs("LSTM"))[0].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert_close(gradients[0], gradients[1], "float32")


@pytest.mark.usefixtures("_in_a_group")
@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="PyTorch 2.6 has no FSDP2 on CPUs"
)
@pytest.mark.parametrize("alone", [False, True])
def test_sharded_models(alone: bool) -> None:
    """swap and restore keep modules whose parameters fully_shard has changed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    reason = "0: kept, its parameters are sharded: change the model before fully_shard"
    for change, home in ((ft.swap, nn), (ft.restore, ft)):
        model = nn.Sequential(home.LSTM(3, 4))
        fully_shard(model[0] if alone else model, mesh=init_device_mesh("cpu", (1,)))
        assert str(change(model)) == reason
        assert model(inputs("LSTM"))[0].shape == (5, 2, 4)


# torch.ao.quantization


@pytest.mark.filterwarnings("ignore:(?s).*deprecated")  # torch.ao.quantization, all of it
@pytest.mark.parametrize("asked", [None, {nn.LSTM}, {"0"}, {nn.Linear}])
def test_quantize_dynamic(asked: Any) -> None:
    """quantize_dynamic says of each of our modules that it leaves it as it is, and changes the
    others.
    """
    model = nn.Sequential(ft.LSTM(3, 4), ft.GRUCell(3, 4), nn.Linear(4, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = torch.ao.quantization.quantize_dynamic(model, asked)
    says = [str(w.message) for w in caught if "fusedrnn" in str(w.message)]
    assert says == [
        f"torch.ao.quantization does not change a fusedrnn.torch.{name}: "
        'fusedrnn.torch.quantize(model, "int8") does'
        for name in ("LSTM", "GRUCell")
    ]
    assert type(done[0]) is ft.LSTM
    assert (type(done[2]) is nn.Linear) == (asked is not None and nn.Linear not in asked)
    x = inputs("LSTM")
    assert torch.equal(done[0](x)[0], model[0](x)[0])
    assert not hasattr(done[0], "qconfig")


@pytest.mark.filterwarnings("ignore:(?s).*deprecated")
def test_quantize_dynamic_after_quantize() -> None:
    """quantize_dynamic of what is left says nothing about modules with narrow weights."""
    model = nn.Sequential(ft.LSTM(3, 4), nn.Linear(4, 5))
    done = torch.ao.quantization.quantize_dynamic(ft.quantize(model, "int8").model)
    assert [type(m).__name__ for m in done] == ["NarrowLSTM", "Linear"]
    assert type(done[1]) is not nn.Linear
