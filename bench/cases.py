"""The named cases, and each contender as a function without arguments.

A case is a cell, a shape and a mode. Inference runs a layer whose weights stay packed, as in
service; training runs forward and backward with weights that were just changed, so packing
is part of it. Streaming runs a layer step by step, each call given the state that the last
one returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fusedrnn as fr

SHAPES = {  # T, B, I, H
    "one-step": (1, 1, 512, 512),
    "stream-small": (100, 1, 64, 128),
    "stream": (100, 1, 256, 256),
    "stream-large": (50, 1, 1024, 1024),
    "few-rows": (100, 8, 128, 256),
    "speech": (100, 32, 128, 256),
    "large": (50, 64, 512, 512),
    "larger": (25, 128, 1024, 1024),
    "narrow": (24, 256, 8, 32),
    "weather": (96, 64, 7, 64),
    "long": (200, 16, 40, 128),
    "stream-middle": (50, 1, 512, 512),
    "odd": (60, 7, 9, 100),
    "three-rows": (100, 3, 64, 200),
    "one-feature": (1000, 1, 1, 64),
    "hundred": (100, 1, 100, 100),
    "digits": (28, 64, 28, 128),
}
# Those whose figures of other machines and peers are known.
USUAL = tuple(SHAPES)[:11]
STREAMING_SHAPES = {f"H{H}": (1, 1, H, H) for H in (64, 128, 256, 512)}
CELLS = ("LSTM", "GRU")
MODES = ("inference", "training", "streaming")


@dataclass(frozen=True)
class Case:
    cell: str
    shape: str
    mode: str
    threads: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return (STREAMING_SHAPES if self.mode == "streaming" else SHAPES)[self.shape]

    @property
    def gates(self) -> int:
        return 4 if self.cell == "LSTM" else 3

    @property
    def flops(self) -> int:
        """2·G·H·(I+H)·B·T forward, three times that in training."""
        T, B, I, H = self.sizes
        return 2 * self.gates * H * (I + H) * B * T * (3 if self.mode == "training" else 1)

    def __str__(self) -> str:
        return f"{self.cell}-{self.shape}-{self.mode}-{self.threads}"


CASES = [
    Case(cell, shape, mode, threads)
    for threads in (1, 2)
    for cell in CELLS
    for mode in MODES
    for shape in (STREAMING_SHAPES if mode == "streaming" else SHAPES)
]

Run = Callable[[], dict[str, np.ndarray]]


def seconds_of(run: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


@dataclass(frozen=True)
class Inputs:
    layer: Any
    x: np.ndarray
    dy: np.ndarray

    @classmethod
    def of(cls, case: Case) -> Inputs:
        T, B, I, H = case.sizes
        rng = np.random.default_rng(0)
        x = rng.normal(size=(T, B, I)).astype(np.float32)
        dy = rng.normal(size=(T, B, H)).astype(np.float32)
        return cls(getattr(fr, case.cell)(I, H, rng=rng), x, dy)


def ours(case: Case, inputs: Inputs) -> Run:
    fr.set_num_threads(case.threads)
    if case.mode == "inference":
        return lambda: {"y": inputs.layer(inputs.x)[0]}
    if case.mode == "streaming":
        state = None

        def step() -> dict[str, np.ndarray]:
            nonlocal state
            y, state = inputs.layer(inputs.x, state)
            return {"y": y}

        return step
    parameters = list(inputs.layer.state_dict().values())
    vjp = getattr(fr, f"{case.cell.lower()}_vjp")

    def train() -> dict[str, np.ndarray]:
        (y, *_), pullback = vjp(inputs.x, *parameters)
        grads = pullback(inputs.dy)
        return {"y": y, "dx": grads.x, "dR": grads.weight_hh}

    return train


def reference(case: Case, inputs: Inputs) -> Run:
    parameters = list(inputs.layer.state_dict().values())
    vjp = getattr(fr.reference, f"{case.cell.lower()}_vjp")

    def run() -> dict[str, np.ndarray]:
        (y, *_), pullback = vjp(inputs.x, *parameters)
        if case.mode != "training":
            return {"y": y}
        grads = pullback(inputs.dy)
        return {"y": y, "dx": grads.x, "dR": grads.weight_hh}

    return run


def torch(case: Case, inputs: Inputs) -> Run:
    import torch

    torch.set_num_threads(case.threads)
    _, _, I, H = case.sizes
    module = getattr(torch.nn, case.cell)(I, H)
    state = inputs.layer.state_dict()
    module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})
    x = torch.from_numpy(inputs.x.copy())
    dy = torch.from_numpy(inputs.dy.copy())
    if case.mode == "inference":

        def infer() -> dict[str, np.ndarray]:
            with torch.inference_mode():
                return {"y": module(x)[0].numpy()}

        return infer
    if case.mode == "streaming":
        state = None

        def step() -> dict[str, np.ndarray]:
            nonlocal state
            with torch.inference_mode():
                y, state = module(x, state)
            return {"y": y.numpy()}

        return step
    x.requires_grad_()

    def train() -> dict[str, np.ndarray]:
        module.zero_grad()
        x.grad = None
        y = module(x)[0]
        y.backward(dy)
        return {
            "y": y.detach().numpy(),
            "dx": x.grad.numpy(),
            "dR": module.weight_hh_l0.grad.numpy(),
        }

    return train


def onnx_model(case: Case, inputs: Inputs) -> bytes:
    """The layer as a model, its state in and out; its gates are i o f c and z r h."""
    import onnx

    T, B, I, H = case.sizes
    order = (0, 3, 1, 2) if case.cell == "LSTM" else (1, 0, 2)

    def gates(name: str) -> np.ndarray:
        blocks = np.split(inputs.layer.state_dict()[f"{name}_l0"], len(order))
        return np.concatenate([blocks[i] for i in order])

    constants = {
        "W": gates("weight_ih")[None],
        "R": gates("weight_hh")[None],
        "B": np.concatenate([gates("bias_ih"), gates("bias_hh")])[None],
    }
    states = ("h", "c") if case.cell == "LSTM" else ("h",)
    options = {"hidden_size": H} | ({"linear_before_reset": 1} if case.cell == "GRU" else {})
    node = onnx.helper.make_node(
        case.cell,
        ["X", "W", "R", "B", "", *(f"{s}0" for s in states)],
        ["Y", *(f"{s}_n" for s in states)],
        **options,
    )

    def value(name: str, shape: list[int]) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [value("X", [T, B, I]), *(value(f"{s}0", [1, B, H]) for s in states)],
        [value("Y", [T, 1, B, H]), *(value(f"{s}_n", [1, B, H]) for s in states)],
        [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opset = onnx.helper.make_opsetid("", 14)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def with_state(case: Case, inputs: Inputs, run: Callable[[dict], list[np.ndarray]]) -> Run:
    """Feed a model of ours, which run(feed) takes through one call: Y and the final state."""
    names = ("h0", "c0") if case.cell == "LSTM" else ("h0",)
    _, B, _, H = case.sizes
    feed = {"X": inputs.x} | {name: np.zeros((1, B, H), np.float32) for name in names}

    def call() -> dict[str, np.ndarray]:
        y, *state = run(feed)
        if case.mode == "streaming":
            feed.update(zip(names, state, strict=True))
        return {"y": y[:, 0]}

    return call


def onnxruntime(case: Case, inputs: Inputs) -> Run | None:
    """Inference only."""
    if case.mode == "training":
        return None
    import onnxruntime as ort

    session = ort.SessionOptions()
    session.intra_op_num_threads = case.threads
    session.inter_op_num_threads = 1
    run = ort.InferenceSession(
        onnx_model(case, inputs), session, providers=["CPUExecutionProvider"]
    ).run
    return with_state(case, inputs, lambda feed: run(None, feed))


def openvino(case: Case, inputs: Inputs) -> Run | None:
    """Inference only, and in float32, not the bfloat16 that it prefers where there is one."""
    if case.mode == "training":
        return None
    import openvino as ov

    core = ov.Core()
    model = core.compile_model(
        core.read_model(onnx_model(case, inputs)),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": case.threads,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = model.create_infer_request()

    def run(feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(request.infer(feed, share_inputs=True).values())

    return with_state(case, inputs, run)


# Ours first; the reference is a yardstick, not a peer.
CONTENDERS: dict[str, Callable[[Case, Inputs], Run | None]] = {
    "ours": ours,
    "torch": torch,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "reference": reference,
}
