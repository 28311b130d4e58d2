"""The kernels on an NVIDIA GPU, for one call: the counterpart of `kernel.Host`.

What is computed with is seen as a `_cuda.View`; what the user gets is an array of x's
framework.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import checks, cuda
from .cells import Cell
from .kernel import HOST, h_and_c

if TYPE_CHECKING:
    from ._cuda import Kernel, View


class Masks(NamedTuple):
    """Which steps rows take, None for all, and where their state starts anew."""

    lengths: View | None  # (B,) int32 or int64
    resets: View | None  # (T, B)


@dataclass(frozen=True)
class Weights:
    """A layer's parameters in one direction, packed for the forward or the backward."""

    cell: Cell
    weight_ih: View
    packed: View
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

    def _kernel(self, cell: Cell) -> Kernel:
        kernel: Kernel = self._cuda.Kernel(cell.name, self._precision, self.device, self.stream)
        return kernel

    def pack(
        self,
        cell: Cell,
        weight_ih: View,
        weight_hh: View,
        bias_ih: View | None,
        bias_hh: View | None,
        forward: Weights | None = None,
        borrow: bool = False,
    ) -> Weights:
        """Pack parameters for a forward or, given the weights of that, for its backward."""
        kernel = self._kernel(cell)
        backward = forward is not None
        packed = self._bytes(kernel.packed_bytes(weight_hh.shape[1], backward))
        kernel.pack(weight_hh, bias_ih, bias_hh, backward, packed)
        self._keep(weight_ih, weight_hh, bias_ih, bias_hh)
        return Weights(cell, weight_ih, packed, self.stream)

    def forward(
        self,
        weights: Weights,
        x: View,
        state: tuple[View | None, ...],
        masks: Masks,
        reverse: bool,
        y: View,
        final: tuple[View, ...],
        save: bool = False,
    ) -> View | None:
        """Queue y and the final state; return what backward needs beside them, if `save`."""
        self._await(weights)
        kernel = self._kernel(weights.cell)
        T, B, _ = x.shape
        size = kernel.saved_bytes(T, B, y.shape[2]) if save else 0
        saved = self._bytes(size) if size else None
        h0, c0 = h_and_c(state)
        h_n, c_n = h_and_c(final)
        kernel.forward(
            x,
            weights.weight_ih,
            weights.packed,
            h0,
            c0,
            masks.lengths,
            masks.resets,
            reverse,
            y,
            h_n,
            c_n,
            saved,
            self._bytes,
        )
        self._keep(x, weights.weight_ih, *state, *masks)
        return saved

    def _await(self, weights: Weights) -> None:
        """Let this stream wait for another that packs the weights."""
        if weights.stream != self.stream:
            self._cuda.order(self.device, weights.stream, self.stream)
            self._use(weights.packed, weights.weight_ih)

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

    def tape(self, *recorded: Any) -> Tape:
        """Return what leads back from a training forward; see `Tape`."""
        return Tape(self, *recorded)


@dataclass(frozen=True)
class Tape:
    """What the training forward of one layer in one direction leaves to its backward."""

    on: Device
    cell: Cell
    weights: Weights  # packed for backward
    x: View
    state: tuple[View | None, ...]
    masks: Masks
    reverse: bool
    y: View
    saved: View | None

    def backward(
        self,
        dy: View | None,
        d_final: tuple[View | None, ...],
        dx: View,
        d_state: tuple[View, ...],
        adds: bool = False,
    ) -> tuple[Any, Any, Any, Any]:
        """Queue dx (or add it, if `adds`) and the initial state's gradient.

        Return the gradients of the parameters.
        """
        on = self.on.now()
        if on is not self.on:
            on._use(self.x, *self.state, self.y, self.saved, *self.masks)
        shapes = self.cell.parameter_shapes(self.x.shape[2], self.y.shape[2])
        dW, dR, db_ih, db_hh = (on.empty(shape, self.x.dtype) for shape in shapes)
        h0, c0 = h_and_c(self.state)
        dh_n, dc_n = h_and_c(d_final)
        dh0, dc0 = h_and_c(d_state)
        on._await(self.weights)
        on._kernel(self.cell).backward(
            self.x,
            self.weights.weight_ih,
            self.weights.packed,
            h0,
            c0,
            self.masks.lengths,
            self.masks.resets,
            self.reverse,
            self.y,
            self.saved,
            dy,
            dh_n,
            dc_n,
            dx,
            adds,
            on.see(dW),
            on.see(dR),
            on.see(db_ih),
            on.see(db_hh),
            dh0,
            dc0,
            on._bytes,
        )
        on._keep(self.x, self.weights.weight_ih, *self.state, *self.masks, dy, *d_final)
        return dW, dR, db_ih, db_hh


def backend_of(x: Any, precision: Any = "exact") -> Any:
    """Return where an op on x runs: a `Device` for the GPU that it is on, or the `Host`."""
    cuda.check_precision(precision)
    framework = cuda.framework_of(x)
    if framework is not None:
        return Device(x, framework, precision)
    if precision != "exact":
        raise ValueError(f'precision must be "exact" on the CPU, got "{precision}"')
    return HOST
