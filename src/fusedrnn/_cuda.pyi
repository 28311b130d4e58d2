from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

class Error(RuntimeError): ...
class OutOfMemoryError(MemoryError): ...

class View:
    """An array on a device; strides count elements, and None means contiguous."""

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | list[int] | None,
        dtype: str,
        device: int,
        owner: object,
    ) -> None: ...
    @property
    def pointer(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def itemsize(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def owner(self) -> Any: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_contiguous(self) -> bool: ...
    def __getitem__(self, key: Any, /) -> View: ...
    def swapaxes(self, a: int, b: int, /) -> View: ...
    @staticmethod
    def from_dlpack(capsule: object, /) -> View: ...
    def to_dlpack(self) -> Any: ...

class Memory:
    """Memory on a device, freed on the stream that it was allocated on."""

    def __init__(self, bytes: int, device: int, stream: int) -> None: ...
    @property
    def pointer(self) -> int: ...
    def used_on(self, stream: int, /) -> None: ...

class Event:
    """The work that is queued on a stream at some moment."""

    def __init__(self, device: int, stream: int) -> None: ...
    @property
    def is_done(self) -> bool: ...

class Options:
    """The options of a call that are not arrays; see `fusedrnn.reference.Options`."""

    def __init__(
        self,
        clip: float,
        cell_clip: float,
        zoneout_h: float,
        zoneout_c: float,
        recurrent_dropout: float,
        training: bool,
        seed: int,
        where: int,
        bptt: int,
        activation: Sequence[float],
        recurrent_activation: Sequence[float],
        adds_dx: bool,
    ) -> None: ...

def drop(a: View, p: float, seed: int, what: str, where: int, to: View, stream: int, /) -> None:
    """Write dropout of float32 or float64 into `to`, of "weights" or "between" layers."""

def convert(a: View, to: View, stream: int, /) -> None:
    """Copy at any strides, within one type or from or to float32."""

def clear(a: View, stream: int, /) -> None:
    """Fill with zeros."""

def take_steps(
    mask: View,
    lengths: View | None,
    resets: View | None,
    steps: View,
    counts: View,
    resets_of_steps: View | None,
    stream: int,
    /,
) -> None:
    """Write which steps rows take: (4, T, B) int32, (B,) int32 and their resets.

    `steps` gets the time of each step, the step of each time, and the step at or before each
    time in either direction, -1 for none.
    """

def move_rows(a: View, at: View, initial: View | None, to: View, stream: int, /) -> None:
    """Write to[t, b] = a[at[t, b], b], or initial[b] (None: 0) where `at` is -1."""

def sum_repeated(
    a: View, at: View, reverse: bool, to: View | None, initial: View | None, stream: int, /
) -> None:
    """Write to[k, b], the sum of a[t, b] where `at` is k; add those of -1 to initial[b]."""

class Kernel:
    """The kernels of a cell in a precision, on a device and stream."""

    def __init__(self, cell: str, precision: str, device: int, stream: int) -> None: ...
    def packed_bytes(self, H: int, backward: bool, /) -> int: ...
    def pack(
        self,
        weight_hh: View,
        bias_ih: View | None,
        bias_hh: View | None,
        backward: bool,
        packed: View,
        /,
    ) -> None: ...
    def forward(
        self,
        arrays: dict[str, View | None],
        options: Options,
        reverse: bool,
        saves: bool,
        allocate: Callable[[int], View],
        /,
    ) -> View | None:
        """Run a layer; arrays have their names of cuda/kernels.h.

        Without `packed` weights, steps go row by row. Return the saved values for `backward`.
        """

    def saved_bytes(self, arrays: dict[str, View | None], options: Options, /) -> int:
        """Return how many bytes a forward saves for arrays of these shapes."""

    def backward(
        self,
        arrays: dict[str, View | None],
        options: Options,
        reverse: bool,
        allocate: Callable[[int], View],
        /,
    ) -> None:
        """Write the gradients among the arrays."""

    def explain(self, T: int, B: int, I: int, H: int, backward: bool, /) -> dict[str, Any]: ...
    def plans(self, T: int, B: int, I: int, H: int, backward: bool, /) -> list[dict[str, int]]:
        """Return all plans, as `wish` chooses them and `estimates` reads them."""

def copy_from_host(to: View, source: npt.NDArray[Any], stream: int, /) -> None: ...
def copy_to_host(to: npt.NDArray[np.generic], source: View, stream: int, /) -> None: ...
def copy_on_device(to: View, source: View, stream: int, /) -> None: ...
def wish(
    exchange: int = -1,
    tiles: int = 0,
    resident: int = -1,
    on_chip: int = -1,
    staged: int = -1,
    groups: int = 0,
    splits: int = 0,
    blocks_x: int = 0,
) -> None:
    """Set conditions for the plans that this thread chooses next; for tests."""

def costs() -> dict[str, float]:
    """Return the costs by which a plan is chosen, in cycles: those of cuda/costs.inc."""

def estimates(plans: list[dict[str, int]], costs: dict[str, float], /) -> list[float]:
    """Return the cycles of a step of each plan; costs that are not given are the usual ones."""

def time_recurrences(run: Callable[[], object], /) -> list[float]:
    """Return the seconds on the device of each recurrence that `run` queues."""

def cells() -> list[str]: ...
def device_count() -> int: ...
def device_of(pointer: int, /) -> int: ...
def device(ordinal: int, /) -> dict[str, Any]: ...
def runtime_version() -> int: ...
def use_blas(path: str, /) -> None: ...
def is_capturing(device: int, stream: int, /) -> bool: ...
def synchronize(device: int, stream: int, /) -> None: ...
def order(device: int, before: int, after: int, /) -> None: ...
