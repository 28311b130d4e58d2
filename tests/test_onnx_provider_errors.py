"""Nodes that stay with onnxruntime, and errors of our kernels inside it."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime")

from test_onnx_provider import (  # noqa: E402
    DIRECTIONS,
    OURS,
    THEIRS,
    H,
    add_provider,
    feed_of,
    layer_model,
    model_of,
    node_of,
    provider,
    run,
    runs_on,
    session_of,
    states_of,
    value,
    weights_of,
)

import fusedrnn as fr  # noqa: E402
from fusedrnn import _cpu  # noqa: E402

# Nodes that stay with onnxruntime


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "activations must be equal for g and h": (
        "LSTM",
        {"activations": ["Sigmoid", "Tanh", "Relu"]},
    ),
    "equal in both directions": (
        "RNN",
        {"activations": ["Tanh", "Relu"], "direction": "bidirectional"},
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_nodes_that_our_layers_lack(why: str, caplog: pytest.LogCaptureFixture) -> None:
    """Onnxruntime keeps a node that no layer of ours is; a warning says which and why."""
    op, attributes = REFUSED[why]
    weights, feed = (
        weights_of(op, DIRECTIONS[attributes.get("direction", "forward")]),
        feed_of(op, 5, 3),
    )
    model = layer_model(op, weights, feed, hidden_size=H, **attributes)
    with caplog.at_level(logging.WARNING, "fusedrnn.onnx"):
        session = session_of(model)
    assert runs_on(session) == {op: THEIRS}
    assert any(f"{op} node 'node' stays" in m and why in m for m in caplog.messages)
    for a, e in zip(session.run(None, feed), run(model, feed, None), strict=True):
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("weight", ["W", "R", "B", "P"])
def test_weights_that_are_not_constant(weight: str, caplog: pytest.LogCaptureFixture) -> None:
    """Onnxruntime keeps a node whose weights a run may change, such as inputs with defaults."""
    weights, feed = weights_of("LSTM", peephole=True), feed_of("LSTM", 5, 3)
    given = {weight: weights.pop(weight)}
    expected = run(layer_model("LSTM", weights | given, feed, hidden_size=H), feed, None)
    for constants in ({}, given):
        caplog.clear()
        node = node_of("LSTM", {*weights, *given, "X"}, hidden_size=H)
        model = model_of([node], ["X", weight], ["Y", "Y_h", "Y_c"], weights | constants)
        with caplog.at_level(logging.WARNING, "fusedrnn.onnx"):
            session = session_of(model)
        assert runs_on(session) == {"LSTM": THEIRS}
        assert f"{weight} is not a constant" in caplog.messages[0]
        for a, e in zip(
            session.run(None, feed if constants else feed | given), expected, strict=True
        ):
            np.testing.assert_array_equal(a, e)


def test_narrow_precisions_take_float32() -> None:
    """A node with weights that cannot be narrow stays with onnxruntime."""
    weights, feed = weights_of("GRU"), feed_of("GRU", 5, 3)
    weights["W"][0, 0, 0] = np.inf
    model = layer_model("GRU", weights, feed, hidden_size=H)
    assert runs_on(session_of(model)) == {"GRU": OURS}
    assert runs_on(session_of(model, "int8")) == {"GRU": THEIRS}


# Errors


WRONG: list[tuple[str, np.ndarray, str]] = [
    ("X", np.zeros((5, 3, 6), "f"), "have 3 axes, the last of 5, got (5, 3, 6)"),
    ("X", np.zeros((5, 3), "f"), "have 3 axes, the last of 5, got (5, 3)"),
    ("initial_h", np.zeros((1, 2, H), "f"), "have shape (1, 3, 17), got (1, 2, 17)"),
    ("initial_c", np.zeros((1, 3, 4), "f"), "have shape (1, 3, 17), got (1, 3, 4)"),
    ("sequence_lens", np.array([1, 2], "i4"), "have shape (3), got (2)"),
    ("sequence_lens", np.array([1, 6, 2], "i4"), "be 0 to 5, got 6"),
    ("sequence_lens", np.array([1, -1, 2], "i4"), "be 0 to 5, got -1"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), WRONG)
def test_errors_of_a_run(name: str, wrong: np.ndarray, message: str) -> None:
    """A wrong input is named, and the next run with the right one works."""
    names = [*states_of("LSTM"), "sequence_lens"]
    weights, feed = weights_of("LSTM"), feed_of("LSTM", 5, 3, names=names)
    node = node_of("LSTM", {*weights, *feed}, hidden_size=H)
    inputs = [value(k, str(v.dtype)) for k, v in feed.items()]  # of any shape
    session = session_of(model_of([node], inputs, ["Y", "Y_h", "Y_c"], weights))
    expected = session.run(None, feed)
    with pytest.raises(Exception, match=re.escape(f"{name} must {message}")):
        session.run(None, feed | {name: wrong})
    np.testing.assert_array_equal(session.run(None, feed)[0], expected[0])


def test_errors_while_a_session_is_made() -> None:
    """An error in Python, which is not about the node, ends the session with its text."""

    def fail(*_: Any) -> None:
        raise MemoryError("no memory is left")

    weights, feed = weights_of("GRU"), feed_of("GRU", 5, 3)
    model = layer_model("GRU", weights, feed, hidden_size=H)
    _cpu.set_onnxruntime_compiler(fail, "0")
    try:
        with pytest.raises(Exception, match="MemoryError: no memory is left"):
            session_of(model)
    finally:
        _cpu.set_onnxruntime_compiler(provider._compile, fr.__version__)
    assert runs_on(session_of(model)) == {"GRU": OURS}


def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """add_provider names a wrong argument and what it needs, before anything changes."""
    options = onnxruntime.SessionOptions()
    with pytest.raises(TypeError, match=r"must be .*SessionOptions, got dict"):
        add_provider({})
    expected = 'precision must be one of "float32", "int8", "bfloat16", "float16", got "int4"'
    with pytest.raises(ValueError, match=expected.replace('"int4"', "'int4'")):
        add_provider(options, "int4")  # type: ignore[arg-type]
    assert not options.has_providers()
    with pytest.raises(RuntimeError):
        options.get_session_config_entry("session.intra_op.allow_spinning")
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(ImportError, match=r"1\.24\.4 or newer, got 1\.23\.2"):
        add_provider(options)
    monkeypatch.undo()
    monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
    with pytest.raises(ImportError, match=r"this build of .* cannot"):
        add_provider(options)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        add_provider(options)


def test_a_precision_that_add_provider_has_not_checked() -> None:
    """A session whose options were written by hand says what is wrong with them."""
    add_provider(onnxruntime.SessionOptions())
    options = onnxruntime.SessionOptions()
    devices = provider._devices(onnxruntime)
    options.add_provider_for_devices(devices, {"precision": "int4"})
    model = layer_model("GRU", weights_of("GRU"), feed_of("GRU", 5, 3), hidden_size=H)
    with pytest.raises(Exception, match="precision must be one of"):
        onnxruntime.InferenceSession(model.SerializeToString(), options)
