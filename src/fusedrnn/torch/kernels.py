"""The kernels on tensors: those on the CPU are used in place, those on a GPU on its stream."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from .. import _cpu, cuda
from ..device import backend_of
from ..kernel import FEW_ROWS, HOST, Problem, told_options, values_of
from ..options import Request
from ..reference import Parameters
from .call import READ, SMOOTH, Call, Inputs, Maybe, Outputs, parse


def share_team() -> bool:
    """Run on PyTorch's own threads, which spin on their cores after each of its operations."""
    home = pathlib.Path(torch.__file__).parent
    files = [*home.glob("lib/lib*.so*"), *home.parent.glob("torch.libs/lib*.so*")]
    found = [f for f in files if f.name.startswith(("libgomp", "libiomp", "libomp"))]
    # A library of that name may have been loaded from elsewhere before.
    return any(_cpu.share_team(name) for file in found for name in (str(file), file.name))


share_team()
_followed = 0
_to_dlpack: Any = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]
_from_dlpack = _cpu.from_dlpack


def _follow_threads() -> None:
    """Let calls use as many threads as PyTorch does, where the user did not say how many."""
    global _followed
    threads = torch.get_num_threads()
    if threads != _followed:
        _cpu.follow_threads(threads)
        _followed = threads


def _array(a: Maybe) -> Any:
    """See a tensor on the CPU, whatever autograd thinks of it."""
    return None if a is None else _from_dlpack(_to_dlpack(a.resolve_neg()))


class _Layer:
    """One call, its tensors as the kernels of their backend see them."""

    def __init__(self, call: Call, tensors: Sequence[Any]) -> None:
        self.call = call
        self.given = given = Inputs(*tensors)
        if given.is_on_gpu:
            is_single = given.x.dtype == torch.float32
            self.on: Any = backend_of(given.x, call.precision if is_single else "exact")
        else:
            self.on = HOST
            _follow_threads()
        self.x = self.see(given.x)
        self.parameters = Parameters(*map(self.see, given.parameters))
        self.row_wise = call.is_row_wise(given)

    def see(self, a: Maybe) -> Any:
        """See a tensor, whatever autograd thinks of it."""
        if a is None:
            return None
        return _array(a) if self.on is HOST else self.on.see(a.contiguous())

    def give(self, made: Any) -> Tensor:
        """Return the tensor of what `on.empty` made."""
        tensor: Tensor = torch.from_numpy(made) if self.on is HOST else self.on.give(made)
        return tensor

    def empty(self, shape: tuple[int, ...] | None, of_state: bool = False) -> Any:
        """Make an array of x's dtype or that of states, none for no shape."""
        dtype = self.x.dtype
        dtype = self.on.state_dtype(dtype) if of_state else dtype
        return None if shape is None else self.on.empty(shape, dtype)

    def start(self) -> tuple[Any, ...]:
        """Return the state before the first step."""
        on, (_, B, _, H, R) = self.on, self.call.sizes(self.given)
        state = []
        for a, width in zip(
            self.given[1 : 1 + len(self.call.cell.states)], (R, H), strict=False
        ):
            if a is None:
                state.append(on.zeros((B, width), on.state_dtype(self.x.dtype)))
            else:
                state.append(self.see(a.contiguous()))
        return tuple(state)

    def masks(self) -> Any:
        """Return the masks of rows."""
        (T, B, _), lengths, resets = self.x.shape, self.given.lengths, self.given.resets
        if lengths is not None:
            values = _array(lengths) if lengths.is_cpu else lengths
            lengths = self.on.lengths(values, T, (B,))
        if resets is not None:
            values = _array(resets) if resets.is_cpu else resets
            resets = self.on.resets(values, (T, B), "(T, B)")
        return self.on.masks(lengths, resets)

    def problem(self, y: Any, final: Any, cells: Any, trace: Any) -> Problem:
        """Return what is to be computed from and into arrays."""
        call, request = self.call, with_seed(self.call, self.given)
        where = (self.x, self.start(), self.masks(), call.reverse, y, final)
        return Problem(call.cell, *where, request, self.row_wise, cells, trace)

    def pack(self, problem: Problem, forward: Any = None, borrow: bool = False) -> Any:
        """Pack the parameters, for backward if those of the forward are given."""
        seen = self.on.with_weights_dropped(self.parameters, problem.request)
        T, B, _ = self.x.shape
        borrow = borrow or (T * B <= FEW_ROWS and not self.row_wise)
        return self.on.pack(self.call.cell, seen, forward, borrow, self.row_wise)

    def forward(self) -> Outputs:
        """Return what `fusedrnn::forward` does."""
        on, call, x = self.on, self.call, self.given.x
        shapes = call.output_shapes(self.given)
        made = [self.empty(shape, 0 < i < 4) for i, shape in enumerate(shapes)]
        y, h_n, c_n, cells, trace = (None if a is None else on.see(a) for a in made)
        problem = self.problem(y, (h_n, c_n)[: len(call.cell.states)], cells, trace)
        saved = on.forward(self.pack(problem), problem, call.saves)
        results = [x.new_empty(0) if a is None else self.give(a) for a in made]
        if saved is None:  # nothing is, or no row takes a step
            kept = x.new_empty(saved_shape(call, self.given))
        else:
            kept = self.give(saved) if on is HOST else saved.owner
        return (*results, kept)  # type: ignore[return-value]

    def backward(
        self, wanted: int, d: Sequence[Maybe], y: Tensor, cells: Tensor, saved: Tensor
    ) -> list[Tensor]:
        """Return what `fusedrnn::backward` does."""
        on, call, see = self.on, self.call, self.see
        problem = self.problem(see(y), (), see(cells) if call.keeps_cells else None, None)
        forward = self.pack(problem, borrow=not call.request.recompute)
        back = self.pack(problem, forward)
        kept = see(saved.contiguous()) if saved.numel() else None
        tape = on.tape(problem, self.parameters, back, forward, kept)
        names = [name for n, name in enumerate(Inputs._fields[:SMOOTH]) if wanted >> n & 1]
        _, B, _, H, R = call.sizes(self.given)
        made = {f"{s}0": self.empty((B, H if s == "c" else R), True) for s in call.cell.states}
        d_state = tuple(map(on.see, made.values()))
        made["x"] = self.empty(self.given.x.shape) if "x" in names else None
        dy, dh_n, dc_n, d_cells = map(see, d)
        d_parameters = tape.backward(
            dy,
            (dh_n, dc_n)[: len(d_state)],
            d_cells,
            None if made["x"] is None else on.see(made["x"]),
            d_state,
            wanted=names,
        )
        made |= d_parameters._asdict()
        return [self.give(made[name]) for name in names]


def with_seed(call: Call, given: Inputs) -> Request:
    """Return the request with the seed that a tensor holds, where it matters."""
    if not call.request.is_random:
        return call.request
    if given.seed is None:
        raise ValueError("seed must be a tensor of one int64 where random numbers decide")
    return call.request.with_seed(int(given.seed) % 2**64)


_PLAIN = Inputs._fields.index("weight_hr")  # what a plain call has ends before
_NOTHING = {type(None)}


def _is_plain(call: Call, tensors: Sequence[Any]) -> bool:
    """Whether it is a call on the CPU that has only x, a state, weights and biases."""
    if not (call.is_plain and tensors[0].is_cpu):
        return False
    return set(map(type, tensors[_PLAIN:])) == _NOTHING


_REST = [None] * (SMOOTH - _PLAIN)


def _arrays(tensors: Sequence[Any]) -> tuple[list[Any], Any, Any, Any]:
    """Return the parameters, x, h0 and c0 of a plain call."""
    _follow_threads()
    x, h0, c0, *parameters = [  # as _array, seven calls less
        None if a is None else _from_dlpack(_to_dlpack(a.resolve_neg())) for a in tensors
    ]
    return parameters + _REST, x, h0, c0


def _plain(call: Call, tensors: Sequence[Any]) -> tuple[str, list[Any], Any, Any, Any, bool]:
    """Return what the kernels take of a plain call."""
    return call.cell.name, *_arrays(tensors[:_PLAIN]), call.reverse


def compute_layer(cell: str, tensors: Sequence[Any]) -> list[Tensor] | None:
    """Run a plain layer whose states are (1, B, H), as it comes: y, h_n and c_n.

    None where an argument needs preparing, or is wrong.
    """
    try:
        arrays = _arrays(tensors)
    except (TypeError, BufferError, RuntimeError):  # elsewhere, or of an unknown type
        return None
    made = _cpu.plain_forward(cell, *arrays, False, False, FEW_ROWS, 1)
    return made and [torch.from_numpy(a) for a in made if a is not None]


def compute_forward(text: str, *tensors: Any) -> Outputs:
    """Run the kernels: what `fusedrnn::forward` does."""
    call = parse(text)
    if _is_plain(call, tensors):
        made = _cpu.plain_forward(*_plain(call, tensors), call.saves, FEW_ROWS, 0)
        if made is not None:
            none = tensors[0].new_empty
            y, h_n, c_n, saved = [none(0) if a is None else torch.from_numpy(a) for a in made]
            return y, h_n, c_n, none(0), none(0), saved
    return _Layer(call, tensors).forward()


def compute_backward(text: str, wanted: int, *tensors: Any) -> list[Tensor]:
    """Run the kernels backward: what `fusedrnn::backward` does.

    Tensors: the gradients of y, h_n, c_n and cells, or None; y, cells and saved; `Inputs`.
    `wanted` has bit n for the n-th of those, whose gradients are returned in that order.
    """
    call = parse(text)
    *d, y, cells, saved = tensors[:READ]
    inputs = tensors[READ:]
    if not (call.saves or call.request.recompute):
        text = f'{text[:-1]}, "save": true}}'
        call, saved = parse(text), compute_forward(text, *inputs)[-1]
    if _is_plain(call, inputs):
        of_y, of_saved, dy, dh_n, dc_n = map(_array, (y, saved, *d[:3]))
        read = (of_y, of_saved, dy, dh_n, dc_n)
        made = _cpu.plain_backward(*_plain(call, inputs), *read, wanted, FEW_ROWS)
        if made is not None:
            return [torch.from_numpy(a) for a in made]
    return _Layer(call, inputs).backward(wanted, d, y, cells, saved)


class _Form(NamedTuple):
    """What the size of what is saved depends on, beside T, B and the type."""

    call: Call
    present: tuple[str, ...]  # of the parameters
    I: int
    H: int
    R: int
    row_wise: bool

    @classmethod
    def of(cls, call: Call, given: Inputs) -> _Form:
        """Read it off the tensors."""
        _, _, I, H, R = call.sizes(given)
        return cls(call, given.present, int(I), int(H), int(R), call.is_row_wise(given))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return those that there are."""
        projected = self.R if "weight_hr" in self.present else None
        shapes = self.call.cell.parameter_shapes(self.I, self.H, projected)
        return {name: shapes[name].lengths for name in self.present}


def saved_shape(call: Call, given: Inputs) -> tuple[Any, ...]:
    """Return the shape of what a forward saves."""
    T, B, _ = given.x.shape
    if not call.saves or call.request.recompute:
        return (0,)
    form = _Form.of(call, given)
    if given.is_on_gpu:
        count = _saved_bytes(form, str(given.x.dtype)[6:], given.x.device.index or 0)
        return ((T * B * count + 255) // 256 * 256,) if count else (0,)
    size, _ = _saved_size(form, given.x.dtype == torch.float64, _cpu.get_isa())
    return (T, B, size) if size else (0,)


def clean_saved(text: str, saved: Tensor, *tensors: Any) -> None:
    """Fill what a forward on the CPU leaves as it was: who compares results may see it."""
    call, given = parse(text), Inputs(*tensors)
    if saved.dim() != 3 or given.is_on_gpu:
        return
    form = _Form.of(call, given)
    _, values = _saved_size(form, given.x.dtype == torch.float64, _cpu.get_isa())
    saved[..., values:] = 0
    if given.lengths is not None:
        lengths = given.lengths.tolist()
        longest = max(lengths, default=0)
        saved[longest:] = 0
        for b, length in enumerate(lengths):  # steps that the row does not take
            if call.reverse:
                saved[: longest - length, b] = 0
            else:
                saved[length:longest, b] = 0


@functools.cache
def _saved_size(form: _Form, double: bool, _: str) -> tuple[int, int]:
    """Return how many values a step and row have on the CPU, and how many are written.

    That depends on the ISA in use.
    """
    dtype = np.float64 if double else np.float32
    shapes = form.parameter_shapes()
    parameters = Parameters(**{name: np.zeros(shape, dtype) for name, shape in shapes.items()})
    weights = HOST.pack(form.call.cell, parameters, borrow=not form.row_wise)
    options = told_options(form.call.request, form.row_wise)
    return weights.saved_size(options), weights.saved_values(options)


@functools.cache
def _saved_bytes(form: _Form, dtype: str, device: int) -> int:
    """Return how many bytes a step and row have on a GPU."""
    call, _, I, H, R, row_wise = form
    module = cuda._module()
    is_wide = dtype in ("float32", "float64")
    wide = dtype if is_wide else "float32"
    asked = call.precision if dtype == "float32" else "exact"
    precision = cuda.precision_of(dtype, asked)
    if row_wise and not is_wide:
        dtype, precision = wide, "tf32"
    T = 256  # so that no rounding shows

    def view(shape: tuple[int, ...], dtype: str) -> Any:
        return module.View(256, shape, None, dtype, device, None)  # null would be none

    shapes = form.parameter_shapes()
    arrays = {
        name: view(shape, wide if name == "weight_ch" else dtype)
        for name, shape in shapes.items()
    }
    arrays |= {"x": view((T, 1, I), dtype), "y": view((T, 1, R), dtype)}
    kernel = module.Kernel(call.cell.name, precision, device, 0)
    arrays["packed"] = None if row_wise else view((kernel.packed_bytes(H, False),), "uint8")
    arrays["cells"] = view((T, 1, H), wide) if call.keeps_cells else None
    options = module.Options(*values_of(call.request.options), False)
    return int(kernel.saved_bytes(arrays, options)) // T
