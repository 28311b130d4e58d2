"""What the operators are told: tensors by name, and a string of all else."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..cells import CELLS, Cell
from ..options import Request, beyond_plain, check_options
from ..reference import Parameters

Maybe = Tensor | None


class Inputs(NamedTuple):
    """The tensors that `forward` takes, after the string.

    Attributes
    ----------
    x: (T, B, I). h0, c0: (B, R) and (B, H), or None for zeros. weight_ih and so on: as
        `reference.Parameters`. lengths: (B,) integers. resets: (T, B) bool.
    seed: an int64 on the CPU, where random numbers decide.
    """

    x: Tensor
    h0: Maybe
    c0: Maybe
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Maybe = None
    bias_hh: Maybe = None
    weight_hr: Maybe = None
    weight_ch: Maybe = None
    gamma_ih: Maybe = None
    gamma_hh: Maybe = None
    gamma_c: Maybe = None
    beta_c: Maybe = None
    lengths: Maybe = None
    resets: Maybe = None
    seed: Maybe = None

    @property
    def parameters(self) -> Parameters:
        """Those among them."""
        return Parameters(*self[3:SMOOTH])

    @property
    def is_on_gpu(self) -> bool:
        """Whether the kernels of CUDA are asked; what is nowhere is as on the CPU."""
        return self.x.is_cuda

    @property
    def present(self) -> tuple[str, ...]:
        """The names of the parameters that there are."""
        return tuple(n for n, p in self.parameters._asdict().items() if p is not None)


SMOOTH = Inputs._fields.index("lengths")  # so many of them have gradients


# What `forward` returns, empty tensors for what is not asked for or the cell has not:
#   y (T, B, R), h_n (B, R), c_n (B, H),
#   cells: every c, (T, B, H); those four have gradients,
#   trace: every gate, (T, B, gates, H),
#   saved: what backward reads beside those and the inputs.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
SMOOTH_OUTPUTS = 4

# So many tensors `backward` reads before the inputs: the gradients of those four, or None, then
# y, cells and saved.
READ = 7


@dataclass(frozen=True, eq=False)  # one for each string
class Call:
    """What is asked for beside the tensors; `saves`: backward will be."""

    cell: Cell
    request: Request
    reverse: bool = False
    saves: bool = False
    precision: str = "exact"

    @property
    def has_c(self) -> bool:
        """Whether the cell carries c."""
        return "c" in self.cell.states

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether only the tensors can ask for more than the plain kernels do."""
        request = self.request
        asks = request.beyond_plain(True) or request.options.bptt or request.drops_weights
        return not (asks or self.cell.is_coupled or self.cell.resets_before)

    @property
    def is_there(self) -> tuple[bool, bool, bool, bool]:
        """Whether y, h_n, c_n and cells are made."""
        return True, True, self.has_c, self.keeps_cells

    @property
    def keeps_cells(self) -> bool:
        """Whether every c is an output, for the user or for backward."""
        return self.request.return_cells or (self.request.recompute and self.has_c)

    def sizes(self, given: Inputs) -> tuple[Any, Any, int, int, int]:
        """Return T, B, I, H, R."""
        T, B, I = given.x.shape
        H = given.weight_ih.shape[0] // len(self.cell.gates)
        return T, B, I, H, given.weight_hh.shape[1]

    def output_shapes(self, given: Inputs) -> list[tuple[Any, ...] | None]:
        """Return the shapes of y, h_n, c_n, cells and trace, None for what is not made."""
        T, B, _, H, R = self.sizes(given)
        return [
            (T, B, R),
            (B, R),
            (B, H) if self.has_c else None,
            (T, B, H) if self.keeps_cells else None,
            (T, B, len(self.cell.gates), H) if self.request.trace else None,
        ]

    def is_row_wise(self, given: Inputs) -> bool:
        """Whether the plain kernels do not do."""
        on_cpu = not given.is_on_gpu
        of_layer = beyond_plain(self.cell, given.parameters, on_cpu)
        return bool(of_layer or self.request.beyond_plain(on_cpu))


@functools.cache
def parse(call: str) -> Call:
    """Read the string that says what is asked for, a JSON object.

    "cell": a name in `CELLS`. "reverse", "save", "precision": as in `Call`. "where": a number
    that tells the random numbers of layers and directions apart. Others: options of the
    cell's op in `fusedrnn.functional`.

    >>> parse('{"cell": "gru", "clip": 3.0, "reverse": true}').reverse
    True
    """
    given = {"training": False} | json.loads(call)
    cell, where = CELLS[given.pop("cell")], given.pop("where", 0)
    reverse, saves = given.pop("reverse", False), given.pop("save", False)
    precision = given.pop("precision", "exact")
    request = check_options(cell, given | {"seed": 0})
    return Call(cell, request.at(where), reverse, saves, precision)
