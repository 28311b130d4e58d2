from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

compiler: str

class Options:
    """What a call is asked for beside its arrays; see `fusedrnn.reference.Options`."""

    def __init__(
        self,
        row_wise: bool,
        clip: float,
        cell_clip: float,
        zoneout_h: float,
        zoneout_c: float,
        recurrent_dropout: float,
        training: bool,
        seed: int,
        where: int,
        bptt: int,
    ) -> None: ...

class Weights:
    """A layer's parameters in one direction, packed for one ISA; never changes.

    `borrow` keeps the arrays instead, for a few rows.
    """

    def __init__(
        self,
        cell: str,
        parameters: list[Array | None],  # as `reference.Parameters`
        backward: bool = False,
        isa: str | None = None,
        borrow: bool = False,
    ) -> None: ...
    @property
    def cell(self) -> str: ...
    @property
    def isa(self) -> str: ...
    def saved_size(self, options: Options, /) -> int:
        """Return how many values are saved for backward per step and row, beside x and y."""

    def saved_values(self, options: Options, /) -> int:
        """Return how many of those are written, the first."""

    def plan(self, T: int, B: int, options: Options, /) -> dict[str, Any]:
        """Return how a forward of that size is laid out."""

    def call(self, x: object, state: object, /) -> tuple[Array, Any] | None:
        """Run a layer whole, or None where its arguments need checking or preparing."""

    def forward(
        self,
        options: Options,
        x: Array,
        h0: Array,
        c0: Array | None,
        lengths: Array | None,
        resets: Array | None,
        reverse: bool,
        y: Array,
        h_n: Array,
        c_n: Array | None,
        saved: Array | None,
        cells: Array | None,
        trace: Array | None,
        /,
    ) -> None: ...
    def backward(
        self,
        options: Options,
        forward: Weights,
        x: Array,
        h0: Array,
        c0: Array | None,
        lengths: Array | None,
        resets: Array | None,
        reverse: bool,
        y: Array,
        saved: Array | None,
        cells: Array | None,
        dy: Array | None,
        dh_n: Array | None,
        dc_n: Array | None,
        dcells: Array | None,
        dx: Array | None,
        gradients: list[Array | None],
        dh0: Array,
        dc0: Array | None,
        /,
    ) -> None:
        """Write gradients, those of parameters in their order, as `reference.Parameters`.

        One that is None costs nothing.
        """

def from_dlpack(capsule: object, /) -> Array:
    """Return the array on the CPU that a capsule is about."""

def share_team(library: str, /) -> bool:
    """Let calls run on the threads of an OpenMP library that is loaded, if it is."""

def plain_forward(
    cell: str,
    parameters: list[Array | None],
    x: Array,
    h0: Array | None,
    c0: Array | None,
    reverse: bool,
    saves: bool,
    few_rows: int,
    layers: int,
    /,
) -> tuple[Array, Array, Array | None, Array | None] | None:
    """Pack and run a layer that is asked for nothing more: y, h_n, c_n, what is saved.

    Up to so few rows the weights are read as they are. States are (B, H), or (1, B, H) for
    layers = 1. None where an argument needs preparing.
    """

def plain_backward(
    cell: str,
    parameters: list[Array | None],
    x: Array,
    h0: Array | None,
    c0: Array | None,
    reverse: bool,
    y: Array,
    saved: Array | None,
    dy: Array | None,
    dh_n: Array | None,
    dc_n: Array | None,
    wanted: int,
    few_rows: int,
    /,
) -> list[Array] | None:
    """Return those gradients whose bits are in `wanted`: x, h0, c0, parameters in order."""

def drop(a: Array, p: float, seed: int, what: str, where: int, to: Array, /) -> None:
    """Write dropout of (T, B, n) into `to`, of "weights" or "between" layers."""

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
