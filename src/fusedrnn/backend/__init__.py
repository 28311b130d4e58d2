"""Where calls run: what the CPU and GPUs both do for `engine`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ..cells import Cell
from ..reference import Options, Parameters


@dataclass(frozen=True)
class Spec:
    """What is called: layers of one cell, in one or both directions.

    Attributes
    ----------
    I, H, R: the units of x, of a layer and of its h.
    dropout: the probability with which a layer does not see an element of the y below.
    layered: whether states have an axis of layers and directions, which an op's have not.
    reverse: whether a single direction goes from the end.
    precision: of products on a GPU.
    """

    cell: Cell
    I: int
    H: int
    R: int
    layers: int = 1
    directions: int = 1
    dropout: float = 0.0
    batch_first: bool = False
    layered: bool = True
    reverse: bool = False
    precision: str = "exact"

    @property
    def is_projected(self) -> bool:
        """Whether h has other units than the layer."""
        return self.R != self.H

    def state_shape(self, batch: tuple[int, ...], width: int) -> tuple[int, ...]:
        """Return the shape of a state; `batch` is (B,) or ()."""
        count = (self.layers * self.directions,) if self.layered else ()
        return (*count, *batch, width)


class Tape(Protocol):
    """What leads back from a training call."""

    def backward(self, dy: Any, d_state: Any, d_cells: Any, /) -> Any:
        """Return the gradients of x, of the state and a list of those of the parameters.

        The arguments are the gradients of the results, None for zeros.
        """


class Layers(Protocol):
    """Layers that are ready to be called, their weights packed when a call first needs it."""

    def forward(
        self,
        x: Any,
        state: Any,
        lengths: Any,
        resets: Any,
        options: Options,
        out: Any,
        saves: bool,
        /,
    ) -> Any:
        """Return y, the state, every c and gates, those two where they are asked for.

        With `saves` return a pair of these and a `Tape`. A state is h, or a pair (h, c). Gates
        are indexed by the number of a layer and direction, as arrays (T, B, gates, H).
        """


class Backend(Protocol):
    """The CPU, or the GPU that x is on with the stream that is current there.

    Functions that take a name check an argument, raise errors that name it, and return the
    argument as the backend reads it.
    """

    on_cpu: bool

    def array(
        self, name: str, value: Any, dtype: Any | None = None, whole: bool = False
    ) -> Any:
        """Return an array, of `dtype` where that is given, contiguous if `whole`."""

    def state_dtype(self, dtype: Any) -> Any:
        """Return the dtype of states for x of `dtype`."""

    def state(self, name: str, value: Any, dtype: Any) -> Any:
        """Return a state or its gradient."""

    def lengths(self, value: Any, T: int, batch: tuple[int, ...]) -> Any:
        """Return the rows' lengths; `batch` is (B,), or () for x (T, I)."""

    def resets(self, value: Any, expected: tuple[int, ...], axes: str) -> Any:
        """Return resets, shaped as x without its last axis."""

    def output(self, out: Any, shape: tuple[int, ...], axes: str, used: list[Any]) -> Any:
        """Return the array that y is written into; `used` is what the op reads, x first."""

    def layers(
        self, spec: Spec, parameters: list[Parameters], kept: dict[Any, Any] | None = None
    ) -> Layers:
        """Return layers with these parameters, of each layer and direction.

        `kept` is a dict in which layers called before with the same parameters left what they
        packed.
        """

    def now(self) -> Backend:
        """Return the backend for a later call: on a GPU, of the stream that is current then."""
