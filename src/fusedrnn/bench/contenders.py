"""Each contender on the CPU as a function without arguments, all from the same inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fusedrnn as fr

from .cases import Case

Results = dict[str, np.ndarray[Any, Any]]
Run = Callable[[], Results]


@dataclass(frozen=True)
class Inputs:
    """A layer with random parameters, x, and the gradient of y."""

    layer: Any
    x: np.ndarray[Any, Any]
    dy: np.ndarray[Any, Any]

    @classmethod
    def of(cls, case: Case) -> Inputs:
        """Draw them, the same for the same sizes."""
        T, B, I, H = case.sizes
        rng = np.random.default_rng(0)
        x = rng.normal(size=(T, B, I)).astype(case.dtype)
        dy = rng.normal(size=(T, B, H)).astype(case.dtype)
        return cls(getattr(fr, case.cell)(I, H, rng=rng, dtype=case.dtype), x, dy)

    @property
    def parameters(self) -> list[np.ndarray[Any, Any]]:
        """In the order of `fusedrnn.lstm`."""
        return list(self.layer.state_dict().values())


def ours(case: Case, inputs: Inputs) -> Run:
    """Run this package's layer, or in training its op, which packs weights anew."""
    fr.set_num_threads(case.threads)
    if case.mode == "inference":
        return lambda: {"y": inputs.layer(inputs.x)[0]}
    if case.mode == "streaming":
        state = None

        def step() -> Results:
            nonlocal state
            y, state = inputs.layer(inputs.x, state)
            return {"y": y}

        return step
    return _vjp(fr, case, inputs.x, inputs.dy, inputs.parameters)


def reference(case: Case, inputs: Inputs) -> Run:
    """Run the cell's definition in NumPy, one step after the other."""
    return _vjp(fr.reference, case, inputs.x, inputs.dy, inputs.parameters)


def exact(case: Case, inputs: Inputs) -> Results:
    """Return what the results should be: the definition, in float64, of the same inputs."""
    x, dy, *parameters = (
        a.astype(np.float64) for a in (inputs.x, inputs.dy, *inputs.parameters)
    )
    return _vjp(fr.reference, case, x, dy, parameters)()


def _vjp(of: Any, case: Case, x: Any, dy: Any, parameters: list[Any]) -> Run:
    vjp = getattr(of, f"{case.cell.lower()}_vjp")

    def run() -> Results:
        (y, *_), pullback = vjp(x, *parameters)
        if not case.training:
            return {"y": y}
        grads = pullback(dy)
        return {"y": y, "dx": grads.x, "dR": grads.weight_hh}

    return run


def torch(case: Case, inputs: Inputs) -> Run:
    """Run torch.nn's module with the same parameters."""
    import torch

    torch.set_num_threads(case.threads)
    _, _, I, H = case.sizes
    module = getattr(torch.nn, case.cell)(I, H, dtype=getattr(torch, case.dtype))
    state = inputs.layer.state_dict()
    module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})
    x = torch.from_numpy(inputs.x.copy())
    dy = torch.from_numpy(inputs.dy.copy())
    if case.mode == "inference":

        def infer() -> Results:
            with torch.inference_mode():
                return {"y": module(x)[0].numpy()}

        return infer
    if case.mode == "streaming":
        state = None

        def step() -> Results:
            nonlocal state
            with torch.inference_mode():
                y, state = module(x, state)
            return {"y": y.numpy()}

        return step
    x.requires_grad_()

    def train() -> Results:
        module.zero_grad()
        x.grad = None
        y = module(x)[0]
        y.backward(dy)
        dx: Any = x.grad
        return {
            "y": y.detach().numpy(),
            "dx": dx.numpy(),
            "dR": module.weight_hh_l0.grad.numpy(),
        }

    return train


# Which of our blocks of gates stands where in ONNX: i o f c and z r h.
ONNX_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def onnx_model(case: Case, inputs: Inputs) -> bytes:
    """The layer as a model, its state in and out."""
    import onnx

    T, B, I, H = case.sizes
    order = ONNX_ORDER[case.cell]

    def gates(name: str) -> np.ndarray[Any, Any]:
        blocks = np.split(inputs.layer.state_dict()[f"{name}_l0"], len(order))
        return np.concatenate([blocks[i] for i in order])

    constants = {
        "W": gates("weight_ih")[None],
        "R": gates("weight_hh")[None],
        "B": np.concatenate([gates("bias_ih"), gates("bias_hh")])[None],
    }
    states = ("h", "c") if case.cell == "LSTM" else ("h",)
    options: dict[str, Any] = {"hidden_size": H}
    if case.cell == "GRU":
        options["linear_before_reset"] = 1
    node = onnx.helper.make_node(
        case.cell,
        ["X", "W", "R", "B", "", *(f"{s}0" for s in states)],
        ["Y", *(f"{s}_n" for s in states)],
        **options,
    )

    def value(name: str, shape: list[int]) -> Any:
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


def _with_state(
    case: Case, inputs: Inputs, run: Callable[[dict[str, Any]], list[np.ndarray[Any, Any]]]
) -> Run:
    """Feed a model of ours, which run(feed) takes through one call: Y and the final state."""
    names = ("h0", "c0") if case.cell == "LSTM" else ("h0",)
    _, B, _, H = case.sizes
    feed = {"X": inputs.x} | {name: np.zeros((1, B, H), np.float32) for name in names}

    def call() -> Results:
        y, *state = run(feed)
        if case.mode == "streaming":
            feed.update(zip(names, state, strict=True))
        return {"y": y[:, 0]}

    return call


def _runs_models(case: Case) -> bool:
    return case.dtype == "float32" and not case.training


def onnxruntime(case: Case, inputs: Inputs) -> Run | None:
    """Inference in float32 alone."""
    if not _runs_models(case):
        return None
    import onnxruntime as ort

    session = ort.SessionOptions()
    session.intra_op_num_threads = case.threads
    session.inter_op_num_threads = 1
    run = ort.InferenceSession(
        onnx_model(case, inputs), session, providers=["CPUExecutionProvider"]
    ).run
    return _with_state(case, inputs, lambda feed: run(None, feed))


def openvino(case: Case, inputs: Inputs) -> Run | None:
    """Inference alone, and in float32, not the bfloat16 that it prefers where there is one."""
    if not _runs_models(case):
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

    def run(feed: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        return list(request.infer(feed, share_inputs=True).values())

    return _with_state(case, inputs, run)


# Ours first; the reference is a yardstick, not a peer.
CONTENDERS: dict[str, Callable[[Case, Inputs], Run | None]] = {
    "ours": ours,
    "torch": torch,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "reference": reference,
}
# What each needs to be installed.
NEEDS = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
}
PEERS = tuple(NEEDS)


def missing(name: str) -> list[str]:
    """Return the packages that a contender needs and that are not installed."""
    return [need for need in NEEDS.get(name, ()) if not importlib.util.find_spec(need)]
