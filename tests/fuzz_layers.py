"""Random calls of layers, streams and layers of narrow weights, compared with the reference."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from fuzz_calls import (
    ISAS,
    LARGE,
    Draw,
    assert_same,
    compare,
    draw_sizes,
    is_unstable,
    laid_out,
    noisy,
    vary_options,
)
from fuzz_stack import Stack
from helpers import (
    MASKS,
    Sizes,
    as_double,
    double,
    masks,
    options_of,
    spoil_padding,
    taken_steps,
)

import fusedrnn as fr
from fusedrnn import reference
from fusedrnn.cells import CELLS, Cell
from fusedrnn.options import DEFAULTS
from fusedrnn.weights import PRECISIONS

OF_LAYERS: tuple[str, ...] = (
    "projection",
    "peephole",
    "clip",
    "cell_clip",
    "layer_norm",
    "zoneout",
)
OF_LAYERS += ("recurrent_dropout", "weight_dropout", "activation", "recurrent_activation")


def draw_layer(draw: Draw, cell: Cell, known: Iterable[str] = OF_LAYERS) -> dict[str, Any]:
    """Arguments of a layer beside its sizes and dtype, of which `known` are options."""
    names = [n for n in known if n in options_of(cell)]
    names = draw.sample(names, min(draw.choice([0, 0, 1, 2, 3]), len(names)))
    options: dict[str, Any] = dict.fromkeys(names, True)
    vary_options(draw, cell, options, 1)
    arguments: dict[str, Any] = {
        "num_layers": draw.choice([1, 1, 2, 3]),
        "bias": draw.chance(0.8),
        "bidirectional": draw.chance(0.4),
        "batch_first": draw.chance(0.4),
    }
    return arguments | options | dict(cell.arguments)


def spread_out(draw: Draw, layer: Any) -> None:
    """Give the vectors of LayerNorm, which start as ones and zeros, random values."""
    changed = {
        k: v + draw.arrays.normal(size=v.shape) / 4
        for k, v in layer.state_dict().items()
        if k.startswith(("gamma", "beta"))
    }
    if changed:
        layer.load_state_dict(layer.state_dict() | changed)


class LayerCall:
    """A layer, what it is called with, and what it has to return."""

    KNOWN: tuple[str, ...] = OF_LAYERS

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.cell = cell = CELLS[draw.choice(list(CELLS))]
        self.dtype = draw.choice(["float32", "float32", "float64"])
        isa = draw.choice(ISAS)
        fr.set_isa(isa)
        self.sizes = sizes = self.draw_size(isa)
        self.arguments = draw_layer(draw, cell, self.KNOWN)
        if self.arguments.pop("projection", False) and sizes.H > 1:
            self.arguments["proj_size"] = draw.randint(1, sizes.H - 1)
        if is_unstable(self.dtype, sizes):
            self.arguments.pop("layer_norm", None)
        self.layer = self.build()
        self.unbatched = sizes.B == 1 and draw.chance(0.5)
        self.batch_first = self.arguments["batch_first"] and not self.unbatched
        self.seed = draw.getrandbits(64)
        self.asked = self.draw_call()
        x = draw.arrays.normal(size=sizes[:3])
        if not draw.chance(0.1):
            spoil_padding(x, self.asked)
        self.x = x.astype(self.dtype)
        count = self.arguments["num_layers"] * (1 + self.arguments["bidirectional"])
        widths = (self.arguments.get("proj_size") or sizes.H, sizes.H)
        shapes = [(count, sizes.B, w) for _, w in zip(cell.states, widths, strict=False)]
        has_state = draw.chance(0.8)
        normal = draw.arrays.normal
        self.state = [normal(size=s).astype(self.dtype) if has_state else None for s in shapes]

    may_be_empty = True
    may_reverse = True

    def draw_size(self, isa: str) -> Sizes:
        return draw_sizes(self.draw, isa, self.dtype, empty=self.may_be_empty)

    def build(self) -> Any:
        draw, cell = self.draw, self.cell
        self.arguments["dropout"] = 0.3 * (
            self.arguments["num_layers"] > 1 and draw.chance(0.3)
        )
        if self.may_reverse and not self.arguments["bidirectional"] and draw.chance(0.2):
            self.arguments["reverse"] = True
        layer = getattr(fr, cell.op.upper())(
            *self.sizes[2:], dtype=self.dtype, rng=draw.getrandbits(31), **self.arguments
        )
        spread_out(draw, layer)
        return pickle.loads(pickle.dumps(layer)) if draw.chance(0.1) else layer

    def draw_call(self) -> dict[str, Any]:
        """Masks, and options of a call."""
        draw, sizes = self.draw, self.sizes
        kinds = ["", "", "lengths", "resets", "both", "mask", "mask last", "both+mask"]
        asked: dict[str, Any] = {}
        for kind in filter(None, draw.choice(kinds).split("+")):
            asked |= masks(kind, sizes, draw.getrandbits(31))
        if "lengths" in asked and "mask" in asked:
            asked["mask"] &= np.arange(sizes.T)[:, None] < asked["lengths"]
        asked["training"] = draw.chance(0.5)
        if draw.chance(0.2):
            asked["bptt"] = draw.randint(1, sizes.T + 2)
        return asked

    # To the layout of the caller and back

    def user(self, a: Any) -> Any:
        """Return a sequence (T, B, …), or a mask, as the layer takes it."""
        if a is None:
            return None
        return a[:, 0] if self.unbatched else a.swapaxes(0, 1) if self.batch_first else a

    def ours(self, a: Any) -> Any:
        return a[:, None] if self.unbatched else a.swapaxes(0, 1) if self.batch_first else a

    def user_state(self, state: list[Any]) -> Any:
        parts = [None if s is None else laid_out(self.draw, s) for s in state]
        if all(s is None for s in parts) and self.draw.chance(0.5):
            return None
        parts = [s if s is None or not self.unbatched else s[:, 0] for s in parts]
        return tuple(parts) if len(parts) > 1 else parts[0]

    def ours_state(self, state: Any) -> list[Any]:
        parts = state if isinstance(state, (tuple, list)) else (state,)
        return [s[:, None] if self.unbatched else s for s in parts]

    def user_masks(self) -> dict[str, Any]:
        found = {k: self.asked[k] for k in ("lengths", "resets", "mask") if k in self.asked}
        for name, value in found.items():
            if name == "lengths":
                found[name] = value[0] if self.unbatched else value
            else:
                value = value.astype(self.draw.choice(["bool", "int8", "float32"]))
                found[name] = laid_out(self.draw, self.user(value))
        return found

    def named(self, results: tuple[Any, ...]) -> dict[str, Any]:
        """Return a call's results by name and in our layout."""
        y, state, *others = results
        names = [f"{letter}_n" for letter in self.cell.states]
        found = {"y": self.ours(y)} | dict(zip(names, self.ours_state(state), strict=True))
        for other in others:
            if isinstance(other, dict):
                found |= {k: self.ours(v) for k, v in other.items()}
            else:
                found["cells"] = self.ours(other)
        return found

    # Calls

    def extras(self) -> dict[str, Any]:
        """Draw which other results are asked for."""
        flags = ["trace"] + ["return_cells"] * ("c" in self.cell.states)
        return {name: True for name in flags if self.draw.chance(0.3)}

    @property
    def options(self) -> dict[str, Any]:
        known = ("masked_output", "training")
        found = {k: self.asked[k] for k in known if k in self.asked} | {"seed": self.seed}
        if found["training"]:
            return found
        return {k: v for k, v in found.items() if self.draw.chance(0.5) or k == "masked_output"}

    def call(self, x: Any = None, state: Any = None, **more: Any) -> dict[str, Any]:
        """Call the layer in inference, or with the masks of training."""
        given = self.user_masks() | self.extras() | self.options | more
        x = laid_out(self.draw, self.user(self.x if x is None else x))
        state = self.user_state(self.state if state is None else state)
        return self.named(self.draw.call(self.layer, x, state, **given))

    def vjp(self) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
        """Return results and a function from their gradients to those of everything."""
        draw, extras = self.draw, self.extras()
        given = self.user_masks() | extras | self.options
        given |= {"training": self.asked["training"], "bptt": self.asked.get("bptt")}
        given["recompute"] = draw.chance(0.3)
        x, state = laid_out(draw, self.user(self.x)), self.user_state(self.state)
        results, pullback = draw.call(self.layer.vjp, x, state, **given)

        def pull(dy: Any, d_state: list[Any], d_cells: Any) -> dict[str, Any]:
            d_ends = self.user_state(d_state)
            cells = [laid_out(draw, self.user(d_cells))] if "return_cells" in extras else []
            found = draw.call(pullback, laid_out(draw, self.user(dy)), d_ends, *cells)
            states = [f"{letter}0" for letter in self.cell.states]
            starts = dict(zip(states, self.ours_state(found.state), strict=True))
            return found.parameters | starts | {"x": self.ours(found.x)}

        return self.named(results), pull

    # Expected results

    def expected(self, x: Any, state: Any, parameters: Any) -> Any:
        """Results of the reference and its pullback."""
        others = ("peephole", "layer_norm", "coupled_gates", "reset_after")
        options = {k: v for k, v in self.arguments.items() if k in DEFAULTS and k not in others}
        asked = options | self.asked | {"seed": self.seed}
        return Stack(self.cell, self.arguments, parameters).run(x, state, asked)

    def all_arrays(self) -> dict[str, Any]:
        """x, the state and the parameters, in float64."""
        state = {f"{n}0": s for n, s in zip(self.cell.states, self.state, strict=True)}
        return double({"x": self.x} | state | self.layer.state_dict())

    def run_reference(self, arrays: dict[str, Any]) -> Any:
        x, *state = (arrays[k] for k in ("x", *(f"{n}0" for n in self.cell.states)))
        return self.expected(x, state, {k: v for k, v in arrays.items() if "_l" in k})

    def draw_gradients(self, results: dict[str, Any]) -> list[Any]:
        """Draw the gradients of y, of the state, and of cells, which may be zeros."""
        normal, masked = self.draw.arrays.normal, dict(self.asked)

        def drawn(name: str) -> Any:
            d = normal(size=results[name].shape)
            if name in ("y", "cells") and masked.get("masked_output") != "last":
                d[~taken_steps(d, masked)] = 0
            return d.astype(self.dtype)

        ends = [drawn(f"{letter}_n") for letter in self.cell.states]
        cells = drawn("cells") if "cells" in results and self.draw.chance(0.5) else None
        return [drawn("y"), ends, cells]

    def check(self) -> None:
        draw, row = self.draw, self.dtype
        arrays, run = self.all_arrays(), self.run_reference
        results, pullback = run(arrays)
        weights = self.draw_gradients(results)
        fr.set_num_threads(1)
        self.results, pull = self.vjp()
        if weights[2] is not None and "cells" not in self.results:
            weights[2] = None
        wide = [as_double(weights[0]), [as_double(d) for d in weights[1]], weights[2]]
        gradients = pull(*weights)
        several = 1 + 0.5 * (self.arguments["num_layers"] - 1)

        def some(found: dict[str, Any]) -> dict[str, Any]:
            return {k: found[k] for k in self.results}

        compare(
            self.results,
            some(results),
            row,
            several,
            lambda: some(run(noisy(draw, arrays, row))[0]),
        )
        compare(
            gradients,
            pullback(*wide),
            row,
            several,
            lambda: run(noisy(draw, arrays, row))[1](*wide),
            gradient=True,
        )
        for way in draw.choices(self.WAYS, k=draw.randint(8, 20)):
            fr.set_num_threads(draw.choice([1, 1, 2, 2, 3, 5, 9]))
            way(self)
        fr.set_num_threads(draw.choice([2, 3, 9]))
        _, pull = self.vjp()
        if weights[2] is None:
            again = pull(*weights)
            assert_same({k: again[k] for k in gradients}, gradients, "gradients on threads")

    def same(self, found: dict[str, Any], what: str) -> None:
        common = [k for k in found if k in self.results]
        wanted = {k: self.results[k] for k in common}
        assert_same({k: found[k] for k in common}, wanted, what)

    def again(self) -> None:
        self.same(self.call(), "results in inference")

    def in_parts(self) -> None:
        """A sequence in two parts, which the state connects."""
        one_way = not (self.layer.bidirectional or self.layer.reverse)
        if not one_way or self.asked["training"] or {*self.asked} & {*MASKS}:
            return
        at = self.draw.randint(0, self.sizes.T)
        first = self.call(self.x[:at])
        state = [first[f"{n}_n"] for n in self.cell.states]
        second = self.call(self.x[at:], state)
        found = {"y": np.concatenate([first["y"], second["y"]])}
        self.same(found | {k: v for k, v in second.items() if k.endswith("_n")}, "parts")

    def by_stream(self) -> None:
        """Single steps, some of which start from zeros or do not count."""
        layer, (T, B) = self.layer, self.sizes[:2]
        one_way = not (layer.bidirectional or layer.reverse)
        if not one_way or self.asked["training"] or "lengths" in self.asked or not B * T:
            return
        draw, masked = self.draw, self.asked.get("masked_output", "zero")
        stream = fr.Stream(layer, None if self.unbatched else B)
        stream.state = None if self.state[0] is None else self.user_state(self.state)
        ys = []
        for t in range(T):
            if "resets" in self.asked:
                rows = (
                    self.asked["resets"][t] & self.asked.get("mask", np.ones((T, B), bool))[t]
                )
                draw.call(stream.reset, rows if draw.chance(0.5) else np.flatnonzero(rows))
            x = self.x[t, 0] if self.unbatched else laid_out(draw, self.x[t])
            given = {}
            if "mask" in self.asked:
                given["mask"] = (
                    self.asked["mask"][t, 0] if self.unbatched else self.asked["mask"][t]
                )
                given["masked_output"] = masked
            ys.append(draw.call(stream.step, x, **given))
            if draw.chance(0.1):
                file = io.BytesIO()
                stream.save(file)
                file.seek(0)
                stream = fr.Stream(layer, stream.batch_size)
                draw.call(stream.load, file)
        y = np.stack(ys)
        ends = dict(
            zip(
                [f"{n}_n" for n in self.cell.states], self.ours_state(stream.state), strict=True
            )
        )
        self.same({"y": y[:, None] if self.unbatched else y} | ends, "steps of a stream")

    WAYS: tuple[Any, ...] = (again, again, again, in_parts, by_stream, by_stream)


def layer_scene(draw: Draw) -> None:
    """A layer and its pullback, and a stream of it."""
    LayerCall(draw).check()


# Streams


class StreamCall(LayerCall):
    """A long stream: every step's h, and the state after the last, are the reference's."""

    # LayerNorm makes a long recurrence chaotic.
    KNOWN = tuple(name for name in OF_LAYERS if name != "layer_norm")
    may_be_empty = may_reverse = False

    def draw_size(self, isa: str) -> Sizes:
        T = self.draw.randint(40, 150)
        return super().draw_size(isa)._replace(T=T, B=self.draw.choice([1, 1, 2, 5]))

    def build(self) -> Any:
        self.arguments |= {"bidirectional": False, "num_layers": self.draw.choice([1, 1, 2])}
        return super().build()

    def draw_call(self) -> dict[str, Any]:
        asked = super().draw_call()
        kept = ("resets", "mask", "masked_output")
        return {k: v for k, v in asked.items() if k in kept} | {"training": False}

    def check(self) -> None:
        arrays = self.all_arrays()
        self.results = self.call()

        def some(arrays: dict[str, Any]) -> dict[str, Any]:
            results, _ = self.run_reference(arrays)
            return {k: results[k] for k in self.results}

        def again() -> dict[str, Any]:
            return some(noisy(self.draw, arrays, self.dtype))

        compare(self.results, some(arrays), self.dtype, 4, again)
        fr.set_num_threads(self.draw.choice([1, 2, 5]))
        self.by_stream()


def stream_scene(draw: Draw) -> None:
    """A layer, step by step."""
    StreamCall(draw).check()


# Narrow weights


class NarrowCall(LayerCall):
    """A layer of narrow weights, whose steps follow the definition from its own states."""

    KNOWN = tuple(name for name in OF_LAYERS if not name.endswith("dropout"))  # in inference
    may_be_empty = False

    def build(self) -> Any:
        self.dtype = "float32"
        layer = super().build()
        uniform = self.draw.arrays.uniform
        rows = {k: (*v.shape[:1], *(1,) * (v.ndim - 1)) for k, v in layer.state_dict().items()}
        scales = {k: uniform(0.2, 3, shape).astype("float32") for k, shape in rows.items()}
        layer.load_state_dict({k: v * scales[k] for k, v in layer.state_dict().items()})
        precision = self.draw.choice(PRECISIONS)
        bits = self.draw.choice([None, 8, 16]) if precision == "int8" else None
        return self.draw.call(layer.quantize, precision, bits)

    def draw_call(self) -> dict[str, Any]:
        asked = super().draw_call()
        asked.pop("bptt", None)
        return asked | {"training": False}

    def check(self) -> None:
        draw, flags = self.draw, {"trace": True, "return_cells": "c" in self.cell.states}
        fr.set_num_threads(1)
        self.results = self.call(**flags)
        for way in draw.choices(self.WAYS, k=draw.randint(6, 16)):
            fr.set_num_threads(draw.choice([1, 1, 2, 2, 3, 5, 9]))
            way(self)
        a = self.arguments
        is_one = a["num_layers"] == 1 and not (a["bidirectional"] or a.get("reverse"))
        if is_one and not {*self.asked} & {*MASKS}:
            self.check_steps()

    def check_steps(self) -> None:
        rows = self.sizes.T * self.sizes.B
        ours = [self.results[name] for name in ("y", "cells") if name in self.results]
        starts = [
            np.zeros((self.sizes.B, e.shape[-1])) if s is None else s[0]
            for s, e in zip(self.state, ours, strict=True)
        ]
        before = [
            np.concatenate([s[None], e[:-1]]).astype(np.float64).reshape(rows, -1)
            for s, e in zip(starts, ours, strict=True)
        ]
        (parameters,) = self.layer._all_parameters()
        x = self.x.reshape(1, rows, -1).astype(np.float64)
        step = reference.run(
            self.cell.reference, x, parameters, before, options=self.layer._options
        )
        expected = [step.y, step.cells][: len(ours)]
        names = ["activation", "recurrent_activation"]
        if not all(np.abs(e).max() < LARGE for e in expected):
            return
        jumps = any("threshold" in str(self.arguments.get(n)) for n in names)
        # A second product within the step rounds what the step has computed.
        is_rounded = jumps or self.layer.proj_size or self.cell.resets_before
        for a, e in zip(ours, expected, strict=True):
            error = np.abs(a.reshape(e.shape) - e).max() / (1 + np.abs(e).max())
            assert error < (2e-2 if is_rounded else 1e-5), f"error of a step {error:.1e}"


def narrow_scene(draw: Draw) -> None:
    """A layer of narrow weights, and a stream of it."""
    NarrowCall(draw).check()
