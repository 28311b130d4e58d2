"""A call: check its arguments in their order, run it, and compute gradients.

Ops, layers and streams run through this module. On the CPU a call is first tried with unchecked
arguments: `_cpu.Layers.forward` returns None if the kernels cannot read one of them. Then the
functions here check and convert the arguments, or raise an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import checks, cuda
from ._cpu import Layers as CompiledLayers
from .backend import Backend, Layers, Spec, Tape
from .backend.cpu import HOST
from .backend.cuda import Device
from .cells import Cell
from .options import PLAIN, check_options
from .reference import Grads, Narrow, Options, Parameters
from .weights import Weights

# Keyword arguments of ops that are arrays, and others that `check_options` does not know.
_ARRAYS = Parameters._fields[4:]
_MASKS = ("lengths", "resets", "mask")
_OTHERS = (*_MASKS, "reverse", "precision")


def backend_of(x: Any, precision: Any = "exact") -> Backend:
    """Return the backend of a call with x: the GPU that x is on, or the CPU."""
    cuda.check_precision(precision)
    framework = cuda.framework_of(x)
    if framework is not None:
        return Device(x, framework, precision)
    if precision != "exact":
        raise ValueError(f'precision must be "exact" on the CPU, got "{precision}"')
    return HOST


# Arguments


def check_input(on: Backend, x: Any, batch_first: bool = False, I: int | None = None) -> Any:
    """Check x, which must have I features unless I is None."""
    x = on.array("x", x)
    checks.sequence(x, "(B, T, I)" if batch_first else "(T, B, I)", I)
    return x


def sizes(spec: Spec, x: Any) -> tuple[int, tuple[int, ...]]:
    """Return T and (B,), or T and () for x without a batch."""
    if len(x.shape) == 2:
        return int(x.shape[0]), ()
    T, B = x.shape[:2]
    return (int(B), (int(T),)) if spec.batch_first else (int(T), (int(B),))


def split_state(name: str, cell: Cell, value: Any) -> tuple[Any, ...]:
    """Split a state into one value for each letter of the cell; None stands for zeros."""
    count = len(cell.states)
    if count == 1:
        return (value,)
    if value is None:
        return (None,) * count
    if not isinstance(value, (tuple, list)) or len(value) != count:
        is_sequence = isinstance(value, (tuple, list))
        length = f" of length {len(value)}" if is_sequence else ""
        raise TypeError(
            f"{name} must be a pair ({', '.join(cell.states)}) or None, "
            f"got {type(value).__name__}{length}"
        )
    return tuple(value)


def _joined(state: tuple[Any, ...]) -> Any:
    """Join a split state again: h, a pair (h, c), or None if both are None."""
    if all(s is None for s in state):
        return None
    return state if len(state) > 1 else state[0]


def check_state(
    on: Backend,
    spec: Spec,
    names: list[str],
    values: tuple[Any, ...],
    dtype: Any,
    batch: tuple[int, ...],
) -> Any:
    """Check a state or its gradient."""
    checked: list[Any] = []
    for name, value, width in zip(names, values, (spec.R, spec.H), strict=False):
        if value is None:
            checked.append(None)
            continue
        axes = ["layers*directions"] * spec.layered + ["B"] * len(batch)
        axes.append("R" if width != spec.H else "H")
        meaning = f"({', '.join(axes)})" if len(axes) > 1 else f"({axes[0]},)"
        state = on.state(name, value, on.state_dtype(dtype))
        checks.shape(name, state, spec.state_shape(batch, width), meaning)
        checked.append(state)
    return _joined(tuple(checked))


def check_masks(
    on: Backend, spec: Spec, x: Any, options: Options, lengths: Any, resets: Any, mask: Any
) -> tuple[Any, Any, Any]:
    """Check the masks of x: lengths, resets and mask."""
    T, batch = sizes(spec, x)
    axes = "(T,)" if not batch else "(B, T)" if spec.batch_first else "(T, B)"
    if lengths is not None:
        lengths = on.lengths(lengths, T, batch)
    if resets is not None:
        resets = on.flags("resets", resets, x.shape[:-1], axes)
    if mask is not None:
        mask = on.flags("mask", mask, x.shape[:-1], axes)
        if lengths is not None:
            on.check_mask(mask, lengths, int(bool(batch) and spec.batch_first))
    checks.repeats(mask, options.repeats)
    return lengths, resets, mask


def check_parameters(
    cell: Cell, on: Backend, x: Any, weights: tuple[Any, ...], others: Mapping[str, Any]
) -> Parameters:
    """Check the parameters of an op on x; the first of `weights` determines H."""
    values = dict(zip(Parameters._fields, weights, strict=False)) | dict(others)
    I, G = x.shape[-1], len(cell.gates)

    def read(name: str) -> Any:
        value = values[name]
        if not isinstance(value, Narrow):
            return on.array(name, value, x.dtype, whole=True)
        if x.dtype != "float32":
            raise TypeError(f"x must be float32 with {value.precision} weights, got {x.dtype}")
        return value

    weight_ih = read("weight_ih")
    if len(weight_ih.shape) != 2 or weight_ih.shape[1] != I or weight_ih.shape[0] % G:
        axes = cell.parameter_shapes(I, 1)["weight_ih"].axes
        raise ValueError(
            f"weight_ih must have shape {axes} with I = {I}, got {weight_ih.shape}"
        )
    H = weight_ih.shape[0] // G
    if H == 0:
        raise ValueError(f"weight_ih must have at least {G} rows, got {weight_ih.shape}")
    R = None
    if values.get("weight_hr") is not None and "c" in cell.states:
        weight_hr = read("weight_hr")
        if (
            len(weight_hr.shape) != 2
            or weight_hr.shape[1] != H
            or not 1 <= weight_hr.shape[0] <= H
        ):
            raise ValueError(
                f"weight_hr must have shape (R, H) with 1 <= R <= H = {H}, "
                f"got {weight_hr.shape}"
            )
        R = weight_hr.shape[0]
    shapes = cell.parameter_shapes(I, H, R)
    checked = {"weight_ih": weight_ih}
    for name, value in values.items():
        if name not in shapes and value is not None:
            raise TypeError(f"{cell.op} has no {name}")
        if name == "weight_ih" or (value is None and name != "weight_hh"):
            continue
        checked[name] = read(name)
        checks.shape(name, checked[name], *shapes[name])
    norms = [n for n in shapes if n.startswith(("gamma", "beta"))]
    missing = [n for n in norms if n not in checked]
    if missing and len(missing) < len(norms):
        raise ValueError(
            f"{missing[0]} must be given with the others of {', '.join(norms)}, got None"
        )
    return Parameters(**checked)


# Results


def with_gates(spec: Spec, results: tuple[Any, ...], names: list[str]) -> tuple[Any, ...]:
    """Replace the last result, the arrays of all gates, by a dict of single gates.

    A gate's key is its letter and the name of its layer and direction in `names`.
    """
    *others, traces = results
    unbatched = len(others[0].shape) == 2

    def view(a: Any) -> Any:
        if unbatched:
            return a[:, 0]
        return a.swapaxes(0, 1) if spec.batch_first else a

    gates = {
        letter + name: view(traces[at][:, :, k])
        for at, name in enumerate(names)
        for k, letter in enumerate(spec.cell.gates)
    }
    return (*others, gates)


def pull_back(
    on: Backend,
    spec: Spec,
    tape: Tape,
    dtype: Any,
    y: Any,
    cells: Any,
    dy: Any,
    d_state: tuple[Any, ...],
    d_cells: Any,
    name_of_state: str,
) -> Any:
    """Check the gradients of the results and return the gradients of the arguments.

    `dtype` is that of x. `name_of_state` is a format string with a field for the letter.
    """
    now = on.now()
    if d_cells is not None and cells is None:
        raise TypeError("d_cells must be None without return_cells=True, got a gradient")
    _, batch = sizes(spec, y)
    dy = _check_sequence(now, spec, "dy", dy, dtype, y)
    d_cells = _check_sequence(now, spec, "d_cells", d_cells, now.state_dtype(dtype), cells)
    names = [name_of_state.format(letter) for letter in spec.cell.states]
    return tape.backward(dy, check_state(now, spec, names, d_state, dtype, batch), d_cells)


def _check_sequence(
    on: Backend, spec: Spec, name: str, value: Any, dtype: Any, like: Any
) -> Any:
    """Check the gradient of y or of cells; None stands for zeros."""
    if value is None:
        return None
    value = on.array(name, value, dtype)
    width = "R" if spec.is_projected and name == "dy" else "H"
    last = f"directions*{width}" if spec.layered else width
    batch = "B, T, " if spec.batch_first else "T, B, "
    axes = f"(T, {last})" if len(like.shape) == 2 else f"({batch}{last})"
    checks.shape(name, value, tuple(like.shape), axes)
    return value


# Ops

_NO_OPTIONS = (None,) * len(_ARRAYS)


def plain_op(
    cell: Cell, x: Any, weights: tuple[Any, ...], states: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Run an op on the CPU with unchecked arguments; return None if they must be checked."""
    kept = weights[0]
    if isinstance(kept, Weights):
        found = kept.layers_of(cell.name).get("layers")
        if found is None or any(other is not None for other in weights[1:]):
            return None
        layers: CompiledLayers = found
    else:
        try:
            layers = CompiledLayers(
                cell.name, [weights + _NO_OPTIONS], 1, 0.0, False, False, False
            )
        except (TypeError, ValueError):
            return None
    results = layers.forward(x, _joined(states), None, None, None, PLAIN, None, False)
    return None if results is None else _flat(results)


def _flat(results: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return results as ops do, with h_n and c_n instead of a pair."""
    y, state, *others = results
    return (y, *(state if isinstance(state, tuple) else (state,)), *others)


def _arrays_of(
    kept: Weights,
    on: Backend,
    weights: tuple[Any, ...],
    arrays: dict[str, Any],
    training: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arrays of `Weights`, which must be all that was given."""
    given = dict(zip(Parameters._fields[1:], weights[1:], strict=False)) | arrays
    for name, value in given.items():
        if value is not None:
            raise TypeError(f"{name} must be None with Weights, got {type(value).__name__}")
    if str(on) != "cpu":
        raise ValueError(f"x must be on the CPU with Weights, got one on {on}")
    if training and kept.precision:
        raise ValueError(
            f"gradients need float32 or float64 weights: {kept.precision} ones are for "
            "inference"
        )
    parameters = kept.parameters
    return parameters[:4], {n: getattr(parameters, n) for n in _ARRAYS}


class OpCall:
    """A call of an op, its arguments checked."""

    def __init__(
        self,
        cell: Cell,
        x: Any,
        weights: tuple[Any, ...],
        states: tuple[Any, ...],
        arguments: Mapping[str, Any],
        training: bool = False,
        out: Any = None,
    ) -> None:
        others = {n: arguments[n] for n in _OTHERS if n in arguments}
        arrays = {n: arguments[n] for n in _ARRAYS if n in arguments}
        precision = others.get("precision", "exact")
        self.on = on = backend_of(x, precision)
        self.x = x = check_input(on, x)
        kept = weights[0] if isinstance(weights[0], Weights) else None
        if kept is not None:
            weights, arrays = _arrays_of(kept, on, weights, arrays, training)
        parameters = check_parameters(cell, on, x, weights, arrays)
        self.present = [n for n, p in parameters._asdict().items() if p is not None]
        H, R = parameters.weight_ih.shape[0] // len(cell.gates), parameters.weight_hh.shape[1]
        fields: dict[str, Any] = {"layered": False, "precision": precision}
        spec = Spec(cell, x.shape[-1], H, R, **fields)
        _, batch = sizes(spec, x)
        names = [f"{letter}0" for letter in cell.states]
        self.state = check_state(on, spec, names, states, x.dtype, batch)
        reverse = checks.flag("reverse", others.get("reverse", False))
        self.spec = replace(spec, reverse=reverse)
        options = {n: v for n, v in arguments.items() if n not in (*_ARRAYS, *_OTHERS)}
        self.options = check_options(cell, options, training, is_vjp=training)
        self.masks = check_masks(on, spec, x, self.options, *map(others.get, _MASKS))
        if kept is not None and kept.precision and self.options.training:
            raise ValueError(
                f"training must be False with {kept.precision} weights, which are for inference"
            )
        if out is not None:
            axis = "R" if R != H else "H"
            meaning = f"(T, B, {axis})" if batch else f"(T, {axis})"
            state = self.state if isinstance(self.state, tuple) else (self.state,)
            used = [x, *parameters, *state] if kept is None else [x, *state]
            out = on.output(out, (*x.shape[:-1], R), meaning, used)
        self.out = out
        if kept is None:
            self.layers: Layers = on.layers(self.spec, [parameters])
        else:
            cache = kept.layers_of(cell.name, reverse)
            self.layers = on.layers(self.spec, [parameters], cache)

    def forward(self) -> tuple[Any, ...]:
        """Run the op in inference."""
        return self._results(self._run(False))

    def vjp(self) -> tuple[tuple[Any, ...], Tape]:
        """Run the op in training; return the results and the tape for backward."""
        results, tape = self._run(True)
        return self._results(results), tape

    def _run(self, saves: bool) -> Any:
        arguments = (self.x, self.state, *self.masks, self.options, self.out)
        return self.layers.forward(*arguments, saves)

    def _results(self, results: tuple[Any, ...]) -> tuple[Any, ...]:
        return _flat(with_gates(self.spec, results, [""]) if self.options.trace else results)

    def pull_back(
        self,
        tape: Tape,
        results: tuple[Any, ...],
        dy: Any,
        d_state: tuple[Any, ...],
        d_cells: Any,
    ) -> Grads:
        """Return the gradients of the arguments from those of the results."""
        letters = self.spec.cell.states
        cells = results[1 + len(letters)] if self.options.return_cells else None
        where = (self.on, self.spec, tape, self.x.dtype, results[0], cells)
        dx, d_start, gradients = pull_back(*where, dy, d_state, d_cells, "d{}_n")
        d_starts = d_start if isinstance(d_start, tuple) else (d_start,)
        named: dict[str, Any]
        states = {f"{letter}0": d for letter, d in zip(letters, d_starts, strict=True)}
        named = dict.fromkeys(Parameters._fields) | dict(
            zip(self.present, gradients, strict=True)
        )
        return Grads(dx, **named, **states)
