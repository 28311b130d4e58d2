"""NVIDIA GPUs: arrays of any framework, and calls layer by layer.

The kernels read arrays through a `_cuda.View`. Results are arrays of x's framework.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import checks, cuda
from ..cells import Cell
from ..options import asked_of_layer
from ..reference import Options, Parameters
from . import Spec
from .cuda_arguments import (
    Problem,
    Weights,
    h_and_c,
    part_of,
    time_major,
    time_major_mask,
    values_of,
    with_axes,
    with_forget_gate,
)
from .cuda_masks import Steps

if TYPE_CHECKING:
    from .._cuda import Kernel, View
    from .._cuda import Options as KernelOptions


class Device:
    """The GPU that x is on, its current stream, and x's framework."""

    def __init__(self, x: Any, framework: cuda.Framework, precision: str) -> None:
        self._cuda = cuda._module()
        self._x = x
        self.framework = framework
        self.device = framework.device(x)
        self.stream = framework.stream(x, self.device)
        self._x_view = framework.view(x, self.stream)
        self.dtype = self._x_view.dtype
        if self.dtype not in cuda.DTYPES:
            known = ", ".join(cuda.DTYPES)
            raise TypeError(f"x must be one of {known} on a GPU, got {self.dtype}")
        self._precision = cuda.precision_of(self.dtype, precision)
        capability = self._cuda.device(self.device)["capability"]
        if capability < 80:
            raise RuntimeError(
                f"x must be on a GPU of compute capability 8.0 or newer, "
                f"got {capability / 10:.1f}"
            )

    def now(self) -> Device:
        """Return this GPU with the stream that is current now, which waits for this one."""
        stream = self.framework.stream(self._x, self.device)
        if stream == self.stream:
            return self
        self._cuda.order(self.device, self.stream, stream)
        later = copy(self)
        later.stream = stream
        return later

    def __str__(self) -> str:
        return f"cuda:{self.device}"

    # Arguments

    def _argument_view(self, name: str, value: Any) -> View:
        if value is self._x:
            return self._x_view
        if value is None:
            raise TypeError(f"{name} must be an array, got None")
        framework = cuda.framework_of(value)
        if framework is None:
            kind = type(value).__name__
            raise TypeError(f"{name} must be on {self} like x, got {kind} on the host")
        device = framework.device(value)
        if device != self.device:
            raise ValueError(f"{name} must be on {self} like x, got cuda:{device}")
        if type(framework) is not type(self.framework):
            stream = framework.stream(value, device)
            if stream != self.stream:
                self._cuda.order(device, stream, self.stream)
        return framework.view(value, self.stream)

    def array(
        self, name: str, value: Any, dtype: str | None = None, whole: bool = False
    ) -> View:
        """Return an array, of `dtype` unless that is None.

        Its rows must be contiguous or, if `whole`, all of it.
        """
        view = self._argument_view(name, value)
        if dtype is not None and view.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} like x, got {view.dtype}")
        if whole:
            self._check_contiguous(name, view)
        elif view.ndim and view.shape[-1] > 1 and view.size and view.strides[-1] != 1:
            raise ValueError(
                f"{name} must be contiguous along its last axis on a GPU, "
                f"got strides {view.strides}"
            )
        return view

    def _check_contiguous(self, name: str, view: View) -> None:
        if not view.is_contiguous:
            raise ValueError(f"{name} must be contiguous on a GPU, got strides {view.strides}")

    def state_dtype(self, dtype: str) -> str:
        """Return the dtype of states for x of `dtype`: at least float32."""
        return "float64" if dtype == "float64" else "float32"

    def state(self, name: str, value: Any, dtype: str) -> View:
        """Return a state or its gradient; it is not copied."""
        view = self._argument_view(name, value)
        if view.dtype != dtype:
            like = " like x" if dtype == self.dtype else f" for x of {self.dtype}"
            raise TypeError(f"{name} must be {dtype}{like}, got {view.dtype}")
        self._check_contiguous(name, view)
        return view

    def lengths(self, value: Any, T: int, batch: tuple[int, ...]) -> View:
        """Return the rows' lengths; on a GPU they are not checked, which would wait for it."""
        if cuda.framework_of(value) is None:
            host = checks.lengths(value, T, batch).astype(np.int32)
            return self._upload("lengths", host.reshape(-1), "int32")
        view = self._argument_view("lengths", value)
        if view.dtype not in ("int32", "int64"):
            raise TypeError(f"lengths must be int32 or int64 on a GPU, got {view.dtype}")
        checks.shape("lengths", view, batch, "(B,)")
        self._check_contiguous("lengths", view)
        return view if batch else view[None]

    def flags(self, name: str, value: Any, expected: tuple[int, ...], axes: str) -> View:
        """Return resets or a mask."""
        if cuda.framework_of(value) is None:
            return self._upload(name, checks.flags(name, value, expected, axes), "bool")
        view = self._argument_view(name, value)
        if view.dtype != "bool":
            raise TypeError(f"{name} must be bool on a GPU, got {view.dtype}")
        checks.shape(name, view, expected, axes)
        return view

    def check_mask(self, mask: View, lengths: View, time_axis: int) -> None:
        """Check nothing: on a GPU that would wait for it. Rows end at their lengths."""

    def _upload(self, name: str, values: Any, dtype: str) -> View:
        if self._cuda.is_capturing(self.device, self.stream):
            raise RuntimeError(
                f"{name} must be on {self} while a graph is captured, got host memory, which "
                "is gone when the graph is replayed"
            )
        return cuda._upload(values, dtype, self.device, self.stream)._view

    # Results

    def output(self, out: Any, shape: tuple[int, ...], axes: str, used: list[Any]) -> Any:
        """Raise ValueError: y cannot be written into an array of the user's on a GPU."""
        raise ValueError(f"out must be None for arrays on a GPU, got {type(out).__name__}")

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return an uninitialised array of x's framework."""
        return self.framework.empty(shape, dtype, self.device, self.stream)

    def scratch(self, shape: tuple[int, ...], dtype: str) -> View:
        """Return the view of new memory of int32 or bool."""
        item = 4 if dtype == "int32" else 1
        memory = self._bytes(item * math.prod(shape))
        where = memory.pointer, shape, None, dtype, self.device, memory.owner
        view: View = self._cuda.View(*where)
        return view

    def see(self, a: Any) -> View:
        """Return the view of an array, which may be a view itself, that the kernels read."""
        if isinstance(a, self._cuda.View):
            view: View = a
            return view
        framework = cuda.framework_of(a)
        assert framework is not None
        return framework.view(a, self.stream)

    def give(self, a: Any) -> Any:
        """Return an array from `empty` in the form that the user gets."""
        return self.framework.give(a)

    def _bytes(self, count: int) -> View:
        return self.see(self.empty((max(count, 1),), "uint8"))

    # Calls

    def layers(
        self, spec: Spec, parameters: list[Parameters], cache: dict[Any, Any] | None = None
    ) -> Layers:
        """Return layers with the parameters of each layer and direction."""
        return Layers(self, spec, parameters, cache)

    def _kernel(self, cell: Cell, precision: str | None = None) -> Kernel:
        kernel: Kernel = self._cuda.Kernel(
            cell.name, precision or self._precision, self.device, self.stream
        )
        return kernel

    def pack(
        self,
        cell: Cell,
        parameters: Parameters,
        backward: bool,
        by_rows: bool,
    ) -> Weights:
        """Pack parameters for a forward or for a backward."""
        if cell.is_coupled:
            parameters = with_forget_gate(parameters, self._insert)
        if by_rows:
            return Weights(cell, parameters, None, self.stream)
        kernel = self._kernel(cell)
        _, weight_hh, bias_ih, bias_hh, *_ = parameters
        packed = self._bytes(kernel.packed_bytes(weight_hh.shape[1], backward))
        kernel.pack(weight_hh, bias_ih, bias_hh, backward, packed)
        self._keep(*parameters)
        return Weights(cell, parameters, packed, self.stream)

    def _insert(self, a: View, blocks: int) -> View:
        """Return a copy with a block of zeros after the first."""
        H = a.shape[0] // blocks
        longer = self.see(self.empty((H * (blocks + 1), *a.shape[1:]), a.dtype))
        self._cuda.clear(longer[H : 2 * H], self.stream)
        for to, source in ((longer[:H], a[:H]), (longer[2 * H :], a[H:])):
            self._cuda.copy_on_device(to, source, self.stream)
        self._keep(a)
        return longer

    def _remove(self, a: Any, blocks: int) -> Any:
        """Return a copy without the second block."""
        view = self.see(a)
        H = view.shape[0] // (blocks + 1)
        shorter = self.empty((H * blocks, *view.shape[1:]), view.dtype)
        rest = self.see(shorter)
        for to, source in ((rest[:H], view[:H]), (rest[H:], view[2 * H :])):
            self._cuda.copy_on_device(to, source, self.stream)
        return shorter

    def drop(self, a: View, p: float, seed: int, kind: str, where: int, to: View) -> None:
        """Write a (T, B, n), with dropout, into `to`, which may be a itself."""
        wide, output = self._widened(a), to if self._is_wide else self._wide(to.shape)
        self._cuda.drop(wide, p, seed, kind, where, output, self.stream)
        self._finish(output, to)
        self._keep(a)

    def drop_weights(self, weight: View, options: Options, to: View | None = None) -> View:
        """Mask R, or its gradient, into `to` or a new array; return that."""
        output = self.see(self.empty(weight.shape, self.dtype)) if to is None else to
        o = options
        self.drop(weight, o.weight_dropout, o.seed, "weights", o.where, output)
        return output

    def with_weights_dropped(self, parameters: Parameters, options: Options) -> Parameters:
        """Return the parameters, R masked if the call drops weights."""
        if not options.drops_weights:
            return parameters
        return parameters._replace(weight_hh=self.drop_weights(parameters.weight_hh, options))

    # Steps that go row by row compute 16 bits in float32; peepholes are float32 always.

    @property
    def _is_wide(self) -> bool:
        return self.dtype in ("float32", "float64")

    def _wide(self, shape: tuple[int, ...]) -> View:
        return self.see(self.empty(shape, self.state_dtype(self.dtype)))

    def _widened(self, a: View) -> View:
        """Return an array in float32 or float64."""
        if self._is_wide:
            return a
        wide = self._wide(a.shape)
        self._cuda.convert(a, wide, self.stream)
        self._keep(a)
        return wide

    def _widens(self, name: str, problem: Problem) -> bool:
        return not self._is_wide and (problem.by_rows or name == "weight_ch")

    def _input(self, name: str, a: View | None, problem: Problem) -> View | None:
        """Return the array that the kernels read for an argument, widened if necessary."""
        if a is None or a.dtype != self.dtype or not self._widens(name, problem):
            return a
        return self._widened(a)

    def _output(self, name: str, to: View, problem: Problem) -> View:
        """Return the array that the kernels write; `_finish` then copies it into `to`."""
        return self._wide(to.shape) if self._widens(name, problem) else to

    def _finish(self, output: View, to: View) -> None:
        """Convert an output into its destination unless the kernels wrote there."""
        if output is not to:
            self._cuda.convert(output, to, self.stream)

    def _call(
        self, weights: Weights, problem: Problem, adds_dx: bool = False
    ) -> tuple[Kernel, dict[str, Any], KernelOptions]:
        """Return a call's kernel, the arrays that both directions read, and the options."""
        h0, c0 = h_and_c(problem.state)
        lengths, resets = problem.lengths, problem.resets
        arrays = {"x": problem.x, "h0": h0, "c0": c0} | weights.parameters._asdict()
        arrays = {k: self._input(k, a, problem) for k, a in arrays.items()}
        arrays |= {"packed": weights.packed, "lengths": lengths, "resets": resets}
        arrays["cells"] = problem.cells
        precision = "tf32" if problem.by_rows and not self._is_wide else None
        options = self._cuda.Options(*values_of(problem.options), adds_dx)
        return self._kernel(weights.cell, precision), arrays, options

    def forward(self, weights: Weights, problem: Problem, save: bool = False) -> View | None:
        """Queue a forward, which writes y and the final state; return the saved values."""
        self._await(weights)
        kernel, arrays, options = self._call(weights, problem)
        h_n, c_n = h_and_c(problem.final)
        y, trace = self._output("y", problem.y, problem), problem.trace
        gates, kernel_gates = problem.cell.gates, problem.cell.kernel_gates
        if trace is not None and kernel_gates != gates:
            T, B, _, H = trace.shape
            dtype = self.state_dtype(self.dtype) if problem.by_rows else self.dtype
            trace = self.see(self.empty((T, B, len(kernel_gates), H), dtype))
        elif trace is not None:
            trace = self._output("trace", trace, problem)
        arrays |= {"h_n": h_n, "c_n": c_n, "y": y, "trace": trace}
        saves = save and not problem.options.recompute
        saved = kernel.forward(arrays, options, problem.reverse, saves, self._bytes)
        self._finish(y, problem.y)
        if trace is not problem.trace:
            for k, gate in enumerate(gates):
                values = trace[:, :, kernel_gates.index(gate)]
                self._cuda.convert(values, problem.trace[:, :, k], self.stream)
        self._keep(*arrays.values())
        return saved

    def _await(self, weights: Weights) -> None:
        """Let this stream wait for the one that packs the weights."""
        if weights.stream != self.stream:
            self._cuda.order(self.device, weights.stream, self.stream)
            self._use(weights.packed, *weights.parameters)

    def _use(self, *views: View | None) -> None:
        """Keep arrays of another stream alive until this stream is done with them."""
        for view in views:
            if view is not None:
                self.framework.used_on(view.owner, self.device, self.stream)

    def _keep(self, *views: View | None) -> None:
        """Keep a call's arrays alive until it is done, if their framework does not."""
        if self.framework.keeps_nothing:
            self._use(*views)

    def check_may_keep(self) -> None:
        """Raise RuntimeError while a graph is captured: it would pack only when replayed."""
        if self._cuda.is_capturing(self.device, self.stream):
            raise RuntimeError(
                "a layer packs its weights in the first call after they changed: make that "
                "call before a graph is captured"
            )


@dataclass(frozen=True)
class PassTape:
    """The record of a training forward of one layer in one direction, for its backward."""

    on: Device
    problem: Problem
    weights: Weights  # packed for backward
    saved: View | None

    def backward(
        self,
        dy: View | None,
        d_final: tuple[View | None, ...],
        d_cells: View | None,
        dx: View | None,
        d_state: tuple[View, ...],
        adds: bool = False,
        wanted: Collection[str] = Parameters._fields,
    ) -> Parameters:
        """Queue the gradients of x and of the initial state, and return the parameters'.

        With `adds`, the gradient of x is added to dx; if dx is None, it is not computed. Only
        the gradients of the parameters in `wanted` are computed.
        """
        on = self.on.now()
        problem = self.problem
        x, y = problem.x, problem.y
        if on is not self.on:
            masks = problem.lengths, problem.resets
            on._use(x, *problem.state, y, self.saved, problem.cells, *masks)
        coupled = problem.cell.is_coupled
        weights = self.weights.parameters
        present = {n: p for n, p in weights._asdict().items() if p is not None and n in wanted}
        d = Parameters(**dict.fromkeys(Parameters._fields))._replace(
            **{n: on.empty(p.shape, x.dtype) for n, p in present.items()}
        )
        dh_n, dc_n = h_and_c(d_final)
        dh0, dc0 = h_and_c(d_state)
        on._await(self.weights)
        kernel, arrays, options = on._call(self.weights, problem, adds)
        arrays |= {k: on._input(k, a, problem) for k, a in (("y", y), ("dy", dy))}
        arrays |= {"dh_n": dh_n, "dc_n": dc_n, "dh0": dh0, "dc0": dc0}
        arrays |= {"saved": self.saved, "dcells": d_cells}
        destinations = {k: on.see(v) for k, v in d._asdict().items() if v is not None}
        if dx is not None:
            destinations["x"] = dx
        outputs = {k: on._output(k, to, problem) for k, to in destinations.items()}
        if adds and dx is not None and outputs["x"] is not dx:
            on._cuda.convert(dx, outputs["x"], on.stream)
        arrays |= {f"d{k}": v for k, v in outputs.items()}
        kernel.backward(arrays, options, problem.reverse, on._bytes)
        for name, to in destinations.items():
            on._finish(outputs[name], to)
        on._keep(*arrays.values())
        if coupled:
            d = with_forget_gate(d, on._remove)
        if problem.options.drops_weights and d.weight_hh is not None:
            view = on.see(d.weight_hh)
            on.drop_weights(view, problem.options, view)
        return d


@dataclass(frozen=True)
class Layers:
    """Layers in one or both directions on a GPU, called one after the other.

    A call packs the weights when it first needs to, and keeps them in `cache` if there is one.
    """

    on: Device
    spec: Spec
    parameters: list[Parameters]
    cache: dict[Any, Any] | None

    def _weights(self, at: int, views: Parameters, options: Options, backward: bool) -> Weights:
        on, cell = self.on, self.spec.cell
        by_rows = bool(asked_of_layer(cell, views, False))
        if self.cache is None or options.drops_weights:
            return on.pack(cell, views, backward, by_rows)
        key = ("cuda", at, backward)
        if key not in self.cache:
            on.check_may_keep()
            self.cache[key] = on.pack(cell, views, backward, by_rows)
        packed: Weights = self.cache[key]
        return packed

    def forward(
        self,
        x: View,
        state: Any,
        lengths: Any,
        resets: Any,
        mask: Any,
        options: Options,
        out: Any,
        saves: bool,
        /,
    ) -> Any:
        """Queue a call; see `backend.Layers`."""
        on, spec = self.on, self.spec
        unbatched = x.ndim == 2
        sequence = time_major(x, spec)
        resets, mask = (time_major_mask(m, spec, unbatched) for m in (resets, mask))
        steps = None
        if mask is not None:
            where = spec.directions, spec.reverse
            steps = Steps.of(on, mask, lengths, resets, *where)
            sequence, lengths, resets = steps.compact(sequence), steps.lengths, steps.resets
        (T, B, _), D = sequence.shape, spec.directions
        letters, state_dtype = spec.cell.states, on.state_dtype(x.dtype)
        pair = state if isinstance(state, tuple) else (state,) * len(letters)
        widths = (spec.R, spec.H)[: len(letters)]
        final = [on.empty((spec.layers * D, B, width), state_dtype) for width in widths]
        ends = [on.see(s) for s in final]
        starts = [with_axes(s, spec, unbatched) for s in pair]
        keeps_cells = options.recompute and "c" in letters
        cells, traces, tapes = None, [], []
        for at in range(spec.layers * D):
            layer, direction = divmod(at, D)
            is_last = layer == spec.layers - 1
            if direction == 0:
                below = sequence if layer == 0 else self._dropped(sequence, layer - 1, options)
                y = on.empty((T, B, D * spec.R), x.dtype)
                sequence = on.see(y)
                if keeps_cells or (options.return_cells and is_last):
                    cells = on.empty((T, B, D * spec.H), state_dtype)
            if options.trace:
                traces.append(on.empty((T, B, len(spec.cell.gates), spec.H), x.dtype))
            pass_options = options._replace(where=options.where + at)
            parameters = on.with_weights_dropped(self._views(at), pass_options)
            problem = Problem(
                spec.cell,
                below,
                tuple(None if s is None else s[at] for s in starts),
                lengths,
                resets,
                spec.reverse or direction == 1,
                part_of(sequence, direction, spec.R, D),
                tuple(s[at] for s in ends),
                pass_options,
                bool(asked_of_layer(spec.cell, parameters, False)),
                None if cells is None else part_of(on.see(cells), direction, spec.H, D),
                on.see(traces[-1]) if traces else None,
            )
            weights = self._weights(at, parameters, pass_options, False)
            saved = on.forward(weights, problem, saves)
            if saves:
                backward_weights = self._weights(at, parameters, pass_options, True)
                tapes.append(PassTape(on, problem, backward_weights, saved))
        if steps is not None:
            h0 = None if starts[0] is None else starts[0][-D:]
            y, cells, traces = spread_results(steps, y, h0, cells, traces, options.repeats)
        results = [self._user_sequence(y, unbatched), self._user_state(final, unbatched)]
        if options.return_cells:
            results.append(self._user_sequence(cells, unbatched))
        if options.trace:
            results.append([on.give(trace) for trace in traces])
        if not saves:
            return tuple(results)
        return tuple(results), Tape(self, tapes, options, x.shape, unbatched, steps)

    def _views(self, at: int) -> Parameters:
        return Parameters(*[p if p is None else self.on.see(p) for p in self.parameters[at]])

    def _dropped(self, y: View, layer: int, options: Options) -> View:
        """Return a layer's y with dropout, as the next layer reads it."""
        on, p = self.on, self.spec.dropout
        if not (p and options.training):
            return y
        dropped = on.see(on.empty(y.shape, y.dtype))
        on.drop(y, p, options.seed, "between", layer, dropped)
        return dropped

    def _user_sequence(self, a: Any, unbatched: bool) -> Any:
        a = self.on.give(a)
        if unbatched:
            return a[:, 0]
        return a.swapaxes(0, 1) if self.spec.batch_first else a

    def _user_state(self, state: Sequence[Any], unbatched: bool) -> Any:
        states = [self.on.give(s) for s in state]
        if not self.spec.layered:
            states = [s[0] for s in states]
        if unbatched:
            states = [s[..., 0, :] for s in states]
        return tuple(states) if len(states) > 1 else states[0]


def spread_results(
    steps: Steps, y: Any, h0: View | None, cells: Any, traces: list[Any], repeats: bool
) -> tuple[Any, Any, list[Any]]:
    """Return y, cells and gates with the steps at their own times."""
    on = steps.on
    cells = None if cells is None else steps.spread(cells)
    traces = [steps.spread(trace) for trace in traces]
    if not repeats:
        return steps.spread(y), cells, traces
    compact = on.see(y)
    y = on.empty(compact.shape, compact.dtype)
    steps.repeat_into(compact, h0, on.see(y))
    return y, cells, traces


@dataclass(frozen=True)
class Tape:
    """The record of a training call on a GPU, for its backward."""

    layers: Layers
    passes: list[PassTape]
    options: Options
    shape: tuple[int, ...]  # of x
    unbatched: bool
    steps: Steps | None = None

    def backward(self, dy: Any, d_state: Any, d_cells: Any, /) -> Any:
        """Queue the gradients; see `backend.Tape`."""
        spec, options = self.layers.spec, self.options
        on, D = self.layers.on.now(), spec.directions
        first = self.passes[0].problem
        T, B, _ = first.x.shape
        letters, state_dtype = spec.cell.states, on.state_dtype(first.x.dtype)
        pair = d_state if isinstance(d_state, tuple) else (d_state,) * len(letters)
        ends = [with_axes(d, spec, self.unbatched) for d in pair]
        widths = (spec.R, spec.H)[: len(letters)]
        d_start = [on.empty((spec.layers * D, B, width), state_dtype) for width in widths]
        d_starts = [on.see(d) for d in d_start]
        dy, d_cells = time_major(dy, spec), time_major(d_cells, spec)
        user_dy, steps = dy, self.steps
        if steps is not None:
            steps = steps.on_stream(on)
            dy, d_cells = steps.gather_gradient(dy, options.repeats), steps.compact(d_cells)
        gradients: list[list[Any]] = []
        for at in reversed(range(spec.layers * D)):
            layer, direction = divmod(at, D)
            tape = self.passes[at]
            if direction == D - 1:
                dx = on.empty((T, B, tape.problem.x.shape[-1]), tape.problem.x.dtype)
            d_parameters = tape.backward(
                part_of(dy, direction, spec.R, D),
                tuple(None if d is None else d[at] for d in ends),
                part_of(d_cells, direction, spec.H, D) if layer == spec.layers - 1 else None,
                on.see(dx),
                tuple(d[at] for d in d_starts),
                adds=direction < D - 1,
            )
            gradients.insert(0, [on.give(d) for d in d_parameters if d is not None])
            if direction == 0:
                dy = on.see(dx)
                if spec.dropout and options.training and layer > 0:
                    on.drop(dy, spec.dropout, options.seed, "between", layer - 1, dy)
        flat = [d for d_parameters in gradients for d in d_parameters]
        if steps is not None:
            dx = steps.spread(dx)
            steps.add_to_start(user_dy, options.repeats, d_starts[0][-D:])
        user_dx = self.layers._user_sequence(dx, self.unbatched)
        return user_dx, self.layers._user_state(d_start, self.unbatched), flat
