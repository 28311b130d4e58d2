"""NaN and infinities reach what the equations say, and no neighbour."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import (
    MASKS,
    Sizes,
    as_double,
    by_name,
    cotangents,
    double,
    op,
    options_of,
    pulled,
    with_options,
)

import fusedrnn as fr
from fusedrnn import _cpu, reference
from fusedrnn.cells import Cell

VALUES = (np.nan, np.inf, -np.inf)
# NaN of both signs, quiet and signalling, with payloads that rounding up would overflow.
NANS = [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7F80FFFF, 0x7FFFFFFF, 0xFFFFFFFF]
ISAS = [name for name, runs in _cpu.isas().items() if runs and "_" not in name]


class Case:
    """A call with options, its inputs and the gradients of its results."""

    def __init__(self, cell: Cell, sizes: Sizes, names: list[str], dtype: Any) -> None:
        self.cell, self.sizes, self.names = cell, sizes, names
        self.values, self.options = with_options(cell, sizes, names, dtype)
        results, _ = op(cell, "_vjp")(**self.values, **self.options)
        d_names = ["dy", *(f"d{letter}_n" for letter in cell.states), "d_cells"]
        self.weights = dict(zip(d_names, cotangents(results), strict=False))

    def everything(self, module: Any = fr, **replaced: np.ndarray) -> dict[str, Any]:
        """Results and gradients by name, with some arrays replaced."""
        values = {k: replaced.get(k, v) for k, v in self.values.items()}
        weights = [replaced.get(k, v) for k, v in self.weights.items()]
        if module is reference:
            values, weights = double(values), list(map(as_double, weights))
        with np.errstate(invalid="ignore", over="ignore"):
            results, pullback = op(self.cell, "_vjp", module)(**values, **self.options)
            gradients = pulled(self.cell, pullback, weights)
        return by_name(self.cell, results) | {f"d{k}": v for k, v in gradients.items()}

    def spoiled(self) -> Iterator[tuple[str, Any, np.ndarray]]:
        """Each array with one element that is not finite: name, the element's place, array."""
        rng = np.random.default_rng([*self.sizes, len(self.names)])
        values = itertools.cycle(VALUES)
        arrays = self.values | self.weights
        # The reference multiplies the zeros of padding with the weights.
        has_zeros = {*self.names} & {*MASKS} - {"resets"}
        for name, array in arrays.items():
            for value in VALUES if not self.names else [next(values)]:
                other, at = array.copy(), tuple(rng.integers(array.shape))
                is_weight = name in ("weight_ih", "weight_hh")
                other[at] = np.nan if has_zeros and is_weight else value
                yield name, at, other


def kinds(a: Any) -> np.ndarray:
    """0 where a is finite, 1 and -1 where it is infinite, 2 where it is NaN."""
    a = as_double(a)
    return np.where(np.isnan(a), 2, np.where(np.isinf(a), np.sign(a), 0))


def check_places(case: Case) -> None:
    for name, at, array in case.spoiled():
        actual = case.everything(**{name: array})
        for result, e in case.everything(reference, **{name: array}).items():
            np.testing.assert_array_equal(
                kinds(actual[result]),
                kinds(e),
                f"{array[at]} in {name} at {at}: {result} with {case.names}",
            )


def test_places_are_those_of_the_equations(cell: Cell, isa: str) -> None:
    """One NaN, inf or -inf in any input or gradient makes the same elements of all results and
    gradients NaN, inf or -inf as in the reference.
    """
    check_places(Case(cell, Sizes(3, 3, 4, 9), [], np.float64))


def test_places_with_options(cell: Cell) -> None:
    """It does so with each option and mask."""
    for number, name in enumerate([*options_of(cell), *MASKS]):
        fr.set_isa(ISAS[number % len(ISAS)])
        check_places(Case(cell, Sizes(3, 3, 2, 5), [name], np.float64))
    fr.set_isa(None)


def rows_beside(a: Any, row: int) -> np.ndarray:
    return np.delete(np.asarray(a), row, -2)


def test_rows_beside_have_the_bits_of_a_call_without(
    cell: Cell, dtype: np.dtype, isa_on_threads: None
) -> None:
    """No bit of other rows' y, states, gates, dx and gradients of states changes.

    Tiles have any number of rows, and each option is tried.
    """
    each = [[name] for name in [*options_of(cell), *MASKS]]
    for number, names in enumerate([[], [], [], [], *each]):
        B = (2, 9, 17, 5)[number % 4]
        case = Case(cell, Sizes(2, B, 5, 18), names, dtype)
        clean = case.everything()
        of_rows = {k for k, v in clean.items() if np.shape(v)[-2:-1] == (B,)}
        of_rows -= {"dweight_ih", "dweight_hh", "dweight_hr"}
        for name, at, array in case.spoiled():
            if name not in ("x", "h0", "c0", *case.weights):
                continue
            spoiled = case.everything(**{name: array})
            for result in of_rows:
                np.testing.assert_array_equal(
                    rows_beside(spoiled[result], at[-2]),
                    rows_beside(clean[result], at[-2]),
                    f"{array[at]} in {name} at {at}: {result} with {names}",
                )


def test_units_beside_have_the_bits_of_a_call_without(
    cell: Cell, dtype: np.dtype, isa: str
) -> None:
    """A unit's parameter reaches this unit alone at first; its dy, its own weights alone."""
    if cell.resets_before:
        pytest.skip("its new gate reads every reset gate")
    for H in (7, 17, 33):
        case = Case(cell, Sizes(1, 2, 3, H), [], dtype)
        clean = case.everything()
        for name, at, array in case.spoiled():
            if name.startswith(("weight", "bias")):
                of_units = [k for k in clean if k in ("y", "h_n", "c_n")]
                unit, axis = at[0] % H, -1
            elif name in case.weights:
                of_units = [k for k in clean if k.startswith(("dweight", "dbias"))]
                unit, axis = at[-1], 0
            else:
                continue
            spoiled = case.everything(**{name: array})
            for result in of_units:
                parts = [v[result] for v in (spoiled, clean)]
                if axis == 0:  # (gates · H, …)
                    parts = [p.reshape(-1, H, *p.shape[1:]).swapaxes(0, 1) for p in parts]
                np.testing.assert_array_equal(
                    *(np.delete(p, unit, axis) for p in parts),
                    f"{array[at]} in {name} at {at}: {result}",
                )


def test_a_reset_ends_them(cell: Cell, dtype: np.dtype, isa: str) -> None:
    """What is not finite before a reset reaches nothing after it, and no gradient from after it
    reaches what was before.
    """
    case = Case(cell, Sizes(5, 4, 3, 18), [], dtype)
    case.options["resets"] = np.zeros((5, 4), bool)
    case.options["resets"][2, 1] = True
    clean = case.everything()
    for value in VALUES:
        x, h0 = case.values["x"].copy(), case.values["h0"].copy()
        x[1, 1, 2] = h0[1, 4] = value
        spoiled = case.everything(x=x, h0=h0)
        for name in ("y", "h_n", "c_n", "dx"):
            if name in clean:
                after = slice(2, None) if name in ("y", "dx") else slice(None)
                np.testing.assert_array_equal(spoiled[name][after], clean[name][after], name)
        dy = case.weights["dy"].copy()
        dy[3, 1, 0] = value
        before = case.everything(dy=dy)
        np.testing.assert_array_equal(before["dx"][:2], clean["dx"][:2])
        np.testing.assert_array_equal(before["dh0"], clean["dh0"])


@pytest.mark.parametrize("precision", ["int8", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", [fr.LSTM, fr.GRU, fr.RNN])
def test_any_nan_in_narrow_precisions(kind: Any, precision: Any, isa_with_units: str) -> None:
    """A NaN of any bits in x or h makes its row NaN from then on with weights of 8 and 16 bits,
    and int8 does so with infinities; no bit of another row changes.
    """
    layer = kind(7, 33, rng=0).quantize(precision)
    rng = np.random.default_rng(0)
    for B in (1, 5):
        x = rng.normal(size=(3, B, 7)).astype(np.float32)
        h = rng.normal(size=(1, B, 33)).astype(np.float32)
        clean, _ = layer(x, (h, h) if kind is fr.LSTM else h)
        row = B // 2
        infinities = [0x7F800000, 0xFF800000] if precision == "int8" else []
        for bits, first in itertools.product([*NANS, *infinities], (0, 1)):
            x_, h_ = x.copy(), h.copy()
            (x_[1, row, 5:6] if first else h_[0, row, 4:5]).view(np.uint32)[:] = bits
            y, _ = layer(x_, (h_, h_) if kind is fr.LSTM else h_)
            assert np.isnan(y[first:, row]).all(), hex(bits)
            np.testing.assert_array_equal(y[:first], clean[:first])
            np.testing.assert_array_equal(rows_beside(y, row), rows_beside(clean, row))


def test_any_nan_in_layers_of_bfloat16(cell: Cell, isa_with_units: str) -> None:
    """A NaN of any bits stays one through the roundings to bfloat16, forward and backward."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    case = Case(cell, Sizes(3, 4, 6, 18), [], np.float32)
    states = ("h0", "c0", "dh_n", "dc_n")
    cast = {
        k: v if k in states else v.astype(bfloat16)
        for k, v in (case.values | case.weights).items()
    }
    clean = case.everything(**cast)
    for bits in NANS:
        h0, x = case.values["h0"].copy(), cast["x"].copy()
        x[2, 1, 3:4].view(np.uint16)[:] = bits >> 16 | (bits & 1)
        h0[2, 3:4].view(np.uint32)[:] = bits
        found = case.everything(**(cast | {"x": x, "h0": h0}))
        y, dx = as_double(found["y"]), as_double(found["dx"])
        # The slope of relu is 0 at NaN, and that of the identity 1.
        has_slope_of_h = cell.name not in ("rnn_relu", "rnn_identity")
        assert np.isnan(y[:, 2]).all(), hex(bits)
        assert np.isnan(y[2, 1]).all(), hex(bits)
        assert not has_slope_of_h or np.isnan(dx[:, 2]).all(), hex(bits)
        np.testing.assert_array_equal(y[:, [0, 3]], as_double(clean["y"])[:, [0, 3]])
        np.testing.assert_array_equal(dx[:, [0, 3]], as_double(clean["dx"])[:, [0, 3]])


def test_streams_and_layers() -> None:
    """In a stream a row with NaN stays NaN until it is reset, and no other row changes; layers
    in both directions spread it over all times of the row.
    """
    x = np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32)
    spoiled = x.copy()
    spoiled[2, 3, 1] = np.nan
    layer = fr.GRU(3, 20, num_layers=2, rng=0)
    clean, stream = layer(x)[0], fr.Stream(layer, 5)
    for t in range(4):
        y = stream.step(spoiled[t])
        np.testing.assert_array_equal(rows_beside(y, 3), rows_beside(clean[t], 3))
        assert np.isnan(y[3]).all() == (t >= 2)
    stream.reset(np.arange(5) == 3)
    np.testing.assert_array_equal(stream.step(spoiled[4])[3], layer(x[4:5])[0][0, 3])
    both = fr.LSTM(3, 20, num_layers=2, bidirectional=True, rng=0)
    y, _ = both(spoiled)
    assert np.isnan(y[:, 3]).all()
    np.testing.assert_array_equal(rows_beside(y, 3), rows_beside(both(x)[0], 3))


def test_pytorch_has_the_same_places() -> None:
    """Results and gradients of our modules are NaN or infinite where those of torch.nn are."""
    torch = pytest.importorskip("torch")
    ft = pytest.importorskip("fusedrnn.torch")
    torch.manual_seed(0)
    for name, value in itertools.product(("LSTM", "GRU", "RNN"), VALUES):
        theirs = getattr(torch.nn, name)(3, 8, num_layers=2).double()
        ours = getattr(ft, name)(3, 8, num_layers=2).double()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(4, 5, 3, dtype=torch.float64)
        x[1, 2, 0] = value
        found = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y, _ = module(leaf)
            y.backward(torch.ones_like(y))
            found.append([y, leaf.grad, *(p.grad for p in module.parameters())])
        for a, e in zip(*found, strict=True):
            np.testing.assert_array_equal(kinds(a), kinds(e))


def test_cells_take_nan_alone() -> None:
    """In a step of ft.LSTMCell a NaN makes its row NaN, and no other row changes."""
    torch = pytest.importorskip("torch")
    ft = pytest.importorskip("fusedrnn.torch")
    cell = ft.LSTMCell(3, 18)
    x = torch.randn(4, 3)
    clean = cell(x)
    x[2, 1] = torch.nan
    for a, e in zip(cell(x), clean, strict=True):
        assert a[2].isnan().all()
        assert torch.equal(a[[0, 1, 3]], e[[0, 1, 3]])
