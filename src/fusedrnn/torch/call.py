"""The arguments of the operators: named tensors, and two strings for everything else."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _cpu
from ..cells import CELLS, Cell
from ..options import check_options
from ..reference import Options, Parameters
from ..reference.narrow import NarrowPrecision

Maybe = Tensor | None

_DEFAULT_KINDS = Parameters._fields[:4]
OTHER_PARAMETERS = "parameters must be those that the call names, all of one size"


class Inputs(NamedTuple):
    """The tensors that `forward` takes after the strings.

    Attributes
    ----------
    x: (T, B, I). h0, c0: (layers*directions, B, R) and (…, B, H), or None for zeros.
    parameters: those that exist for each layer and direction, in the order of
        `reference.Parameters`.
    lengths: (B,) integers. resets, mask: (T, B) bool.
    seed: an int64 on the CPU, needed if the call draws random numbers.
    """

    x: Tensor
    h0: Maybe
    c0: Maybe
    parameters: tuple[Tensor, ...] | list[Tensor]
    lengths: Maybe = None
    resets: Maybe = None
    mask: Maybe = None
    seed: Maybe = None

    @property
    def is_on_gpu(self) -> bool:
        """Whether CUDA's kernels run. Meta tensors count as tensors on the CPU."""
        return self.x.is_cuda

    @property
    def smooth(self) -> list[Maybe]:
        """The tensors that have gradients: x, h0, c0 and the parameters."""
        return [*self[:3], *self.parameters]


# The results of `forward`; those that the call does not have are empty tensors:
#   y (T, B, directions*R), h_n (layers*directions, B, R), c_n (…, B, H),
#   cells: every c of the last layer, (T, B, directions*H); these four have gradients,
#   trace: every gate, (layers*directions, T, B, gates, H),
#   saved: what backward reads in addition to the results and the inputs.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
SMOOTH_OUTPUTS = 4

# The number of tensors that `backward` reads before the inputs: the gradients of those four, or
# None, then y, cells and saved.
READ = 7


class Sizes(NamedTuple):
    """The sizes of a call. T and B may be symbols."""

    T: Any
    B: Any
    I: int
    H: int
    R: int


@dataclass(frozen=True, eq=False)  # one object for each pair of strings
class Call:
    """The arguments of a call that are not tensors.

    Attributes
    ----------
    text: the strings that `parse` read.
    kinds: the names of the parameters that each layer and direction has.
    reverse: whether a single direction runs from the last step to the first.
    saves: whether forward saves values for backward.
    halves: whether the CPU computes as with x of bfloat16, whatever the type of x, as under
        autocast.
    weights, x_bits: the precision of narrow weights, or None, as `fusedrnn.LSTM.quantize`
        takes them; `kinds` then has the scales, too.
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
    weights: NarrowPrecision | None
    x_bits: int
    halves: bool

    @property
    def has_c(self) -> bool:
        """Whether the cell has a state c."""
        return "c" in self.cell.states

    @property
    def count(self) -> int:
        """The number of layers times that of directions."""
        return self.layers * self.directions

    @property
    def has_results(self) -> tuple[bool, bool, bool, bool]:
        """Whether the call has y, h_n, c_n and cells."""
        return True, True, self.has_c, self.options.return_cells

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether the call draws random numbers."""
        return self.options.is_random

    @functools.cached_property
    def saving(self) -> Call:
        """The same call, saving values for backward."""
        layers, asked = self.text
        return parse(layers, f"{asked} save")

    def keeps_cells(self, on_gpu: bool) -> bool:
        """Whether every c is a result, for the user or for backward on a GPU."""
        return self.options.return_cells or (on_gpu and self.options.recompute and self.has_c)

    def dtype(self, given: Inputs) -> torch.dtype:
        """Return the dtype of y, of a trace and, on the CPU, of the saved values."""
        return torch.bfloat16 if self.halves else given.x.dtype

    def sizes(self, given: Inputs) -> Sizes:
        """Return T, B, I, H, R."""
        T, B, I = given.x.shape
        H = given.parameters[0].shape[0] // len(self.cell.gates)
        return Sizes(T, B, I, H, given.parameters[1].shape[1])

    def output_shapes(self, s: Sizes, on_gpu: bool) -> list[tuple[Any, ...] | None]:
        """Return the shapes of y, h_n, c_n, cells and trace, None for absent ones."""
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
        """Return the layers in compiled code for the CPU, of the sizes of these tensors."""
        shapes = (x.shape[-1], *parameters[1].shape)
        layers = self._by_shapes.get(shapes)
        if layers is None:
            I, rows, R = shapes
            layers = self.of_sizes(I, rows // len(self.cell.gates), R)
            self._by_shapes[shapes] = layers
        return layers

    def of_sizes(self, I: int, H: int, R: int) -> _cpu.TensorLayers:
        """Return the layers in compiled code for the CPU, of these sizes."""
        if R != H and "weight_hr" not in self.kinds:
            raise ValueError(OTHER_PARAMETERS)
        kinds = sum(1 << k for k, n in enumerate(Parameters._fields) if n in self.kinds)
        shape = (self.layers, self.directions, kinds, self.reverse)
        return _cpu.TensorLayers(self.cell.name, (I, H, R), *shape, self.halves)


def describe(
    cell: str,
    options: Mapping[str, Any],
    kinds: Sequence[str] = _DEFAULT_KINDS,
    layers: int = 1,
    directions: int = 1,
    reverse: bool = False,
    where: int = 0,
    precision: str = "exact",
    weights: NarrowPrecision | None = None,
    x_bits: int = 0,
) -> str:
    """Return the string that describes layers: a JSON object that leaves out default values.

    `where` is the number of the first layer and direction, from which their random numbers
    follow. `options` are those of the cell's op in `fusedrnn.functional`.
    """
    values = {
        "layers": (layers, 1),
        "directions": (directions, 1),
        "reverse": (reverse, False),
        "where": (where, 0),
        "precision": (precision, "exact"),
        "weights": (weights, None),
        "x_bits": (x_bits, 0),
        "parameters": (list(kinds), list(_DEFAULT_KINDS)),
    }
    changed = {name: value for name, (value, default) in values.items() if value != default}
    return json.dumps({"cell": cell} | changed | dict(options))


_OF_CALL = ("save", "bfloat16", "repeat")  # words that name no option of an op


@functools.cache
def parse(layers: str, asked: str = "") -> Call:
    """Read the two strings of a call.

    Parameters
    ----------
    layers: the string that `describe` returns.
    asked: words that say what the call does: save (values for backward), bfloat16, training,
        return_cells, trace, recompute, repeat (the last y at steps that are not taken),
        bptt=<number>.

    >>> parse('{"cell": "gru", "clip": 3.0}', "save bptt=5").options.bptt
    5
    """
    given = json.loads(layers)
    cell, where = CELLS[given.pop("cell")], given.pop("where", 0)
    kinds = tuple(given.pop("parameters", _DEFAULT_KINDS))
    numbers = given.pop("layers", 1), given.pop("directions", 1)
    reverse, precision = given.pop("reverse", False), given.pop("precision", "exact")
    narrow = given.pop("weights", None), given.pop("x_bits", 0)
    words = asked.split()
    flags: dict[str, Any] = {"training": False} | {
        word: True for word in words if "=" not in word and word not in _OF_CALL
    }
    if "repeat" in words:
        flags["masked_output"] = "last"
    flags |= {name: int(value) for name, _, value in (w.partition("=") for w in words) if value}
    options = check_options(cell, given | flags | {"seed": 0})._replace(where=where)
    saves, halves, text = "save" in words, "bfloat16" in words, (layers, asked)
    where = (*numbers, reverse)
    return Call(text, cell, options, kinds, *where, saves, precision, *narrow, halves)


def with_seed(call: Call, seed: Maybe) -> Options:
    """Return the options, with the value of `seed` if the call draws random numbers."""
    if not call.is_random:
        return call.options
    if seed is None:
        raise ValueError(
            "seed must be a tensor of one int64 for options that draw random numbers"
        )
    return call.options._replace(seed=int(seed) % 2**64)
