"""Runs the cases of same_bits.py on the build that is installed with this interpreter.

Reads one case a line from the standard input and writes one answer a line: a digest of each
array that the case computes, or the arrays themselves, or the error that it raised.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import fusedrnn as fr
from fusedrnn import _cpu, cuda
from fusedrnn.cells import CELLS

Array = np.ndarray[Any, Any]
Arrays = dict[str, Any]
Case = dict[str, Any]

OF_VJP = ("bptt", "recompute")
EXCHANGES = {"cluster": 0, "grid": 1, "step": 2}


class Inputs:
    """What a case is called with, drawn from its seed."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.cell = CELLS[case["cell"]]
        self.T, self.B, self.I, self.H = case["sizes"]
        self.R = case.get("R") or self.H
        self.rng = np.random.default_rng(case["seed"])
        self.on_gpu = case.get("device") == "cuda"
        self.dtype = case["dtype"]
        self.unbatched = case.get("unbatched", False)
        self.arrays: Arrays = {}
        self.masks = self._masks()
        self.arrays["x"] = self._sequence(self._values((self.T, self.B, self.I)), spoilt=True)
        self.parameters = self._parameters()

    # Values

    def _values(self, shape: tuple[int, ...], scale: float = 1.0, zeros: bool = True) -> Array:
        """Draw an array of the kind that the case asks for."""
        rng, kind = self.rng, self.case.get("values", "usual")
        a = rng.normal(size=shape) * scale
        if kind == "zeros" and zeros:
            a = np.where(rng.random(shape) < 0.6, np.copysign(0.0, a), a)
        elif kind == "large":
            a *= 30
        elif kind == "tiny" and zeros:
            a *= 1e-309 if self.dtype == "float64" else 1e-39
        return a.astype("float64" if self.dtype == "float64" else "float32")

    def _sequence(self, a: Array, spoilt: bool = False, of_state: bool = False) -> Any:
        """Return a sequence (T, B, n) as it is handed over."""
        kind = self.case.get("values")
        if spoilt and a.size and kind in ("nan", "inf"):
            at = self.rng.integers(0, a.size, 2)
            a.reshape(-1)[at] = np.nan if kind == "nan" else [np.inf, -np.inf]
        if self.case.get("padding"):
            for b, length in enumerate(np.atleast_1d(self.masks.get("lengths", ()))):
                a[length:, b] = np.nan
                a[length:, b, ::2] = -np.inf
        a = laid_out(a, self.case.get("layout", "whole"))
        return self.put(a[:, 0] if self.unbatched else a, of_state)

    def put(self, a: Array, of_state: bool = False) -> Any:
        """Return an array where the case runs; there is no state of 16 bits."""
        if not self.on_gpu:
            return a
        is_short = self.dtype in ("bfloat16", "float16") and not of_state
        return cuda.array(a, self.dtype if is_short else str(a.dtype))

    def _masks(self) -> dict[str, Any]:
        T, B, rng, case = self.T, self.B, self.rng, self.case
        masks: dict[str, Any] = {}
        if kind := case.get("lengths"):
            lengths = rng.integers(0, T + 1, B)
            if kind in ("full", "none"):
                lengths[:] = T if kind == "full" else 0
            elif kind == "equal":
                lengths[:] = max(T - 1, 0)
            elif B > 1:
                lengths[rng.permutation(B)[:2]] = T, 0
            masks["lengths"] = lengths
        if kind := case.get("resets"):
            resets = rng.random((T, B)) < 0.25
            if kind != "drawn":
                resets[:] = False
                resets[: T if kind == "all" else 1] = True
            masks["resets"] = resets
        if self.unbatched:
            masks = {k: v[0] if k == "lengths" else v[:, 0] for k, v in masks.items()}
        return masks

    def _parameters(self) -> dict[str, Any]:
        """Draw weights under which no recurrence explodes."""
        asked, rng = self.case.get("options", {}), self.rng
        R = self.R if "projection" in asked else None
        has = (R or 0, self.case.get("bias", True), "peephole" in asked, "layer_norm" in asked)
        shapes = self.cell.layer_shapes(self.I, self.H, *has)
        made = {}
        for name, shape in shapes.items():
            lengths = shape.lengths
            if name.startswith("gamma"):
                a = 0.7 + rng.random(lengths) / 2
            elif name.startswith("weight") and len(lengths) == 2:
                a = rng.normal(size=lengths) * 0.6 / np.sqrt(max(lengths[1], 1))
            else:
                a = self._values(lengths, 0.5)
            a = a.astype("float64" if self.dtype == "float64" else "float32")
            if self.case.get("layout") == "stepped" and not self.on_gpu:
                a = np.asfortranarray(a)
            made[name] = self.put(a)
        return made

    def state(self, leading: tuple[int, ...] = ()) -> dict[str, Any]:
        """Draw h0 and c0, or none where the case starts from zeros."""
        widths = dict(zip(("h0", "c0"), (self.R, self.H), strict=True))
        rows = () if self.unbatched else (self.B,)
        made = {}
        for letter in self.cell.states:
            a = self._values((*leading, *rows, widths[f"{letter}0"]))
            made[f"{letter}0"] = self.put(a, True) if self.case.get("state", True) else None
        return made

    # What is asked for

    @property
    def options(self) -> dict[str, Any]:
        """The options that are no arrays."""
        asked = dict(self.case.get("options", {}))
        for name in ("projection", "peephole", "layer_norm"):
            asked.pop(name, None)
        if "zoneout" in asked and len(self.cell.states) == 2:
            asked["zoneout"] = tuple(asked["zoneout"])
        return asked

    @property
    def drawing(self) -> dict[str, Any]:
        """Whether random numbers are drawn, and their seed."""
        return {"training": self.case.get("training", True), "seed": 2**40 + self.case["seed"]}

    def gradients(self, results: Iterable[Any], names: list[str]) -> list[dict[str, Any]]:
        """Draw gradients of results: the given ones, then the others if there are any.

        None stands for a gradient of zeros.
        """
        made = {}
        for name, r in zip(names, results, strict=False):
            value = self._values(tuple(r.shape))
            if name in ("dy", "d_cells"):
                value = value[:, None] if self.unbatched else value
                made[name] = self._sequence(value, of_state=name == "d_cells")
            else:
                made[name] = self.put(value, of_state=True)
        given = self.case.get("given", names)
        first = {k: v if k in given else None for k, v in made.items()}
        others = {k: None if k in given else v for k, v in made.items()}
        return [first] if set(given) >= set(made) else [first, others]


def laid_out(a: Array, layout: str) -> Array:
    """Return the values of a (T, B, n) in memory of another order, with NaN between them."""
    T, B, n = a.shape
    if layout == "batch first":
        return np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1)
    if layout == "backwards":
        return np.ascontiguousarray(a[::-1])[::-1]
    if layout == "unaligned":
        b = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
        b[...] = a
        return b
    if layout == "broadcast":
        return np.broadcast_to(a[:, :1], a.shape) if B else a
    if layout == "read-only":
        a.flags.writeable = False
        return a
    if layout == "sliced":
        b = np.full((T, B, n + 3), np.nan, a.dtype)[..., 1 : n + 1]
    elif layout == "second rows":
        b = np.full((T, 2 * B, n), np.nan, a.dtype)[:, ::2]
    elif layout == "stepped":
        b = np.full((T, B, 2 * n), np.nan, a.dtype)[..., ::2]
    else:
        return a
    b[...] = a
    return b


def named(prefix: str, results: Any) -> Arrays:
    """Give each array of results a name."""
    if results is None:
        return {}
    if isinstance(results, dict):
        found: Arrays = {}
        for k, v in results.items():
            found |= named(f"{prefix} {k}", v)
        return found
    if isinstance(results, (tuple, list)):
        if hasattr(results, "_asdict"):
            return named(prefix, results._asdict())
        return named(prefix, {str(i): v for i, v in enumerate(results)})
    return {prefix: results}


# What a case runs


def run_op(case: Case) -> Arrays:
    """An op without and with a pullback."""
    inputs = Inputs(case)
    cell = inputs.cell
    call = functools.partial(getattr(fr, cell.op), **cell.arguments)
    vjp = functools.partial(getattr(fr, f"{cell.op}_vjp"), **cell.arguments)
    arguments = inputs.arrays | inputs.parameters | inputs.state() | inputs.masks
    arguments |= inputs.drawing | {"reverse": case.get("reverse", False)}
    if inputs.on_gpu:
        arguments["precision"] = "tf32" if case["dtype"] == "tf32" else "exact"
    options = inputs.options
    plain = {k: v for k, v in options.items() if k not in OF_VJP}
    results = call(**arguments, **plain)
    found = named("call", results)
    if case.get("out"):
        out = laid_out(np.full((inputs.T, inputs.B, inputs.R), 7, case["dtype"]), "sliced")
        out = out[:, 0] if inputs.unbatched else out
        found |= named("call with out", call(**arguments, **plain, out=out))
    results, pullback = vjp(**arguments, **options)
    found |= named("vjp", results)
    names = ["dy", *(f"d{letter}_n" for letter in cell.states)]
    names += ["d_cells"] * options.get("return_cells", False)
    for n, given in enumerate(inputs.gradients(results, names)):
        found |= named(f"pullback {n}", pullback(**given))
    return found


def layer_arguments(inputs: Inputs) -> dict[str, Any]:
    """Return what a layer of ours, or a module of PyTorch, is built with."""
    asked = inputs.case.get("options", {})
    of_call = (*OF_VJP, "return_cells", "trace")
    arguments = {k: v for k, v in inputs.options.items() if k not in of_call}
    arguments["bias"] = inputs.case.get("bias", True)
    if "projection" in asked:
        arguments["proj_size"] = inputs.R
    return arguments | {n: True for n in ("peephole", "layer_norm") if n in asked}


def make_layer(inputs: Inputs, **more: Any) -> Any:
    """Build a layer of the class that has the case's cell, every parameter drawn."""
    case, cell = inputs.case, inputs.cell
    layer = getattr(fr, cell.op.upper())(
        inputs.I,
        inputs.H,
        dtype="float64" if inputs.dtype == "float64" else "float32",
        rng=case["seed"],
        **layer_arguments(inputs),
        **cell.arguments,
        **more,
    )
    vectors = {
        k: v + inputs.rng.normal(size=v.shape) / 4
        for k, v in layer.state_dict().items()
        if k.startswith(("gamma", "beta"))
    }
    layer.load_state_dict(layer.state_dict() | vectors)
    if inputs.on_gpu:
        dtype = "float32" if case["dtype"] == "tf32" else case["dtype"]
        layer.to("cuda", dtype, "tf32" if case["dtype"] == "tf32" else "exact")
    return layer


def run_layer(case: Case) -> Arrays:
    """A layer, or several in one or both directions, without and with a pullback."""
    inputs = Inputs(case)
    layers, two = case.get("layers", 1), case.get("bidirectional", False)
    batch_first = case.get("batch_first", False)
    layer = make_layer(
        inputs,
        num_layers=layers,
        bidirectional=two,
        batch_first=batch_first,
        dropout=case.get("dropout", 0.0),
    )

    def turned(a: Any) -> Any:
        return a.swapaxes(0, 1) if batch_first and not inputs.unbatched else a

    x = turned(inputs.arrays["x"])
    masks = {k: turned(v) if k == "resets" else v for k, v in inputs.masks.items()}
    pair = tuple(inputs.state((layers * (1 + two),)).values())
    state = None if pair[0] is None else pair if len(pair) > 1 else pair[0]
    options = inputs.options
    of_vjp = {k: v for k, v in options.items() if k in (*OF_VJP, "return_cells", "trace")}
    of_call = {k: v for k, v in of_vjp.items() if k not in OF_VJP}
    found = named("simple", layer(x, state))
    found |= named("call", layer(x, state, **masks, **inputs.drawing, **of_call))
    results, pullback = layer.vjp(x, state, **masks, **inputs.drawing, **of_vjp)
    found |= named("vjp", results)
    y, final, *others = results
    cells = others[:1] if options.get("return_cells") else []
    finals = final if isinstance(final, tuple) else (final,)
    names = ["dy", "dh_n", "dc_n"][: 1 + len(finals)] + ["d_cells"] * len(cells)
    rows = [turned(y), *finals, *map(turned, cells)]
    for n, given in enumerate(inputs.gradients(rows, names)):
        d = [given[name] for name in names[1 : 1 + len(finals)]]
        arguments = {"d_state": tuple(d) if len(d) > 1 else d[0]}
        for name in ("dy", *["d_cells"] * len(cells)):
            arguments[name] = None if given[name] is None else turned(given[name])
        found |= named(f"pullback {n}", pullback(**arguments))
    return found


def run_stream(case: Case) -> Arrays:
    """A layer step by step, rows starting anew now and then, and in two parts."""
    inputs = Inputs(case)
    layer = make_layer(inputs, num_layers=case.get("layers", 1))
    stream = fr.Stream(layer, None if inputs.unbatched else inputs.B)
    x, ys = inputs.arrays["x"], []
    for t in range(inputs.T):
        if inputs.rng.random() < 0.2:
            stream.reset(np.flatnonzero(inputs.rng.random(inputs.B) < 0.5))
        ys.append(stream.step(x[t]))
    found = named("steps", {"y": np.stack(ys), "state": stream.state})
    middle = inputs.T // 2
    first, state = layer(x[:middle])
    second, state = layer(x[middle:], state)
    return found | named("parts", {"first": first, "second": second, "state": state})


def run_torch(case: Case) -> Arrays:
    """A module of PyTorch, of whose inputs and parameters autograd wants some."""
    torch: Any = importlib.import_module("torch")
    modules: Any = importlib.import_module("fusedrnn.torch")
    inputs = Inputs(case)
    layers, two = case.get("layers", 1), case.get("bidirectional", False)
    batch_first = case.get("batch_first", False)
    layer = make_layer(inputs, num_layers=layers, bidirectional=two, batch_first=batch_first)
    arguments = {"num_layers": layers, "bidirectional": two, "batch_first": batch_first}
    arguments |= layer_arguments(inputs) | inputs.cell.arguments
    kind = getattr(modules, inputs.cell.op.upper())
    module = kind(inputs.I, inputs.H, dtype=getattr(torch, case["dtype"]), **arguments)
    values = {k: torch.from_numpy(v.copy()) for k, v in layer.state_dict().items()}
    module.load_state_dict(values)
    frozen = case.get("frozen", [])
    for name, p in module.named_parameters():
        p.requires_grad_(name.rpartition("_l")[0] not in frozen)

    def turned(a: Any) -> Any:
        return a.swapaxes(0, 1) if batch_first and not inputs.unbatched else a

    x = torch.from_numpy(turned(inputs.arrays["x"]).copy()).requires_grad_("x" not in frozen)
    pair = tuple(inputs.state((layers * (1 + two),)).values())
    leaves = [None if a is None else torch.from_numpy(a).requires_grad_() for a in pair]
    state = None if pair[0] is None else tuple(leaves) if len(pair) > 1 else leaves[0]
    masks = {k: turned(v) if k == "resets" else v for k, v in inputs.masks.items()}
    asked = {k: torch.from_numpy(np.array(v)) for k, v in masks.items()}
    asked |= {"seed": inputs.drawing["seed"]}
    options = inputs.options
    of_vjp = {k: v for k, v in options.items() if k in (*OF_VJP, "return_cells", "trace")}
    module.train(inputs.drawing["training"])
    with torch.no_grad():
        found = named("simple", as_arrays(module(x, state, seed=asked["seed"])))
        found |= named("inference", as_arrays(module(x, state, **asked, **of_vjp)))
    results = module(x, state, **asked, **of_vjp)
    found |= named("training", as_arrays(results))
    y, final, *others = results
    finals = final if isinstance(final, tuple) else (final,)
    outputs = [y, *finals, *others[: bool(options.get("return_cells"))]]
    names = ["dy", "dh_n", "dc_n"][: 1 + len(finals)] + ["d_cells"] * (len(outputs) > 3)
    rows = [a.detach().numpy() for a in outputs]
    drawn = inputs.gradients([turned(rows[0]), *rows[1:3], *map(turned, rows[3:])], names)
    seeds = [drawn[0][name] for name in names]
    given = [
        (out, torch.from_numpy((turned(d) if d.ndim == y.ndim and n in (0, 3) else d).copy()))
        for n, (out, d) in enumerate(zip(outputs, seeds, strict=False))
        if d is not None and out.requires_grad
    ]
    if given:
        torch.autograd.backward([out for out, _ in given], [d for _, d in given])
    wanted = {"x": x, "h0": leaves[0], "c0": leaves[-1]} | dict(module.named_parameters())
    # Whether autograd adds zeros of other layers to a state's, which makes -0 0, is not ours.
    grads = {k: a.grad + 0 for k, a in wanted.items() if a is not None and a.grad is not None}
    return found | named("gradients", as_arrays(grads))


def as_arrays(results: Any) -> Any:
    """Return tensors in tuples and dicts as arrays."""
    if isinstance(results, tuple):
        return tuple(map(as_arrays, results))
    if isinstance(results, dict):
        return {k: as_arrays(v) for k, v in results.items()}
    return results.detach().numpy()


def run_math(case: Case) -> Arrays:
    """The elementwise functions, on random bits and where they change their way."""
    rng, dtype = np.random.default_rng(case["seed"]), np.dtype(case["dtype"])
    bits = rng.integers(0, 256, 100_000 * dtype.itemsize, np.uint8).view(dtype)
    edges = [0, np.inf, np.nan, 0.34657, 0.69315, 88.72, 87.3365, 709.78, 708.3964, 745]
    parts = [bits, *(rng.uniform(-r, r, 50_000) for r in (1e-3, 1, 10, 100, 800))]
    x = np.concatenate([*parts, edges, np.negative(edges)]).astype(dtype)
    found = {}
    for name in ("sigmoid", "tanh"):
        for n in (len(x), 1, 3, 17):
            found[f"{name} of {n}"] = _cpu.elementwise(name, x[-n:].copy())
    return found


RUNS: dict[str, Callable[[Case], Arrays]] = {
    "op": run_op,
    "layer": run_layer,
    "stream": run_stream,
    "torch": run_torch,
    "math": run_math,
}


# The answer


def on_host(a: Any) -> Array:
    """Return an array's values; bfloat16 comes as float32."""
    return np.ascontiguousarray(a.numpy() if isinstance(a, cuda.Array) else a)


def digests(a: Array) -> list[str]:
    """Return a digest of all bits, and one that takes every NaN for the same."""
    head = f"{a.dtype.str} {a.shape}".encode()
    whole = hashlib.sha256(head + a.tobytes()).hexdigest()
    is_nan = np.isnan(a) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    if not is_nan.any():
        return [whole, whole]
    return [whole, hashlib.sha256(head + np.where(is_nan, np.nan, a).tobytes()).hexdigest()]


def answer(case: Case, flips: bool) -> dict[str, Any]:
    """Run a case; `flips` changes the last bit of one of its results, to try the comparison."""
    if "device" in case:
        cuda._module().wish(exchange=EXCHANGES.get(case.get("exchange", ""), -1))
    else:
        fr.set_num_threads(case["threads"])
    arrays = {k: on_host(a) for k, a in RUNS[case["way"]](case).items()}
    if flips and case["seed"] % 50 == 0:
        name, a = next((k, a) for k, a in reversed(arrays.items()) if a.size)
        a = a.copy()
        a.reshape(-1)[a.size // 2 :].view(np.uint8)[0] ^= 1
        arrays[name] = a
    if not case.get("dump"):
        return {"arrays": {k: digests(a) for k, a in arrays.items()}}
    return {
        "dumped": {
            k: [a.dtype.str, list(a.shape), base64.b64encode(a.tobytes()).decode()]
            for k, a in arrays.items()
        }
    }


def main() -> None:
    """Tell what this build has, then answer until the input ends."""
    channel, sys.stdout = sys.stdout, sys.stderr
    flips = "--flip" in sys.argv
    build = {
        "cells": {
            name: {
                "gates": len(cell.gates),
                "has_c": "c" in cell.states,
            }
            for name, cell in CELLS.items()
        },
        "isas": [name for name, here in _cpu.isas().items() if here],
        "isa": fr.get_isa(),
        "device": cuda.status(),
    }
    print(json.dumps(build), file=channel, flush=True)
    np.seterr(all="ignore")
    for line in sys.stdin:
        try:
            told = answer(json.loads(line), flips)
        except Exception as error:
            if "dump" in line:
                traceback.print_exc()
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), file=channel, flush=True)


if __name__ == "__main__":
    main()
