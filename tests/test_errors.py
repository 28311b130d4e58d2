"""Each wrong argument is refused before computing, by name, with what came."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from helpers import Sizes, arguments, op

import fusedrnn as fr
from fusedrnn.cells import CELLS, Cell

SIZES = Sizes(T=3, B=2, I=4, H=5)

# NumPy before 1.24 makes arrays of objects of ragged lists, which are refused for their dtype.
RAGGED = "an array" if np.lib.NumpyVersion(np.__version__) >= "1.24.0" else ""


def refused(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=re.escape(message))


WRONG = [
    ("x", lambda a: None, TypeError, "x must be an array, got None"),
    (
        "x",
        lambda a: a.astype(int),
        TypeError,
        "x must be float32, float64 or bfloat16, got int64",
    ),
    (
        "x",
        lambda a: a.astype(">f8"),
        TypeError,
        "x must be float32, float64 or bfloat16, got >f8",
    ),
    (
        "x",
        lambda a: a.astype(complex),
        TypeError,
        "x must be float32, float64 or bfloat16, got complex128",
    ),
    ("x", lambda a: [[1.0], [2.0, 3.0]], TypeError, f"x must be {RAGGED}"),
    ("x", lambda a: a[0, 0], ValueError, "x must have shape (T, B, I) or (T, I), got (4,)"),
    (
        "x",
        lambda a: a[None],
        ValueError,
        "x must have shape (T, B, I) or (T, I), got (1, 3, 2, 4)",
    ),
    (
        "x",
        lambda a: a[..., :0],
        ValueError,
        "x must have at least one feature, got shape (3, 2, 0)",
    ),
    ("weight_ih", lambda a: None, TypeError, "weight_ih must be an array, got None"),
    (
        "weight_ih",
        lambda a: a.astype("f4"),
        TypeError,
        "weight_ih must be float64 like x, got float32",
    ),
    ("weight_ih", lambda a: a[:, :3], ValueError, "with I = 4, got (20, 3)"),
    ("weight_ih", lambda a: a[:-1], ValueError, "weight_ih must have shape (4*H, I)"),
    ("weight_ih", lambda a: a[0], ValueError, "weight_ih must have shape (4*H, I)"),
    ("weight_ih", lambda a: a[:0], ValueError, "weight_ih must have at least 4 rows"),
    (
        "weight_hh",
        lambda a: a.T,
        ValueError,
        "weight_hh must have shape (4*H, H) = (20, 5), got (5, 20)",
    ),
    (
        "weight_hh",
        lambda a: a.astype("f4"),
        TypeError,
        "weight_hh must be float64 like x, got float32",
    ),
    (
        "bias_ih",
        lambda a: a[:, None],
        ValueError,
        "bias_ih must have shape (4*H,) = (20,), got (20, 1)",
    ),
    (
        "bias_hh",
        lambda a: a[:5],
        ValueError,
        "bias_hh must have shape (4*H,) = (20,), got (5,)",
    ),
    ("bias_hh", lambda a: a > 0, TypeError, "bias_hh must be float64 like x, got bool"),
    ("h0", lambda a: a[:1], ValueError, "h0 must have shape (B, H) = (2, 5), got (1, 5)"),
    ("h0", lambda a: a[None], ValueError, "h0 must have shape (B, H) = (2, 5), got (1, 2, 5)"),
    ("c0", lambda a: a[:, :4], ValueError, "c0 must have shape (B, H) = (2, 5), got (2, 4)"),
    ("c0", lambda a: "zeros", TypeError, "c0 must be float64 like x, got <U5"),
    ("lengths", lambda a: [1.0, 2.0], TypeError, "lengths must be integers, got float64"),
    ("lengths", lambda a: [True, False], TypeError, "lengths must be integers, got bool"),
    ("lengths", lambda a: [[1], [2, 3]], TypeError, f"lengths must be {RAGGED}"),
    (
        "lengths",
        lambda a: [1, 2, 3],
        ValueError,
        "lengths must have shape (B,) = (2,), got (3,)",
    ),
    ("lengths", lambda a: 3, ValueError, "lengths must have shape (B,) = (2,), got ()"),
    ("lengths", lambda a: [3, -1], ValueError, "lengths must be from 0 to T = 3, got -1"),
    ("lengths", lambda a: [5, 4], ValueError, "lengths must be from 0 to T = 3, got 5"),
    (
        "resets",
        lambda a: np.full((3, 2), -1),
        ValueError,
        "resets must be bool or numbers that are 0 or 1, got -1",
    ),
    (
        "resets",
        lambda a: "no",
        TypeError,
        "resets must be bool or numbers that are 0 or 1, got <U2",
    ),
    ("resets", lambda a: [[True], []], TypeError, f"resets must be {RAGGED}"),
    (
        "resets",
        lambda a: np.zeros((2, 3), bool),
        ValueError,
        "resets must have shape (T, B) = (3, 2), got (2, 3)",
    ),
    ("reverse", lambda a: 1, TypeError, "reverse must be a bool, got int"),
    ("out", lambda a: [0.0], TypeError, "out must be an array, got list"),
    (
        "out",
        lambda a: np.empty((3, 2, 4)),
        ValueError,
        "out must have shape (T, B, H) = (3, 2, 5)",
    ),
    (
        "out",
        lambda a: np.empty((3, 2, 5), "f4"),
        TypeError,
        "out must be float64 like x, got float32",
    ),
    (
        "out",
        lambda a: np.empty((3, 2, 10))[..., ::2],
        ValueError,
        "contiguous along its last axis",
    ),
    ("out", lambda a: np.broadcast_to(0.0, (3, 2, 5)), ValueError, "out must be writeable"),
    (
        "out",
        lambda a: np.lib.stride_tricks.as_strided(np.empty(10), (3, 2, 5), (0, 40, 8)),
        ValueError,
        "out must not overlap itself, got strides (0, 40, 8)",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "error", "message"), WRONG)
def test_wrong_argument_of_lstm(name: str, spoil: Any, error: type, message: str) -> None:
    """A wrong argument of an op is named, with what was expected and what came."""
    values = arguments(CELLS["lstm"], SIZES)
    values[name] = spoil(values.get(name))
    with refused(error, message):
        fr.lstm(**values)
    if name != "out":
        with refused(error, message):
            fr.lstm_vjp(**values)


def test_wrong_masks_of_an_unbatched_sequence() -> None:
    """Without a batch lengths is one integer and resets have one axis."""
    values = {k: v for k, v in arguments(CELLS["gru"], SIZES).items() if k != "h0"}
    values["x"] = values["x"][:, 0]
    with refused(ValueError, "lengths must be one integer for x (T, I), got shape (1,)"):
        fr.gru(**values, lengths=[3])
    with refused(ValueError, "lengths must be from 0 to T = 3, got 4"):
        fr.gru(**values, lengths=4)
    with refused(ValueError, "resets must have shape (T,) = (3,), got (3, 1)"):
        fr.gru(**values, resets=np.zeros((3, 1), bool))


def test_the_first_wrong_argument_is_named(cell: Cell) -> None:
    values = {k: v.astype("f4") if k != "x" else v for k, v in arguments(cell, SIZES).items()}
    with refused(TypeError, "weight_ih must be float64 like x, got float32"):
        op(cell)(**values)


def test_out_may_not_overlap_an_input() -> None:
    values = arguments(CELLS["gru"], Sizes(3, 2, 5, 5))
    with refused(ValueError, "out must not lie within the memory of another argument"):
        fr.gru(**values, out=values["x"])


def test_arrays_of_jax_need_values() -> None:
    """Under jax.jit arrays have no values, which a sentence says."""
    tracer = type("DynamicJaxprTracer", (), {"__module__": "jax._src.interpreters"})()
    with refused(TypeError, "arrays of JAX must have values, got a DynamicJaxprTracer"):
        fr.GRU(3, 4)(tracer)


def test_out_may_not_be_masked() -> None:
    """y would be written below the mask."""
    x, W, R = (np.zeros(s, np.float32) for s in ((3, 2, 4), (15, 4), (15, 5)))
    out = np.ma.masked_array(np.zeros((3, 2, 5), np.float32))
    with refused(TypeError, "out must be an array without a mask"):
        fr.gru(x, W, R, None, None, None, out=out)


def test_nothing_is_written_when_refused() -> None:
    out = np.full((3, 2, 5), 7.0)
    values = arguments(CELLS["lstm"], SIZES) | {"reverse": None}
    with pytest.raises(TypeError):
        fr.lstm(**values, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("value", ["sigmoid", None, 3])
def test_unknown_nonlinearity(value: Any) -> None:
    """An unknown nonlinearity is refused with the list of those that exist."""
    values = arguments(CELLS["rnn_tanh"], SIZES)
    expected = f'nonlinearity must be one of "tanh", "relu", "identity", got {value!r}'
    with refused(ValueError, expected):
        fr.rnn(**values, nonlinearity=value)
    with refused(ValueError, expected):
        fr.RNN(3, 4, nonlinearity=value)


def test_wrong_gradients() -> None:
    """A pullback names a gradient of the wrong shape or dtype."""
    _, pullback = fr.lstm_vjp(**arguments(CELLS["lstm"], SIZES))
    with refused(ValueError, "dy must have shape (T, B, H) = (3, 2, 5), got (3, 5)"):
        pullback(np.zeros((3, 5)))
    with refused(TypeError, "dh_n must be float64 like x, got float32"):
        pullback(None, np.zeros((2, 5), np.float32))
    with refused(ValueError, "dc_n must have shape (B, H) = (2, 5), got (5,)"):
        pullback(dc_n=np.zeros(5))


def test_y_of_a_vjp_is_read_only() -> None:
    (y, h_n, c_n, cells), _ = fr.lstm_vjp(**arguments(CELLS["lstm"], SIZES), return_cells=True)
    for frozen in (y, cells):
        with pytest.raises(ValueError, match="read-only"):
            frozen += 1
    h_n += 1
    c_n += 1
    (y, _), _ = fr.GRU(4, 5, batch_first=True).vjp(np.zeros((2, 3, 4), np.float32))
    with pytest.raises(ValueError, match="read-only"):
        y += 1


@pytest.mark.parametrize(
    ("arguments_", "error", "message"),
    [
        ((0, 4), ValueError, "input_size must be from 1 to 2**31, got 0"),
        ((3, -1), ValueError, "hidden_size must be from 1 to 2**31, got -1"),
        ((3, 4.0), TypeError, "hidden_size must be an integer, got float"),
        ((3, float("nan")), TypeError, "hidden_size must be an integer, got float"),
        ((float("inf"), 4), TypeError, "input_size must be an integer, got float"),
        ((True, 4), TypeError, "input_size must be an integer, got bool"),
        ((3, 4, 0), ValueError, "num_layers must be from 1 to 2**16, got 0"),
        ((3, 4, 1, 1), TypeError, "bias must be a bool, got int"),
        ((3, 4, 1, True, None), TypeError, "batch_first must be a bool, got NoneType"),
    ],
)
def test_wrong_size_of_a_layer(arguments_: tuple, error: type, message: str) -> None:
    """A layer names a size or flag that it cannot have."""
    with refused(error, message):
        fr.LSTM(*arguments_)


@pytest.mark.parametrize(
    ("dtype", "shown"), [(np.float16, "float16"), ("x", "x"), (5, "5"), (len, "<built-in")]
)
def test_wrong_dtype_of_a_layer(dtype: Any, shown: str) -> None:
    """A dtype that no layer has, or NumPy does not know, is named."""
    with refused(TypeError, f"dtype must be float32, float64 or bfloat16, got {shown}"):
        fr.GRU(3, 4, dtype=dtype)


@pytest.mark.parametrize(("rng", "error"), [(-1, ValueError), ("x", TypeError)])
def test_wrong_rng_of_a_layer(rng: Any, error: type) -> None:
    """What NumPy cannot make a generator of is named."""
    with refused(error, f"rng must be a generator of NumPy, a seed or None, got {rng!r}"):
        fr.GRU(3, 4, rng=rng)


def test_wrong_call_of_a_layer() -> None:
    """A call of a layer names the wrong argument."""
    layer = fr.LSTM(4, 5, num_layers=2, bidirectional=True)
    x = np.zeros((3, 2, 4), np.float32)
    state = np.zeros((4, 2, 5), np.float32)
    with refused(ValueError, "with I = input_size = 4, got (3, 2, 5)"):
        layer(np.zeros((3, 2, 5), np.float32))
    with refused(TypeError, "x must be float32 like the layer, got float64"):
        layer(x.astype(np.float64))
    with refused(TypeError, "state must be a pair (h, c) or None, got ndarray"):
        layer(x, state)
    with refused(
        ValueError, "c0 must have shape (layers*directions, B, H) = (4, 2, 5), got (2, 2, 5)"
    ):
        layer(x, (state, state[:2]))
    with refused(
        ValueError, "h0 must have shape (layers*directions, H) = (4, 5), got (4, 2, 5)"
    ):
        layer(x[:, 0], (state, state))
    with refused(TypeError, "lengths must be integers, got float64"):
        layer(x, None, [1.0, 2.0], "no")
    with refused(ValueError, "lengths must be from 0 to T = 3, got 4"):
        layer.vjp(x, lengths=[3, 4])
    with refused(ValueError, "resets must have shape (T, B) = (3, 2), got (2, 3)"):
        layer(x, resets=np.zeros((2, 3), bool))
    first = fr.LSTM(4, 5, batch_first=True)
    with refused(ValueError, "lengths must have shape (B,) = (2,), got (3,)"):
        first(x.swapaxes(0, 1), lengths=[1, 2, 3])
    with refused(ValueError, "resets must have shape (B, T) = (2, 3), got (3, 2)"):
        first(x.swapaxes(0, 1), resets=np.zeros((3, 2), bool))
    _, pullback = layer.vjp(x)
    with refused(
        ValueError, "dy must have shape (T, B, directions*H) = (3, 2, 10), got (3, 2, 5)"
    ):
        pullback(np.zeros((3, 2, 5), np.float32))
    with refused(TypeError, "d_state must be a pair (h, c) or None, got ndarray"):
        pullback(None, state)


def test_wrong_state_dict_changes_nothing() -> None:
    layer = fr.GRU(3, 4, rng=0)
    before = {k: v.copy() for k, v in layer.state_dict().items()}
    good = {k: v + 1 for k, v in before.items()}
    with refused(TypeError, "state_dict must be a dict, got NoneType"):
        layer.load_state_dict(None)
    with refused(KeyError, "missing ['bias_hh_l0'], unknown ['bias']"):
        layer.load_state_dict(
            {("bias" if k == "bias_hh_l0" else k): v for k, v in good.items()}
        )
    with refused(ValueError, "bias_hh_l0 must have shape (rows,) = (12,), got (11,)"):
        layer.load_state_dict(good | {"bias_hh_l0": np.zeros(11)})
    with refused(TypeError, "weight_ih_l0 must be float32, float64 or bfloat16, got int64"):
        layer.weight_ih_l0 = np.zeros((12, 3), int)
    with pytest.raises(AttributeError, match="hidden_size is fixed"):
        layer.hidden_size = 8
    with pytest.raises(AttributeError, match="has no parameter weight_ih_l1"):
        layer.weight_ih_l1 = np.zeros((12, 4))
    layer.note = "mine"
    layer.note = "still mine"
    with pytest.raises(AttributeError, match="has no attribute 'weight_hr_l0'"):
        _ = layer.weight_hr_l0
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (-1, ValueError, "n must be from 0 to 4096, got -1"),
        (1.5, TypeError, "n must be an integer, got float"),
        ("2", TypeError, "n must be an integer, got str"),
        (10**9, ValueError, "n must be from 0 to 4096, got 1000000000"),
    ],
)
def test_wrong_number_of_threads(n: Any, error: type, message: str) -> None:
    with refused(error, message):
        fr.set_num_threads(n)


def test_unknown_isa() -> None:
    """An unknown instruction set is refused, and the one in use stays."""
    before = fr.get_isa()
    with refused(ValueError, "name must be one of "):
        fr.set_isa("sse9")
    with refused(TypeError, "name must be a string or None, got int"):
        fr.set_isa(2)
    assert fr.get_isa() == before
    with refused(ValueError, 'mode must be "print" or "dict", got \'json\''):
        fr.show_config("json")


WRONG_OPTIONS = [
    ("lstm", {"clip": 0}, ValueError, "clip must be greater than 0 or None, got 0"),
    (
        "lstm",
        {"clip": float("nan")},
        ValueError,
        "clip must be greater than 0 or None, got nan",
    ),
    ("gru", {"clip": "1"}, TypeError, "clip must be a number, got str"),
    ("lstm", {"cell_clip": -1.0}, ValueError, "cell_clip must be greater than 0"),
    (
        "gru",
        {"cell_clip": 1.0},
        TypeError,
        "gru has no option 'cell_clip', which only an LSTM has",
    ),
    ("gru", {"return_cells": True}, TypeError, "gru has no option 'return_cells'"),
    (
        "lstm",
        {"zoneout": 1.0},
        ValueError,
        "zoneout must be a probability p, 0 <= p < 1, got 1.0",
    ),
    ("lstm", {"zoneout": (0.1, 1)}, ValueError, "zoneout[1] must be a probability"),
    (
        "lstm",
        {"zoneout": (0.1,)},
        ValueError,
        "zoneout must be a pair (p_h, p_c), got 1 values",
    ),
    ("gru", {"zoneout": (0.1, 0.2)}, ValueError, "zoneout must be one probability, got 2"),
    (
        "lstm",
        {"recurrent_dropout": -0.1},
        ValueError,
        "recurrent_dropout must be a probability",
    ),
    (
        "lstm",
        {"recurrent_dropout": True},
        TypeError,
        "recurrent_dropout must be a number, got bool",
    ),
    ("lstm", {"weight_dropout": 2}, ValueError, "weight_dropout must be a probability"),
    ("lstm", {"seed": -1}, ValueError, "seed must be from 0 to 2**64 - 1, got -1"),
    ("lstm", {"seed": 2**64}, ValueError, "seed must be from 0 to 2**64 - 1"),
    ("lstm", {"seed": 1.5}, TypeError, "seed must be an integer, got float"),
    ("lstm", {"training": 1}, TypeError, "training must be a bool, got int"),
    ("lstm", {"trace": None}, TypeError, "trace must be a bool, got NoneType"),
    ("lstm", {"coupled_gates": 1}, TypeError, "coupled_gates must be a bool, got int"),
    ("gru", {"reset_after": 0}, TypeError, "reset_after must be a bool, got int"),
    ("lstm", {"peephole": True}, TypeError, "lstm has no option 'peephole'"),
    ("lstm", {"bptt": 0}, ValueError, "bptt must be from 1 to 2**31, got 0"),
    ("lstm", {"bptt": 2.0}, TypeError, "bptt must be an integer, got float"),
    ("lstm", {"recompute": "yes"}, TypeError, "recompute must be a bool, got str"),
    (
        "lstm",
        {"weight_ch": np.zeros(10)},
        ValueError,
        "weight_ch must have shape (3*H,) = (15,)",
    ),
    (
        "lstm",
        {"weight_hr": np.zeros((6, 5))},
        ValueError,
        "weight_hr must have shape (R, H) with",
    ),
    ("lstm", {"weight_hr": np.zeros((3, 5))}, ValueError, "weight_hh must have shape (4*H, R)"),
    ("gru", {"weight_ch": np.zeros(15)}, TypeError, "gru has no weight_ch"),
    ("rnn", {"gamma_ih": np.zeros(5)}, TypeError, "rnn has no gamma_ih"),
    (
        "lstm",
        {"gamma_ih": np.zeros(20)},
        ValueError,
        "gamma_hh must be given with the others of gamma_ih, gamma_hh, gamma_c, beta_c",
    ),
    ("gru", {"gamma_ih": np.zeros(15, "f4")}, TypeError, "gamma_ih must be float64 like x"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), WRONG_OPTIONS)
def test_wrong_options_are_refused(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    values = arguments(CELLS["rnn_tanh" if name == "rnn" else name], SIZES)
    with refused(error, message):
        getattr(fr, name + "_vjp")(**values, **options)
    if not {"bptt", "recompute"} & set(options):
        with refused(error, message):
            getattr(fr, name)(**values, **options)


@pytest.mark.parametrize("options", [{"bptt": 2}, {"recompute": True}], ids=str)
def test_what_is_for_gradients_is_refused_without(options: dict[str, Any]) -> None:
    with refused(TypeError, f"lstm has no option {next(iter(options))!r}"):
        fr.lstm(**arguments(CELLS["lstm"], SIZES), **options)


def test_wrong_layer_options_are_refused() -> None:
    for make, error, message in [
        (lambda: fr.LSTM(3, 4, proj_size=4), ValueError, "proj_size must be smaller than"),
        (lambda: fr.LSTM(3, 4, proj_size=-1), ValueError, "proj_size must be from 0"),
        (lambda: fr.LSTM(3, 4, dropout=0.5), ValueError, "dropout is between layers"),
        (lambda: fr.LSTM(3, 4, 2, dropout=1.5), ValueError, "dropout must be a probability"),
        (lambda: fr.LSTM(3, 4, peephole=1), TypeError, "peephole must be a bool, got int"),
        (lambda: fr.GRU(3, 4, layer_norm="yes"), TypeError, "layer_norm must be a bool"),
        (
            lambda: fr.GRU(3, 4, zoneout=(0.1, 0.1)),
            ValueError,
            "zoneout must be one probability",
        ),
        (
            lambda: fr.LSTM(3, 4, coupled_gates=True, forget_bias=1.0),
            ValueError,
            "forget_bias must be None: coupled_gates has no forget gate, got 1.0",
        ),
        (
            lambda: fr.LSTM(3, 4, bias=False, forget_bias=1.0),
            ValueError,
            "forget_bias must be None: there is no bias",
        ),
        (lambda: fr.LSTM(3, 4, orthogonal=2), TypeError, "orthogonal must be a bool"),
    ]:
        with refused(error, message):
            make()
    layer, x = fr.GRU(3, 4), np.zeros((5, 2, 3), np.float32)
    with refused(TypeError, "gru has no option 'return_cells'"):
        layer(x, return_cells=True)
    with refused(ValueError, "seed must be from 0"):
        layer(x, training=True, seed=-1)
    for call in (layer, layer.vjp):
        with refused(TypeError, "training must be a bool, got int"):
            call(x, training=0)
        with refused(TypeError, "seed must be an integer, got str"):
            call(x, seed="1")
    with refused(AttributeError, "zoneout is fixed when the layer is created"):
        layer.zoneout = 0.5
    _, pullback = fr.LSTM(3, 4).vjp(x)
    with refused(TypeError, "d_cells must be None without return_cells=True, got a gradient"):
        pullback(d_cells=np.zeros((5, 2, 4), np.float32))
