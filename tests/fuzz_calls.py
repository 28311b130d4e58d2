"""Random calls of ops, compared with the reference.

A scene is what one number of tests/fuzz.py draws: arguments, and several calls with them that
must agree with the reference in float64 and, bit for bit, with each other.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from helpers import (
    MASKS,
    Bfloat16,
    Place,
    Sizes,
    as_double,
    assert_close,
    by_name,
    cotangents,
    double,
    op,
    options_of,
    pulled,
    spoil_padding,
    with_options,
)
from same_bits import LANES

import fusedrnn as fr
from fusedrnn import _cpu, reference
from fusedrnn.bfloat16 import bfloat16
from fusedrnn.cells import CELLS, Cell
from fusedrnn.reference.activations import ACTIVATIONS

bfloat16()  # now NumPy knows the name
ISAS = [name for name, here in _cpu.isas().items() if here]
PLACES = [Place("float32"), Place("float32"), Place("float64"), Bfloat16()]
# The relative error that rounding may add to an element, by the row of `TOLERANCE`.
NOISE = {"float32": 4e-7, "float64": 1e-14, "bfloat16 rounded alike": 2**-8}
LARGE = 1e3
OF_VJP = ("bptt", "recompute")


class Draw(random.Random):
    """The random choices of a number, and how many calls it made."""

    def __init__(self, seed: int, number: int) -> None:
        super().__init__(f"{seed}:{number}")
        self.arrays = np.random.default_rng(self.getrandbits(64))
        self.good = self.refused = 0

    def chance(self, share: float) -> bool:
        return self.random() < share

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of the package that has to succeed."""
        self.good += 1
        return function(*args, **kwargs)


# Drawing


def draw_sizes(draw: Draw, isa: str, dtype: str, empty: bool = True) -> Sizes:
    """Small sizes around the lanes of the instruction set; few that threads share, or long."""
    lanes = LANES[isa.partition("_")[0]] // (1 + (dtype == "float64"))
    H = draw.choice([1, 2, 3, 5, 7, 11, lanes, lanes - 1, lanes + 1, 2 * lanes + 1])
    T, B = draw.choice([1, 1, 2, 3, 4, 5, 7]), draw.choice([1, 1, 2, 3, 5, 7, 13])
    I = draw.choice([1, 2, 3, 5, 8, 17, lanes + 1])
    kind = draw.random()
    if kind < 0.03:
        B, H, I = draw.randint(8, 40), draw.randint(48, 130), draw.randint(1, 70)
    elif kind < 0.05:
        T = draw.randint(20, 60)
    elif kind < 0.07 and empty:
        T, B = draw.choice([(0, 3), (2, 0), (0, 0), (0, 1)])
    return Sizes(T, B, I, max(H, 1))


def draw_activation(draw: Draw) -> Any:
    """A name, or a name with numbers under which no recurrence explodes."""
    name = draw.choice(list(ACTIVATIONS))
    count = draw.randint(0, len(ACTIVATIONS[name][0]))
    return (name, *(draw.choice([0.2, 0.5, 0.9]) for _ in range(count))) if count else name


def draw_options(draw: Draw, cell: Cell, known: Iterable[str]) -> list[str]:
    """Names of options and masks."""
    known = [name for name in known if name in options_of(cell)]
    names = draw.sample(known, min(draw.choice([0, 0, 1, 1, 2, 3, 5]), len(known)))
    if {"zoneout", "zoneout in inference"} <= {*names}:
        names.remove("zoneout")
    if draw.chance(0.35):
        names.append(draw.choice(["lengths", "resets", "both"]))
    if draw.chance(0.15):
        names.append(draw.choice(["mask", "mask last"]))
    return names


def is_unstable(dtype: str, sizes: Sizes) -> bool:
    """Whether LayerNorm of so few units magnifies errors of rounding without bound."""
    return dtype != "float64" and min(sizes.I, sizes.H) < 5


def vary_options(draw: Draw, cell: Cell, asked: dict[str, Any], T: int) -> None:
    """Replace the fixed values of `with_options` by drawn ones."""
    for name in asked:
        if name in ("clip", "cell_clip"):
            asked[name] = draw.choice([0.25, 0.5, 0.8, 3, np.float32(1.5)])
        elif name in ("recurrent_dropout", "weight_dropout"):
            asked[name] = draw.choice([0.1, 0.3, 0.5, 0.9])
        elif name == "zoneout":
            pair = draw.choice([0.25, 0.5]), draw.choice([0.0, 0.4])
            asked[name] = pair if len(cell.states) == 2 and draw.chance(0.7) else pair[0]
        elif name == "bptt":
            asked[name] = draw.randint(1, T + 2)
        elif name.endswith("activation"):
            asked[name] = draw_activation(draw)


def laid_out(draw: Draw, a: Any) -> Any:
    """The same values elsewhere in memory, with NaN between them: the axes in another order,
    with steps, backwards, with margins, at any byte, read-only.
    """
    if a is None or draw.chance(0.4):
        return a
    order = draw.sample(range(a.ndim), a.ndim)
    steps = [draw.choice([1, 1, 1, 2, -1]) for _ in order]
    margins = [draw.choice([0, 0, 1]) for _ in order]
    whole = [n * abs(s) + m for n, s, m in zip(a.shape, steps, margins, strict=True)]
    at = draw.choice([0, 0, 0, 1, 4])
    raw = np.full(math.prod(whole) * a.itemsize + at, 0xFF, np.uint8)[at:].view(a.dtype)
    inverse = np.argsort(order)
    view = raw.reshape([whole[n] for n in order]).transpose(inverse)
    for axis, (n, s, m) in enumerate(zip(a.shape, steps, margins, strict=True)):
        inner = slice(m, m + n * abs(s), abs(s))
        view = view[(slice(None),) * axis + (inner,)]
        view = np.flip(view, axis) if s < 0 else view
    view[...] = a
    view.flags.writeable = draw.chance(0.5)
    return view


def broadcast(draw: Draw, arrays: dict[str, Any]) -> None:
    """Give all rows of x or of a state the values of the first, at the same address."""
    for name, axis in (("x", 1), ("h0", 0), ("c0", 0)):
        a = arrays.get(name)
        if a is not None and a.shape[axis] and draw.chance(0.5):
            arrays[name] = np.broadcast_to(a.take([0], axis), a.shape)


# Comparisons


def assert_same(actual: Any, expected: Any, what: str) -> None:
    """Two arrays, or dicts of arrays, have the same bits; NaN may be any NaN."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected), f"{what}: {list(actual)}, not {list(expected)}"
        for name, e in expected.items():
            assert_same(actual[name], e, f"{what}: {name}")
        return
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    if actual.tobytes() != expected.tobytes():
        a, e = as_double(actual), as_double(expected)
        np.testing.assert_array_equal(a, e, what)
        assert not (np.signbit(a) != np.signbit(e))[~np.isnan(e)].any(), f"{what}: sign of 0"


def noisy(draw: Draw, arrays: dict[str, Any], row: str) -> dict[str, Any]:
    """The same arrays with an error of rounding in each element."""
    size = NOISE[row]

    def changed(a: Any) -> Any:
        return (a * (1 + size * draw.arrays.uniform(-1, 1, a.shape))).astype(a.dtype)

    return {k: a if a is None else changed(a) for k, a in arrays.items()}


def compare(
    actual: dict[str, Any],
    expected: dict[str, Any],
    row: str,
    factor: float,
    again: Callable[[], dict[str, Any]],
    gradient: bool = False,
) -> None:
    """Compare results or gradients by name with the reference.

    Rounding may move an argument across a jump of a value or a slope, as of relu's: an error
    may be twice what the errors of rounding in `again` make of it. Values that explode, as
    under some activations, are not compared.
    """
    assert set(actual) == set(expected), f"{[*actual]}, not {[*expected]}"
    others: list[dict[str, Any]] = []
    for name, e in expected.items():
        if e.size and not np.abs(e).max() < LARGE:
            return
        try:
            assert_close(actual[name], e, row, name, gradient, factor)
        except AssertionError:
            a, e = as_double(actual[name]), as_double(e)
            if a.shape != e.shape or not np.isfinite(a).all():
                raise
            others = others or [again() for _ in range(8)]
            spread = np.abs(np.stack([as_double(o[name]) for o in others]) - e).max(0)
            inside = e + np.clip(a - e, -2 * spread, 2 * spread)
            assert_close(actual[name], inside, row, name, gradient, factor)


# An op


class OpCall:
    """Arguments of an op, its results on one thread, and other ways to the same results."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.cell = cell = CELLS[draw.choice(list(CELLS))]
        self.place = place = draw.choice(PLACES)
        isa = draw.choice(ISAS)
        fr.set_isa(isa)
        self.sizes = draw_sizes(draw, isa, place.dtype)
        self.names = names = draw_options(draw, cell, options_of(cell))
        if "layer_norm" in names and is_unstable(place.dtype, self.sizes):
            names.remove("layer_norm")
        seed, bias = draw.getrandbits(31), draw.chance(0.8)
        arrays, asked = with_options(cell, self.sizes, names, seed=seed, bias=bias)
        if set(names) <= set(MASKS):  # calls of the plain kernels
            del asked["seed"], asked["training"]
        vary_options(draw, cell, asked, self.sizes.T)
        for name in ("h0", "c0"):
            if draw.chance(0.2):
                arrays.pop(name, None)
        if draw.chance(0.1):
            broadcast(draw, arrays)
        else:
            spoil_padding(arrays["x"], asked)
        self.asked = asked | ({"reverse": True} if draw.chance(0.4) else {})
        self.plain = {k: v for k, v in self.asked.items() if k not in OF_VJP}
        self.inputs = place.put_all(arrays)
        self.current = {name: laid_out(draw, a) for name, a in self.inputs.items()}
        self.is_short = place.dtype == "bfloat16"  # then the reference rounds alike

    def laid(self) -> dict[str, Any]:
        """The arguments that are arrays, two of them moved in memory."""
        for name in self.draw.choices(list(self.inputs), k=2):
            self.current[name] = laid_out(self.draw, self.inputs[name])
        return dict(self.current)

    def expected(self, inputs: dict[str, Any], weights: Any = None) -> tuple[Any, Any]:
        """Results and gradients of the reference, by name."""
        results, pullback = op(self.cell, "_vjp", reference)(**inputs, **self.asked)
        if weights is None:
            weights = dict(zip(self.gradients_of(results), cotangents(results), strict=True))
            for name in {"dy", "d_cells"} & set(weights):
                if name != "dy" or self.asked.get("masked_output") != "last":
                    spoil_padding(weights[name], self.asked)
            self.weights = self.place.put_all(weights)
        weights = self.weights if self.is_short else double(self.weights)
        gradients = pulled(self.cell, pullback, list(weights.values()))
        return by_name(self.cell, results), gradients

    def gradients_of(self, results: tuple[Any, ...]) -> list[str]:
        names = ["dy", *(f"d{letter}_n" for letter in self.cell.states), "d_cells"]
        return names[: sum(not isinstance(r, dict) for r in results)]

    def vjp(self) -> tuple[Any, Any]:
        draw = self.draw
        results, pullback = draw.call(op(self.cell, "_vjp"), **self.laid(), **self.asked)
        weights = [laid_out(draw, w) for w in self.weights.values()]
        return by_name(self.cell, results), draw.call(pulled, self.cell, pullback, weights)

    def call(self, inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        inputs = self.laid() if inputs is None else inputs
        return by_name(self.cell, self.draw.call(op(self.cell), **inputs, **self.plain | more))

    def check(self) -> None:
        """Compare with the reference, then try some of the other ways."""
        draw, factor = self.draw, self.place.factor(self.cell, self.names)
        row = "bfloat16 rounded alike" if self.is_short else self.place.row
        inputs = self.inputs if self.is_short else double(self.inputs)
        results, gradients = self.expected(inputs)
        fr.set_num_threads(1)
        self.results, self.gradients = self.vjp()

        def again(which: int) -> Callable[[], dict[str, Any]]:
            return lambda: self.expected(noisy(draw, inputs, row), self.weights)[which]

        compare(self.results, results, row, factor, again(0))
        compare(self.gradients, gradients, row, factor, again(1), gradient=True)
        for way in draw.choices(self.WAYS, k=draw.randint(6, 16)):
            fr.set_num_threads(draw.choice([1, 1, 2, 2, 3, 5, 9]))
            way(self)

    def in_training(self) -> None:
        results, gradients = self.vjp()
        assert_same(results, self.results, "results of another vjp")
        assert_same(gradients, self.gradients, "gradients of another vjp")

    def in_inference(self) -> None:
        assert_same(self.call(), self.results, "results in inference")

    def into_out(self) -> None:
        """y lands in `out`, and no byte around it changes."""
        y = self.results["y"]
        if not y.size:
            return
        margins = [self.draw.choice([0, 1, 2]) for _ in y.shape]
        whole = np.full([n + m for n, m in zip(y.shape, margins, strict=True)], 7, y.dtype)
        out = whole[tuple(slice(m, None) for m in margins)]
        assert_same(self.call(out=out), self.results, "results with out")
        assert_same(out, y, "out")
        out[...] = 7
        assert (whole == 7).all(), "a write beside out"

    def with_weights(self) -> None:
        """Weights that stay packed."""
        states = {k: v for k, v in self.laid().items() if k in ("x", "h0", "c0")}
        kept = {k: v for k, v in self.laid().items() if k not in states}
        weights = fr.Weights(**kept)
        for _ in range(self.draw.randint(1, 3)):
            states = {k: laid_out(self.draw, v) for k, v in states.items()}
            found = self.call(states | {"weight_ih": weights})
            assert_same(found, self.results, "results with Weights")

    @property
    def is_random(self) -> bool:
        return self.asked.get("training", False) and bool(
            {"zoneout", "recurrent_dropout", "weight_dropout"} & set(self.names)
        )

    def in_parts(self) -> None:
        """A sequence in two parts, which the state connects."""
        if self.is_random or self.asked.get("reverse") or {*self.names} & {*MASKS}:
            return
        at, x, ys, state = self.draw.randint(0, self.sizes.T), self.inputs["x"], [], {}
        for part in (x[:at], x[at:]):
            found = self.call(self.laid() | {"x": laid_out(self.draw, part)} | state)
            state = {f"{n}0": found[f"{n}_n"] for n in self.cell.states}
            ys.append(found["y"])
            assert_same(found["h_n"], state["h0"], "h_n")
        assert_same(np.concatenate(ys), self.results["y"], "y in parts")
        for n in self.cell.states:
            assert_same(found[f"{n}_n"], self.results[f"{n}_n"], f"{n}_n in parts")

    def few_rows(self) -> None:
        """Some rows of the batch alone, and one without a batch axis."""
        B = self.sizes.B
        if self.is_random or not B:
            return
        at = self.draw.randrange(B)
        alone = self.draw.chance(0.5)
        some: Any = at if alone else slice(at, at + self.draw.randint(1, B))

        def rows(name: str, a: Any) -> Any:
            if name in ("x", "resets", "mask"):
                return a[:, some]
            return a[some] if name in ("h0", "c0", "lengths") else a

        inputs = {k: laid_out(self.draw, rows(k, v)) for k, v in self.inputs.items()}
        found = self.call(inputs, **{k: rows(k, v) for k, v in self.plain.items()})
        wanted = {
            k: v[some] if k.endswith("_n") else v[:, some] for k, v in self.results.items()
        }
        assert_same(found, wanted, "rows alone")

    def without_gradients(self) -> None:
        """None stands for a gradient of zeros."""
        kept = {n: w for n, w in self.weights.items() if self.draw.chance(0.5)}
        zeros = {n: np.zeros_like(w) for n, w in self.weights.items() if n not in kept}
        _, pullback = self.draw.call(op(self.cell, "_vjp"), **self.laid(), **self.asked)
        found, wanted = (
            self.draw.call(pullback, **kept, **more)._asdict() for more in ({}, zeros)
        )
        for name, e in wanted.items():
            if e is not None:  # -0 may be 0
                np.testing.assert_array_equal(as_double(found[name]), as_double(e), name)

    WAYS: tuple[Any, ...] = (
        in_training,
        in_inference,
        in_inference,
        into_out,
        with_weights,
        in_parts,
        few_rows,
        without_gradients,
    )


def op_scene(draw: Draw) -> None:
    """An op and its pullback."""
    OpCall(draw).check()
