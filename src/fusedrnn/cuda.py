"""Arrays on NVIDIA GPUs: those of other frameworks, which ops take and return, and our own.

Anything that supports DLPack or ``__cuda_array_interface__`` may be an argument; PyTorch's and
CuPy's arrays are read directly. An op returns arrays of the framework of its x. It runs on that
framework's current stream and never waits for it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from . import checks
from .cells import CELLS
from .reference import Array as HostArray

if TYPE_CHECKING:
    from ._cuda import View

__all__ = ["Array", "array", "count", "explain", "is_available", "status"]

Precision = Literal["exact", "tf32"]

DTYPES = ("float32", "float64", "bfloat16", "float16")

# The plan of calls that the persistent recurrences do not support.
ROW_WISE = {
    "step": "cuBLASLt computes the products; between them, one block of threads processes a row"
}

# CUDA's own number of the caller's default stream.
_DEFAULT_STREAM = 0


# The extension module and what it needs


def _wheel_library(name: str) -> str | None:
    """Return where the nvidia-* wheels put a library, if they are installed."""
    for folder in sys.path:
        path = Path(folder, "nvidia", "cu13", "lib", name)
        if path.is_file():
            return str(path)
    return None


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Return the extension module, and the reason if it cannot be used."""
    if find_spec(f"{__package__}._cuda") is None:
        return None, "this build has no CUDA backend; a build with FUSEDRNN_CUDA=ON has it"
    runtime = _wheel_library("libcudart.so.13")
    try:
        if runtime is not None:
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        from . import _cuda
    except (ImportError, OSError) as error:
        return None, f'{error}; install it with: pip install "fusedrnn[cuda13]"'
    blas = _wheel_library("libcublasLt.so.13")
    if blas is not None:
        _cuda.use_blas(blas)
    try:
        count = _cuda.device_count()
    except _cuda.Error as error:
        return _cuda, str(error)
    return _cuda, None if count else "no device"


def _module() -> Any:
    """Return the extension module; raise RuntimeError if it cannot be used."""
    module, problem = _load()
    if module is None or problem is not None:
        raise RuntimeError(f"CUDA cannot be used: {problem}")
    return module


def is_available() -> bool:
    """Return whether there is a GPU that this build can use.

    >>> is_available() == (not status().startswith("off"))
    True
    """
    return _load()[1] is None


def count() -> int:
    """Return the number of GPUs; raise RuntimeError if none can be used.

    >>> not is_available() or count() > 0
    True
    """
    return int(_module().device_count())


def status() -> str:
    """Return the GPUs' names, or why none can be used, in one line.

    >>> isinstance(status(), str)
    True
    """
    module, problem = _load()
    if module is None or problem is not None:
        return f"off: {problem}"
    names = (module.device(i) for i in range(module.device_count()))
    devices = ", ".join(f"{d['name']} (sm_{d['capability']})" for d in names)
    version = module.runtime_version()
    return f"{devices}; CUDA {version // 1000}.{version % 1000 // 10}"


def explain(
    cell: str,
    T: int,
    B: int,
    I: int,
    H: int,
    dtype: str = "float32",
    precision: Precision = "exact",
    backward: bool = False,
    device: int = 0,
) -> dict[str, Any]:
    """Return how a call would run on a GPU.

    Parameters
    ----------
    cell: "lstm", "lstm_coupled", "gru", "gru_before", "rnn_tanh", "rnn_relu", "rnn_identity".
    T, B, I, H: the sizes. dtype: of x. precision: "exact" or "tf32". device: the GPU's number.
    backward: describe the backward instead of the forward.

    Returns
    -------
    A dict that describes a call without LayerNorm or a projection: "exchange" is "cluster"
        (blocks that share memory), "grid" (all blocks at once, through L2) or "step" (a launch
        for each step); "weights" is where the recurrent weights stay, "operand" where warps
        read h from (in the backward, da); the other entries describe the launch. For
        "gru_before", whose steps always go row by row, there is only "step".

    Raises
    ------
    TypeError: a size is not an integer. ValueError: a wrong name, size or number. RuntimeError:
        no GPU can be used.

    >>> if is_available():
    ...     assert explain("lstm", 100, 16, 64, 64, "bfloat16")["threads"] % 32 == 0
    """
    module = _module()
    cells = module.cells()
    if cell not in cells:
        raise ValueError(f"cell must be one of {', '.join(cells)}, got {cell!r}")
    for name, size in (("T", T), ("B", B), ("I", I), ("H", H)):
        checks.positive(name, size)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_device(device)
    kernel = module.Kernel(cell, precision_of(dtype, precision), device, _DEFAULT_STREAM)
    if CELLS[cell].resets_before:
        return dict(ROW_WISE)
    plan: dict[str, Any] = kernel.explain(T, B, I, H, backward)
    return plan


def check_precision(precision: Any) -> None:
    """Check that a precision is "exact" or "tf32"."""
    if precision not in ("exact", "tf32"):
        raise ValueError(f'precision must be "exact" or "tf32", got {precision!r}')


def precision_of(dtype: str, precision: Any) -> str:
    """Return the kernels' name for the precision of a dtype."""
    check_precision(precision)
    if precision == "exact":
        return dtype
    if dtype != "float32":
        raise ValueError(f'precision must be "exact" for {dtype}, got "tf32"')
    return "tf32"


def check_device(device: Any) -> None:
    """Check that a device is the number of a GPU."""
    if isinstance(device, bool) or not isinstance(device, int):
        raise TypeError(f"device must be an integer, got {type(device).__name__}")
    if not 0 <= device < count():
        raise ValueError(f"device must be from 0 to {count() - 1}, got {device}")


# Arrays


def _to_bfloat16(a: HostArray) -> HostArray:
    """Round float32 to bfloat16, and return its 16 bits."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)


def _from_bfloat16(bits: HostArray) -> HostArray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Array:
    """An array on a GPU, which any framework can read by DLPack without a copy.

    `array` returns one, and so do ops whose x is one or is of an unknown framework. Its values
    cannot be changed.

    Attributes
    ----------
    shape: a tuple. dtype: "float32", "float64", "bfloat16", "float16" or another's name.
    device: the number of the GPU.

    >>> if is_available():
    ...     assert array([[1.0, 2.0]])[:, 1:].numpy().tolist() == [[2.0]]
    """

    def __init__(self, view: View, stream: int) -> None:
        self._view = view
        self._stream = stream

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""
        return self._view.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self._view.ndim

    @property
    def dtype(self) -> str:
        """The name of the elements' type."""
        return self._view.dtype

    @property
    def device(self) -> int:
        """The number of the GPU."""
        return self._view.device

    def __repr__(self) -> str:
        return (
            f"fusedrnn.cuda.Array(shape={self.shape}, dtype={self.dtype}, cuda:{self.device})"
        )

    def __getitem__(self, key: Any) -> Array:
        return Array(self._view[key], self._stream)

    def swapaxes(self, a: int, b: int) -> Array:
        """Return a view with two axes swapped."""
        return Array(self._view.swapaxes(a, b), self._stream)

    def numpy(self) -> HostArray:
        """Wait for the values and copy them to the host; bfloat16 becomes float32."""
        view = self._view
        if not view.is_contiguous:
            return self._permuted()
        host = np.empty(view.shape, "uint16" if view.dtype == "bfloat16" else view.dtype)
        _module().copy_to_host(host, view, self._stream)
        return _from_bfloat16(host) if view.dtype == "bfloat16" else host

    def _permuted(self) -> HostArray:
        """Copy a view whose axes are permuted or that skips elements."""
        view = self._view
        if view.ndim > 1:
            return np.stack([self[i].numpy() for i in range(view.shape[0])])
        return np.concatenate([self[i : i + 1].numpy() for i in range(view.shape[0])])

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        # -1 requests no synchronisation; None stands for the default stream.
        consumer = _DEFAULT_STREAM if stream in (None, 1) else stream
        if consumer not in (-1, self._stream):
            _module().order(self.device, self._stream, consumer)
        return self._view.to_dlpack()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        codes = {"float32": "<f4", "float64": "<f8", "float16": "<f2", "int32": "<i4"}
        codes |= {"int64": "<i8", "bool": "|b1", "uint8": "|u1"}
        view = self._view
        if view.dtype not in codes:
            raise AttributeError(f"__cuda_array_interface__ has no {view.dtype}; use DLPack")
        return {
            "shape": view.shape,
            "typestr": codes[view.dtype],
            "data": (view.pointer, True),
            "strides": tuple(s * view.itemsize for s in view.strides),
            "version": 3,
            "stream": self._stream or 1,  # 0 is not allowed here: 1 is the default stream
        }


def _empty(shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Array:
    module = _module()
    view = module.View(0, shape, None, dtype, device, None)
    memory = module.Memory(view.size * view.itemsize, device, stream)
    return Array(module.View(memory.pointer, shape, None, dtype, device, memory), stream)


def array(a: Any, dtype: str | None = None, device: int = 0) -> Array:
    """Copy host values to a GPU.

    Parameters
    ----------
    a: anything NumPy can convert to an array of numbers.
    dtype: "float32", "float64", "bfloat16" or "float16"; None for that of a.
    device: the number of the GPU.

    Raises
    ------
    TypeError: a wrong dtype. ValueError: no such GPU. RuntimeError: no GPU can be used.
        MemoryError: its memory is full.

    >>> if is_available():
    ...     assert array([0.5, 1.5], "bfloat16").numpy().tolist() == [0.5, 1.5]
    """
    host = checks.as_array("a", a)
    if host.dtype.kind not in "fiu":
        raise TypeError(f"a must be an array of numbers, got {host.dtype}")
    name = str(host.dtype) if dtype is None else dtype
    if name not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {name}")
    check_device(device)
    values = _to_bfloat16(host) if name == "bfloat16" else host.astype(name)
    return _upload(values, name, device, _DEFAULT_STREAM)


def dtype_name(dtype: Any) -> str:
    """Return a dtype's name: NumPy's, a string, or another framework's."""
    if isinstance(dtype, str):
        return dtype
    try:
        return str(np.dtype(dtype))
    except TypeError:
        return str(dtype).rpartition(".")[2]


def copy_of(name: str, a: Any, framework: Framework, dtype: Any, place: str) -> Array:
    """Copy an array that must have the dtype `dtype` and be on the GPU `place`."""
    device = framework.device(a)
    if f"cuda:{device}" != place:
        raise ValueError(f"{name} must be on {place} like the layer, got cuda:{device}")
    stream = framework.stream(a, device)
    view = framework.view(a, stream)
    if view.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} like the layer, got {view.dtype}")
    if not view.is_contiguous:
        raise ValueError(f"{name} must be contiguous on a GPU, got strides {view.strides}")
    copy = _empty(view.shape, view.dtype, device, stream)
    _module().copy_on_device(copy._view, view, stream)
    if framework.keeps_nothing:
        framework.used_on(view.owner, device, stream)
    return copy


def on_host(a: Any) -> HostArray:
    """Return a copy of an array's values on the host, waiting for those of a GPU."""
    framework = framework_of(a)
    if framework is None:
        return np.array(a)
    stream = framework.stream(a, framework.device(a))
    return Array(framework.view(a, stream), stream).numpy()


def _upload(values: HostArray, dtype: str, device: int, stream: int) -> Array:
    copy = _empty(values.shape, dtype, device, stream)
    _module().copy_from_host(copy._view, np.ascontiguousarray(values), stream)
    return copy


# Frameworks


class Framework(Protocol):
    """The functions that ops need of an array's framework."""

    keeps_nothing: bool  # whether it may reuse memory that a stream unknown to it still reads

    def device(self, a: Any) -> int:
        """Return the number of the GPU that an array is on."""

    def view(self, a: Any, stream: int) -> View:
        """Return a view of an array, ready to be read on a stream."""

    def stream(self, a: Any, device: int) -> int:
        """Return the framework's current stream on a GPU."""

    def empty(self, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
        """Return an uninitialised array."""

    def give(self, a: Any) -> Any:
        """Return an array from `empty` in the form that the user gets."""

    def used_on(self, owner: Any, device: int, stream: int) -> None:
        """Keep an array's memory until another stream than its own is done with it."""


# Events, and the arrays that must live until they are done; one thread at a time drops some.
_held: deque[tuple[Any, Any]] = deque()
_dropping = threading.Lock()


def _hold(owner: Any, device: int, stream: int) -> None:
    """Keep an array alive until the work that is queued on a stream is done."""
    _held.append((_module().Event(device, stream), owner))
    if _dropping.acquire(blocking=False):
        try:
            while _held and _held[0][0].is_done:
                _held.popleft()
        finally:
            _dropping.release()


class _Own:
    keeps_nothing = False

    def device(self, a: Array) -> int:
        return a.device

    def view(self, a: Array, stream: int) -> View:
        if a._stream != stream:
            _module().order(a.device, a._stream, stream)
            a._view.owner.used_on(stream)
        return a._view

    def used_on(self, owner: Any, device: int, stream: int) -> None:
        if hasattr(owner, "used_on"):
            owner.used_on(stream)

    def stream(self, a: Array, device: int) -> int:
        return a._stream

    def empty(self, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Array:
        return _empty(shape, dtype, device, stream)

    def give(self, a: Any) -> Any:
        return a


class _Torch(_Own):
    def __init__(self, torch: Any) -> None:
        self.torch = torch

    def device(self, a: Any) -> int:
        return a.device.index or 0

    def view(self, a: Any, stream: int) -> View:
        dtype = str(a.dtype).removeprefix("torch.")
        return _module().View(  # type: ignore[no-any-return]
            a.data_ptr(), a.shape, a.stride(), dtype, self.device(a), a
        )

    def stream(self, a: Any, device: int) -> int:
        return int(self.torch.cuda.current_stream(device).cuda_stream)

    def used_on(self, owner: Any, device: int, stream: int) -> None:
        if isinstance(owner, self.torch.Tensor):
            owner.record_stream(self.torch.cuda.current_stream(device))
        else:
            super().used_on(owner, device, stream)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
        torch = self.torch
        return torch.empty(shape, dtype=getattr(torch, dtype), device=f"cuda:{device}")


class _CuPy(_Own):
    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy

    def device(self, a: Any) -> int:
        return int(a.device.id)

    def view(self, a: Any, stream: int) -> View:
        strides = [s // a.itemsize for s in a.strides]
        return _module().View(  # type: ignore[no-any-return]
            a.data.ptr, a.shape, strides, str(a.dtype), self.device(a), a
        )

    def stream(self, a: Any, device: int) -> int:
        with self.cupy.cuda.Device(device):
            return int(self.cupy.cuda.get_current_stream().ptr)

    def used_on(self, owner: Any, device: int, stream: int) -> None:
        _hold(owner, device, stream)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
        with self.cupy.cuda.Device(device):
            return self.cupy.empty(shape, dtype)


class _Exchange(_Own):
    """Any framework, through DLPack or, without that, `__cuda_array_interface__`."""

    keeps_nothing = True

    def __init__(self, back: Callable[[Array], Any] | None = None) -> None:
        self.back = back

    def used_on(self, owner: Any, device: int, stream: int) -> None:
        _hold(owner, device, stream)

    def device(self, a: Any) -> int:
        if hasattr(a, "__dlpack__"):
            return int(a.__dlpack_device__()[1])
        return int(_module().device_of(a.__cuda_array_interface__["data"][0]))

    def view(self, a: Any, stream: int) -> View:
        module = _module()
        if hasattr(a, "__dlpack__"):
            # In DLPack, 1 is the default stream, and 0 is not allowed.
            return module.View.from_dlpack(a.__dlpack__(stream=stream or 1))  # type: ignore[no-any-return]
        interface = a.__cuda_array_interface__
        dtype = np.dtype(interface["typestr"])
        strides = interface.get("strides")
        steps = None if strides is None else [s // dtype.itemsize for s in strides]
        return module.View(  # type: ignore[no-any-return]
            interface["data"][0], interface["shape"], steps, str(dtype), self.device(a), a
        )

    def stream(self, a: Any, device: int) -> int:
        interface = getattr(a, "__cuda_array_interface__", {}) if self.back is None else {}
        stream = interface.get("stream")
        return _DEFAULT_STREAM if stream in (None, 1) else int(stream)

    def give(self, a: Any) -> Any:
        return a if self.back is None else self.back(a)


def framework_of(a: Any) -> Framework | None:
    """Return the framework of an array on a GPU, or None for anything else."""
    if isinstance(a, Array):
        return _Own()
    root = type(a).__module__.partition(".")[0]
    if root == "numpy":
        return None
    if root == "torch":
        torch = sys.modules["torch"]  # a PackedSequence is defined there, too
        on_gpu = isinstance(a, torch.Tensor) and a.device.type == "cuda"
        return _Torch(torch) if on_gpu else None
    if root == "cupy":
        return _CuPy(sys.modules["cupy"])
    if root in ("jaxlib", "jax"):
        if not hasattr(a, "__dlpack_device__"):
            raise TypeError(
                f"arrays of JAX must have values, got a {type(a).__name__}: call fusedrnn "
                "outside of jax.jit, jax.grad and jax.vmap"
            )
        if a.__dlpack_device__()[0] != 2:
            return None
        return _Exchange(sys.modules["jax"].dlpack.from_dlpack)
    if hasattr(a, "__dlpack_device__"):
        return _Exchange() if a.__dlpack_device__()[0] == 2 else None
    return _Exchange() if hasattr(a, "__cuda_array_interface__") else None
