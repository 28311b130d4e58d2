from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .reference import Options

Array = npt.NDArray[Any]

compiler: str

class Layers:
    """Layers of a cell in one or both directions, with their weights; never changes.

    Weights are packed when a call first needs it. `parameters` has those of each layer and
    direction that exist, as `reference.Parameters`.
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
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def plan(self, at: int, T: int, B: int, options: Options, /) -> dict[str, Any]:
        """Return how a forward of one layer and direction is laid out."""

    def saved_values(self, options: Options, /) -> int:
        """Return how many values a step and row leave to backward beside x and results."""

    def forward(
        self,
        x: object,
        state: object,
        lengths: object,
        resets: object,
        options: Options,
        out: Array | None,
        saves: bool,
        /,
    ) -> Any:
        """Run a whole call; see `backend.Layers`.

        Returns None, and does nothing, where an argument is not as the kernels read it.
        """

class Tape:
    """What leads back from a training call."""

    def backward(self, dy: object, d_state: object, d_cells: object, /) -> Any:
        """Return the gradients; see `backend.Tape`. None likewise."""

class TensorLayers:
    """Layers of PyTorch's tensors, which are read and made by PyTorch's C interface.

    `sizes` are I, H and R. `kinds` has a bit for each parameter that a direction has, in the
    order of `reference.Parameters`. Calls return None, and do nothing, where a tensor is not
    as the kernels read it.
    """

    def __init__(
        self,
        cell: str,
        sizes: tuple[int, int, int],
        layers: int,
        directions: int,
        kinds: int,
        reverse: bool,
        /,
    ) -> None: ...
    def saved_values(self, is_double: bool, options: Options, /) -> int:
        """Return how many values a step and row leave to backward beside x and results."""

    def infer(
        self, x: object, hx: object, parameters: list[Any], axes: int, options: Options, /
    ) -> Any:
        """Return what a module gives its user for x and hx, where nothing is recorded.

        Axes of x: 0 for (T, B, I), 1 for (B, T, I), either without B, and 2 for a single step.
        None also where anything but autograd looks at the call, False where autograd does.
        """

    def forward(
        self,
        x: object,
        h0: object,
        c0: object,
        parameters: Sequence[Any],
        lengths: object,
        resets: object,
        options: Options,
        saves: bool,
        step: bool,
        /,
    ) -> Any:
        """Return y, h_n, c_n, cells, trace and what is saved; what is not asked for is empty.

        With `step` x is (B, I), and the state after, without an axis of layers, and what is
        saved are returned.
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
        options: Options,
        step: bool,
        /,
    ) -> Any:
        """Return a list of the gradients that are wanted of x, h0, c0 and the parameters."""

def set_torch(
    torch: object, parameter: type, library: str, observers: Sequence[Any], /
) -> None:
    """Hand PyTorch over: the module, nn.Parameter, where libtorch_cpu is, and observers.

    Those are functions; one that returns true looks at calls.
    """

def set_clears_saved(clears: bool, /) -> None:
    """Say whether what is saved is zero where the kernels do not write; for tests."""

def set_few_rows(rows: int, /) -> None:
    """Say up to how many rows, 12 at first, weights are read as they are; for tests."""

def share_team(library: str, /) -> bool:
    """Let calls run on the threads of an OpenMP library that is loaded, if it is."""

LARGE_ARRAY: int

def isas() -> dict[str, bool]:
    """Compiled ISAs, best first, and whether this CPU has them."""

def cells() -> list[str]: ...
def get_isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int, /) -> None: ...
def follow_threads(n: int, /) -> None:
    """Say how many threads calls may use where nobody set it, 0 for what OpenMP says."""

def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], /) -> Array:
    """Return an uninitialised array; large ones reuse memory that was freed."""

def release_memory() -> None:
    """Give back what is kept of freed arrays, and the calling thread's scratch memory."""

def elementwise(name: str, x: Array, /) -> Array: ...
def probe_multiply_add(rounds: int, single: bool, /) -> float:
    """Multiply and add as fast as a core can; return the floating-point operations done."""

def probe_read(a: Array, rounds: int, /) -> float:
    """Read a float32 array `rounds` times as fast as a core can; return the sum."""

def probe_meetings(rounds: int, threads: int, /) -> None:
    """Let threads meet that often at the barrier of a step."""
