"""Activations in place of σ and tanh: their definitions, and the kernels' values and slopes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Sizes, assert_close, by_name, cotangents, double, op, pulled, with_options

import fusedrnn as fr
import fusedrnn.torch as ft
from fusedrnn import checks, reference
from fusedrnn.cells import CELLS, Cell

NUMBERS = {"tanh": (1.7, 0.6), "hard_sigmoid": (0.2, 0.5), "affine": (-0.8, 0.3), "elu": (0.6,)}
FORMS = [
    *reference.ACTIVATIONS,
    *((name, *numbers) for name, numbers in NUMBERS.items()),
    ("leaky_relu", 0.3),
    ("leaky_relu", 0.0),
    ("thresholded_relu", 0.2),
]
# PyTorch's functions of the same names; ONNX and Keras define them alike.
F = torch.nn.functional
ORACLES = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "hard_tanh": F.hardtanh,
    "softsign": F.softsign,
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
    "leaky_relu": F.leaky_relu,
    ("hard_sigmoid", 0.2, 0.5): lambda a: (0.2 * a + 0.5).clamp(0, 1),
    ("elu", 0.6): lambda a: F.elu(a, 0.6),
    ("leaky_relu", 0.3): lambda a: F.leaky_relu(a, 0.3),
    ("leaky_relu", 0.0): lambda a: F.leaky_relu(a, 0.0),
    ("thresholded_relu", 0.2): lambda a: F.threshold(a, 0.2, 0.0),
    ("tanh", 1.7, 0.6): lambda a: 1.7 * torch.tanh(0.6 * a),
    ("affine", -0.8, 0.3): lambda a: -0.8 * a + 0.3,
    "identity": lambda a: a + 0.0,
}


def values_of_all() -> torch.Tensor:
    rng = np.random.default_rng(0)
    a = np.concatenate([rng.normal(size=400) * 3, [-1e3, 1e3, -40.0, 40.0, -750.0, 0.0]])
    return torch.from_numpy(a).requires_grad_()


@pytest.mark.parametrize("form", ORACLES, ids=str)
def test_definitions(form: Any) -> None:
    """Values and slopes are those of PyTorch's functions, and slopes those of complex steps."""
    phi = checks.activation("activation", form)
    a = values_of_all()
    expected = ORACLES[form](a)
    (slope,) = torch.autograd.grad(expected.sum(), a)
    x = a.detach().numpy()
    y = phi(x)
    np.testing.assert_allclose(y, expected.detach().numpy(), 1e-12, 1e-14)
    np.testing.assert_allclose(phi.slope(y), slope.numpy(), 1e-7, 1e-12)
    step = phi(x + 1e-30j).imag / 1e-30
    np.testing.assert_allclose(phi.slope(y), step, 1e-9, 1e-12)
    np.testing.assert_allclose(phi(a.detach()).numpy(), y, 1e-12, 1e-15)
    assert np.isnan(phi(np.array([np.nan]))).all()


def check(
    cell: Cell, sizes: Sizes, options: list[str], given: dict[str, Any], dtype: Any
) -> None:
    """An op agrees with the reference forward and backward."""
    arrays, asked = with_options(cell, sizes, options)
    arrays = {k: None if v is None else v.astype(dtype) for k, v in arrays.items()}
    asked |= given
    expected, expected_pullback = op(cell, "_vjp", reference)(**double(arrays), **asked)
    results, pullback = op(cell, "_vjp")(**arrays, **asked)
    wanted = by_name(cell, expected)
    for name, a in by_name(cell, results).items():
        assert_close(a, wanted[name], dtype, name, factor=4)
    d = cotangents(expected)
    gradients = pulled(cell, pullback, [g.astype(dtype) for g in d])
    # Values within rounding of a jump may get the slope of its other side, in float32 only.
    jumps = dtype == np.float32 and checks.activation("", given["activation"]).jumps
    for name, e in pulled(cell, expected_pullback, d).items():
        what = f"d{name}"
        assert_close(gradients[name], e, dtype, what, gradient=True, factor=40 if jumps else 4)


@pytest.mark.parametrize("name", ["lstm", "lstm_coupled", "gru", "gru_before", "rnn_tanh"])
def test_every_activation(name: str, dtype: np.dtype, isa: str) -> None:
    """Each activation, of gates, too, agrees with the reference, alone, with options that
    change gates and states, with LayerNorm, and recomputed.
    """
    cell, sizes = CELLS[name], Sizes(5, 3, 4, 19)
    for n, form in enumerate(FORMS):
        given: dict[str, Any] = {"activation": form}
        if len(cell.gates) > 1:
            bounded = [("hard_sigmoid", 0.2, 0.5), "sigmoid", "hard_sigmoid", ("tanh", 0.7)]
            given["recurrent_activation"] = bounded[n % 4]
        others = [["zoneout"], ["recompute", "mask"], ["layer_norm"]][
            : 2 + (len(cell.gates) > 1)
        ]
        check(cell, sizes, [], given, dtype)
        check(cell, sizes, ["clip", *others[n % len(others)]], given, dtype)


def test_relu_of_a_layer_is_torchs() -> None:
    """`RNN(activation="relu")` has the values and gradients of torch.nn.RNN with relu."""
    theirs = torch.nn.RNN(3, 5, 2, "relu", bidirectional=True, dtype=torch.float64)
    ours = ft.RNN(3, 5, 2, bidirectional=True, dtype=torch.float64, activation="relu")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    pairs = zip(ours(x), theirs(x), strict=True)
    for a, e in pairs:
        assert_close(a, e)
    (a,), (e,) = (torch.autograd.grad(m(x)[0].square().sum(), x) for m in (ours, theirs))
    assert_close(a, e, gradient=True)
    assert "activation=relu" in repr(ours)


def test_layers_streams_and_narrow_weights() -> None:
    """Layers keep their activations when they are copied, pickled, quantised or streamed."""
    layer = fr.LSTM(
        4, 9, 2, activation=("elu", 0.5), recurrent_activation="hard_sigmoid", rng=0
    )
    x = np.random.default_rng(1).normal(size=(6, 3, 4)).astype(np.float32)
    y, _ = layer(x)
    assert "activation=('elu', 0.5), recurrent_activation=hard_sigmoid" in repr(layer)
    stream = fr.Stream(layer, 3)
    np.testing.assert_array_equal(np.stack([stream.step(x_t) for x_t in x]), y)
    narrow, _ = layer.quantize("float16")(x)
    np.testing.assert_allclose(narrow, y, atol=2e-3)
    assert "activation" in str(layer.explain(6, 3))
    module = ft.LSTM(4, 9, 2, activation=("elu", 0.5), recurrent_activation="hard_sigmoid")
    module.load_state_dict(
        {k: torch.from_numpy(v.copy()) for k, v in layer.state_dict().items()}
    )
    np.testing.assert_array_equal(module(torch.from_numpy(x))[0].detach().numpy(), y)
    compiled = torch.compile(module, fullgraph=True)
    np.testing.assert_array_equal(compiled(torch.from_numpy(x))[0].detach().numpy(), y)


def test_own_activations_change_nothing(cell: Cell) -> None:
    """The cell's own activations by name are the plain kernels."""
    values, _ = with_options(cell, Sizes(5, 3, 4, 19), [], np.float32)
    named = {"activation": "tanh"}
    if "recurrent_activation" in cell.reference.activations:
        named["recurrent_activation"] = "sigmoid"
    for a, b in zip(op(cell)(**values), op(cell)(**values, **named), strict=True):
        np.testing.assert_array_equal(a, b)


WRONG = [
    ("gelu", ValueError, "activation must be one of tanh, sigmoid, relu, "),
    (3, TypeError, "activation must be a name or a tuple (name, numbers …), got int"),
    ((), ValueError, "activation must be one of tanh, sigmoid, "),
    (("relu", 1.0), ValueError, "activation relu takes at most 0 numbers, got 1"),
    (("elu", 1, 2), ValueError, "activation elu takes at most 1 number, got 2"),
    ((["elu"],), ValueError, "activation must be one of tanh, sigmoid, "),
    (("elu", "x"), TypeError, "a number of activation elu must be a number, got str"),
    (("elu", np.inf), ValueError, "activation elu must have numbers that float32 has, got inf"),
    (("tanh", 1e-50), ValueError, "activation tanh must have numbers that float32 has"),
    (("elu", 10**400), ValueError, "must be a number that float64 has, got 1000"),
    (("tanh", 0), ValueError, "activation tanh must have alpha ≠ 0, got 0.0"),
    (("leaky_relu", -0.1), ValueError, "activation leaky_relu must have alpha ≥ 0, got -0.1"),
    (("thresholded_relu", -1), ValueError, "thresholded_relu must have alpha ≥ 0, got -1.0"),
]


@pytest.mark.parametrize(("form", "error", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_wrong_activations(form: Any, error: type, message: str) -> None:
    """Ops, layers and modules refuse unknown activations and numbers."""
    values, _ = with_options(CELLS["gru"], Sizes(3, 2, 4, 5), [])
    for call in (
        lambda: fr.gru(**values, activation=form),
        lambda: fr.GRU(4, 5, activation=form),
        lambda: ft.GRU(4, 5, activation=form),
        lambda: ft.LSTMCell(4, 5, activation=form),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()


def test_activations_that_a_cell_lacks() -> None:
    """An RNN has no gates, and one of another nonlinearity no other activation."""
    values, _ = with_options(CELLS["rnn_tanh"], Sizes(3, 2, 4, 5), [])
    with pytest.raises(TypeError, match="rnn has no option 'recurrent_activation'"):
        fr.rnn(**values, recurrent_activation="relu")
    message = 'activation must be "tanh", the default, with nonlinearity="relu", got \'elu\''
    with pytest.raises(ValueError, match=message):
        fr.RNN(4, 5, nonlinearity="relu", activation="elu")
