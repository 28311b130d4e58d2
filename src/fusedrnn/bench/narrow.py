"""The peers' low precisions as contenders, and our float32, for cases with narrow weights.

Each runs as its library recommends: bfloat16 modules and `quantize_dynamic` of PyTorch,
DynamicQuantizeLSTM of onnxruntime, whose weights have a scale for a whole matrix, and the
precision that OpenVINO prefers. onnxruntime has no GRU or RNN of 8 bits.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fusedrnn as fr

from .cases import Case
from .contenders import (
    Inputs,
    Results,
    Run,
    _runs_models,
    _with_state,
    onnx_model,
    openvino_of,
)


def float32(case: Case, inputs: Inputs) -> Run:
    """Run our layer in float32."""
    fr.set_num_threads(case.threads)
    return run_layer(case, inputs, inputs.layer)


def run_layer(case: Case, inputs: Inputs, layer: Any) -> Run:
    """Run a layer on whole sequences, or on one step after the other."""
    x, masks = inputs.x, inputs.masks
    if case.mode == "inference":
        return lambda: {"y": layer(x, **masks)[0]}
    state = None

    def step() -> Results:
        nonlocal state
        y, state = layer(x, state)
        return {"y": y}

    return step


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence what quantisation tells of deprecations and of how it is to be used."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _run_torch(case: Case, inputs: Inputs, convert: Any, dtype: str) -> Run | None:
    """Run torch.nn's module after `convert`, on x of a dtype."""
    if case.form not in ("", "two-layers", "both-directions"):
        return None
    import torch

    torch.set_num_threads(case.threads)
    layer = inputs.layer
    module = getattr(torch.nn, case.cell)(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        bidirectional=layer.bidirectional,
    )
    module.load_state_dict(
        {name: torch.from_numpy(value.copy()) for name, value in layer.state_dict().items()}
    )
    with _quietly():
        call = convert(torch, module.eval())
    x = torch.from_numpy(inputs.x).to(getattr(torch, dtype))
    state = None

    def run() -> Results:
        nonlocal state
        with torch.inference_mode():
            y, after = call(x, state)
        if case.mode == "streaming":
            state = after
        return {"y": y.float().numpy()}

    return run


def torch_bfloat16(case: Case, inputs: Inputs) -> Run | None:
    """Run torch.nn's module in bfloat16."""
    return _run_torch(case, inputs, lambda torch, module: module.bfloat16(), "bfloat16")


def torch_int8(case: Case, inputs: Inputs) -> Run | None:
    """Run torch.nn's module after `torch.ao.quantization.quantize_dynamic`."""
    if case.cell == "RNN":
        return None

    def convert(torch: Any, module: Any) -> Any:
        model = torch.nn.Sequential(module)
        done = torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)
        return done[0]

    return _run_torch(case, inputs, convert, "float32")


def onnxruntime_int8(case: Case, inputs: Inputs) -> Run | None:
    """Run onnxruntime's DynamicQuantizeLSTM."""
    if case.cell != "LSTM" or not _runs_models(case):
        return None
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic

    session = ort.SessionOptions()
    session.intra_op_num_threads = case.threads
    session.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder, _quietly():
        model, quantised = Path(folder, "model.onnx"), Path(folder, "int8.onnx")
        model.write_bytes(onnx_model(case, inputs))
        quantize_dynamic(model, quantised, weight_type=QuantType.QInt8)
        run = ort.InferenceSession(
            quantised.read_bytes(), session, providers=["CPUExecutionProvider"]
        ).run
    return _with_state(case, inputs, lambda feed: run(None, feed))


def openvino_bfloat16(case: Case, inputs: Inputs) -> Run | None:
    """Run OpenVINO with its hint for bfloat16, which it follows where the processor has it."""
    return openvino_of(case, inputs, "bf16")


CONTENDERS = {
    "float32": float32,
    "torch-bfloat16": torch_bfloat16,
    "torch-int8": torch_int8,
    "onnxruntime-int8": onnxruntime_int8,
    "openvino-bfloat16": openvino_bfloat16,
}
INT8_PEERS = ("torch-int8", "onnxruntime-int8")
BFLOAT16_PEERS = ("torch-bfloat16", "openvino-bfloat16")
# The largest error with which a contender takes part.
LARGEST_ERROR = 3e-2


def peers_of(weights: str, float_peers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the peers that narrow weights compete with: those of as many bits, or more."""
    peers = (*float_peers, *BFLOAT16_PEERS)
    return (*peers, *INT8_PEERS) if weights.startswith("int8") else peers


def largest_error(actual: Results, expected: Results) -> float:
    """Return the largest error of an element of y."""
    return float(np.abs(actual["y"] - expected["y"]).max())
