"""fusedrnn.torch's modules refuse wrong input with torch.nn's types of exception."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import numpy as np
import pytest
from helpers import assert_close

from fusedrnn.cells import CELLS

torch = pytest.importorskip("torch", reason="the modules are PyTorch's")
pytest.importorskip("expecttest", reason="torch.testing._internal needs it")

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence  # noqa: E402

import fusedrnn as fr  # noqa: E402
import fusedrnn.torch as ft  # noqa: E402

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
LAYERS = NAMES[:3]
DOUBLE = torch.float64
FORMS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.4},
]


# Wrong input


def wrong(what: str) -> tuple[Any, ...]:
    """A module and arguments of which one is wrong."""
    lstm, x = ft.LSTM(3, 4), torch.randn(5, 2, 3)
    h = torch.zeros(1, 2, 4)
    packed = pack_padded_sequence(x.double(), [5, 2])
    return {
        "no tensor": (lstm, [[1.0]]),
        "None": (lstm, None),
        "dtype": (lstm, x.double()),
        "integers": (lstm, x.int()),
        "rank": (lstm, x[None]),
        "features": (lstm, x[..., :2]),
        "device": (lstm, x.to("meta")),
        "hx device": (lstm, x, (h.to("meta"), h)),
        "hx dtype": (lstm, x, (h.double(), h)),
        "hx alone": (lstm, x, h),
        "hx of three": (lstm, x, (h, h, h)),
        "hx rank": (lstm, x, (h[0], h[0])),
        "hx shape": (lstm, x, (h[:, :1], h)),
        "c shape": (lstm, x, (h, h[..., :2])),
        "hx None": (lstm, x, (None, h)),
        "hx of a GRU": (ft.GRU(3, 4), x, (h,)),
        "hx an array": (lstm, x, (h.numpy(), h)),
        "steps": (lstm, x[:0]),
        "packed dtype": (lstm, packed),
        "packed features": (lstm, pack_padded_sequence(x[..., :2], [5, 2])),
        "packed lengths": (lstm, pack_padded_sequence(x, [5, 2]), None, [5, 2]),
        "lengths kind": (lstm, x, None, [1.0, 2.0]),
        "lengths complex": (lstm, x, None, torch.full((2,), 1j)),
        "lengths text": (lstm, x, None, "all"),
        "lengths shape": (lstm, x, None, [1]),
        "lengths value": (lstm, x, None, [1, 6]),
        "resets kind": (lstm, x, None, None, torch.full((5, 2), 0.5)),
        "mask text": (lstm, x, None, None, None, "all"),
        "mask shape": (lstm, x, None, None, None, torch.ones(2, 5)),
        "mask value": (lstm, x, None, None, None, torch.full((5, 2), 2)),
        "mask kind": (lstm, x, None, None, None, torch.full((5, 2), 1j)),
        "mask and lengths": (lstm, x, None, [5, 4], None, torch.ones(5, 2)),
        "packed mask": (lstm, pack_padded_sequence(x, [5, 2]), None, None, None, x[..., 0]),
        "resets shape": (lstm, x, None, None, torch.zeros(2, 5, dtype=torch.bool)),
    }[what]


WRONG = {
    "no tensor": (TypeError, "input must be a tensor, got list"),
    "None": (TypeError, "input must be a tensor, got NoneType"),
    "dtype": (ValueError, r"input must have the dtype .*float32, got torch.float64.*\.to\("),
    "integers": (ValueError, r"input must have the dtype .*float32, got torch.int32"),
    "rank": (ValueError, r"input must have 2 or 3 dimensions, got shape \(1, 5, 2, 3\)"),
    "features": (RuntimeError, r"input.size\(-1\) must be equal to input_size = 3, got 2"),
    "device": (RuntimeError, "input must be on cpu like the parameters, got meta"),
    "hx device": (RuntimeError, r"hx\[0\] must be on cpu like the parameters, got meta"),
    "hx dtype": (RuntimeError, r"hx\[0\] must have the dtype .*float32, got torch.float64"),
    "hx alone": (TypeError, r"hx must be a pair \(h_0, c_0\), got Tensor"),
    "hx of three": (TypeError, r"hx must be a pair \(h_0, c_0\), got tuple of 3"),
    "hx rank": (RuntimeError, r"hx\[0\] must have 3 dimensions .*got shape \(2, 4\)"),
    "hx shape": (RuntimeError, r"hx\[0\], h_0, must have shape \(1, 2, 4\), got \(1, 1, 4\)"),
    "c shape": (RuntimeError, r"hx\[1\], c_0, must have shape \(1, 2, 4\), got \(1, 2, 2\)"),
    "hx None": (TypeError, r"hx\[0\] must be a tensor, got NoneType"),
    "hx of a GRU": (TypeError, "hx must be a tensor, got tuple"),
    "hx an array": (TypeError, r"hx\[0\] must be a tensor, got ndarray"),
    "steps": (RuntimeError, r"input must have at least one step, got shape \(0, 2, 3\)"),
    "packed dtype": (ValueError, r"input.data must have the dtype .*float32, got .*float64"),
    "packed features": (RuntimeError, r"input_size = 3, got 2"),
    "packed lengths": (TypeError, "lengths must be None with a PackedSequence"),
    "lengths kind": (TypeError, "lengths must be integers, got torch.float32"),
    "lengths complex": (TypeError, "lengths must be integers, got torch.complex64"),
    "lengths text": (TypeError, "lengths must be a tensor, got str"),
    "lengths shape": (ValueError, r"lengths must have shape \(B,\) = \(2,\), got \(1,\)"),
    "lengths value": (ValueError, "lengths must be from 0 to T = 5, got 6"),
    "resets kind": (ValueError, "resets must be bool or numbers that are 0 or 1, got 0.5"),
    "mask text": (TypeError, "mask must be a tensor, got str"),
    "mask shape": (ValueError, r"mask must have .* \(5, 2\), got \(2, 5\)"),
    "mask value": (ValueError, "mask must be bool or numbers that are 0 or 1, got 2"),
    "mask kind": (
        TypeError,
        "mask must be bool or numbers that are 0 or 1, got torch.complex64",
    ),
    "mask and lengths": (ValueError, "true at step 4 of row 1, whose length is 4"),
    "packed mask": (TypeError, "mask must be None with a PackedSequence"),
    "resets shape": (ValueError, r"resets must have .* \(5, 2\), got \(2, 5\)"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("has_gradient", [False, True])
def test_wrong_calls(what: str, has_gradient: bool) -> None:
    """A wrong argument of a call is named, with torch.nn's type of exception."""
    module, *arguments = wrong(what)
    error, message = WRONG[what]
    with pytest.raises(error, match=message), torch.set_grad_enabled(has_gradient):
        module(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trace": 1}, TypeError, "trace must be a bool, got int"),
        ({"recompute": "yes"}, TypeError, "recompute must be a bool, got str"),
        ({"return_cells": True}, TypeError, "gru has no option 'return_cells'"),
        ({"bptt": 0}, ValueError, "bptt must be from 1"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
    ],
)
def test_wrong_options_of_a_call(options: Any, error: Any, message: str) -> None:
    """A wrong option of a call is named."""
    with pytest.raises(error, match=message):
        ft.GRU(3, 4, zoneout=0.1)(torch.zeros(5, 2, 3), **options)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("LSTM", {"zoneout": 1.5}, ValueError, "zoneout"),
        ("LSTM", {"dropout": 2.0}, ValueError, "dropout must be a probability"),
        ("LSTM", {"dropout": True}, ValueError, "dropout must be a probability"),
        ("LSTM", {"proj_size": 4}, ValueError, "proj_size must be from 0"),
        ("LSTM", {"reset_after": True}, TypeError, "LSTM has no option reset_after"),
        ("LSTM", {"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias must be None"),
        ("LSTM", {"peephole": 1}, TypeError, "peephole must be a bool"),
        ("LSTM", {"precision": "bf16"}, ValueError, "precision must be"),
        ("GRU", {"proj_size": 2}, ValueError, "proj_size"),
        ("GRU", {"cell_clip": 1.0}, TypeError, "GRU has no option cell_clip"),
        ("RNN", {"nonlinearity": "gelu"}, ValueError, "nonlinearity must be one of"),
        ("RNN", {"layer_norm": True}, TypeError, "RNN has no option layer_norm"),
        ("GRUCell", {"hidden": 3}, TypeError, "GRUCell has no option hidden"),
    ],
)
def test_wrong_arguments(name: str, options: Any, error: Any, message: str) -> None:
    """A module names an argument that it cannot have."""
    with pytest.raises(error, match=message):
        getattr(ft, name)(3, 4, **options)


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_damaged_weights(name: str) -> None:
    """A weight of another dtype, on another device or None is named."""
    x = torch.randn(5, 2, 3) if name == "LSTM" else torch.randn(2, 3)
    suffix = "_l0" * (name == "LSTM")

    def damaged(value: Any) -> Any:
        module = getattr(ft, name)(3, 4)
        setattr(module, f"bias_hh{suffix}", value)
        return module

    size = 16 if name == "LSTM" else 12
    for value, error, message in (
        (nn.Parameter(torch.zeros(size, dtype=DOUBLE)), RuntimeError, "must have the dtype"),
        (nn.Parameter(torch.zeros(size, device="meta")), RuntimeError, "must be on cpu"),
        (None, TypeError, "must be a tensor, got None"),
    ):
        module = damaged(value)
        for has_gradient in (True, False):
            with (
                pytest.raises(error, match=f"bias_hh{suffix} {message}"),
                torch.set_grad_enabled(has_gradient),
            ):
                module(x)


def test_numbers_of_numpy_are_options() -> None:
    lstm = ft.LSTM(3, 4, clip=np.float32(3), zoneout=(np.float64(0.1), 0))
    assert lstm(torch.zeros(2, 1, 3))[0].shape == (2, 1, 4)


def test_packed_sequences_under_another_default_device() -> None:
    lstm, x = ft.LSTM(3, 4), pack_padded_sequence(torch.randn(5, 2, 3), [5, 2])
    expected = lstm(x)[0].data
    with torch.device("meta"):
        assert_close(lstm(x)[0].data, expected)


def test_dropout_of_one_layer_warns() -> None:
    with pytest.warns(UserWarning, match="dropout is between layers"):
        ft.LSTM(3, 4, dropout=0.5)


def test_meta_modules() -> None:
    """A module on the meta device computes shapes alone, and can be filled later."""
    module = ft.LSTM(3, 4, num_layers=2, device="meta")
    y, (h_n, _) = module(torch.empty(5, 2, 3, device="meta"))
    assert y.shape == (5, 2, 4)
    assert h_n.shape == (2, 2, 4)
    assert y.is_meta
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert module(torch.zeros(5, 2, 3))[0].isfinite().all()


@pytest.mark.parametrize("module", ["", ".call", ".modules", ".swapping"])
def test_examples_in_docstrings(module: str) -> None:
    """The examples in docstrings run and show what they print."""
    results = doctest.testmod(importlib.import_module(f"fusedrnn.torch{module}"))
    assert results.failed == 0
    assert results.attempted > 0


def test_public_names_have_docstrings() -> None:
    for name in ft.__all__:
        assert ">>>" in getattr(ft, name).__doc__, name


def test_every_cell_has_a_module() -> None:
    """Every cell of CELLS, a new one too, has a module that runs it."""
    modules = [
        ft.LSTM(1, 1),
        ft.LSTM(1, 1, coupled_gates=True),
        ft.GRU(1, 1),
        ft.GRU(1, 1, reset_after=False),
        *(ft.RNN(1, 1, nonlinearity=n) for n in ("tanh", "relu", "identity")),
    ]
    assert {m._cell for m in modules} == set(CELLS)


def test_numpy_layers_name_a_bfloat16_argument() -> None:
    """NumPy's layers name the argument that is a bfloat16 tensor."""
    layer, x = fr.LSTM(4, 5), np.zeros((3, 2, 4), np.float32)
    state = torch.zeros(1, 2, 5, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"x must be an array .*a Tensor of torch\.bfloat16"):
        layer(torch.zeros(3, 2, 4, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"h0 must be an array .*a Tensor of torch\.bfloat16"):
        layer(x, (state, state))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("what", ["gradients", "sparse", "nested", "conjugate", "quantized"])
def test_unusual_tensors_are_refused_by_name(what: str) -> None:
    """Tensors that NumPy cannot read, or that have no strides, are named by both APIs."""
    plain = torch.ones(3, 2, 4)
    x = {
        "gradients": lambda: plain.requires_grad_(),
        "sparse": plain.to_sparse,
        "nested": lambda: torch.nested.nested_tensor([plain[0], plain[1, :1]]),
        "conjugate": lambda: plain.to(torch.complex64).conj(),
        "quantized": lambda: torch.quantize_per_tensor(plain[0], 1.0, 0, torch.qint8),
    }[what]()
    layer = fr.GRU(4, 5)
    with pytest.raises(TypeError, match="x must be an array that NumPy can read"):
        layer(x)
    with pytest.raises(TypeError, match="weight_ih_l0 must be an array that NumPy can read"):
        layer.load_state_dict(layer.state_dict() | {"weight_ih_l0": x})
    if what == "gradients":
        return
    for module in (ft.GRU(4, 5), ft.GRUCell(4, 5)):
        way = r".*convert it by .dequantize\(\)$" * (what == "quantized")
        with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"^input must{way}"):
            module(x)


def test_masks_may_not_be_masked_arrays() -> None:
    """Modules refuse a masked array as lengths, resets or mask, and lists of them."""
    x, flags = torch.zeros(3, 2, 4), np.ma.masked_array(np.ones((3, 2), bool))
    for given in ({"mask": flags}, {"resets": flags}, {"lengths": [np.ma.masked_array(3)] * 2}):
        with pytest.raises(TypeError, match=f"{next(iter(given))} must be an array without"):
            ft.GRU(4, 5)(x, **given)
    with pytest.raises(TypeError, match="x must be an array without a mask"):
        fr.GRU(4, 5)([np.ma.masked_array(np.zeros((2, 4), np.float32))] * 3)


def test_numpy_layers_refuse_masked_arrays() -> None:
    """NumPy's layers refuse masked arrays, whose mask they would not see."""
    layer, x = fr.GRU(4, 5), np.zeros((3, 2, 4), np.float32)
    with pytest.raises(TypeError, match="x must be an array without a mask"):
        layer(np.ma.masked_array(x, x == 0))
    with pytest.raises(TypeError, match="dy must be an array without a mask"):
        layer.vjp(x)[1](np.ma.masked_array(np.zeros((3, 2, 5), np.float32)))


def test_arrays_that_are_read_only() -> None:
    """lengths, resets and mask may be arrays that are read-only, as Ray's are."""
    lengths, flags = np.array([3, 1]), np.array([[True, False], [False, True], [True, True]])
    for a in (lengths, flags):
        a.flags.writeable = False
    for given in ({"lengths": lengths, "resets": flags}, {"mask": flags}):
        y, _ = ft.GRU(4, 5)(torch.zeros(3, 2, 4), **given)
        assert y.shape == (3, 2, 5)
