"""Our kernels inside onnxruntime agree with its own, and with our layers where it has none."""

from __future__ import annotations

import gc
import itertools
import re
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from helpers import assert_close

import fusedrnn as fr
from fusedrnn.convert import from_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
VERSION = tuple(map(int, re.findall(r"\d+", onnxruntime.__version__)[:3]))
if VERSION < (1, 24, 4):
    pytest.skip("onnxruntime 1.24.4 or newer is needed", allow_module_level=True)

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from fusedrnn.onnx import provider  # noqa: E402
from fusedrnn.onnx.provider import add_provider  # noqa: E402

Arrays = dict[str, np.ndarray]
OURS, THEIRS = provider.NAME, "CPUExecutionProvider"
I, H = 5, 17
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
KINDS = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int32": TensorProto.INT32,
}


def weights_of(
    op: str, D: int = 1, peephole: bool = False, seed: int = 0, **sizes: int
) -> Arrays:
    rng, G = np.random.default_rng(seed), GATES[op]
    width, units = sizes.get("I", I), sizes.get("H", H)
    shapes = {"W": (D, G * units, width), "R": (D, G * units, units), "B": (D, 2 * G * units)}
    if peephole:
        shapes["P"] = (D, 3 * units)
    return {k: (rng.normal(size=s) / units**0.5).astype(np.float32) for k, s in shapes.items()}


def node_of(
    op: str, present: set[str], outputs: tuple[str, ...] | None = None, **attributes: Any
) -> Any:
    """Return a recurrent node that reads the inputs named so, with every output it has."""
    places = INPUTS if op == "LSTM" else INPUTS[:6]
    names = [name if name in present else "" for name in places]
    outputs = outputs or ("Y", "Y_h", "Y_c")[: 2 + (op == "LSTM")]
    return helper.make_node(op, names, outputs, name="node", **attributes)


def value(name: str, kind: str = "float32", shape: Any = None) -> Any:
    return helper.make_tensor_value_info(name, KINDS[kind], shape)


def model_of(
    nodes: list[Any],
    inputs: list[Any],
    outputs: list[str],
    constants: Arrays,
    kind: str = "float32",
) -> Any:
    """A model; inputs are names of float32 values, or values."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [value(i) if isinstance(i, str) else i for i in inputs],
        [value(o, kind) for o in outputs],
        [numpy_helper.from_array(a, name) for name, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def layer_model(
    op: str,
    weights: Arrays,
    feed: Arrays,
    constants: Arrays | None = None,
    outputs: tuple[str, ...] | None = None,
    **attributes: Any,
) -> Any:
    """A model of one node whose inputs are those of the feed and the constants."""
    constants = {**weights, **(constants or {})}
    node = node_of(op, {*feed, *constants}, outputs, **attributes)
    inputs = [value(k, str(v.dtype), [None] * v.ndim) for k, v in feed.items()]
    kind = str(weights["W"].dtype)
    return model_of([node], inputs, [o for o in node.output if o], constants, kind)


def session_of(model: Any, precision: Any = "float32") -> Any:
    """A session with our provider, or with onnxruntime's own alone for None."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if precision is not None:
        add_provider(options, precision)
    providers = [THEIRS] if precision is None else None
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers)


def run(model: Any, feed: Arrays, precision: Any = "float32") -> list[np.ndarray]:
    return session_of(model, precision).run(None, feed)


def runs_on(session: Any) -> dict[str, str]:
    """Which provider runs the operators of a session."""
    parts = session.get_provider_graph_assignment_info()
    return {node.op_type: part.ep_name for part in parts for node in part.get_nodes()}


def feed_of(
    op: str, T: int, B: int, D: int = 1, names: Any = (), seed: int = 1, **sizes: int
) -> Arrays:
    """X and the other inputs named so. A row is of full length, and onnxruntime takes no
    empty one.
    """
    rng, units = np.random.default_rng([seed, T, B]), sizes.get("H", H)
    lengths = rng.integers(1, T + 1, B) if T else np.zeros(B, int)
    lengths[:1] = T
    feed = {
        "X": rng.normal(size=(T, B, sizes.get("I", I))).astype(np.float32),
        "sequence_lens": lengths.astype(np.int32),
        "initial_h": rng.normal(size=(D, B, units)).astype(np.float32),
        "initial_c": rng.normal(size=(D, B, units)).astype(np.float32),
    }
    return {k: v for k, v in feed.items() if k == "X" or k in names}


def states_of(op: str) -> list[str]:
    return ["initial_h", "initial_c"][: 1 + (op == "LSTM")]


def by_layer(
    op: str, weights: Arrays, feed: Arrays, precision: str = "float32", **attributes: Any
) -> list[np.ndarray]:
    """Return the results of our layer, as ONNX lays them out."""
    layer = from_onnx(op, **weights, **attributes)
    if precision != "float32":
        layer = layer.quantize(precision)
    D, rows_first = len(weights["W"]), attributes.get("layout", 0)

    def swapped(a: np.ndarray) -> np.ndarray:
        return a.swapaxes(0, 1) if rows_first else a

    state = None
    if "initial_h" in feed:
        states = [np.ascontiguousarray(swapped(feed[name])) for name in states_of(op)]
        state = tuple(states) if op == "LSTM" else states[0]
    y, ends = layer(feed["X"], state, feed.get("sequence_lens"))
    y = y.reshape(*y.shape[:2], D, layer.hidden_size)
    ends = ends if op == "LSTM" else (ends,)
    return [y if rows_first else y.swapaxes(1, 2), *(swapped(e) for e in ends)]


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "peephole": ("LSTM", {}),
    "input_forget": ("LSTM", {"input_forget": 1}),
    "LSTM clip": ("LSTM", {"clip": 0.3}),
    "LSTM activations": ("LSTM", {"activations": ["HardSigmoid", "Relu", "Relu"]}),
    "GRU": ("GRU", {"linear_before_reset": 1}),
    "GRU before": ("GRU", {}),
    "GRU clip": ("GRU", {"clip": 0.3, "linear_before_reset": 1}),
    "RNN": ("RNN", {}),
    "RNN clip": ("RNN", {"clip": 0.3}),
    "RNN activations": ("RNN", {"activations": ["LeakyRelu"], "activation_alpha": [0.2]}),
}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


def attributes_of(name: str, direction: str) -> tuple[str, int, dict[str, Any]]:
    """The operator, the number of directions and the attributes of a variant."""
    op, attributes = VARIANTS[name]
    D = DIRECTIONS[direction]
    more = {k: v * D if isinstance(v, list) else v for k, v in attributes.items()}
    return op, D, {"hidden_size": H, "direction": direction, **more}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", VARIANTS)
def test_agrees_with_onnxruntime(name: str, direction: str) -> None:
    """Every cell and option, with and without states and lengths, as T and B change."""
    op, D, attributes = attributes_of(name, direction)
    weights = weights_of(op, D, name == "peephole")
    for has_states, has_lengths in itertools.product((False, True), repeat=2):
        names = states_of(op) * has_states + ["sequence_lens"] * has_lengths
        model = layer_model(op, weights, feed_of(op, 1, 1, D, names), **attributes)
        ours, theirs = session_of(model), session_of(model, None)
        assert runs_on(ours) == {op: OURS}
        for T, B in ((1, 1), (7, 3), (20, 33), (2, 1)):
            feed = feed_of(op, T, B, D, names)
            what = f"{names}, T = {T}, B = {B}"
            assert_close(ours.run(None, feed), theirs.run(None, feed), "onnxruntime", what)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("precision", ["float32", "float64", "int8", "bfloat16", "float16"])
def test_equals_our_layer(precision: str, op: str, direction: str, layout: int) -> None:
    """Each precision and layout has the bits of the layer, also with rows without a step."""
    D, T, B = DIRECTIONS[direction], 9, 6
    weights = weights_of(op, D)
    names = [*states_of(op), "sequence_lens"]
    feed = feed_of(op, T, B, D, names)
    feed["sequence_lens"][:] = 3, 0, 7, 8, 1, 0
    if precision == "float64":
        weights = {k: v.astype(np.float64) for k, v in weights.items()}
        feed = {k: v.astype(np.float64) if k != "sequence_lens" else v for k, v in feed.items()}
    if layout:
        feed = {k: v if v.ndim == 1 else v.swapaxes(0, 1).copy() for k, v in feed.items()}
    attributes = {"hidden_size": H, "direction": direction, "layout": layout}
    narrow = "float32" if precision == "float64" else precision
    for given in (feed, {"X": feed["X"]}):
        model = layer_model(op, weights, given, **attributes)
        actual = run(model, given, narrow)
        for a, e in zip(
            actual, by_layer(op, weights, given, narrow, **attributes), strict=True
        ):
            np.testing.assert_array_equal(a, e)
            assert a.dtype == e.dtype


@pytest.mark.parametrize("outputs", [("Y",), ("", "Y_h"), ("", "", "Y_c"), ("Y", "", "Y_c")])
@pytest.mark.parametrize("layout", [0, 1])
def test_outputs_may_be_left_out(outputs: tuple[str, ...], layout: int) -> None:
    """A node computes the outputs that it has, whichever they are."""
    weights, feed = weights_of("LSTM", 2), feed_of("LSTM", 4, 3)
    attributes = {"hidden_size": H, "direction": "bidirectional", "layout": layout}
    every = dict(
        zip(("Y", "Y_h", "Y_c"), by_layer("LSTM", weights, feed, **attributes), strict=True)
    )
    actual = run(layer_model("LSTM", weights, feed, outputs=outputs, **attributes), feed)
    for a, name in zip(actual, filter(None, outputs), strict=True):
        np.testing.assert_array_equal(a, every[name])


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("op", GATES)
def test_empty_sequences_and_batches(op: str, layout: int) -> None:
    """Without steps the states stay; a batch may have no row."""
    weights = weights_of(op, 2)
    attributes = {"hidden_size": H, "direction": "bidirectional", "layout": layout}
    for names in ([], [*states_of(op), "sequence_lens"]):
        session = session_of(
            layer_model(op, weights, feed_of(op, 3, 2, 2, names), **attributes)
        )
        for T, B in ((0, 3), (4, 0), (0, 0), (4, 3)):
            feed = feed_of(op, T, B, 2, names)
            if layout:
                feed = {k: v if v.ndim == 1 else v.swapaxes(0, 1) for k, v in feed.items()}
            expected = by_layer(op, weights, feed, **attributes)
            for a, e in zip(session.run(None, feed), expected, strict=True):
                np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("op", GATES)
def test_other_inputs_may_be_constant(op: str) -> None:
    """Exporters write initial states and lengths as constants; X may be one, too."""
    weights, names = weights_of(op), [*states_of(op), "sequence_lens"]
    feed = feed_of(op, 6, 4, 1, names)
    expected = by_layer(op, weights, feed)
    for constant in (["initial_h"], [*names], [*states_of(op), "X"]):
        given = {k: v for k, v in feed.items() if k not in constant}
        model = layer_model(op, weights, given, {k: feed[k] for k in constant}, hidden_size=H)
        session = session_of(model)
        assert runs_on(session) == {op: OURS}
        gc.collect()
        for a, e in zip(session.run(None, given), expected, strict=True):
            np.testing.assert_array_equal(a, e)


def test_values_that_are_used_twice() -> None:
    """A value may be both states of a node, and one weight that of two nodes."""
    weights, feed = weights_of("LSTM", I=H), feed_of("LSTM", 3, 2, names=["initial_h"], I=H)
    names = ["X", "W", "R", "B", "", "initial_h", "initial_h"]
    first = helper.make_node("LSTM", names, ["Y0", "h"], hidden_size=H)
    squeeze = helper.make_node("Squeeze", ["Y0", "axis"], ["X1"])
    names = ["X1", "W", "R", "B", "", "h", "initial_h"]
    second = helper.make_node("LSTM", names, ["Y", "Y_h", "Y_c"], hidden_size=H)
    constants = weights | {"axis": np.array([1])}
    outputs = ["Y", "Y_h", "Y_c"]
    model = model_of([first, squeeze, second], list(feed), outputs, constants)
    assert_close(run(model, feed), run(model, feed, None), "onnxruntime")


# Bodies


@pytest.mark.parametrize("outer", [False, True])
def test_nodes_in_branches(outer: bool) -> None:
    """Nodes within If run on our kernels, with weights of their own or of the outer graph."""
    branches, constants = [], {}
    for seed, suffix in enumerate(("then", "else")):
        weights = {f"{k}_{suffix}": v for k, v in weights_of("LSTM", seed=seed).items()}
        names = ["X", *weights]
        node = helper.make_node("LSTM", names, [f"Y_{suffix}"], hidden_size=H)
        constants |= weights
        own = [] if outer else [numpy_helper.from_array(v, k) for k, v in weights.items()]
        outputs = [value(f"Y_{suffix}", shape=["T", 1, "B", H])]
        branches.append(helper.make_graph([node], suffix, [], outputs, own))
    node = helper.make_node(
        "If", ["which"], ["Y"], then_branch=branches[0], else_branch=branches[1]
    )
    which = helper.make_tensor_value_info("which", TensorProto.BOOL, [])
    inputs = [which, value("X", shape=["T", "B", I])]
    model = model_of([node], inputs, ["Y"], constants if outer else {})
    ours, theirs = session_of(model), session_of(model, None)
    assert runs_on(ours)["LSTM"] == OURS
    for taken in (True, False):
        feed = feed_of("LSTM", 4, 3) | {"which": np.array(taken)}
        assert_close(ours.run(None, feed), theirs.run(None, feed), "onnxruntime")


def test_a_node_in_a_loop() -> None:
    """A node within Loop carries its state from one iteration to the next."""
    weights = weights_of("GRU")
    body = helper.make_graph(
        [
            helper.make_node("GRU", ["X", *weights, "", "h"], ["", "h_out"], hidden_size=H),
            helper.make_node("Identity", ["go_on"], ["go_on_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            value("h", shape=[1, "B", H]),
        ],
        [
            helper.make_tensor_value_info("go_on_out", TensorProto.BOOL, []),
            value("h_out", shape=[1, "B", H]),
        ],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    loop = helper.make_node("Loop", ["count", "", "initial_h"], ["Y_h"], body=body)
    count = helper.make_tensor_value_info("count", TensorProto.INT64, [])
    inputs = [count, value("X", shape=["T", "B", I]), value("initial_h", shape=[1, "B", H])]
    model = model_of([loop], inputs, ["Y_h"], {})
    ours, theirs = session_of(model), session_of(model, None)
    assert runs_on(ours)["GRU"] == OURS
    feed = feed_of("GRU", 4, 3, names=["initial_h"]) | {"count": np.array(5)}
    assert_close(ours.run(None, feed), theirs.run(None, feed), "onnxruntime")


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_threads_change_no_bit(precision: Any, threads: int) -> None:
    """A node that is worth several threads has the bits of the layer on one."""
    weights = weights_of("LSTM", 2, I=40, H=160)
    names = [*states_of("LSTM"), "sequence_lens"]
    feed = feed_of("LSTM", 40, 24, 2, names, I=40, H=160)
    attributes = {"hidden_size": 160, "direction": "bidirectional"}
    actual = run(layer_model("LSTM", weights, feed, **attributes), feed, precision)
    fr.set_num_threads(1)
    expected = by_layer("LSTM", weights, feed, precision, **attributes)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def stacked(op: str = "LSTM") -> Any:
    """A model with other operators between a bidirectional node and another one."""
    first, second = weights_of(op, 2, I=H), weights_of(op, 1, seed=1, I=2 * H)
    rng = np.random.default_rng(2)
    constants = {f"{k}0": v for k, v in first.items()} | {f"{k}1": v for k, v in second.items()}
    constants |= {
        "M": rng.normal(size=(I, H)).astype(np.float32),
        "shape": np.array([0, 0, -1]),
    }
    both = {"hidden_size": H, "direction": "bidirectional"}
    nodes = [
        helper.make_node("MatMul", ["X", "M"], ["X0"]),
        helper.make_node(op, ["X0", "W0", "R0", "B0"], ["Y0"], **both),
        helper.make_node("Transpose", ["Y0"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["t", "shape"], ["X1"]),
        helper.make_node(op, ["X1", "W1", "R1", "B1"], ["Y", "Y_h"], hidden_size=H),
    ]
    return model_of(nodes, [value("X", shape=["T", "B", I])], ["Y", "Y_h"], constants)


@pytest.mark.parametrize("op", GATES)
def test_a_model_of_several_nodes(op: str) -> None:
    """Other operators stay with onnxruntime, as T and B change."""
    model = stacked(op)
    ours, theirs = session_of(model), session_of(model, None)
    assert runs_on(ours) == {"MatMul": THEIRS, "Transpose": THEIRS, "Reshape": THEIRS, op: OURS}
    for T, B in ((3, 2), (30, 9), (1, 1), (3, 2)):
        feed = feed_of(op, T, B)
        expected = theirs.run(None, feed)
        assert_close(ours.run(None, feed), expected, "onnxruntime", factor=3)


@pytest.mark.parametrize("inner", [1, 2])
def test_sessions_in_several_threads(inner: int) -> None:
    """Threads may run one session at once, and sessions of their own."""
    fr.set_num_threads(inner)
    model = stacked()
    shared, plain = session_of(model, "int8"), session_of(model)
    feeds = [feed_of("LSTM", 10 + n, 3, seed=n) for n in range(4)]
    expected = [(shared.run(None, feed), plain.run(None, feed)) for feed in feeds]
    wrong: list[str] = []

    def work(n: int) -> None:
        try:
            own = session_of(model)
            for _ in range(20):
                for session, results in zip((shared, own), expected[n], strict=True):
                    for a, e in zip(session.run(None, feeds[n]), results, strict=True):
                        np.testing.assert_array_equal(a, e)
        except BaseException as error:
            wrong.append(repr(error))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_run_lets_other_threads_of_python_work() -> None:
    """The kernels run without the interpreter's lock: a thread that holds it can go on."""
    weights, feed = weights_of("LSTM", I=I, H=256), feed_of("LSTM", 300, 32)
    session = session_of(layer_model("LSTM", weights, feed, hidden_size=256))
    counts, done = [0], threading.Event()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # no thread gives the lock up unless it waits

    def work() -> None:
        session.run(None, feed)
        done.set()

    worker = threading.Thread(target=work)
    try:
        worker.start()
        while not done.is_set():
            counts[0] += 1
            if counts[0] % 1000 == 0:
                done.wait(1e-4)
    finally:
        sys.setswitchinterval(before)
        worker.join()
    assert counts[0] > 1000


# Life


def test_threads_of_onnxruntime_do_not_spin() -> None:
    """Sessions leave the cores to our threads, whichever precision and how often asked."""
    for precision in ("float32", "int8"):
        options = onnxruntime.SessionOptions()
        add_provider(options, precision)
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert options.has_providers()


def test_sessions_end_in_any_order() -> None:
    """Layers end with their session; the library can be registered again."""
    code = """
import gc, numpy as np, onnxruntime
import test_onnx_provider as t
weights, feed = t.weights_of("LSTM"), t.feed_of("LSTM", 5, 3)
model = t.layer_model("LSTM", weights, feed, hidden_size=t.H)
expected = t.by_layer("LSTM", weights, feed)
sessions = [t.session_of(model) for _ in range(3)]
del sessions[1]
for _ in range(2):
    for session in sessions:
        np.testing.assert_array_equal(session.run(None, feed)[0], expected[0])
    session = sessions = None
    gc.collect()
    onnxruntime.unregister_execution_provider_library("fusedrnn")
    sessions = [t.session_of(model)]
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=__file__[: __file__.rindex("/")],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
