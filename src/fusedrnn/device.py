"""The kernels on an NVIDIA GPU, for one call: the counterpart of `kernel.Host`.

What is computed with is seen as a `_cuda.View`; what the user gets is an array of x's
framework.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import checks, cuda
from .cells import Cell
from .kernel import HOST, Problem, gradient_shapes, h_and_c, values_of, with_forget_gate
from .reference import Parameters

if TYPE_CHECKING:
    from ._cuda import Kernel, Options, View
    from .options import Request


class Masks(NamedTuple):
    """Which steps rows take, None for all, and where their state starts anew."""

    lengths: View | None  # (B,) int32 or int64
    resets: View | None  # (T, B)


@dataclass(frozen=True)
class Weights:
    """A layer's parameters in one direction, packed for the forward or the backward."""

    cell: Cell
    parameters: Parameters
    packed: View | None  # none where a step is taken row by row
    stream: int  # that packs them
    isa: str = "cuda"  # as a layer asks of packed weights


class Device:
    """The GPU that x is on, its current stream, and x's framework."""

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

    def state(self, name: str, value: Any, dtype: str, copy: bool = False) -> View:
        """Return a state or its gradient; not even a copy is made, values do not change."""
        view = self._see(name, value)
        if view.dtype != dtype:
            like = " like x" if dtype == self.dtype else f" for x of {self.dtype}"
            raise TypeError(f"{name} must be {dtype}{like}, got {view.dtype}")
        self._check_contiguous(name, view)
        return view

    def zeros(self, shape: tuple[int, ...], dtype: str) -> None:
        """Kernels take no state for zeros."""

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

    def masks(self, lengths: View | None, resets: View | None) -> Masks:
        """Return both, for time-major resets."""
        return Masks(lengths, resets)

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
        framework = cuda.framework_of(made)
        assert framework is not None
        return framework.view(made, self.stream)

    def give(self, made: Any) -> Any:
        """Return what the user gets of it."""
        return self.framework.give(made)

    def freeze(self, y: Any) -> None:
        """Do nothing: arrays on a GPU cannot be frozen."""

    def _bytes(self, count: int) -> View:
        return self.see(self.empty((max(count, 1),), "uint8"))

    # Calls

    def _kernel(self, cell: Cell, precision: str | None = None) -> Kernel:
        kernel: Kernel = self._cuda.Kernel(
            cell.name, precision or self._precision, self.device, self.stream
        )
        return kernel

    def pack(
        self,
        cell: Cell,
        parameters: Parameters,
        forward: Weights | None = None,
        borrow: bool = False,
        row_wise: bool = False,
    ) -> Weights:
        """Pack parameters for a forward or, given the weights of that, for its backward."""
        if cell.is_coupled:
            parameters = with_forget_gate(parameters, self._insert)
        if row_wise:
            return Weights(cell, parameters, None, self.stream)
        kernel = self._kernel(cell)
        backward = forward is not None
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

    def drop_weights(self, weight: View, request: Request, to: View | None = None) -> View:
        """Return R as a call sees it, or mask its gradient in place."""
        made = self.see(self.empty(weight.shape, self.dtype)) if to is None else to
        o = request.options
        self.drop(weight, o.weight_dropout, o.seed, "weights", o.where, made)
        return made

    def with_weights_dropped(self, parameters: Parameters, request: Request) -> Parameters:
        """Return parameters as a call sees them."""
        if not request.drops_weights:
            return parameters
        return parameters._replace(weight_hh=self.drop_weights(parameters.weight_hh, request))

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
        return not self._is_wide and (problem.row_wise or name == "weight_ch")

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
    ) -> tuple[Kernel, dict[str, Any], Options]:
        """Return the kernel of a call, what both directions read, and the options."""
        h0, c0 = h_and_c(problem.state)
        lengths, resets = problem.masks
        arrays = {"x": problem.x, "h0": h0, "c0": c0} | weights.parameters._asdict()
        arrays = {k: self._given(k, a, problem) for k, a in arrays.items()}
        arrays |= {"packed": weights.packed, "lengths": lengths, "resets": resets}
        arrays["cells"] = problem.cells
        precision = "tf32" if problem.row_wise and not self._is_wide else None
        options = self._cuda.Options(*values_of(problem.request.options), adds_dx)
        return self._kernel(weights.cell, precision), arrays, options

    def forward(self, weights: Weights, problem: Problem, save: bool = False) -> View | None:
        """Queue y and the final state; return what backward needs beside them, if `save`."""
        self._await(weights)
        kernel, arrays, options = self._call(weights, problem)
        h_n, c_n = h_and_c(problem.final)
        y, trace = self._made("y", problem.y, problem), problem.trace
        gates, made = problem.cell.gates, problem.cell.kernel_gates
        if trace is not None and made != gates:
            T, B, _, H = trace.shape
            dtype = self.state_dtype(self.dtype) if problem.row_wise else self.dtype
            trace = self.see(self.empty((T, B, len(made), H), dtype))
        elif trace is not None:
            trace = self._made("trace", trace, problem)
        arrays |= {"h_n": h_n, "c_n": c_n, "y": y, "trace": trace}
        saves = save and not problem.request.recompute
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

    def tape(
        self,
        problem: Problem,
        parameters: Parameters,
        back: Weights,
        forward: Weights,
        saved: Any,
    ) -> Tape:
        """Return what leads back from a training forward; see `Tape`."""
        return Tape(self, problem, back, saved)


@dataclass(frozen=True)
class Tape:
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
        x, y, masks = problem.x, problem.y, problem.masks
        if on is not self.on:
            on._use(x, *problem.state, y, self.saved, problem.cells, *masks)
        coupled = problem.cell.is_coupled
        weights = self.weights.parameters
        shapes = gradient_shapes(weights, wanted)
        d = Parameters(*(None if s is None else on.empty(s, x.dtype) for s in shapes))
        dh_n, dc_n = h_and_c(d_final)
        dh0, dc0 = h_and_c(d_state)
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
            d = with_forget_gate(d, on._remove)
        if problem.request.drops_weights and d.weight_hh is not None:
            seen = on.see(d.weight_hh)
            on.drop_weights(seen, problem.request, seen)
        return d


def backend_of(x: Any, precision: Any = "exact") -> Any:
    """Return where an op on x runs: a `Device` for the GPU that it is on, or the `Host`."""
    cuda.check_precision(precision)
    framework = cuda.framework_of(x)
    if framework is not None:
        return Device(x, framework, precision)
    if precision != "exact":
        raise ValueError(f'precision must be "exact" on the CPU, got "{precision}"')
    return HOST
