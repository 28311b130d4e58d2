"""The cells that the kernels know, one row each.

To add a cell: its definition in `reference.py`, a row here, a header in `csrc/cells/`, a
line in `csrc/cpu/kernels.cpp`, and for GPUs a file in `cuda/cells/` and a line in
`cuda/cells.cpp`. Tests and benchmarks iterate over `CELLS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import reference


@dataclass(frozen=True)
class Cell:
    """A kernel's name and the reference cell that defines it."""

    name: str
    reference: reference.Cell

    @property
    def gates(self) -> str:
        """One letter for each block of H rows in the weights."""
        return self.reference.gates

    @property
    def states(self) -> tuple[str, ...]:
        """The states it carries: ("h", "c") or ("h",)."""
        return self.reference.states

    def parameter_shapes(self, I: int, H: int) -> tuple[tuple[int, ...], ...]:
        """Return those of weight_ih, weight_hh, bias_ih and bias_hh."""
        rows = len(self.gates) * H
        return (rows, I), (rows, H), (rows,), (rows,)


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", reference.LSTM),
        Cell("gru", reference.GRU),
        *(Cell(f"rnn_{name}", cell) for name, cell in reference.RNN.items()),
    )
}
