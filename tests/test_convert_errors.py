"""Conversions refuse weights, options and modules that they cannot convert, by one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import assert_close
from test_convert import LIBRARIES, B, H, I, T, layer_of, random

import fusedrnn as fr
from fusedrnn import convert

# Errors

KERNELS = [random(I, 4 * H), random(H, 4 * H), random(4 * H)]
PARTS = {"kernel": KERNELS[0], "recurrent_kernel": KERNELS[1], "bias": KERNELS[2]}
AFTER = [random(H, 3 * H), random(H, 3 * H), random(2, 3 * H)]
BEFORE = [*AFTER[:2], random(3 * H)]
GRU_DNN = {"weights_layer": random(1, 1, I, 3, H), "weights_iter": random(1, 1, H, 3, H)}
DNN = {"weights_layer": random(1, 1, I, 4, H), "weights_iter": random(1, 1, H, 4, H)}
DNN_WITH_PEEPHOLE = {
    "weights_layer": random(1, 1, H, 4, H),
    "weights_iter": random(1, 1, H, 4, H),
    "weights_peephole": random(1, 1, 3, H),
}

ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: convert.from_keras(KERNELS), TypeError, 'cell must be "lstm"'),
    (lambda: convert.from_keras(cell="lstm"), TypeError, "layers must be at least one layer"),
    (lambda: convert.from_keras(KERNELS, cell="mgu"), ValueError, "got 'mgu'"),
    (
        lambda: convert.from_keras(KERNELS[:1], cell="lstm"),
        ValueError,
        "the weights of layer 0 must be [kernel, recurrent_kernel] or [kernel, "
        "recurrent_kernel, bias], twice for Bidirectional, got 1",
    ),
    (
        lambda: convert.from_keras(KERNELS, cell="gru"),
        ValueError,
        "recurrent_kernel must have shape (H, 3*H), got (7, 28)",
    ),
    (
        lambda: convert.from_keras([KERNELS[0].T, *KERNELS[1:]], cell="lstm"),
        ValueError,
        "kernel must have shape (I, 4*H) = (I, 28), got (28, 3)",
    ),
    (
        lambda: convert.from_keras([*KERNELS[:2], KERNELS[2][1:]], cell="lstm"),
        ValueError,
        "bias must have shape (4*H,) = (28,), got (27,)",
    ),
    (
        lambda: convert.from_keras(KERNELS, KERNELS, cell="lstm"),
        ValueError,
        "weight_ih_l1 must have shape (rows, columns) = (28, 7), got (28, 3)",
    ),
    (
        lambda: convert.from_keras([a.astype(int) for a in KERNELS], cell="lstm"),
        TypeError,
        "recurrent_kernel must have a floating-point dtype, got int64",
    ),
    (
        lambda: convert.from_keras(KERNELS, cell="lstm", bidirectional=True),
        TypeError,
        "bidirectional follows from the weights and must be left out",
    ),
    (
        lambda: convert.from_torch({"weight_ih_l0": KERNELS[0].T}),
        ValueError,
        "must have weight_ih and weight_hh of every layer and direction, got weight_ih_l0",
    ),
    (
        lambda: convert.from_torch({"lstm.weight_ih_l0": KERNELS[0].T}),
        ValueError,
        "got 'lstm.weight_ih_l0': give the prefix of the names of one module",
    ),
    (
        lambda: convert.from_torch({"a": 1}, prefix="lstm."),
        ValueError,
        "source must have names that begin with 'lstm.', got none",
    ),
    (
        lambda: convert.from_torch(3),
        TypeError,
        "source must be an LSTM, GRU or RNN of torch.nn or fusedrnn.torch, no subclass, or a "
        "state_dict, got int",
    ),
    (lambda: convert.to_mlx(3), TypeError, "no subclass, or fusedrnn, got int"),
    (
        lambda: convert.from_torch({"weight_ih": KERNELS[0].T, "weight_ih_l0": KERNELS[0].T}),
        ValueError,
        "source must have weight_ih of a layer once, got 'weight_ih_l0', too",
    ),
    (
        lambda: convert.from_keras(KERNELS[:2], cell="gru", reset_after=5),
        ValueError,
        "recurrent_kernel must have shape (H, 3*H), got (7, 28)",
    ),
    (
        lambda: convert.from_keras(BEFORE, AFTER, cell="gru"),
        ValueError,
        "the biases of a GRU must all have shape (3*H,), or all (2, 3*H)",
    ),
    (
        lambda: convert.from_keras(AFTER, cell="gru", reset_after=False),
        ValueError,
        "reset_after must be True, which follows from the weights or attributes, got False",
    ),
    (
        lambda: convert.from_onednn("gru", GRU_DNN, reset_after=True),
        ValueError,
        "reset_after must be False, which follows from the weights or attributes, got True",
    ),
    (
        lambda: convert.from_onednn("lstm", DNN, DNN_WITH_PEEPHOLE),
        ValueError,
        "weight_ch must be in every layer and direction, or in none",
    ),
    (
        lambda: convert.from_keras(KERNELS, cell="lstm", peephole=True),
        TypeError,
        "peephole follows from the weights and must be left out",
    ),
    (lambda: convert.from_keras(5, cell="lstm"), TypeError, "layer 0 must be one of Keras or"),
    (
        lambda: convert.from_onnx(
            "GRU", random(1, 21, 3), random(1, 21, 7), direction="reverse", reverse=False
        ),
        ValueError,
        "reverse must be True, which follows from the weights or attributes, got False",
    ),
    (
        lambda: convert.from_onnx("RNN", random(1, 7, 3), random(1, 7, 7), activations=5),
        TypeError,
        "activations must be a list, got int",
    ),
    (
        lambda: convert.from_onnx("RNN", random(1, 7, 3), random(1, 7, 7), clip="a"),
        TypeError,
        "clip must be a number, got str",
    ),
    (
        lambda: convert.from_onnx("LSTM", random(1, 27, 3), random(1, 28, 7)),
        ValueError,
        "W must have shape (1, 4*H, I) = (1, 28, I), got (1, 27, 3)",
    ),
    (
        lambda: convert.from_onnx("LSTM", random(1, 28, 3), random(1, 28, 6)),
        ValueError,
        "R must have shape (1, 4*H, H) = (1, 24, 6), got (1, 28, 6)",
    ),
    (
        lambda: convert.from_onnx("GRU", random(1, 21, 3), random(1, 21, 7), P=random(1, 21)),
        ValueError,
        "P must be None, because GRU has no peepholes",
    ),
    (
        lambda: convert.from_onnx("QRNN", random(1, 21, 3), random(1, 21, 7)),
        ValueError,
        "op_type must be LSTM, GRU or RNN, got 'QRNN'",
    ),
    (
        lambda: convert.from_onnx("GRU", random(1, 21, 3), random(1, 21, 7), layout=2),
        ValueError,
        "layout must be 0 or 1, got 2",
    ),
    (
        lambda: convert.from_onnx(
            "LSTM",
            random(1, 28, 3),
            random(1, 28, 7),
            activations=["Sigmoid", "Relu", "Tanh"],
        ),
        ValueError,
        "activations must be equal for g and h, as our layers have one for both, got "
        "['Sigmoid', 'Relu', 'Tanh']",
    ),
    (
        lambda: convert.from_onnx(
            "RNN", random(1, 7, 3), random(1, 7, 7), activations=["Gelu"]
        ),
        ValueError,
        "got 'Gelu'",
    ),
    (
        lambda: convert.from_onnx(
            "RNN", random(1, 7, 3), random(1, 7, 7), activations=["ScaledTanh"]
        ),
        ValueError,
        "activation_alpha must have a number for ScaledTanh, got ['ScaledTanh']",
    ),
    (
        lambda: convert.from_flax({"ii": {"kernel": random(I, H)}}),
        ValueError,
        "the parameters must be those of an LSTMCell, OptimizedLSTMCell, GRUCell or "
        "SimpleCell, got the names ii",
    ),
    (lambda: convert.from_flax(3), TypeError, "the parameters must be a dict, got int"),
    (lambda: convert.to_flax(fr.GRU(I, H), "haiku"), ValueError, "api must be one of linen"),
    (lambda: convert.to_flax(fr.GRU(I, H), "nnx"), ValueError, "a bias_hh of n other than 0"),
    (
        lambda: convert.from_haste(PARTS | {"bias": None}),
        TypeError,
        "bias must be an array of shape (28,), got None",
    ),
    (lambda: convert.from_haste({}), ValueError, "with kernel, recurrent_kernel and bias"),
    (lambda: convert.from_haste(PARTS, (PARTS, PARTS)), ValueError, "the same number of"),
    (
        lambda: convert.from_haste((PARTS,) * 3),
        ValueError,
        "a layer must be one cell or a pair of them, got 3",
    ),
    (lambda: convert.to_haste(fr.RNN(I, H)), ValueError, "layer must be one that Haste has"),
    (lambda: convert.from_mlx({"W": 1}), ValueError, "a dict of an LSTM, GRU or RNN, got W"),
    (
        lambda: convert.from_mlx({"Wx": random(15, 3), "Wh": random(15, 4)}),
        ValueError,
        "Wh must have 4*H (LSTM), 3*H (GRU) or H (RNN) elements along the gates with H = 4, "
        "got 15",
    ),
    (lambda: convert.from_onednn("augru", DNN), ValueError, "kind must be one of lstm"),
    (lambda: convert.from_onednn("lstm", {}), ValueError, "the weights of primitive 0 must"),
    (
        lambda: convert.from_onednn("lstm", DNN | {"bias": random(1, 1, 5, H)}),
        ValueError,
        "bias of primitive 0 must have shape (1, 1, 4, 7), got (1, 1, 5, 7)",
    ),
    (
        lambda: convert.from_cudnn("gru", random(100), I, H),
        ValueError,
        "flat must have shape (252,), got (100,)",
    ),
    (lambda: convert.from_cudnn("gru", random(252), 0, H), ValueError, "input_size must be"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_errors(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    """Weights of a wrong shape, type or name are refused with one sentence."""
    with pytest.raises(kind, match=re.escape(message)):
        call()


OPTIONS: dict[str, Any] = {
    "peephole": True,
    "coupled_gates": True,
    "layer_norm": True,
    "activation": "relu",
    "clip": 1.0,
    "cell_clip": 1.0,
    "zoneout": 0.1,
    "proj_size": 5,
    "reverse": True,
}
OFFERED = {
    "keras": ["activation", "reverse"],
    "onnx": ["peephole", "coupled_gates", "activation", "clip", "reverse"],
    "flax": ["activation"],
    "haste": ["layer_norm", "zoneout"],
    "mlx": [],
    "onednn": ["peephole", "proj_size", "reverse"],
    "cudnn": [],
    "torch": [name for name in OPTIONS if name != "reverse"],
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_a_library_lacks(library: str, option: str) -> None:
    """A layer with an option that a library lacks is refused, by the option's name."""
    if library == "torch":
        pytest.importorskip("torch")
    layer = layer_of("lstm", **{option: OPTIONS[option]})
    convert_it = getattr(convert, f"to_{library}")
    if option in OFFERED[library]:
        assert convert_it(layer)
    else:
        with pytest.raises(ValueError, match=f"layer must not have {option}="):
            convert_it(layer)


def test_narrow_weights_are_refused() -> None:
    """A quantised layer is refused: its weights are not those of its dtype."""
    layer = fr.LSTM(I, H).quantize("int8")
    with pytest.raises(ValueError, match="layer must have weights of its dtype, got int8"):
        convert.to_keras(layer)


def test_keras_layers_that_are_refused() -> None:
    """Layers of Keras that compute something else than one of ours are refused."""
    keras = pytest.importorskip("keras")
    LSTM, GRU = keras.layers.LSTM, keras.layers.GRU
    both = keras.layers.Bidirectional
    other = LSTM(H, activation="relu", go_backwards=True)
    refused = [
        (LSTM(H, go_backwards=True), "layer 0 must not have go_backwards=True"),
        (
            LSTM(H, activation="gelu"),
            "layer 0 must have an activation that we have, got 'gelu'",
        ),
        (LSTM(H, activation=lambda a: a), "an activation that we have, got '<lambda>'"),
        (both(LSTM(H), merge_mode="sum"), 'layer 0 must have merge_mode="concat"'),
        (both(LSTM(H), backward_layer=other), "layer 0 must have equal options in both"),
    ]
    for layer, message in refused:
        layer.build((None, None, I))
        with pytest.raises(ValueError, match=message):
            convert.from_keras(layer)
    with pytest.raises(TypeError, match="layer 0 must be an LSTM, GRU, SimpleRNN"):
        convert.from_keras(keras.layers.Dense(H))
    layers = [LSTM(H), GRU(H)]
    for layer in layers:
        layer.build((None, None, I))
    with pytest.raises(ValueError, match="layers must have equal cells and options, layer 1"):
        convert.from_keras(*layers)


def test_modules_that_are_refused() -> None:
    """Modules of PyTorch that may compute something else than their weights say are refused."""
    torch = pytest.importorskip("torch")

    class Doubled(torch.nn.LSTM):  # type: ignore[misc, name-defined]
        def forward(self, *arguments: Any) -> Any:
            y, state = super().forward(*arguments)
            return 2 * y, state

    with pytest.raises(TypeError, match="no subclass, or a state_dict, got Doubled"):
        convert.from_torch(Doubled(I, H))
    module = torch.nn.GRU(I, H)
    handle = module.register_forward_hook(lambda _, __, results: results)
    with pytest.raises(ValueError, match="layer must have no forward hooks"):
        convert.to_keras(module)
    handle.remove()
    with pytest.raises(ValueError, match="prefix and cell must be left out with a module"):
        convert.from_torch(module, cell="gru")
    assert convert.from_torch(Doubled(I, H).state_dict()).hidden_size == H
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = random(T, B, I, dtype=np.float32)
    expected = module(torch.tensor(x))[0].detach().numpy()
    assert_close(convert.from_torch(module)(x)[0], expected)


def test_tensors_of_16_bits() -> None:
    """Every conversion reads tensors of PyTorch, also of bfloat16."""
    torch = pytest.importorskip("torch")
    kernels = [torch.tensor(a).bfloat16().requires_grad_() for a in KERNELS]
    expected = convert.from_keras([a.detach().float().numpy() for a in kernels], cell="lstm")
    layer = convert.from_keras(kernels, cell="lstm")
    np.testing.assert_array_equal(layer.weight_hh_l0, expected.weight_hh_l0)
