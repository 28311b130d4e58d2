"""The cells that the kernels implement, one row each.

To add a cell that `rnn` runs, write its definition and its row of `RNN` in `reference/cells.py`
(the row here follows from it) and a header in `csrc/cells/`; then add header and name to
`csrc/cells/all.h`. Tests and benchmarks iterate over `CELLS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import checks, reference


class Shape(NamedTuple):
    """A shape, and the names of its axes, as in "(4*H, I)"."""

    lengths: tuple[int, ...]
    axes: str


@dataclass(frozen=True)
class Cell:
    """A kernel's name, the op that runs it, and the reference cell that defines it."""

    name: str
    op: str
    reference: reference.Cell
    arguments: Mapping[str, Any] = field(default_factory=dict)  # select this cell of the op

    @property
    def gates(self) -> str:
        """One letter for each block of H rows in the weights."""
        return self.reference.gates

    @property
    def states(self) -> tuple[str, ...]:
        """The states that a step hands to the next: ("h", "c") or ("h",)."""
        return self.reference.states

    @property
    def peepholes(self) -> str:
        """The gates that may have a peephole, one letter for each block of H in weight_ch."""
        return "".join(gate for gate in self.gates if gate in "ifo")

    @property
    def resets_before(self) -> bool:
        """Whether the cell is a GRU that applies its reset gate before the matmul."""
        return self.reference is reference.GRU_RESET_BEFORE

    @property
    def is_coupled(self) -> bool:
        """Whether the cell is an LSTM with f = 1 - i, without weights for f."""
        return self.reference is reference.COUPLED_LSTM

    @property
    def kernel_gates(self) -> str:
        """The gates that the kernels compute, a coupled LSTM's f included."""
        return reference.LSTM.gates if self.is_coupled else self.gates

    def parameter_shapes(self, I: int, H: int, R: int | None = None) -> dict[str, Shape]:
        """Return the shapes of all parameters by name; h has R units, or H if R is None."""
        rows, axis = len(self.gates) * H, f"{len(self.gates)}*H" if self.gates != "h" else "H"
        peepholes = len(self.peepholes)
        shapes = {
            "weight_ih": Shape((rows, I), f"({axis}, I)"),
            "weight_hh": Shape((rows, R or H), f"({axis}, {'R' if R else 'H'})"),
            "bias_ih": Shape((rows,), f"({axis},)"),
            "bias_hh": Shape((rows,), f"({axis},)"),
        }
        has_c = "c" in self.states
        if has_c:
            shapes["weight_hr"] = Shape((R or H, H), "(R, H)")
            shapes["weight_ch"] = Shape((peepholes * H,), f"({peepholes}*H,)")
        if len(self.gates) > 1:
            shapes["gamma_ih"] = Shape((rows,), f"({axis},)")
            shapes["gamma_hh"] = Shape((rows,), f"({axis},)")
        if has_c:
            shapes["gamma_c"] = shapes["beta_c"] = Shape((H,), "(H,)")
        return shapes

    def layer_shapes(
        self, I: int, H: int, proj_size: int, bias: bool, peephole: bool, layer_norm: bool
    ) -> dict[str, Shape]:
        """Return the shapes of the parameters that a layer with these arguments has."""
        left_out = set()
        if not bias:
            left_out |= {"bias_ih", "bias_hh"}
        if not proj_size:
            left_out |= {"weight_hr"}
        if not peephole:
            left_out |= {"weight_ch"}
        if not layer_norm:
            left_out |= {"gamma_ih", "gamma_hh", "gamma_c", "beta_c"}
        shapes = self.parameter_shapes(I, H, proj_size or None)
        return {name: shape for name, shape in shapes.items() if name not in left_out}


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", "lstm", reference.LSTM),
        Cell("lstm_coupled", "lstm", reference.COUPLED_LSTM, {"coupled_gates": True}),
        Cell("gru", "gru", reference.GRU),
        Cell("gru_before", "gru", reference.GRU_RESET_BEFORE, {"reset_after": False}),
        *(
            Cell(f"rnn_{name}", "rnn", cell, {"nonlinearity": name})
            for name, cell in reference.RNN.items()
        ),
    )
}


def lstm_cell(options: Any) -> Cell:
    """Return the LSTM that an op's options select; remove those options."""
    coupled = checks.flag("coupled_gates", options.pop("coupled_gates", False))
    return CELLS["lstm_coupled" if coupled else "lstm"]


def gru_cell(options: Any) -> Cell:
    """Return the GRU that an op's options select; remove those options."""
    after = checks.flag("reset_after", options.pop("reset_after", True))
    return CELLS["gru" if after else "gru_before"]


def rnn_cell(options: Any) -> Cell:
    """Return the RNN that an op's options select; remove those options."""
    nonlinearity = options.pop("nonlinearity", "tanh")
    cell = CELLS.get(f"rnn_{nonlinearity}")
    if cell is None:
        known = ", ".join(f'"{n.removeprefix("rnn_")}"' for n in CELLS if n.startswith("rnn_"))
        raise ValueError(f"nonlinearity must be one of {known}, got {nonlinearity!r}")
    return cell
