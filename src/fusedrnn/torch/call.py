"""What the operators are given: tensors by name, and two strings of all else."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .. import _cpu
from ..cells import CELLS, Cell
from ..options import check_options
from ..reference import Options, Parameters

Maybe = Tensor | None

_USUAL = Parameters._fields[:4]
OTHER_PARAMETERS = "parameters must be those that the call names, of one size"


class Inputs(NamedTuple):
    """The tensors that `forward` takes, after the strings.

    Attributes
    ----------
    x: (T, B, I). h0, c0: (layers*directions, B, R) and (…, B, H), or None for zeros.
    parameters: of each layer and direction those that exist, in the order of
        `reference.Parameters`.
    lengths: (B,) integers. resets: (T, B) bool.
    seed: an int64 on the CPU, where random numbers decide.
    """

    x: Tensor
    h0: Maybe
    c0: Maybe
    parameters: tuple[Tensor, ...] | list[Tensor]
    lengths: Maybe = None
    resets: Maybe = None
    seed: Maybe = None

    @property
    def is_on_gpu(self) -> bool:
        """Whether the kernels of CUDA are asked; what is nowhere is as on the CPU."""
        return self.x.is_cuda

    @property
    def smooth(self) -> list[Maybe]:
        """Those that have gradients: x, h0, c0 and the parameters."""
        return [*self[:3], *self.parameters]


# What `forward` returns, empty tensors for what is not asked for or the cell has not:
#   y (T, B, directions*R), h_n (layers*directions, B, R), c_n (…, B, H),
#   cells: every c of the last layer, (T, B, directions*H); those four have gradients,
#   trace: every gate, (layers*directions, T, B, gates, H),
#   saved: what backward reads beside those and the inputs.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
SMOOTH_OUTPUTS = 4

# So many tensors `backward` reads before the inputs: the gradients of those four, or None, then
# y, cells and saved.
READ = 7


class Sizes(NamedTuple):
    """Sizes of a call; T and B may be symbols."""

    T: Any
    B: Any
    I: int
    H: int
    R: int


@dataclass(frozen=True, eq=False)  # one for each pair of strings
class Call:
    """What is asked for beside the tensors.

    Attributes
    ----------
    text: the strings that `parse` made it of.
    kinds: the parameters that each layer and direction has.
    reverse: whether a single direction goes from the end.
    saves: whether backward will be asked for.
    """

    text: tuple[str, str]
    cell: Cell
    options: Options
    kinds: tuple[str, ...]
    layers: int
    directions: int
    reverse: bool
    saves: bool
    precision: str

    @property
    def has_c(self) -> bool:
        """Whether the cell carries c."""
        return "c" in self.cell.states

    @property
    def count(self) -> int:
        """How many layers and directions there are together."""
        return self.layers * self.directions

    @property
    def is_there(self) -> tuple[bool, bool, bool, bool]:
        """Whether y, h_n, c_n and cells are made."""
        return True, True, self.has_c, self.options.return_cells

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether the call draws random numbers."""
        return self.options.is_random

    @functools.cached_property
    def saving(self) -> Call:
        """The same call with backward asked for."""
        layers, asked = self.text
        return parse(layers, f"{asked} save")

    def keeps_cells(self, on_gpu: bool) -> bool:
        """Whether every c is an output, for the user or for a GPU's backward."""
        return self.options.return_cells or (on_gpu and self.options.recompute and self.has_c)

    def sizes(self, given: Inputs) -> Sizes:
        """Return T, B, I, H, R."""
        T, B, I = given.x.shape
        H = given.parameters[0].shape[0] // len(self.cell.gates)
        return Sizes(T, B, I, H, given.parameters[1].shape[1])

    def output_shapes(self, s: Sizes, on_gpu: bool) -> list[tuple[Any, ...] | None]:
        """Return the shapes of y, h_n, c_n, cells and trace, None for what is not made."""
        n, D, gates = self.count, self.directions, len(self.cell.gates)
        return [
            (s.T, s.B, D * s.R),
            (n, s.B, s.R),
            (n, s.B, s.H) if self.has_c else None,
            (s.T, s.B, D * s.H) if self.keeps_cells(on_gpu) else None,
            (n, s.T, s.B, gates, s.H) if self.options.trace else None,
        ]

    def parameter_shapes(self, I: int, H: int, R: int) -> list[tuple[int, ...]]:
        """Return the shapes of all parameters."""
        of_R = R if "weight_hr" in self.kinds else None
        shapes = []
        for at in range(self.count):
            below = I if at < self.directions else self.directions * R
            every = self.cell.parameter_shapes(below, H, of_R)
            shapes += [every[kind].lengths for kind in self.kinds]
        return shapes

    @functools.cached_property
    def _by_shapes(self) -> dict[tuple[int, ...], _cpu.TensorLayers]:
        return {}

    def on_cpu(self, x: Tensor, parameters: Sequence[Tensor]) -> _cpu.TensorLayers:
        """Return what calls the kernels of the CPU."""
        shapes = (x.shape[-1], *parameters[1].shape)
        layers = self._by_shapes.get(shapes)
        if layers is None:
            I, rows, R = shapes
            layers = self.of_sizes(I, rows // len(self.cell.gates), R)
            self._by_shapes[shapes] = layers
        return layers

    def of_sizes(self, I: int, H: int, R: int) -> _cpu.TensorLayers:
        """Return what calls the kernels of the CPU for I, H and R units."""
        if R != H and "weight_hr" not in self.kinds:
            raise ValueError(OTHER_PARAMETERS)
        kinds = sum(1 << k for k, n in enumerate(Parameters._fields) if n in self.kinds)
        shape = (self.layers, self.directions, kinds, self.reverse)
        return _cpu.TensorLayers(self.cell.name, (I, H, R), *shape)


def describe(
    cell: str,
    options: Mapping[str, Any],
    kinds: Sequence[str] = _USUAL,
    layers: int = 1,
    directions: int = 1,
    reverse: bool = False,
    where: int = 0,
    precision: str = "exact",
) -> str:
    """Return the string that describes layers, a JSON object without what is as usual.

    `where` is the number of the first layer and direction, which tells their random numbers
    apart. `options` are those of the cell's op in `fusedrnn.functional`.
    """
    own = {
        "layers": (layers, 1),
        "directions": (directions, 1),
        "reverse": (reverse, False),
        "where": (where, 0),
        "precision": (precision, "exact"),
        "parameters": (list(kinds), list(_USUAL)),
    }
    unusual = {name: value for name, (value, usual) in own.items() if value != usual}
    return json.dumps({"cell": cell} | unusual | dict(options))


@functools.cache
def parse(layers: str, asked: str = "") -> Call:
    """Read the strings that say what is asked for.

    Parameters
    ----------
    layers: what `describe` returns.
    asked: words of what a call is asked for: save (backward follows), training, return_cells,
        trace, recompute, bptt=<number>.

    >>> parse('{"cell": "gru", "clip": 3.0}', "save bptt=5").options.bptt
    5
    """
    given = json.loads(layers)
    cell, where = CELLS[given.pop("cell")], given.pop("where", 0)
    kinds = tuple(given.pop("parameters", _USUAL))
    numbers = given.pop("layers", 1), given.pop("directions", 1)
    reverse, precision = given.pop("reverse", False), given.pop("precision", "exact")
    words = asked.split()
    flags: dict[str, Any] = {"training": False} | {
        word: True for word in words if "=" not in word and word != "save"
    }
    flags |= {name: int(value) for name, _, value in (w.partition("=") for w in words) if value}
    options = check_options(cell, given | flags | {"seed": 0})._replace(where=where)
    text, saves = (layers, asked), "save" in words
    return Call(text, cell, options, kinds, *numbers, reverse, saves, precision)


def with_seed(call: Call, seed: Maybe) -> Options:
    """Return the options with the seed that a tensor holds, where it matters."""
    if not call.is_random:
        return call.options
    if seed is None:
        raise ValueError("seed must be a tensor of one int64 where random numbers decide")
    return call.options._replace(seed=int(seed) % 2**64)
