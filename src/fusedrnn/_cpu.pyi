from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .reference import Options

Array = npt.NDArray[Any]

compiler: str

class Layers:
    """Layers of a cell in one or both directions, with their weights; immutable.

    A call packs the weights when it first needs to. `parameters` holds those of each layer and
    direction in the order of `reference.Parameters`, None for those that do not exist. Weights
    may be int8, uint16 (the bits of bfloat16) or float16; `scales` then has, for each layer and
    direction, the scales of weight_ih, weight_hh and weight_hr, None unless these are int8, and
    the number of operands that add up to a row of x.
    """

    def __init__(
        self,
        cell: str,
        parameters: Sequence[Sequence[Array | None]],
        directions: int = 1,
        dropout: float = 0.0,
        batch_first: bool = False,
        layered: bool = True,
        reverse: bool = False,
        scales: Sequence[tuple[Sequence[Array | None], int]] = (),
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def plan(self, at: int, T: int, B: int, options: Options, /) -> dict[str, Any]:
        """Return how a forward of one layer and direction would run."""

    def saved_bytes(self, options: Options, /) -> int:
        """Return the number of bytes saved per step and row, beside x and the results."""

    def forward(
        self,
        x: object,
        state: object,
        lengths: object,
        resets: object,
        mask: object,
        options: Options,
        out: Array | None,
        saves: bool,
        /,
    ) -> Any:
        """Run a whole call; see `backend.Layers`.

        Return None, and do nothing, if the kernels cannot read an argument as it is.
        """

class Tape:
    """A training call's record, for its backward."""

    def backward(self, dy: object, d_state: object, d_cells: object, /) -> Any:
        """Return the gradients, see `backend.Tape`, or None as `Layers.forward` does."""

class TensorLayers:
    """Layers on PyTorch's tensors, which PyTorch's C interface reads and allocates.

    `sizes` are I, H and R. `kinds` has a bit for each parameter that a direction has, in the
    order of `reference.Parameters`. With `halves` calls compute as with x of bfloat16, whatever
    its type. Calls return None, and do nothing, if the kernels cannot
    read a tensor as it is.
    """

    def __init__(
        self,
        cell: str,
        sizes: tuple[int, int, int],
        layers: int,
        directions: int,
        kinds: int,
        reverse: bool,
        halves: bool,
        /,
    ) -> None: ...
    def saved_values(self, item: int, options: Options, /) -> int:
        """Return the number of values saved per step and row, beside x and the results.

        `item` is the bytes of an element of y and of what is saved.
        """

    def infer(
        self, x: object, hx: object, parameters: list[Any], axes: int, options: Options, /
    ) -> Any:
        """Return the results of a module's call on x and hx that nothing records.

        `axes` is 0 for x (T, B, I), 1 for (B, T, I), either also without B, and 2 for a single
        step. Return False if autograd must record the call, and None also if a mode, transform
        or tracer must.
        """

    def forward(
        self,
        x: object,
        h0: object,
        c0: object,
        parameters: Sequence[Any],
        lengths: object,
        resets: object,
        mask: object,
        options: Options,
        saves: bool,
        step: bool,
        /,
    ) -> Any:
        """Return y, h_n, c_n, cells, trace and the saved values, empty if not computed.

        With `step`, x is (B, I), and (h, saved) or (h, c, saved) is returned; states have no
        axis of layers.
        """

    def backward(
        self,
        wanted: Sequence[bool],
        d: Sequence[Any],
        y: object,
        cells: object,
        saved: object,
        x: object,
        h0: object,
        c0: object,
        parameters: Sequence[Any],
        lengths: object,
        resets: object,
        mask: object,
        options: Options,
        step: bool,
        /,
    ) -> Any:
        """Return a list of those gradients of x, h0, c0 and the parameters that are wanted."""

def set_torch(
    torch: object, parameter: type, library: str, observers: Sequence[Any], /
) -> None:
    """Set the torch module, nn.Parameter, the path of libtorch_cpu, and the observers.

    An observer is a function that returns true while a mode, transform or tracer is active.
    """

def set_onnxruntime_compiler(
    compile: Callable[
        [str, str, dict[str, Array | None], dict[str, Any], str], tuple[Layers, Options] | None
    ],
    version: str,
    /,
) -> None:
    """Set the function that makes the layers of onnxruntime's nodes, and our version.

    It is called with a node's name, operator, weights and attributes, and the precision, and
    returns None for a node that stays with onnxruntime. A weight is None if it is not constant.
    """

def set_bfloat16(dtype: np.dtype[Any], /) -> None:
    """Set which dtype of NumPy is bfloat16."""

def set_clears_saved(clears: bool, /) -> None:
    """Set whether saved values are 0 where the kernels do not write; for tests."""

def set_few_rows(rows: int, /) -> None:
    """Set up to how many rows, by default 12, weights are read unpacked; for tests."""

def share_team(library: str, /) -> bool:
    """Let calls run on the threads of an OpenMP library; return whether it is loaded."""

LARGE_ARRAY: int

def isas() -> dict[str, bool]:
    """Return the compiled ISAs, best first, and whether this CPU has them."""

def cells() -> list[str]: ...
def get_isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int, /) -> None: ...
def follow_threads(n: int, /) -> None:
    """Set the number of threads that are asked for if the user sets none; 0 follows OpenMP."""

def get_threads_asked_for() -> int: ...
def get_thread_limit() -> int:
    """Return how many threads OpenMP allows, which OMP_THREAD_LIMIT sets."""

def set_quota(cores: int, /) -> None:
    """Set how many processors this process may use at the same time; 0 for no quota."""

def usable_cores() -> int:
    """Return how many processors this process may use, by its affinity mask and quota."""

def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], /) -> Array:
    """Return an uninitialised array; a large one reuses freed memory."""

def release_memory() -> None:
    """Release the memory kept of freed arrays, and the calling thread's scratch memory."""

def elementwise(name: str, x: Array, /) -> Array: ...
def probe_multiply_add(rounds: int, single: bool, /) -> float:
    """Multiply and add as fast as a core can; return the number of operations."""

def probe_product(rounds: int, precision: int) -> float: ...
def probe_read(a: Array, rounds: int, /) -> float:
    """Read a float32 array `rounds` times as fast as a core can; return the sum."""

def probe_meetings(rounds: int, threads: int, as_call: bool, /) -> int:
    """Let threads pass the barrier of a step `rounds` times; return how many there are:
    `threads`, or as many of these as a call takes.
    """
