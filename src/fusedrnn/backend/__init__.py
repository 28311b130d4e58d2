"""Backends: the interface through which `engine` runs calls on the CPU or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ..cells import Cell
from ..reference import Options, Parameters


@dataclass(frozen=True)
class Spec:
    """The layers of a call: one cell, in one or both directions.

    Attributes
    ----------
    I, H, R: the number of features of x, units of a layer, and units of its h.
    dropout: the probability with which an element of y is dropped between two layers.
    layered: whether states have an axis of layers and directions; those of an op do not.
    reverse: whether a single direction runs from the last step to the first.
    precision: the precision of products on a GPU.
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
        """Whether h is projected to another number of units."""
        return self.R != self.H

    def state_shape(self, batch: tuple[int, ...], width: int) -> tuple[int, ...]:
        """Return the shape of a state; `batch` is (B,) or ()."""
        count = (self.layers * self.directions,) if self.layered else ()
        return (*count, *batch, width)


class Tape(Protocol):
    """A training call's record, from which backward computes the gradients."""

    def backward(self, dy: Any, d_state: Any, d_cells: Any, /) -> Any:
        """Return the gradients of x, of the initial state, and of all parameters in a list.

        The arguments are the gradients of the results, None for zeros.
        """


class Layers(Protocol):
    """Layers that are ready to be called; a call packs their weights when it first needs to."""

    def forward(
        self,
        x: Any,
        state: Any,
        lengths: Any,
        resets: Any,
        mask: Any,
        options: Options,
        out: Any,
        saves: bool,
        /,
    ) -> Any:
        """Return y and the state, and as options request every c and the gates.

        With `saves`, return a pair of these results and a `Tape`. A state is h, or a pair
        (h, c). The gates are a list of arrays (T, B, gates, H), one for each layer and
        direction.
        """


class Backend(Protocol):
    """The CPU, or the GPU that x is on with the stream that is current there.

    Functions that take a name check an argument, raise errors that name it, and return the
    argument as the backend reads it.
    """

    def array(
        self, name: str, value: Any, dtype: Any | None = None, whole: bool = False
    ) -> Any:
        """Return an array, of `dtype` unless that is None, contiguous if `whole`."""

    def state_dtype(self, dtype: Any) -> Any:
        """Return the dtype of states for x of `dtype`."""

    def state(self, name: str, value: Any, dtype: Any) -> Any:
        """Return a state or its gradient."""

    def lengths(self, value: Any, T: int, batch: tuple[int, ...]) -> Any:
        """Return the rows' lengths; `batch` is (B,), or () for x (T, I)."""

    def flags(self, name: str, value: Any, expected: tuple[int, ...], axes: str) -> Any:
        """Return resets or a mask, shaped as x without its last axis."""

    def check_mask(self, mask: Any, lengths: Any, time_axis: int) -> None:
        """Check that a mask is false from the rows' lengths on."""

    def output(self, out: Any, shape: tuple[int, ...], axes: str, used: list[Any]) -> Any:
        """Return the array that y is written into; `used` is what the op reads, x first."""

    def layers(
        self, spec: Spec, parameters: list[Parameters], cache: dict[Any, Any] | None = None
    ) -> Layers:
        """Return layers with the parameters of each layer and direction.

        `cache` keeps packed weights from call to call, as long as the parameters are the same.
        """

    def now(self) -> Backend:
        """Return the backend for a later call, with the GPU stream that is current then."""
