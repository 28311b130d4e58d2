"""Each contender on the CPU as a function without arguments, all from the same inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

import fusedrnn as fr

from . import forms
from .cases import Case

Array = np.ndarray[Any, Any]
Results = dict[str, Array]
Run = Callable[[], Results]


def _host_dtype(name: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    from fusedrnn.bfloat16 import bfloat16  # which another build, see before.py, may lack

    return bfloat16()


@dataclass(frozen=True)
class Inputs:
    """A layer with random parameters, x and the gradient of y as it takes them, and masks."""

    layer: Any
    x: Array
    dy: Array
    masks: dict[str, Any]

    @classmethod
    def of(cls, case: Case, form: str | None = None) -> Inputs:
        """Draw the inputs of a case, in its form or another; equal sizes give equal values."""
        form = case.form if form is None else form
        T, B, I, H = case.sizes
        rng = np.random.default_rng(0)
        dtype = _host_dtype(case.dtype)
        x = rng.normal(size=(T, B, I)).astype(dtype)
        arguments = forms.layer_arguments(form, H)
        width = arguments.get("proj_size", H) * (1 + arguments.get("bidirectional", False))
        dy = rng.normal(size=(T, B, width)).astype(dtype)
        layer = getattr(fr, case.cell)(I, H, rng=rng, dtype=dtype, **arguments)
        if layer.batch_first:
            x, dy = (np.ascontiguousarray(a.swapaxes(0, 1)) for a in (x, dy))
        return cls(layer, x, dy, forms.FORMS[form].call(T, B))

    @classmethod
    def widened(cls, case: Case, inputs: Inputs) -> tuple[Case, Inputs]:
        """Return a case in float32 without narrow weights, and inputs of the same values."""
        wide = replace(case, weights="", dtype="float32")
        of = cls.of(wide)
        of.layer.load_state_dict(inputs.layer.state_dict())
        x, dy = (a.astype(np.float32) for a in (inputs.x, inputs.dy))
        return wide, replace(of, x=x, dy=dy)

    @property
    def parameters(self) -> list[Array]:
        """All parameters; those of a layer and direction in the order of `fusedrnn.lstm`."""
        return list(self.layer.state_dict().values())

    @property
    def lengths(self) -> Array | None:
        """The lengths of the rows, None if all take T steps."""
        return self.masks.get("lengths")


def ours(case: Case, inputs: Inputs) -> Run:
    """Run this package's layer, or its op to train a plain layer, which packs the weights."""
    fr.set_num_threads(case.threads)
    if case.interface == "torch":
        import fusedrnn.torch as ft

        if not case.weights:
            return run_module(ft, case, inputs)
        arguments: Any = case.quantisation
        return run_module(
            ft, case, inputs, lambda module: ft.quantize(module, *arguments).model
        )
    layer, x, masks = inputs.layer, inputs.x, inputs.masks
    if case.weights:
        layer = layer.quantize(*case.quantisation)
    if case.mode == "inference":
        return lambda: {"y": layer(x, **masks)[0]}
    if case.mode == "streaming":
        state = None

        def step() -> Results:
            nonlocal state
            y, state = layer(x, state)
            return {"y": y}

        return step
    if not case.form:
        return _run_op(fr, case, x, inputs.dy, inputs.parameters)
    return _train_layer(inputs)


def plain(case: Case, inputs: Inputs) -> Run:
    """Run this package's layer without the form; the cost of the form is the inverse ratio."""
    fr.set_num_threads(case.threads)
    without = Inputs.of(case, "")
    if case.training:
        return _train_layer(without)
    return lambda: {"y": without.layer(without.x)[0]}


def _train_layer(inputs: Inputs) -> Run:
    """Train by `vjp`, with weights just assigned, as an optimiser leaves them."""
    layer, x, dy, masks = inputs.layer, inputs.x, inputs.dy, dict(inputs.masks)
    R = layer.weight_hh_l0
    if layer.zoneout or layer.recurrent_dropout or layer.weight_dropout:
        masks["seed"] = 1

    def train() -> Results:
        layer.weight_hh_l0 = R
        (y, *_), pullback = layer.vjp(x, **masks)
        grads = pullback(dy)
        return {"y": y, "dx": grads.x, "dR": grads.parameters["weight_hh_l0"]}

    return train


def _run_op(of: Any, case: Case, x: Array, dy: Array, parameters: list[Array]) -> Run:
    vjp = getattr(of, f"{case.cell.lower()}_vjp")

    def run() -> Results:
        (y, *_), pullback = vjp(x, *parameters)
        if not case.training:
            return {"y": y}
        grads = pullback(dy)
        return {"y": y, "dx": grads.x, "dR": grads.weight_hh}

    return run


def reference(case: Case, inputs: Inputs) -> Run:
    """Run the cell's definition in NumPy, one step after the other."""
    if not case.form:
        return _run_op(fr.reference, case, inputs.x, inputs.dy, inputs.parameters)
    return lambda: _define(case, inputs, inputs.x, inputs.dy, inputs.parameters)


def exact(case: Case, inputs: Inputs) -> Results:
    """Return what the results should be: the definition, in float64, of the same inputs."""
    x, dy, *parameters = (
        a.astype(np.float64) for a in (inputs.x, inputs.dy, *inputs.parameters)
    )
    return _define(case, inputs, x, dy, parameters)


def _define(
    case: Case, inputs: Inputs, x: Array, dy: Array, parameters: list[Array]
) -> Results:
    """Compute the layers and directions, each by the definition of its cell."""
    layer = inputs.layer
    vjp = getattr(fr.reference, f"{case.cell.lower()}_vjp")
    order = (1, 0, 2) if layer.batch_first else (0, 1, 2)
    y, dy, pullbacks = x.transpose(order), dy.transpose(order), []
    directions = 1 + layer.bidirectional
    each = len(parameters) // (layer.num_layers * directions)
    for n in range(layer.num_layers):
        passes = []
        for direction in range(directions):
            at = (n * directions + direction) * each
            weights = parameters[at : at + each]
            passes.append(vjp(y, *weights, lengths=inputs.lengths, reverse=direction == 1))
        pullbacks.append([pullback for _, pullback in passes])
        y = np.concatenate([results[0] for results, _ in passes], -1)
    results = {"y": y.transpose(order)}
    if case.training:
        for of_layer in reversed(pullbacks):
            parts = np.split(dy, directions, -1)
            grads = [pull(part) for pull, part in zip(of_layer, parts, strict=True)]
            dy = sum(g.x for g in grads)
        results |= {"dx": dy.transpose(order), "dR": grads[0].weight_hh}
    return results


def torch(case: Case, inputs: Inputs) -> Run:
    """Run torch.nn's module with the same parameters."""
    import torch

    return run_module(torch.nn, case, inputs)


def float32(case: Case, inputs: Inputs) -> Run | None:
    """Run our layer or module in float32, for cases with fewer bits."""
    return ours(*Inputs.widened(case, inputs)) if case.is_rounded else None


def torch_float32(case: Case, inputs: Inputs) -> Run | None:
    """Run torch.nn's module in float32, for cases of bfloat16."""
    if case.dtype != "bfloat16":
        return None
    return torch(*Inputs.widened(case, inputs))


def compiled(case: Case, inputs: Inputs) -> Run | None:
    """Run the module of `fusedrnn.torch` through torch.compile."""
    import torch

    import fusedrnn.torch

    if case.interface != "torch":
        return None
    torch._dynamo.reset()
    return run_module(fusedrnn.torch, case, inputs, torch.compile)


def run_module(
    library: Any,
    case: Case,
    inputs: Inputs,
    wrap: Callable[[Any], Any] = lambda module: module,
    dtype: str | None = None,
) -> Run:
    """Run a module of `library`, torch.nn or fusedrnn.torch, through autograd in training.

    `wrap` changes the module. `dtype` is that of x, if it is not the case's.
    """
    import torch

    torch.set_num_threads(case.threads)
    _, B, I, H = case.sizes
    kind: dict[str, Any] = {"dtype": getattr(torch, case.dtype)}

    def tensor(a: Array) -> Any:
        if a.dtype.name == "bfloat16":
            return torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(a.copy())

    weights = {k: tensor(v) for k, v in inputs.layer.state_dict().items()}
    x, dy = tensor(inputs.x), tensor(inputs.dy)
    is_cell = case.form == "cell"
    if is_cell:
        weights = {k.removesuffix("_l0"): v for k, v in weights.items()}
        x, dy, state = x[0], dy[0], torch.zeros(B, H, dtype=getattr(torch, dtype or case.dtype))
        module = getattr(library, f"{case.cell}Cell")(I, H, **kind)
        start: Any = (state, state) if case.cell == "LSTM" else state
    else:
        arguments = forms.layer_arguments(case.form, H)
        module, start = getattr(library, case.cell)(I, H, **arguments, **kind), None
    module.load_state_dict(weights)
    call = wrap(module)
    x = x if dtype is None else x.to(getattr(torch, dtype))
    lengths = None if inputs.lengths is None else torch.from_numpy(inputs.lengths)
    leaves = [x, *module.parameters()]
    R = module.weight_hh if is_cell else module.weight_hh_l0

    def run(state: Any) -> Any:
        """Return y and the state after."""
        if is_cell:
            state = call(x, state)
            return (state[0] if case.cell == "LSTM" else state), state
        if lengths is None:
            return call(x, state)
        if library is not torch.nn:
            return call(x, lengths=lengths)
        utils = torch.nn.utils.rnn
        packed = utils.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, state = call(packed)
        return utils.pad_packed_sequence(y, total_length=len(x))[0], state

    def array(a: Any) -> Array:
        values: Array = (a.float() if a.dtype == torch.bfloat16 else a).numpy()
        return values

    def results(y: Any) -> Results:
        values = array(y.detach())
        return {"y": values[None] if is_cell else values}

    if not case.training:
        carries = case.mode == "streaming"

        def infer() -> Results:
            nonlocal start
            with torch.inference_mode():
                y, state = run(start)
            if carries:
                start = state
            return results(y)

        return infer
    x.requires_grad_()

    def train() -> Results:
        for leaf in leaves:
            leaf.grad = None
        y, _ = run(start)
        y.backward(dy)
        dx = array(x.grad)
        return results(y) | {"dx": dx[None] if is_cell else dx, "dR": array(R.grad)}

    return train


# ONNX orders the gates i o f c and z r h; the numbers are the positions of ours.
ONNX_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def onnx_model(case: Case, inputs: Inputs) -> bytes:
    """Return a model of the layers; x and y are (T, B, ·), and all states go in and out."""
    import onnx

    T, B, I, H = case.sizes
    layer, weights = inputs.layer, inputs.layer.state_dict()
    order, D = ONNX_ORDER[case.cell], 1 + inputs.layer.bidirectional
    states = ("h", "c") if case.cell == "LSTM" else ("h",)
    options: dict[str, Any] = {"hidden_size": H}
    if layer.bidirectional:
        options["direction"] = "bidirectional"
    if case.cell == "GRU":
        options["linear_before_reset"] = 1
    constants: dict[str, Array] = {"shape": np.array([T, B, D * H])}
    if inputs.lengths is not None:
        constants["lengths"] = inputs.lengths.astype(np.int32)
    make_node, nodes, read = onnx.helper.make_node, [], "X"
    for n in range(layer.num_layers):

        def gates(name: str, n: int = n) -> list[Array]:
            """Return a parameter of each direction with its gates in ONNX's order."""
            blocks_of = []
            for suffix in ("", "_reverse")[:D]:
                blocks = np.split(weights[f"{name}_l{n}{suffix}"], len(order))
                blocks_of.append(np.concatenate([blocks[i] for i in order]))
            return blocks_of

        biases = zip(gates("bias_ih"), gates("bias_hh"), strict=True)
        constants |= {
            f"W{n}": np.stack(gates("weight_ih")),
            f"R{n}": np.stack(gates("weight_hh")),
            f"B{n}": np.stack([np.concatenate(pair) for pair in biases]),
        }
        ends = [f"{s}_n{n}" for s in states]
        reads = [read, f"W{n}", f"R{n}", f"B{n}"]
        reads += ["lengths" if "lengths" in constants else "", *(f"{s}0{n}" for s in states)]
        nodes.append(make_node(case.cell, reads, [f"Y{n}", *ends], **options))
        read = f"Y{n}"  # (T, D, B, H)
        if D > 1:
            nodes.append(make_node("Transpose", [read], [f"P{n}"], perm=[0, 2, 1, 3]))
            read = f"P{n}"
        nodes.append(make_node("Reshape", [read, "shape"], [f"L{n}"]))  # without a copy
        read = f"L{n}"

    def value(name: str, shape: list[int]) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = onnx.helper.make_graph(
        nodes,
        "layers",
        [
            value("X", [T, B, I]),
            *(value(name, [D, B, H]) for name in _states(case, layer, "0")),
        ],
        [
            value(read, [T, B, D * H]),
            *(value(name, [D, B, H]) for name in _states(case, layer, "_n")),
        ],
        [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opset = onnx.helper.make_opsetid("", 14)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def _states(case: Case, layer: Any, suffix: str) -> list[str]:
    letters = "hc" if case.cell == "LSTM" else "h"
    return [f"{letter}{suffix}{n}" for n in range(layer.num_layers) for letter in letters]


def with_state(
    case: Case, inputs: Inputs, run: Callable[[dict[str, Any]], Sequence[Array]]
) -> Run:
    """Return a call of the model; run(feed) returns y and the final states."""
    _, B, _, H = case.sizes
    names = _states(case, inputs.layer, "0")
    zeros = np.zeros((1 + inputs.layer.bidirectional, B, H), np.float32)
    feed = {"X": inputs.x} | dict.fromkeys(names, zeros)

    def call() -> Results:
        y, *state = run(feed)
        if case.mode == "streaming":
            feed.update(zip(names, state, strict=True))
        return {"y": y}

    return call


def runs_models(case: Case) -> bool:
    """Whether ONNX has such a model: inference in float32, x as (T, B, I)."""
    has_form = case.form in ("", "two-layers", "both-directions", "lengths")
    return (
        case.dtype == "float32" and not case.training and has_form and case.interface == "numpy"
    )


def onnxruntime(case: Case, inputs: Inputs) -> Run | None:
    """Inference in float32 alone."""
    if not runs_models(case):
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
    """Inference alone, and in float32, not the bfloat16 that it prefers where there is one."""
    return openvino_of(case, inputs, "f32")


@cache
def openvino_core() -> Any:
    """Return the one core of this process.

    Each sets a stack for signals. Two that are freed in the order in which they were made leave
    a freed one set, and the next signal that has a handler ends the process.
    """
    import openvino as ov

    return ov.Core()


def openvino_of(case: Case, inputs: Inputs, precision: str) -> Run | None:
    """Run OpenVINO with a hint for the precision."""
    if not runs_models(case):
        return None
    core = openvino_core()
    model = core.compile_model(
        core.read_model(onnx_model(case, inputs)),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": case.threads,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = model.create_infer_request()

    def run(feed: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        return list(request.infer(feed, share_inputs=True).values())

    return with_state(case, inputs, run)


# "reference", "compiled", "plain" and "float32" are yardsticks and not peers.
CONTENDERS: dict[str, Callable[[Case, Inputs], Run | None]] = {
    "ours": ours,
    "torch": torch,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "reference": reference,
    "compiled": compiled,
    "plain": plain,
    "float32": float32,
    "torch-float32": torch_float32,
}
# The packages that a contender needs.
NEEDS = {
    "torch": ("torch",),
    "torch-float32": ("torch",),
    "torch-bfloat16": ("torch",),
    "torch-int8": ("torch",),
    "onnxruntime-int8": ("onnxruntime", "onnx"),
    "openvino-bfloat16": ("openvino", "onnx"),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "compiled": ("torch",),
}
PEERS = ("torch", "onnxruntime", "openvino")


def missing(name: str) -> list[str]:
    """Return the packages that a contender needs and that are not installed."""
    return [need for need in NEEDS.get(name, ()) if not importlib.util.find_spec(need)]
