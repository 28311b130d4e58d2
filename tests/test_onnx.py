"""The reference agrees with onnxruntime on what only that knows: an oracle for the options.

Its activations are rational approximations, hence the tolerance. Gates are in other orders
there: i o f c for LSTM, z r h for GRU, i o f for peepholes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import Sizes, assert_close, op, options_of, with_options

from fusedrnn import reference
from fusedrnn.cells import CELLS

onnx = pytest.importorskip("onnx", reason="onnxruntime is the oracle of these tests")
onnxruntime = pytest.importorskip("onnxruntime")

SIZES = Sizes(T=6, B=4, I=3, H=7)
ORDER = {"lstm": [0, 3, 1, 2], "gru": [1, 0, 2], "rnn": [0]}
OPERATOR = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


def run(operator: str, inputs: dict[str, np.ndarray], **attributes: Any) -> list[np.ndarray]:
    """One node in onnxruntime; inputs by their ONNX names, those that there are."""
    places = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"]
    kinds = {"f": onnx.TensorProto.FLOAT, "i": onnx.TensorProto.INT32}
    input_infos = [
        onnx.helper.make_tensor_value_info(k, kinds[v.dtype.kind], v.shape)
        for k, v in inputs.items()
    ]
    outputs = ["Y", "Y_h", "Y_c"][: 3 if operator == "LSTM" else 2]
    last = max(places.index(k) for k in inputs) + 1
    node = onnx.helper.make_node(
        operator,
        [k if k in inputs else "" for k in places[:last]],
        outputs,
        hidden_size=SIZES.H,
        **attributes,
    )
    output_infos = [
        onnx.helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, None) for k in outputs
    ]
    graph = onnx.helper.make_graph([node], "layer", input_infos, output_infos)
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(outputs, inputs)


# onnxruntime knows no rnn_identity; peepholes are an LSTM's.
CASES = [
    (name, peephole)
    for name in ("lstm", "lstm_coupled", "gru", "gru_before", "rnn_tanh", "rnn_relu")
    for peephole in (False, True)
    if not peephole or "peephole" in options_of(CELLS[name])
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("name", "peephole"), CASES)
def test_agrees_with_onnxruntime(
    name: str, peephole: bool, clip: bool, lengths: bool, reverse: bool
) -> None:
    """The reference agrees with onnxruntime on peepholes, clips, lengths and coupled gates."""
    cell = CELLS[name]
    names = ["peephole"] * peephole + ["clip"] * clip
    values, options = with_options(cell, SIZES, names, np.float32)
    if lengths:  # onnxruntime wants a row of full length, and no empty one
        options["lengths"] = np.array([4, SIZES.T, 1, 3])
    y, *state = op(cell, "", reference)(
        **{k: v.astype(np.float64) for k, v in values.items()}, **options, reverse=reverse
    )

    if name == "lstm_coupled":  # there the forget gate has weights that are not looked at
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ch"):
            if kind in values:
                blocks = np.split(values[kind], 2 if kind == "weight_ch" else 3)
                values[kind] = np.concatenate([blocks[0], blocks[0] + 1, *blocks[1:]])

    def blocks_of(kind: str) -> np.ndarray:
        order = ORDER[cell.op]
        return np.concatenate([np.split(values[kind], len(order))[k] for k in order])

    inputs = {
        "X": values["x"],
        "W": blocks_of("weight_ih")[None],
        "R": blocks_of("weight_hh")[None],
        "B": np.concatenate([blocks_of("bias_ih"), blocks_of("bias_hh")])[None],
        "initial_h": values["h0"][None],
    }
    if cell.op == "lstm":
        inputs["initial_c"] = values["c0"][None]
    if peephole:
        i, f, o = np.split(values["weight_ch"], 3)
        inputs["P"] = np.concatenate([i, o, f])[None]
    if lengths:
        inputs["sequence_lens"] = options["lengths"].astype(np.int32)
    attributes: dict[str, Any] = {"direction": "reverse" if reverse else "forward"}
    if clip:
        attributes["clip"] = options["clip"]
    if name == "lstm_coupled":
        attributes["input_forget"] = 1
    if cell.op == "gru":
        attributes["linear_before_reset"] = int(name == "gru")
    if cell.op == "rnn":
        attributes["activations"] = [name.partition("_")[2].capitalize()]
    expected, *end = run(OPERATOR[cell.op], inputs, **attributes)
    assert_close(y, expected[:, 0], "onnxruntime")
    for a, e in zip(state, end, strict=True):
        assert_close(a, e[0], "onnxruntime")
