"""`fusedrnn.torch.quantize`: modules with weights of 8 and 16 bits."""

from __future__ import annotations

import io
import warnings
from copy import deepcopy
from typing import Any

import numpy as np
import pytest

import fusedrnn as fr
from fusedrnn.weights import PRECISIONS

torch = pytest.importorskip("torch")
nn = torch.nn
import fusedrnn.torch as ft  # noqa: E402


def model_of() -> Any:
    torch.manual_seed(0)
    kind = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    model = nn.ModuleDict(
        {
            "encoder": nn.LSTM(12, 20, **kind),
            "before": ft.GRU(20, 9, reset_after=False, layer_norm=True, zoneout=0.1),
            "projected": ft.LSTM(4, 8, proj_size=3, peephole=True),
            "step": nn.LSTMCell(5, 6),
            "relu": nn.RNN(4, 5, nonlinearity="relu"),
            "head": nn.Linear(3, 3),
        }
    )
    return model.eval()


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_is_replaced(precision: Any) -> None:
    """The copy has narrow modules in place of recurrent ones, and the model stays as it was."""
    model = model_of()
    before = deepcopy(model.state_dict())
    done = ft.quantize(model, precision)
    assert list(done.replaced) == ["encoder", "before", "projected", "step", "relu"]
    assert not done.kept
    assert "encoder: NarrowLSTM(12, 20, num_layers=2, batch_first=True" in str(done)
    assert str(done).count(f"weights={precision}") == 5
    assert type(done.model["head"]) is nn.Linear
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    alone = ft.quantize(model["step"], precision)
    assert str(alone).startswith("the model: NarrowLSTMCell(5, 6")


def test_it_equals_the_layer(precision: Any) -> None:
    """Modules and layers of NumPy have the same bits, in all forms of a call."""
    model = model_of()
    module = ft.quantize(model, precision).model["encoder"]
    layer = fr.LSTM(12, 20, 2, bidirectional=True, batch_first=True)
    layer.load_state_dict({k: v.numpy() for k, v in model["encoder"].state_dict().items()})
    layer = layer.quantize(precision)
    x = torch.randn(3, 7, 12)
    lengths, state = torch.tensor([7, 2, 5]), (torch.randn(4, 3, 20), torch.randn(4, 3, 20))
    y, (h, c), cells, gates = module(x, state, lengths, return_cells=True, trace=True)
    arrays = tuple(s.numpy() for s in state)
    ours = layer(x.numpy(), arrays, lengths.numpy(), return_cells=True, trace=True)
    for a, b in ((y, ours[0]), (h, ours[1][0]), (c, ours[1][1]), (cells, ours[2])):
        np.testing.assert_array_equal(a, b)
    assert list(gates) == list(ours[3])
    packed = nn.utils.rnn.pack_padded_sequence(
        x, lengths, batch_first=True, enforce_sorted=False
    )
    of_packed, _ = module(packed, state)
    padded, _ = nn.utils.rnn.pad_packed_sequence(of_packed, batch_first=True)
    assert torch.equal(padded, y)
    assert torch.equal(module(x[0])[0], module(x[:1])[0][0])
    half, _ = module(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_the_other_modules(precision: Any) -> None:
    """Options, projections, steps and activations are near those of the model."""
    model = model_of()
    narrow = ft.quantize(model, precision).model
    limit = {"int8": 6e-2, "bfloat16": 2e-2, "float16": 1e-3}[precision]
    with torch.no_grad():
        for name, I in (("before", 20), ("projected", 4), ("relu", 4)):
            x = torch.randn(6, 2, I)
            assert (narrow[name](x)[0] - model[name](x)[0]).abs().max() < limit
        x = torch.randn(2, 5)
        (h, c), (h_model, c_model) = narrow["step"](x), model["step"](x)
        assert (h - h_model).abs().max() < limit
        assert (c - c_model).abs().max() < limit
        again, _ = narrow["step"](x, (h, c))
        assert again.shape == (2, 6)
        assert narrow["step"](x[0])[0].shape == (6,)


def test_later_calls(precision: Any) -> None:
    """Later calls have the same results, and refuse wrong arguments as the first does."""
    model = ft.quantize(model_of(), precision).model
    module, step = model["encoder"], model["step"]
    x, state = torch.randn(3, 7, 12), (torch.randn(4, 3, 20), torch.randn(4, 3, 20))
    first, (h, c) = module(x, state)
    for _ in range(2):
        again, ends = module(x, state)
        assert torch.equal(again, first)
        assert torch.equal(ends[0], h)
        assert torch.equal(ends[1], c)
    alone, _ = module(x[0], tuple(s[:, 0] for s in state))
    assert torch.equal(alone, first[0])
    with pytest.raises(RuntimeError, match="must have shape"):
        module(x, (state[0][:, :2], state[1]))
    with pytest.raises(ValueError, match="input must be torch"):
        module(x.double())
    given, of_step = torch.randn(2, 5), (torch.randn(2, 6), torch.randn(2, 6))
    expected = step(given, of_step)
    for a, b in zip(step(given, of_step), expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="must have shape"):
        step(given[:, :4], of_step)


def test_copies(precision: Any) -> None:
    """state_dict, deepcopy, save and load keep a module; a changed weight is packed again."""
    model = model_of()
    narrow = ft.quantize(model, precision).model
    x = torch.randn(3, 7, 12)
    expected, _ = narrow["encoder"](x)
    file = io.BytesIO()
    torch.save(narrow, file)
    file.seek(0)
    loaded = ft.quantize(model_of(), precision).model
    loaded.load_state_dict(narrow.state_dict())
    for same in (deepcopy(narrow), torch.load(file, weights_only=False), loaded):
        assert torch.equal(same["encoder"](x)[0], expected)
    only_weights = io.BytesIO()
    torch.save(narrow.state_dict(), only_weights)
    only_weights.seek(0)
    loaded.load_state_dict(torch.load(only_weights, weights_only=True))
    module = narrow["encoder"]
    module.weight_hh_l0.zero_()
    assert not torch.equal(module(x)[0], expected)
    module.load_state_dict(loaded["encoder"].state_dict())
    assert torch.equal(module(x)[0], expected)
    assert torch.equal(narrow.double()["relu"].weight_ih_l0, loaded["relu"].weight_ih_l0)


def test_compile_and_export(precision: Any) -> None:
    """Graphs hold one operator and give the same bits."""
    module = ft.quantize(model_of()["encoder"], precision).model
    x = torch.randn(3, 7, 12)
    expected, _ = module(x)
    exported = torch.export.export(module, (x,))
    assert torch.equal(exported.module()(x)[0], expected)
    assert "fusedrnn.infer" in str(exported.graph)
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(x)[0], expected)
    torch._dynamo.reset()


def test_refusals(precision: Any) -> None:
    """Calls that narrow weights cannot make are refused with the reason."""
    module = ft.quantize(nn.LSTM(3, 4, 2, dropout=0.5), precision).model
    x = torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match="is for inference: call eval"):
        module.train()(x)
    module.eval()
    with pytest.raises(ValueError, match=r"input must be torch\.float32 with"):
        module(x.double())
    with pytest.raises(TypeError, match="bptt and recompute are for gradients"):
        module(x, bptt=2)
    y, _ = module(x.requires_grad_())
    with pytest.raises(RuntimeError, match="autograd"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match=r"must be torch\.float32, got torch\.float16"):
        deepcopy(module).half()(x)
    with pytest.raises(TypeError, match="model must be a module, got int"):
        ft.quantize(3, precision)
    with pytest.raises(ValueError, match="weights must be one of"):
        ft.quantize(module, "int3")
    with pytest.raises(TypeError, match="must be float32 to be quantised"):
        ft.quantize(nn.GRU(3, 4).double(), precision)
    broken = nn.GRU(3, 4)
    with torch.no_grad():
        broken.weight_hh_l0[1, 2] = float("nan")
    with pytest.raises(ValueError, match="weight_hh_l0 must be finite, got nan"):
        ft.quantize(broken, precision)

    class Own(nn.GRU):
        pass

    kept = ft.quantize(nn.Sequential(Own(3, 4)), precision)
    assert kept.kept == {"0": "Own is a subclass"}


def test_it_replaces_quantize_dynamic() -> None:
    """On the same model the error is below that of PyTorch's own int8."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.LSTM(40, 64)).eval()
    x = torch.randn(30, 4, 40)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
        expected, old = model(x)[0], theirs(x)[0]
    new, _ = ft.quantize(model, "int8").model(x)
    assert (new - expected).abs().max() < (old - expected).abs().max() / 2
