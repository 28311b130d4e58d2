"""Random calls with a wrong argument, which a sentence has to refuse by its name."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from fuzz_calls import Draw, OpCall, assert_same
from fuzz_layers import LayerCall, NarrowCall
from helpers import op

import fusedrnn as fr

NAN, INF = float("nan"), float("inf")
NAMES = np.array(["a", "b"])
STRANGE = ["a", b"a", 1.5, 1j, [], {}, object(), np.array("a"), NAMES, len]
WORDS: list[Any] = [
    "x",
    "",
    None,
    5,
    b"last",
    b"int8",
    [],
    {},
    len,
]  # where some words are known
FLAGS = [1, 0.0, None, *STRANGE]
SIZES = [0, -1, 2**31 + 1, 2**100, True, None, NAN, np.ones(2, int), *STRANGE]
PROBABILITIES = [1, 1.5, -0.1, NAN, INF, -INF, 10**400, True, None, *STRANGE]
BOUNDS = [0, -1, NAN, -INF, 10**400, True, "a", 1j, [], {}, object(), len]
ACTIVATIONS: list[Any] = ["nope", 5, ("tanh", 1, 2, 3), (), [], ("elu", NAN), ("elu", "x")]
ACTIVATIONS += [("elu", -1), ("tanh", 0), ("elu", 1e300), (("tanh",),), None, b"tanh", len]
SEEDS = [-1, 2**64, True, NAN, np.ones(2, int), *STRANGE]
# Values that an argument of a call, or of a layer, must refuse.
OF_CALLS: dict[str, list[Any]] = {
    "training": FLAGS,
    "seed": SEEDS,
    "bptt": [0, -1, 2**40, True, NAN, *STRANGE],
    "recompute": FLAGS,
    "trace": FLAGS,
    "masked_output": WORDS,
}
OF_OPTIONS: dict[str, list[Any]] = {
    "clip": BOUNDS,
    "zoneout": [(0.1, 0.2, 0.3), (0.1, "b"), (), {}, *PROBABILITIES],
    "recurrent_dropout": PROBABILITIES,
    "weight_dropout": PROBABILITIES,
    "activation": ACTIVATIONS,
}
OF_LSTMS = {"cell_clip": BOUNDS, "return_cells": FLAGS}
OF_GATES = {"recurrent_activation": ACTIVATIONS}
OF_OPS = {"reverse": FLAGS, "precision": ["tf32", *WORDS]}


def refuse(
    draw: Draw,
    names: Iterable[str],
    function: Callable[..., Any],
    *args: Any,
    errors: tuple[type[Exception], ...] = (TypeError, ValueError),
    **kwargs: Any,
) -> None:
    """The call raises an error whose text names one of these arguments."""
    draw.refused += 1
    try:
        function(*args, **kwargs)
    except errors as raised:
        error = raised
    else:
        raise AssertionError(f"{', '.join(names)} was not refused")
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    found = any(re.search(rf"\b{re.escape(name)}\b", text) for name in names)
    assert found, f"none of {', '.join(names)} in: {type(error).__name__}: {text}"
    assert len(text) < 600, f"not a sentence: {text}"


# What is wrong with an array


def wrong_dtypes(draw: Draw, a: np.ndarray) -> Any:
    """The array in a dtype that no call has beside its own."""
    names = ["float16", "int32", "uint8", "bool", "complex64", "object", "U5", "V8"]
    name = draw.choice([*names, "datetime64[s]", "longdouble", "swapped"])
    if name == "swapped":
        return a.astype(a.dtype.newbyteorder()) if a.dtype.kind == "f" else a.astype("int64")
    if name in ("V8", "datetime64[s]"):
        return np.zeros(a.shape, name)
    return np.asarray(a, np.float64).astype(name)


def wrong_shape(draw: Draw, a: np.ndarray, axes: Iterable[int]) -> Any:
    """One of these axes longer or shorter, or an axis more."""
    axis = draw.choice([*axes])
    kind = draw.randrange(4)
    if kind == 0:
        return a[None, None]
    if kind == 1 and a.shape[axis] > 0:
        return a.take(range(a.shape[axis] - 1), axis)
    return np.concatenate(
        [a, np.zeros_like(a, shape=[*a.shape[:axis], 1 + (kind == 3), *a.shape[axis + 1 :]])],
        axis,
    )


def no_array(draw: Draw) -> Any:
    """Draw an object that is not an array of numbers."""
    masked = np.ma.masked_array(np.ones((2, 2), "float32"), [[0, 1], [0, 0]])
    return draw.choice(
        [*STRANGE[:2], *STRANGE[5:], [[1.0], [2.0, 3.0]], [None], masked, {1, 2}]
    )


def wrong_array(draw: Draw, a: Any, axes: Iterable[int] | None = None) -> Any:
    kind = draw.randrange(3)
    if kind == 0:
        return no_array(draw)
    if kind == 1:
        return wrong_dtypes(draw, a)
    return wrong_shape(draw, a, range(a.ndim) if axes is None else axes)


def wrong_masks(draw: Draw, T: int, shape: tuple[int, ...]) -> tuple[str, Any]:
    """Lengths, resets or a mask that do not fit x, whose shape without features is `shape`."""
    name = draw.choice(["lengths", "resets", "mask"])
    batch = draw.arrays.integers(0, T + 1, shape[1:])
    if name == "lengths":
        values = [batch + T + 1, batch - T - 1, batch.astype(float), batch.astype(bool), ["a"]]
        values += [
            batch[None],
            np.full(shape[1:], 2**64 - 1, np.uint64),
            [2**70],
            [[1], [2, 3]],
        ]
        return name, draw.choice([*values, *STRANGE])
    flags = np.ones(shape)
    values = [flags * 2, flags * NAN, flags - 2, flags.astype(object), flags.astype("U3")]
    values += [flags[None], flags[..., None], flags * 1j, [[True], []], 2, *STRANGE]
    return name, draw.choice(values)


# Ops


class WrongOp:
    """An op, each of whose arguments is spoilt in turn."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.right = right = OpCall(draw)
        fr.set_num_threads(1)
        right.expected(right.inputs)
        right.results, right.gradients = right.vjp()
        self.is_lstm = "c" in right.cell.states

    def check(self) -> None:
        right = self.right
        arrays = [*right.inputs.values(), *right.weights.values()]
        before = [a if a is None else a.tobytes() for a in arrays]
        for _ in range(20):
            self.draw.choice(self.WAYS)(self)
        after = [a if a is None else a.tobytes() for a in arrays]
        assert before == after, "an argument changed"
        assert_same(right.call(), right.results, "results after errors")

    def refused(self, names: Iterable[str], vjp: bool | None = None, **wrong: Any) -> None:
        vjp = self.draw.chance(0.5) if vjp is None else vjp
        asked = self.right.asked if vjp else self.right.plain
        given = self.right.inputs | asked | wrong
        refuse(self.draw, names, op(self.right.cell, "_vjp" * vjp), **given)

    def with_array(self) -> None:
        inputs = self.right.inputs
        name = self.draw.choice([n for n, a in inputs.items() if a is not None])
        self.refused(
            inputs, **{name: wrong_array(self.draw, inputs[name], [2] * (name == "x") or None)}
        )

    def without_array(self) -> None:
        name = self.draw.choice(["x", "weight_ih", "weight_hh"])
        self.refused([name], **{name: None})

    def with_masks(self) -> None:
        T, B = self.right.sizes[:2]
        if T and B:
            name, value = wrong_masks(self.draw, T, (T, B))
            self.refused([name], **{name: value})

    def with_option(self) -> None:
        kinds = OF_CALLS | OF_OPTIONS | OF_OPS
        kinds |= OF_LSTMS if self.is_lstm else {}
        kinds |= OF_GATES if len(self.right.cell.gates) > 1 else {}
        name = self.draw.choice(list(kinds))
        value = self.draw.choice(kinds[name])
        self.refused([name], vjp=name in ("bptt", "recompute") or None, **{name: value})

    def with_unknown(self) -> None:
        name = self.draw.choice(
            ["foo", "xs", "h1", "batch_first", *["cell_clip"] * (not self.is_lstm)]
        )
        self.refused([name], **{name: None})

    def with_out(self) -> None:
        y, x = self.right.results["y"], self.right.inputs["x"]
        if not y.size:
            return
        outs = [
            wrong_array(self.draw, y),
            np.zeros_like(y)[None],
            np.broadcast_to(y[:1, :1, :1], y.shape),
        ]
        outs += [x] if x.shape == y.shape else []
        outs += [np.repeat(y, 2, -1)[..., ::2]] if y.shape[-1] > 1 else []
        self.refused(["out"], vjp=False, out=self.draw.choice(outs))

    def with_gradient(self) -> None:
        right, draw = self.right, self.draw
        _, pullback = draw.call(op(right.cell, "_vjp"), **right.inputs, **right.asked)
        name = draw.choice(list(right.weights))
        wrong = {name: wrong_array(draw, right.weights[name])}
        if draw.chance(0.1) and not self.is_lstm:
            name, wrong = "dc_n", {"dc_n": right.weights["dh_n"]}
        refuse(draw, [name], pullback, **right.weights | wrong)

    def with_weights(self) -> None:
        """Weights of wrong arrays, or beside other weights."""
        right, draw = self.right, self.draw
        kept = {k: v for k, v in right.inputs.items() if k not in ("x", "h0", "c0")}
        states = {k: v for k, v in right.inputs.items() if k not in kept}
        weights = fr.Weights(**kept)
        kind = draw.randrange(3)
        if kind == 0:
            name = draw.choice(list(kept)[1:2])
            given = states | right.plain | {"weight_ih": weights, name: kept[name]}
            refuse(draw, [name], op(right.cell), **given)
        elif kind == 1:
            bad = draw.choice([w for w in WORDS if w is not None])
            refuse(draw, ["weights"], fr.Weights, **kept, weights=bad)
        else:
            name = draw.choice([n for n, a in kept.items() if a is not None])
            refuse(draw, [name], fr.Weights, **kept | {name: wrong_dtypes(draw, kept[name])})

    WAYS: tuple[Any, ...] = (with_array,) * 3 + (with_option,) * 3
    WAYS += (without_array, with_masks, with_unknown, with_out, with_gradient, with_weights)


# Layers and streams


class WrongLayer:
    """A layer, its calls, its methods and a stream, each with an argument that is wrong."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.right = right = draw.choice([LayerCall, LayerCall, NarrowCall])(draw)
        self.layer, self.is_narrow = right.layer, isinstance(right, NarrowCall)
        fr.set_num_threads(1)
        right.results = right.call()
        self.is_lstm = "c" in right.cell.states

    def check(self) -> None:
        state_dict = {k: v.tobytes() for k, v in self.layer.state_dict().items()}
        shown = repr(self.layer)
        for _ in range(20):
            self.draw.choice(self.WAYS)(self)
        now = {k: v.tobytes() for k, v in self.layer.state_dict().items()}
        assert (now, repr(self.layer)) == (state_dict, shown), "the layer changed"
        self.right.again()

    def refused(self, names: Iterable[str], call: Any = None, **wrong: Any) -> None:
        right = self.right
        given = {"x": right.user(right.x), "state": right.user_state(right.state)}
        given |= right.user_masks() | right.options | wrong
        refuse(self.draw, names, call or self.layer, **given)

    def with_array(self) -> None:
        right, draw = self.right, self.draw
        x = right.user(right.x)
        states = ["state", "h0", "c0"]
        if draw.chance(0.5) or not x.size:
            wrong = wrong_array(draw, x, [x.ndim - 1])
            self.refused(["x"], x=wrong)
        elif right.state[0] is not None:
            at = draw.randrange(len(right.state))
            parts = right.user_state(right.state)
            parts = list(parts) if isinstance(parts, tuple) else [parts]
            parts[at] = wrong_array(draw, parts[at])
            wrong = tuple(parts) if len(parts) > 1 else parts[0]
            if len(parts) > 1 and draw.chance(0.3):
                wrong = draw.choice([parts[:1], (*parts, None), "a", 5, {}, object()])
            self.refused(states, state=wrong)

    def with_masks(self) -> None:
        right, (T, B) = self.right, self.right.sizes[:2]
        if T * B:
            shape = (T,) if right.unbatched else (T, B)
            name, value = wrong_masks(self.draw, T, shape)
            if name != "lengths" and right.batch_first and getattr(value, "ndim", 0) == 2:
                value = value.swapaxes(0, 1)
            self.refused([name], **{name: value})

    def with_option(self) -> None:
        kinds = OF_CALLS | ({"return_cells": FLAGS[:2]} if self.is_lstm else {})
        name = self.draw.choice(list(kinds))
        vjp = name in ("bptt", "recompute")
        if self.is_narrow and vjp:
            return
        value = self.draw.choice(kinds[name])
        self.refused([name], self.layer.vjp if vjp else None, **{name: value})

    def with_gradient(self) -> None:
        right, draw = self.right, self.draw
        if self.is_narrow:
            refuse(draw, ["vjp"], self.layer.vjp, right.user(right.x))
            refuse(draw, ["training"], self.layer, right.user(right.x), training=True)
            return
        (y, _), pullback = draw.call(self.layer.vjp, right.user(right.x), **right.user_masks())
        if draw.chance(0.5):
            refuse(draw, ["dy"], pullback, wrong_array(draw, y))
        elif draw.chance(0.5):
            refuse(draw, ["d_cells"], pullback, y, None, y)
        else:
            end = wrong_array(draw, np.stack([right.results["h_n"]])[0])
            if end is not None:
                d_state = (end, None) if self.is_lstm else end
                refuse(draw, ["d_state"], pullback, y, d_state)

    def with_arguments(self) -> None:
        """A layer that cannot be built."""
        right, draw = self.right, self.draw
        kind = type(self.layer)
        I, H = right.sizes[2:]
        kinds: dict[str, list[Any]] = OF_OPTIONS | {
            "input_size": SIZES,
            "hidden_size": SIZES,
            "num_layers": SIZES,
            "bias": FLAGS,
            "batch_first": FLAGS,
            "bidirectional": FLAGS,
            "reverse": FLAGS,
            "orthogonal": FLAGS,
            "dropout": [0.5, *PROBABILITIES],
            "dtype": ["float16", int, "nope", object, 5, "U3", [], len, ">f4", "complex64"],
            "rng": ["a", -1, 1.5, len, object(), {}],
            "foo": [1],
        }
        if self.is_lstm:
            of_lstm = {
                "proj_size": [-1, H, 2**40, 1.5, "a", True, None],
                "forget_bias": ["a", [], 1j],
            }
            kinds |= of_lstm | {"cell_clip": BOUNDS, "peephole": FLAGS, "coupled_gates": FLAGS}
        elif len(right.cell.gates) > 1:
            kinds |= {"reset_after": FLAGS, "layer_norm": FLAGS} | OF_GATES
        else:
            kinds["nonlinearity"] = WORDS
        name = draw.choice(list(kinds))
        given = {"input_size": I, "hidden_size": H, name: draw.choice(kinds[name])}
        refuse(draw, [name], kind, **given)

    def with_parameters(self) -> None:
        """Parameters that do not fit, or are not the layer's."""
        draw, layer = self.draw, self.layer
        own = layer.state_dict()
        name = draw.choice(list(own))
        floats = own[name].dtype.kind == "f"
        wrong = (
            wrong_shape(draw, own[name], range(own[name].ndim)) if floats else no_array(draw)
        )
        kind = draw.randrange(4)
        errors = (TypeError, ValueError, KeyError, AttributeError)
        if kind == 0:
            refuse(draw, [name], setattr, layer, name, wrong, errors=errors)
        elif kind == 1:
            refuse(draw, [name], layer.load_state_dict, own | {name: wrong}, errors=errors)
        elif kind == 2:
            less = {k: v for k, v in own.items() if k != name}
            refuse(draw, [name], layer.load_state_dict, less, errors=errors)
        else:
            fixed = draw.choice(["input_size", "bias", "dtype", "weight_ih_l9", "device"])
            refuse(draw, [fixed], setattr, layer, fixed, 3, errors=errors)

    def with_methods(self) -> None:
        draw, layer = self.draw, self.layer
        kind = draw.randrange(4)
        if kind == 0:
            refuse(draw, ["weights"], layer.quantize, draw.choice(WORDS))
        elif kind == 1 and not self.is_narrow:
            bits = draw.choice([0, 7, 32, -1, 2**70, True, "a", 8.0, []])
            refuse(draw, ["x_bits", "float32"], layer.quantize, "int8", bits)
        elif kind == 2:
            refuse(draw, ["device"], layer.to, draw.choice(["cuda:x", "cpu:0", *WORDS]))
            refuse(
                draw,
                ["dtype", "float32"],
                layer.to,
                "cpu",
                draw.choice(["float16", 5, len, []]),
            )
        else:
            name = draw.choice(["T", "B"])
            given = {"T": 3, "B": 2} | {name: draw.choice([-1, 1.5, "a", None, 2**100, []])}
            refuse(draw, [name], layer.explain, **given)

    def with_stream(self) -> None:
        draw, right, layer = self.draw, self.right, self.layer
        if layer.bidirectional or layer.reverse:
            refuse(draw, ["layer"], fr.Stream, layer)
            return
        B = draw.choice([None, 1, 3])
        refuse(draw, ["layer"], fr.Stream, draw.choice(STRANGE))
        refuse(
            draw,
            ["batch_size"],
            fr.Stream,
            layer,
            draw.choice([s for s in SIZES if s is not None]),
        )
        stream = draw.call(fr.Stream, layer, B)
        x = draw.arrays.normal(size=(*([] if B is None else [B]), right.sizes.I)).astype(
            layer.dtype
        )
        draw.call(stream.step, x)
        before = right.ours_state(stream.state)
        kind = draw.randrange(5)
        if kind == 0:
            refuse(draw, ["x"], stream.step, wrong_array(draw, x))
        elif kind == 1:
            flags = draw.choice([2, [True, False], "a", NAN, [[True]], object()])
            refuse(draw, ["mask"], stream.step, x, flags)
        elif kind == 2:
            rows = draw.choice([-1, B or 1, [0, 9], 1.5, "a", [True, True], 2**70, object()])
            if rows != 1 or B != 3:
                refuse(
                    draw,
                    ["rows"],
                    stream.reset,
                    rows,
                    errors=(TypeError, ValueError, IndexError),
                )
        elif kind == 3:
            state = draw.choice(["a", 5, object(), x, (x,) * 9, {}])
            refuse(draw, ["state"], setattr, stream, "state", state)
        else:
            data = draw.randbytes(draw.choice([0, 1, 4, 50, 3000]))
            junk = draw.choice([data, b"PK\x03\x04" + data, b"\x93NUMPY\x01\x00" + data])
            refuse(draw, ["file"], stream.load, io.BytesIO(junk))
        after = right.ours_state(stream.state)
        for b, a in zip(before, after, strict=True):
            assert_same(a, b, "the state of a stream after an error")

    WAYS: tuple[Any, ...] = (
        with_array,
        with_array,
        with_masks,
        with_option,
        with_gradient,
        with_arguments,
    )
    WAYS += (with_arguments, with_parameters, with_methods, with_stream)


def of_settings(draw: Draw) -> None:
    """Settings of the package."""
    refuse(
        draw, ["n"], fr.set_num_threads, draw.choice([-1, 5000, 2**70, True, None, *STRANGE])
    )
    refuse(draw, ["name"], fr.set_isa, draw.choice(["x", 5, b"avx2", [], len]))
    refuse(draw, ["mode"], fr.show_config, draw.choice(WORDS))


def wrong_scene(draw: Draw) -> None:
    """Wrong arguments of an op, or of a layer and its stream."""
    draw.choice([WrongOp, WrongLayer])(draw).check()
    of_settings(draw)
