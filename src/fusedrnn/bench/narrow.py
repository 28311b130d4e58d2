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

from .cases import Case
from .contenders import (
    Inputs,
    Results,
    Run,
    onnx_model,
    openvino_of,
    run_module,
    runs_models,
    with_state,
)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence warnings of quantisation, that it is deprecated and how it is used."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def torch_bfloat16(case: Case, inputs: Inputs) -> Run:
    """Run torch.nn's module in bfloat16."""
    import torch

    return run_module(torch.nn, case, inputs, lambda module: module.bfloat16(), "bfloat16")


def torch_int8(case: Case, inputs: Inputs) -> Run | None:
    """Run torch.nn's module after `torch.ao.quantization.quantize_dynamic`."""
    if case.cell == "RNN":
        return None
    import torch

    def convert(module: Any) -> Any:
        model = torch.nn.Sequential(module)
        with _quietly():
            return torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)[0]

    return run_module(torch.nn, case, inputs, convert)


def onnxruntime_int8(case: Case, inputs: Inputs) -> Run | None:
    """Run onnxruntime's DynamicQuantizeLSTM."""
    if case.cell != "LSTM" or not runs_models(case):
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
    return with_state(case, inputs, lambda feed: run(None, feed))


def openvino_bfloat16(case: Case, inputs: Inputs) -> Run | None:
    """Run OpenVINO with its hint for bfloat16, which it follows where the processor has it."""
    return openvino_of(case, inputs, "bf16")


CONTENDERS = {
    "torch-bfloat16": torch_bfloat16,
    "torch-int8": torch_int8,
    "onnxruntime-int8": onnxruntime_int8,
    "openvino-bfloat16": openvino_bfloat16,
}
INT8_PEERS = ("torch-int8", "onnxruntime-int8")
BFLOAT16_PEERS = ("torch-bfloat16", "openvino-bfloat16")
# The largest error of a case with fewer bits than float32 with which a contender takes part.
LARGEST_ERROR = 3e-2


def peers_of(weights: str, float_peers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the peers that narrow weights compete with: those of as many bits, or more."""
    peers = (*float_peers, *BFLOAT16_PEERS)
    return (*peers, *INT8_PEERS) if weights.startswith("int8") else peers


def largest_error(actual: Results, expected: Results) -> float:
    """Return the largest error of an element of y."""
    return float(np.abs(actual["y"] - expected["y"]).max())
