"""The kernels on an NVIDIA GPU, for one call: the counterpart of `kernel.Host`.

What is computed with is seen as a `_cuda.View`; what the user gets is an array of the
library of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from . import checks, cuda
from .cells import Cell
from .kernel import HOST

if TYPE_CHECKING:
    from ._cuda import Kernel, View

Precision = Literal["exact", "tf32"]


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
    isa: str = "cuda"


class Device:
    """One GPU, its current stream and the library of x."""

    def __init__(
        self,
        x: Any,
        library: cuda.Library,
        device: int,
        stream: int,
        dtype: str,
        precision: str,
    ) -> None:
        self._cuda = cuda._module()
        self._x = x
        self.library = library
        self.device = device
        self.stream = stream
        self.dtype = dtype
        self.precision = "tf32" if precision == "tf32" else dtype

    @classmethod
    def of(cls, x: Any, library: cuda.Library, precision: str) -> Device:
        """Return the GPU that x is on."""
        module = cuda._module()
        seen = library.view(x, cuda._DEFAULT_STREAM)
        if seen.dtype not in cuda.DTYPES:
            known = ", ".join(cuda.DTYPES)
            raise TypeError(f"x must be one of {known} on a GPU, got {seen.dtype}")
        if precision == "tf32" and seen.dtype != "float32":
            raise ValueError(f'precision "tf32" is for float32, got x of {seen.dtype}')
        capability = module.device(seen.device)["capability"]
        if capability < 80:
            raise RuntimeError(
                f"x must be on a GPU of compute capability 8.0 or newer, "
                f"got {capability / 10:.1f}"
            )
        stream = library.stream(x, seen.device)
        return cls(x, library, seen.device, stream, seen.dtype, precision)

    def now(self) -> Device:
        """Return this GPU on the stream that is current now, after what is queued here."""
        stream = self.library.stream(self._x, self.device)
        if stream == self.stream:
            return self
        self._cuda.order(self.device, self.stream, stream)
        return Device(self._x, self.library, self.device, stream, self.dtype, self.precision)

    def __str__(self) -> str:
        return f"cuda:{self.device}"

    # Arguments

    def _see(self, name: str, value: Any) -> View:
        if value is None:
            raise TypeError(f"{name} must be an array, got None")
        library = cuda.library_of(value)
        if library is None:
            kind = type(value).__name__
            raise TypeError(f"{name} must be on {self} like x, got {kind} on the host")
        view = library.view(value, self.stream)
        if type(library) is not type(self.library):
            made_on = library.stream(value, view.device)
            if made_on != self.stream:
                self._cuda.order(view.device, made_on, self.stream)
        if view.device != self.device:
            raise ValueError(f"{name} must be on {self} like x, got cuda:{view.device}")
        return view

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
        if cuda.library_of(value) is None:
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
        if cuda.library_of(value) is None:
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
        """Make an uninitialised array of the library of x."""
        return self.library.empty(shape, dtype, self.device, self.stream)

    def see(self, made: Any) -> View:
        """Return what the kernels see of an array of this library or of our own."""
        library = cuda.library_of(made)
        assert library is not None
        return library.view(made, self.stream)

    def give(self, made: Any) -> Any:
        """Return what the user gets of it."""
        return self.library.give(made)

    def freeze(self, y: Any) -> None:
        """Do nothing: arrays on a GPU cannot be frozen."""

    def _bytes(self, count: int) -> View:
        return self.see(self.empty((max(count, 1),), "uint8"))

    # Calls

    def _kernel(self, cell: Cell) -> Kernel:
        kernel: Kernel = self._cuda.Kernel(cell.name, self.precision, self.device, self.stream)
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
        h0, c0 = state if len(state) == 2 else (state[0], None)
        h_n, c_n = final if len(final) == 2 else (final[0], None)
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
        self._keep(x, *state, *masks)
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
                self.library.used_on(view.owner, self.device, self.stream)

    def _keep(self, *views: View | None) -> None:
        """Keep a call's arrays until it is done, where their library does not."""
        if self.library.keeps_nothing:
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
        I, H = self.x.shape[2], self.y.shape[2]
        gates_H = len(self.cell.gates) * H
        shapes = ((gates_H, I), (gates_H, H), (gates_H,), (gates_H,))
        dW, dR, db_ih, db_hh = (on.empty(shape, self.x.dtype) for shape in shapes)
        h0, c0 = self.state if len(self.state) == 2 else (self.state[0], None)
        dh_n, dc_n = d_final if len(d_final) == 2 else (d_final[0], None)
        dh0, dc0 = d_state if len(d_state) == 2 else (d_state[0], None)
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
        on._keep(self.x, *self.state, dy, *d_final)
        return dW, dR, db_ih, db_hh


def backend_of(x: Any, precision: Any = "exact") -> Any:
    """Return where an op on x runs: a `Device` for the GPU that it is on, or the `Host`."""
    if precision not in ("exact", "tf32"):
        raise ValueError(f'precision must be "exact" or "tf32", got {precision!r}')
    library = cuda.library_of(x)
    if library is not None:
        return Device.of(x, library, precision)
    if precision != "exact":
        raise ValueError(f'precision must be "exact" on the CPU, got "{precision}"')
    return HOST
