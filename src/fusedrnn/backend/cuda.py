"""NVIDIA GPUs: arrays of any framework, and calls layer by layer.

The kernels read a `_cuda.View` of an array. What the user gets is an array of x's framework.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import checks, cuda
from ..cells import Cell
from ..options import asked_of_layer
from ..reference import Options, Parameters
from . import Spec

if TYPE_CHECKING:
    from .._cuda import Kernel, View
    from .._cuda import Options as KernelOptions


# The parameters with a block for each gate, and how many those of peepholes have.
_BLOCKS = dict.fromkeys(
    ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "gamma_ih", "gamma_hh"), 3
) | {"weight_ch": 2}


def _with_forget_gate(parameters: Parameters, insert: Callable[[Any, int], Any]) -> Parameters:
    """Return a coupled LSTM's parameters as an LSTM's, or gradients the other way.

    `insert` adds a block of zeros after the first of so many, or removes it. The kernels do not
    look at the forget gate's.
    """
    changed = {
        name: insert(p, _BLOCKS[name])
        for name, p in parameters._asdict().items()
        if name in _BLOCKS and p is not None
    }
    return parameters._replace(**changed)


def _h_and_c(state: Sequence[Any]) -> tuple[Any, Any]:
    """Return h and c of a cell's state or the like, None for the c that it has not."""
    h, *c = state
    return h, c[0] if c else None


def values_of(o: Options) -> tuple[Any, ...]:
    """Return options in the order in which the kernels take them."""
    masks = (*o.zoneout, o.recurrent_dropout, o.training, o.seed, o.where)
    return o.clip, o.cell_clip, *masks, o.bptt


@dataclass(frozen=True)
class Problem:
    """One layer in one direction, its results yet to be written.

    Attributes
    ----------
    x: (T, B, I). state: h0 (B, R), and c0 (B, H) of an LSTM. y: (T, B, R).
    lengths: (B,) int32 or int64. resets: (T, B). final: as state.
    by_rows: whether steps go row by row; the persistent recurrences do not know all options.
    cells: every c, (T, B, H), or None. trace: every gate, (T, B, gates, H), or None.
    """

    cell: Cell
    x: Any
    state: tuple[Any, ...]
    lengths: View | None
    resets: View | None
    reverse: bool
    y: Any
    final: tuple[Any, ...]
    options: Options
    by_rows: bool
    cells: Any = None
    trace: Any = None


@dataclass(frozen=True)
class Weights:
    """A layer's parameters in one direction, packed for the forward or the backward."""

    cell: Cell
    parameters: Parameters
    packed: View | None  # none where a step is taken row by row
    stream: int  # that packs them


class Device:
    """The GPU that x is on, its current stream, and x's framework."""

    on_cpu = False

    def __init__(self, x: Any, framework: cuda.Framework, precision: str) -> None:
        self._cuda = cuda._module()
        self._x = x
        self.framework = framework
        self.device = framework.device(x)
        self.stream = framework.stream(x, self.device)
        self._seen = framework.view(x, self.stream)
        self.dtype = self._seen.dtype
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
        """Return this GPU on the stream that is current now, after what is queued here."""
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

    def _see(self, name: str, value: Any) -> View:
        if value is self._x:
            return self._seen
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
            made_on = framework.stream(value, device)
            if made_on != self.stream:
                self._cuda.order(device, made_on, self.stream)
        return framework.view(value, self.stream)

    def array(
        self, name: str, value: Any, dtype: str | None = None, whole: bool = False
    ) -> View:
        """Return an array of `dtype`, where that is given.

        Its rows must be contiguous or, if `whole`, all of it.
        """
        view = self._see(name, value)
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
        view = self._see(name, value)
        if view.dtype != dtype:
            like = " like x" if dtype == self.dtype else f" for x of {self.dtype}"
            raise TypeError(f"{name} must be {dtype}{like}, got {view.dtype}")
        self._check_contiguous(name, view)
        return view

    def lengths(self, value: Any, T: int, batch: tuple[int, ...]) -> View:
        """Return the rows' lengths; those on the GPU are not looked at, which would wait."""
        if cuda.framework_of(value) is None:
            host = checks.lengths(value, T, batch).astype(np.int32)
            return self._upload("lengths", host.reshape(-1), "int32")
        view = self._see("lengths", value)
        if view.dtype not in ("int32", "int64"):
            raise TypeError(f"lengths must be int32 or int64 on a GPU, got {view.dtype}")
        checks.shape("lengths", view, batch, "(B,)")
        self._check_contiguous("lengths", view)
        return view if batch else view[None]

    def resets(self, value: Any, expected: tuple[int, ...], axes: str) -> View:
        """Return the resets."""
        if cuda.framework_of(value) is None:
            return self._upload("resets", checks.resets(value, expected, axes), "bool")
        view = self._see("resets", value)
        if view.dtype != "bool":
            raise TypeError(f"resets must be bool, got {view.dtype}")
        checks.shape("resets", view, expected, axes)
        return view

    def _upload(self, name: str, values: Any, dtype: str) -> View:
        if self._cuda.is_capturing(self.device, self.stream):
            raise RuntimeError(
                f"{name} must be on {self} while a graph is captured: a graph would copy from "
                "memory of the host that is gone"
            )
        return cuda._upload(values, dtype, self.device, self.stream)._view

    # Results

    def output(self, out: Any, shape: tuple[int, ...], axes: str, used: list[Any]) -> Any:
        """Refuse an array to write y into."""
        raise ValueError(f"out must be None for arrays on a GPU, got {type(out).__name__}")

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Make an uninitialised array of x's framework."""
        return self.framework.empty(shape, dtype, self.device, self.stream)

    def see(self, made: Any) -> View:
        """Return what the kernels see of an array that `empty` made, or of our own."""
        if isinstance(made, self._cuda.View):
            view: View = made
            return view
        framework = cuda.framework_of(made)
        assert framework is not None
        return framework.view(made, self.stream)

    def give(self, made: Any) -> Any:
        """Return what the user gets of it."""
        return self.framework.give(made)

    def _bytes(self, count: int) -> View:
        return self.see(self.empty((max(count, 1),), "uint8"))

    # Calls

    def layers(
        self, spec: Spec, parameters: list[Parameters], kept: dict[Any, Any] | None = None
    ) -> Layers:
        """Return layers with these parameters, of each layer and direction."""
        return Layers(self, spec, parameters, kept)

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
            parameters = _with_forget_gate(parameters, self._insert)
        if by_rows:
            return Weights(cell, parameters, None, self.stream)
        kernel = self._kernel(cell)
        _, weight_hh, bias_ih, bias_hh, *_ = parameters
        packed = self._bytes(kernel.packed_bytes(weight_hh.shape[1], backward))
        kernel.pack(weight_hh, bias_ih, bias_hh, backward, packed)
        self._keep(*parameters)
        return Weights(cell, parameters, packed, self.stream)

    def _insert(self, a: View, blocks: int) -> View:
        """Add a block of zeros after the first."""
        H = a.shape[0] // blocks
        made = self.see(self.empty((H * (blocks + 1), *a.shape[1:]), a.dtype))
        self._cuda.clear(made[H : 2 * H], self.stream)
        for to, of in ((made[:H], a[:H]), (made[2 * H :], a[H:])):
            self._cuda.copy_on_device(to, of, self.stream)
        self._keep(a)
        return made

    def _remove(self, a: Any, blocks: int) -> Any:
        """Leave the second block out."""
        whole = self.see(a)
        H = whole.shape[0] // (blocks + 1)
        made = self.empty((H * blocks, *whole.shape[1:]), whole.dtype)
        seen = self.see(made)
        for to, of in ((seen[:H], whole[:H]), (seen[H:], whole[2 * H :])):
            self._cuda.copy_on_device(to, of, self.stream)
        return made

    def drop(self, a: View, p: float, seed: int, what: str, where: int, to: View) -> None:
        """Write (T, B, n), some elements of its rows 0, into `to`, which may be itself."""
        wide, made = self._widened(a), to if self._is_wide else self._wide(to.shape)
        self._cuda.drop(wide, p, seed, what, where, made, self.stream)
        self._finish(made, to)
        self._keep(a)

    def drop_weights(self, weight: View, options: Options, to: View | None = None) -> View:
        """Return R as a call sees it, or mask its gradient in place."""
        made = self.see(self.empty(weight.shape, self.dtype)) if to is None else to
        o = options
        self.drop(weight, o.weight_dropout, o.seed, "weights", o.where, made)
        return made

    def with_weights_dropped(self, parameters: Parameters, options: Options) -> Parameters:
        """Return parameters as a call sees them."""
        if not options.drops_weights:
            return parameters
        return parameters._replace(weight_hh=self.drop_weights(parameters.weight_hh, options))

    # Where a step is taken row by row 16 bits are float32 in between; peepholes always are.

    @property
    def _is_wide(self) -> bool:
        return self.dtype in ("float32", "float64")

    def _wide(self, shape: tuple[int, ...]) -> View:
        return self.see(self.empty(shape, self.state_dtype(self.dtype)))

    def _widened(self, a: View) -> View:
        """Return an array in float32 or float64."""
        if self._is_wide:
            return a
        made = self._wide(a.shape)
        self._cuda.convert(a, made, self.stream)
        self._keep(a)
        return made

    def _widens(self, name: str, problem: Problem) -> bool:
        return not self._is_wide and (problem.by_rows or name == "weight_ch")

    def _given(self, name: str, a: View | None, problem: Problem) -> View | None:
        """Return what the kernels read of an argument."""
        if a is None or a.dtype != self.dtype or not self._widens(name, problem):
            return a
        return self._widened(a)

    def _made(self, name: str, to: View, problem: Problem) -> View:
        """Return where the kernels make what belongs to `name` and is wanted in `to`."""
        return self._wide(to.shape) if self._widens(name, problem) else to

    def _finish(self, made: View, to: View) -> None:
        """Copy what was made elsewhere to where it is wanted."""
        if made is not to:
            self._cuda.convert(made, to, self.stream)

    def _call(
        self, weights: Weights, problem: Problem, adds_dx: bool = False
    ) -> tuple[Kernel, dict[str, Any], KernelOptions]:
        """Return the kernel of a call, what both directions read, and the options."""
        h0, c0 = _h_and_c(problem.state)
        lengths, resets = problem.lengths, problem.resets
        arrays = {"x": problem.x, "h0": h0, "c0": c0} | weights.parameters._asdict()
        arrays = {k: self._given(k, a, problem) for k, a in arrays.items()}
        arrays |= {"packed": weights.packed, "lengths": lengths, "resets": resets}
        arrays["cells"] = problem.cells
        precision = "tf32" if problem.by_rows and not self._is_wide else None
        options = self._cuda.Options(*values_of(problem.options), adds_dx)
        return self._kernel(weights.cell, precision), arrays, options

    def forward(self, weights: Weights, problem: Problem, save: bool = False) -> View | None:
        """Queue y and the final state; return what backward needs beside them, if `save`."""
        self._await(weights)
        kernel, arrays, options = self._call(weights, problem)
        h_n, c_n = _h_and_c(problem.final)
        y, trace = self._made("y", problem.y, problem), problem.trace
        gates, made = problem.cell.gates, problem.cell.kernel_gates
        if trace is not None and made != gates:
            T, B, _, H = trace.shape
            dtype = self.state_dtype(self.dtype) if problem.by_rows else self.dtype
            trace = self.see(self.empty((T, B, len(made), H), dtype))
        elif trace is not None:
            trace = self._made("trace", trace, problem)
        arrays |= {"h_n": h_n, "c_n": c_n, "y": y, "trace": trace}
        saves = save and not problem.options.recompute
        saved = kernel.forward(arrays, options, problem.reverse, saves, self._bytes)
        self._finish(y, problem.y)
        if trace is not problem.trace:
            for k, gate in enumerate(gates):
                of_gate = trace[:, :, made.index(gate)]
                self._cuda.convert(of_gate, problem.trace[:, :, k], self.stream)
        self._keep(*arrays.values())
        return saved

    def _await(self, weights: Weights) -> None:
        """Let this stream wait for another that packs the weights."""
        if weights.stream != self.stream:
            self._cuda.order(self.device, weights.stream, self.stream)
            self._use(weights.packed, *weights.parameters)

    def _use(self, *views: View | None) -> None:
        """Keep what another stream made until this one is done with it."""
        for view in views:
            if view is not None:
                self.framework.used_on(view.owner, self.device, self.stream)

    def _keep(self, *views: View | None) -> None:
        """Keep a call's arrays until it is done, where their framework does not."""
        if self.framework.keeps_nothing:
            self._use(*views)

    def check_may_keep(self) -> None:
        """Refuse to keep what only a graph would compute."""
        if self._cuda.is_capturing(self.device, self.stream):
            raise RuntimeError(
                "a layer packs its weights in the first call after they changed: make that "
                "call before a graph is captured"
            )


@dataclass(frozen=True)
class PassTape:
    """What the training forward of one layer in one direction leaves to its backward."""

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
        """Queue dx (or add it, if `adds`), if there is one, and the initial state's gradient.

        Return the gradients of the parameters that are wanted; others cost nothing.
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
        dh_n, dc_n = _h_and_c(d_final)
        dh0, dc0 = _h_and_c(d_state)
        on._await(self.weights)
        kernel, arrays, options = on._call(self.weights, problem, adds)
        arrays |= {k: on._given(k, a, problem) for k, a in (("y", y), ("dy", dy))}
        arrays |= {"dh_n": dh_n, "dc_n": dc_n, "dh0": dh0, "dc0": dc0}
        arrays |= {"saved": self.saved, "dcells": d_cells}
        asked = {k: on.see(v) for k, v in d._asdict().items() if v is not None}
        if dx is not None:
            asked["x"] = dx
        made = {k: on._made(k, to, problem) for k, to in asked.items()}
        if adds and dx is not None and made["x"] is not dx:
            on._cuda.convert(dx, made["x"], on.stream)
        arrays |= {f"d{k}": v for k, v in made.items()}
        kernel.backward(arrays, options, problem.reverse, on._bytes)
        for name, to in asked.items():
            on._finish(made[name], to)
        on._keep(*arrays.values())
        if coupled:
            d = _with_forget_gate(d, on._remove)
        if problem.options.drops_weights and d.weight_hh is not None:
            seen = on.see(d.weight_hh)
            on.drop_weights(seen, problem.options, seen)
        return d


def _time_major(a: Any, spec: Spec) -> Any:
    """Return a sequence as (T, B, …)."""
    if a is None:
        return None
    if a.ndim == 2:
        return a[:, None]
    return a.swapaxes(0, 1) if spec.batch_first else a


def _part(a: Any, direction: int, width: int, directions: int) -> Any:
    """Return what one direction has of a sequence that both share, or of None."""
    if a is None or directions == 1:
        return a
    return a[..., direction * width : (direction + 1) * width]


@dataclass(frozen=True)
class Layers:
    """Layers in one or both directions on a GPU, called one after the other.

    Weights are packed when a call first needs it, and left in `kept` where there is one.
    """

    on: Device
    spec: Spec
    parameters: list[Parameters]
    kept: dict[Any, Any] | None

    def _weights(self, at: int, seen: Parameters, options: Options, backward: bool) -> Weights:
        on, cell = self.on, self.spec.cell
        by_rows = bool(asked_of_layer(cell, seen, False))
        if self.kept is None or options.drops_weights:
            return on.pack(cell, seen, backward, by_rows)
        key = ("cuda", at, backward)
        if key not in self.kept:
            on.check_may_keep()
            self.kept[key] = on.pack(cell, seen, backward, by_rows)
        packed: Weights = self.kept[key]
        return packed

    def forward(
        self,
        x: View,
        state: Any,
        lengths: Any,
        resets: Any,
        options: Options,
        out: Any,
        saves: bool,
        /,
    ) -> Any:
        """Queue a call; see `backend.Layers`."""
        on, spec = self.on, self.spec
        unbatched = x.ndim == 2
        seen = _time_major(x, spec)
        if resets is not None:
            resets = resets[:, None] if unbatched else _time_major_mask(resets, spec)
        (T, B, _), D = seen.shape, spec.directions
        letters, of_state = spec.cell.states, on.state_dtype(x.dtype)
        pair = state if isinstance(state, tuple) else (state,) * len(letters)
        widths = (spec.R, spec.H)[: len(letters)]
        final = [on.empty((spec.layers * D, B, width), of_state) for width in widths]
        ends = [on.see(s) for s in final]
        starts = [_with_axes(s, spec, unbatched) for s in pair]
        keeps_cells = options.recompute and "c" in letters
        cells, traces, tapes = None, [], []
        for at in range(spec.layers * D):
            layer, direction = divmod(at, D)
            is_last = layer == spec.layers - 1
            if direction == 0:
                below = seen if layer == 0 else self._dropped(seen, layer - 1, options)
                y = on.empty((T, B, D * spec.R), x.dtype)
                seen = on.see(y)
                if keeps_cells or (options.return_cells and is_last):
                    cells = on.empty((T, B, D * spec.H), of_state)
            if options.trace:
                traces.append(on.empty((T, B, len(spec.cell.gates), spec.H), x.dtype))
            of_pass = options._replace(where=options.where + at)
            dropped = on.with_weights_dropped(self._seen(at), of_pass)
            problem = Problem(
                spec.cell,
                below,
                tuple(None if s is None else s[at] for s in starts),
                lengths,
                resets,
                spec.reverse or direction == 1,
                _part(seen, direction, spec.R, D),
                tuple(s[at] for s in ends),
                of_pass,
                bool(asked_of_layer(spec.cell, dropped, False)),
                None if cells is None else _part(on.see(cells), direction, spec.H, D),
                on.see(traces[-1]) if traces else None,
            )
            saved = on.forward(self._weights(at, dropped, of_pass, False), problem, saves)
            if saves:
                back = self._weights(at, dropped, of_pass, True)
                tapes.append(PassTape(on, problem, back, saved))
        results = [self._user_sequence(y, unbatched), self._user_state(final, unbatched)]
        if options.return_cells:
            results.append(self._user_sequence(cells, unbatched))
        if options.trace:
            results.append([on.give(trace) for trace in traces])
        if not saves:
            return tuple(results)
        return tuple(results), Tape(self, tapes, options, x.shape, unbatched)

    def _seen(self, at: int) -> Parameters:
        return Parameters(*[p if p is None else self.on.see(p) for p in self.parameters[at]])

    def _dropped(self, y: View, layer: int, options: Options) -> View:
        """Return what the layer after one reads of its y."""
        on, p = self.on, self.spec.dropout
        if not (p and options.training):
            return y
        made = on.see(on.empty(y.shape, y.dtype))
        on.drop(y, p, options.seed, "between", layer, made)
        return made

    def _user_sequence(self, a: Any, unbatched: bool) -> Any:
        a = self.on.give(a)
        if unbatched:
            return a[:, 0]
        return a.swapaxes(0, 1) if self.spec.batch_first else a

    def _user_state(self, made: Sequence[Any], unbatched: bool) -> Any:
        states = [self.on.give(s) for s in made]
        if not self.spec.layered:
            states = [s[0] for s in states]
        if unbatched:
            states = [s[..., 0, :] for s in states]
        return tuple(states) if len(states) > 1 else states[0]


def _time_major_mask(resets: View, spec: Spec) -> View:
    return resets.swapaxes(0, 1) if spec.batch_first else resets


def _with_axes(state: View | None, spec: Spec, unbatched: bool) -> View | None:
    """Return a state as (layers·directions, B, n)."""
    if state is None:
        return None
    if not spec.layered:
        state = state[None]
    return state[:, None] if unbatched else state


@dataclass(frozen=True)
class Tape:
    """What leads back from a training call on a GPU."""

    layers: Layers
    passes: list[PassTape]
    options: Options
    shape: tuple[int, ...]  # of x
    unbatched: bool

    def backward(self, dy: Any, d_state: Any, d_cells: Any, /) -> Any:
        """Queue the gradients; see `backend.Tape`."""
        spec, options = self.layers.spec, self.options
        on, D = self.layers.on.now(), spec.directions
        first = self.passes[0].problem
        T, B, _ = first.x.shape
        letters, of_state = spec.cell.states, on.state_dtype(first.x.dtype)
        pair = d_state if isinstance(d_state, tuple) else (d_state,) * len(letters)
        ends = [_with_axes(d, spec, self.unbatched) for d in pair]
        widths = (spec.R, spec.H)[: len(letters)]
        d_start = [on.empty((spec.layers * D, B, width), of_state) for width in widths]
        d_starts = [on.see(d) for d in d_start]
        dy, d_cells = _time_major(dy, spec), _time_major(d_cells, spec)
        gradients: list[list[Any]] = []
        for at in reversed(range(spec.layers * D)):
            layer, direction = divmod(at, D)
            tape = self.passes[at]
            if direction == D - 1:
                dx = on.empty((T, B, tape.problem.x.shape[-1]), tape.problem.x.dtype)
            of_pass = tape.backward(
                _part(dy, direction, spec.R, D),
                tuple(None if d is None else d[at] for d in ends),
                _part(d_cells, direction, spec.H, D) if layer == spec.layers - 1 else None,
                on.see(dx),
                tuple(d[at] for d in d_starts),
                adds=direction < D - 1,
            )
            gradients.insert(0, [on.give(d) for d in of_pass if d is not None])
            if direction == 0:
                dy = on.see(dx)
                if spec.dropout and options.training and layer > 0:
                    on.drop(dy, spec.dropout, options.seed, "between", layer - 1, dy)
        user = self.layers
        flat = [d for of_pass in gradients for d in of_pass]
        given = user._user_sequence(dx, self.unbatched)
        return given, user._user_state(d_start, self.unbatched), flat
