"""Calls of the kernels with PyTorch's tensors, on the CPU and on a GPU."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _cpu, checks, cuda
from ..backend.cuda import PassTape, spread_results
from ..backend.cuda_arguments import Problem, Weights, values_of
from ..backend.cuda_masks import Steps
from ..engine import backend_of
from ..options import asked_of_layer
from ..reference import Options, Parameters
from .call import OTHER_PARAMETERS, READ, Call, Inputs, Maybe, Outputs, with_seed
from .definition import state_dtype


def share_team() -> bool:
    """Let the kernels run on PyTorch's threads, and return whether they can.

    PyTorch's threads spin on their cores after each operation, so other threads would wait.
    """
    home = pathlib.Path(torch.__file__).parent
    files = [*home.glob("lib/lib*.so*"), *home.parent.glob("torch.libs/lib*.so*")]
    found = [f for f in files if f.name.startswith(("libgomp", "libiomp", "libomp"))]
    # A library of this name may already be loaded from another folder.
    return any(_cpu.share_team(name) for file in found for name in (str(file), file.name))


share_team()
_C: Any = torch._C
# With these functions compiled code finds out whether something other than autograd observes a
# call: modes, transforms, tracers.
_cpu.set_torch(
    torch,
    torch.nn.Parameter,
    str(next(pathlib.Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"), "")),
    [
        _C._len_torch_dispatch_stack,
        _C._len_torch_function_stack,
        _C._functorch.peek_interpreter_stack,
        _C._get_tracing_state,
        functools.partial(torch.is_autocast_enabled, "cpu"),
    ],
)


def follow_threads() -> None:
    """Use as many threads as PyTorch does, unless the user has set the number."""
    _cpu.follow_threads(torch.get_num_threads())


# On the CPU

_ON_CPU = (torch.float32, torch.float64, torch.bfloat16)


class NeedsChecksError(Exception):
    """An argument of a direct call must be checked or converted first."""


# The arguments of `_cpu.TensorLayers` from x to the options.
_Arguments = tuple[Any, Maybe, Maybe, Sequence[Any], Maybe, Maybe, Maybe, Options]


def _unchecked(call: Call, given: Inputs) -> _Arguments | None:
    """Return the kernels' arguments from x to the options, or None for those to be checked."""
    x, h0, c0, parameters, *masks, seed = given
    if not x.is_cpu or any(a is not None for a in masks):
        return None
    follow_threads()
    return x, h0, c0, parameters, None, None, None, with_seed(call, seed)


def try_forward(call: Call, given: Inputs) -> Outputs | None:
    """Run the CPU's kernels on unchecked tensors, or return None if they cannot read one."""
    arguments = _unchecked(call, given)
    if arguments is None:
        return None
    layers = call.on_cpu(given.x, given.parameters)
    outputs: Outputs | None = layers.forward(*arguments, call.saves, False)
    return outputs


def _try_backward(
    call: Call,
    wanted: Sequence[bool],
    d: Sequence[Maybe],
    y: Tensor,
    cells: Tensor,
    saved: Tensor,
    given: Inputs,
) -> list[Tensor] | None:
    """Run the CPU's kernels backward on unchecked tensors, or return None as `try_forward`."""
    arguments = _unchecked(call, given) if call.saves else None
    if arguments is None:
        return None
    seeds = [  # the gradient of a sum is not contiguous
        g if g is None or g.is_contiguous() else g.contiguous() for g in d
    ]
    user_cells = cells if call.options.return_cells else None
    layers = call.on_cpu(given.x, given.parameters)
    gradients: list[Tensor] | None
    gradients = layers.backward(wanted, seeds, y, user_cells, saved, *arguments, False)
    return gradients


def _readable(a: Maybe) -> Maybe:
    """Return a tensor that the kernels can read: contiguous, without a pending negation."""
    return None if a is None else a.resolve_neg().contiguous()


def checked_masks(
    x: Tensor, lengths: Maybe, resets: Maybe, mask: Maybe
) -> tuple[Maybe, Maybe, Maybe]:
    """Return the masks of x (T, B, I) as the kernels read them on the CPU."""
    T, B, _ = x.shape

    def flags(name: str, a: Maybe) -> Maybe:
        if a is None:
            return None
        values = checks.flags(name, a.numpy(force=True), (T, B), "(T, B)")
        return torch.from_numpy(values).contiguous()

    if lengths is not None:
        values = checks.lengths(lengths.numpy(force=True), T, (B,))
        lengths = torch.from_numpy(values)
    resets, mask = flags("resets", resets), flags("mask", mask)
    if mask is not None and lengths is not None:
        checks.fits(mask.numpy(), lengths.numpy(), 0)
    return lengths, resets, mask


def _prepared(call: Call, given: Inputs) -> _Arguments:
    """Return the arguments of the kernels from x to the options, checked and readable."""
    x, h0, c0, parameters, *masks, seed = given
    lengths, resets, mask = checked_masks(x, *masks)
    weights = list(map(_readable, parameters))
    return (
        _readable(x),
        _readable(h0),
        _readable(c0),
        weights,
        lengths,
        resets,
        mask,
        with_seed(call, seed),
    )


def _forward_on_cpu(call: Call, given: Inputs) -> Outputs:
    if given.x.numel() == 0:
        return _without_steps(call, given)
    follow_threads()
    layers = call.on_cpu(given.x, given.parameters)
    outputs: Outputs | None = layers.forward(*_prepared(call, given), call.saves, False)
    if outputs is None:
        raise ValueError("tensors must be on the CPU and have the sizes and dtype of x")
    return outputs


def _without_steps(call: Call, given: Inputs) -> Outputs:
    """Return the results of a call without steps or rows, which keeps the state."""
    s, x = call.sizes(given), given.x
    shapes = call.output_shapes(s, False)
    of_y, of_state = call.dtype(given), state_dtype(x)
    dtypes = (of_y, of_state, of_state, of_state, of_y)
    made = [
        x.new_zeros((0,), dtype=of_y) if shape is None else x.new_zeros(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    for n, state in enumerate((given.h0, given.c0)):
        if state is not None:
            made[1 + n].copy_(state)
    saved = x.new_zeros(saved_shape(call, given), dtype=of_y)
    return (*made, saved)  # type: ignore[return-value]


def _backward_on_cpu(
    call: Call,
    wanted: Sequence[bool],
    d: Sequence[Maybe],
    y: Tensor,
    cells: Tensor,
    saved: Tensor,
    given: Inputs,
) -> list[Tensor]:
    if given.x.numel() == 0:
        ends = [None, d[1], d[2], *[None] * len(given.parameters)]
        return [
            torch.zeros_like(a) if g is None else g.clone()
            for a, g, is_wanted in zip(given.smooth, ends, wanted, strict=True)
            if is_wanted and a is not None
        ]
    follow_threads()
    user_cells = cells if call.options.return_cells else None
    read = (_readable(y), _readable(user_cells), _readable(saved), *_prepared(call, given))
    layers, seeds = call.on_cpu(given.x, given.parameters), list(map(_readable, d))
    gradients: list[Tensor] | None = layers.backward(wanted, seeds, *read, False)
    if gradients is None:
        raise ValueError("gradients must have the sizes and dtype of what they belong to")
    return gradients


# On a GPU, where a call has one layer and one direction


class _OnGpu:
    """A call and its tensors, as arrays of the GPU backend."""

    def __init__(self, call: Call, given: Inputs) -> None:
        self.call, self.given = call, given
        is_single = given.x.dtype == torch.float32
        self.on: Any = backend_of(given.x, call.precision if is_single else "exact")
        self.x = self.see(given.x)
        seen = dict(zip(call.kinds, map(self.see, given.parameters), strict=True))
        self.parameters = Parameters(**seen)
        self.options = with_seed(call, given.seed)
        self.by_rows = bool(asked_of_layer(call.cell, self.parameters, False))
        self._read_masks()

    def see(self, a: Maybe) -> Any:
        """Return a tensor as an array of the backend, without regard to autograd."""
        return None if a is None else self.on.see(a.contiguous())

    def empty(self, shape: tuple[int, ...] | None, of_state: bool = False) -> Any:
        """Create a tensor of the dtype of x, or of states; None if shape is None."""
        dtype = self.on.state_dtype(self.x.dtype) if of_state else self.x.dtype
        return None if shape is None else self.on.empty(shape, dtype)

    def problem(self, y: Any, final: Any, cells: Any, trace: Any) -> Problem:
        """Return the arrays and options of the call as one object."""
        call = self.call
        start = tuple(None if a is None else self.see(a)[0] for a in self.given[1:3])
        x, lengths, resets = self.x, self.lengths, self.resets
        if self.steps is not None:
            x, lengths, resets = self.steps.compact(x), self.steps.lengths, self.steps.resets
        where = (x, start[: len(call.cell.states)], lengths, resets, call.reverse)
        return Problem(call.cell, *where, y, final, self.options, self.by_rows, cells, trace)

    def _read_masks(self) -> None:
        """Set lengths, resets and, with a mask, the steps that rows take."""
        given, on, (T, B, _) = self.given, self.on, self.x.shape

        def read(a: Maybe) -> Any:
            return a if a is None or not a.is_cpu else a.numpy()

        def flags(name: str, a: Maybe) -> Any:
            return None if a is None else on.flags(name, read(a), (T, B), "(T, B)")

        lengths = read(given.lengths)
        self.lengths = None if lengths is None else on.lengths(lengths, T, (B,))
        self.resets, mask = flags("resets", given.resets), flags("mask", given.mask)
        self.steps = None
        if mask is not None:
            where = (self.lengths, self.resets, 1, self.call.reverse)
            self.steps = Steps.of(on, mask, *where)

    def pack(self, backward: bool) -> Weights:
        """Pack the parameters for forward or backward."""
        seen = self.on.with_weights_dropped(self.parameters, self.options)
        packed: Weights = self.on.pack(self.call.cell, seen, backward, self.by_rows)
        return packed

    def forward(self) -> Outputs:
        """Return the results of `fusedrnn::forward`."""
        on, call, x = self.on, self.call, self.given.x
        shapes = call.output_shapes(call.sizes(self.given), True)
        made = [self.empty(shape, 0 < i < 4) for i, shape in enumerate(shapes)]
        y, h_n, c_n, cells, trace = (None if a is None else on.see(a) for a in made)
        final = tuple(a[0] for a in (h_n, c_n) if a is not None)
        problem = self.problem(y, final, cells, None if trace is None else trace[0])
        saved = on.forward(self.pack(False), problem, call.saves)
        if self.steps is not None:
            made = self._spread(self.steps, made)
        results = [x.new_empty(0) if a is None else on.give(a) for a in made]
        # Nothing is saved where no row takes a step.
        kept = x.new_empty(saved_shape(call, self.given)) if saved is None else saved.owner
        return (*results, kept)  # type: ignore[return-value]

    def _spread(self, steps: Steps, made: Sequence[Any]) -> list[Any]:
        """Return results with the steps at their own times."""
        y, h_n, c_n, cells, trace = made
        start = self.see(self.given.h0)
        traces = [] if trace is None else [self.on.see(trace)[0]]
        y, cells, traces = spread_results(steps, y, start, cells, traces, self.options.repeats)
        return [y, h_n, c_n, cells, traces[0].unsqueeze(0) if traces else None]

    def backward(
        self,
        wanted: Sequence[bool],
        d: Sequence[Maybe],
        y: Tensor,
        cells: Tensor,
        saved: Tensor,
    ) -> list[Tensor]:
        """Return the results of `fusedrnn::backward`."""
        on, call, see, steps = self.on, self.call, self.see, self.steps
        of_y, of_cells = see(y), see(cells) if call.keeps_cells(True) else None
        dy, dh_n, dc_n, d_cells = map(see, d)
        user_dy, repeats = dy, self.options.repeats
        if steps is not None:
            of_y, of_cells = steps.compact(of_y), steps.compact(of_cells)
            dy, d_cells = steps.gather_gradient(dy, repeats), steps.compact(d_cells)
        problem = self.problem(of_y, (), of_cells, None)
        tape = PassTape(on, problem, self.pack(True), see(saved) if saved.numel() else None)
        s = call.sizes(self.given)
        widths = (s.R, s.H)[: len(call.cell.states)]
        d_state = [self.empty((1, s.B, width), True) for width in widths]
        dx = self.empty((s.T, s.B, s.I)) if wanted[0] else None
        names = [n for n, is_wanted in zip(call.kinds, wanted[3:], strict=True) if is_wanted]
        d_parameters = tape.backward(
            dy,
            tuple(None if a is None else a[0] for a in (dh_n, dc_n))[: len(d_state)],
            d_cells,
            None if dx is None else on.see(dx),
            tuple(on.see(a)[0] for a in d_state),
            wanted=names,
        )
        if steps is not None:
            dx = None if dx is None else steps.spread(dx)
            steps.add_to_start(user_dy, repeats, on.see(d_state[0]))
        of_state = [*d_state, None][:2]
        found = [dx, *of_state, *(getattr(d_parameters, n) for n in call.kinds)]
        return [on.give(a) for a, is_wanted in zip(found, wanted, strict=True) if is_wanted]


# Both


def compute_forward(call: Call, *tensors: Any, checked: bool = True) -> Outputs:
    """Run the kernels, and return the results of `fusedrnn::forward`.

    `checked`: the sizes of the tensors were checked.
    """
    given = Inputs(*tensors)
    outputs = None if given.is_on_gpu else try_forward(call, given)
    if outputs is not None:
        return outputs
    if not checked:
        check_tensors(call, given)
    return _OnGpu(call, given).forward() if given.is_on_gpu else _forward_on_cpu(call, given)


def compute_backward(
    call: Call, wanted: Sequence[bool], *tensors: Any, checked: bool = True
) -> list[Tensor]:
    """Run the kernels backward, and return the results of `fusedrnn::backward`.

    `tensors` are the gradients of y, h_n, c_n and cells, or None, then y, cells and saved, then
    `Inputs`. `wanted` has a flag for each tensor of `Inputs.smooth`. The gradients of those
    with True are returned, in the same order.
    """
    given = Inputs(*tensors[READ:])
    *d, y, cells, saved = tensors[:READ]
    gradients = None
    if not given.is_on_gpu:
        gradients = _try_backward(call, wanted, d, y, cells, saved, given)
    if gradients is not None:
        return gradients
    if not checked:
        check_tensors(call, given)
    if not call.saves:
        call = call.saving
        saved = compute_forward(call, *given)[-1]
    if given.is_on_gpu:
        return _OnGpu(call, given).backward(wanted, d, y, cells, saved)
    return _backward_on_cpu(call, wanted, d, y, cells, saved, given)


def check_tensors(call: Call, given: Inputs) -> None:
    """Raise an error for tensors that the kernels would read out of bounds."""
    s, n = call.sizes(given), call.count
    shapes = [(n, s.B, s.R), (n, s.B, s.H), *call.parameter_shapes(s.I, s.H, s.R)]
    names = ["h0", "c0", *call.kinds * n]
    found = given.smooth[1:]
    if len(found) != len(shapes):
        raise ValueError(OTHER_PARAMETERS)
    for name, a, expected in zip(names, found, shapes, strict=True):
        dtype = given.x.dtype
        if a is None:
            continue
        if name in ("h0", "c0"):
            dtype = state_dtype(given.x)
        elif call.halves:
            dtype = given.parameters[0].dtype
        if a.shape != expected or a.dtype != dtype or a.device != given.x.device:
            raise ValueError(
                f"{name} must have shape {expected} and dtype {dtype} on {given.x.device}, "
                f"got {tuple(a.shape)}, {a.dtype} on {a.device}"
            )
    if given.x.is_cpu and given.x.dtype not in _ON_CPU:
        raise TypeError(
            f"x must be float32, float64 or bfloat16 on the CPU, got {given.x.dtype}"
        )


def saved_shape(call: Call, given: Inputs) -> tuple[Any, ...]:
    """Return the shape of the values that forward saves."""
    s = call.sizes(given)
    if not call.saves:
        return (0,)
    if given.is_on_gpu:
        if call.options.recompute:
            return (0,)
        where = (str(given.x.dtype)[6:], given.x.device.index or 0)
        count = _saved_bytes(call, int(s.I), int(s.H), int(s.R), *where)
        return ((s.T * s.B * count + 255) // 256 * 256,) if count else (0,)
    layers = call.of_sizes(int(s.I), int(s.H), int(s.R))
    values = layers.saved_values(call.dtype(given).itemsize, call.options)
    return (s.T, s.B, values) if values else (0,)


@functools.cache
def _saved_bytes(call: Call, I: int, H: int, R: int, dtype: str, device: int) -> int:
    """Return the number of bytes that a GPU saves for each step and row."""
    module = cuda._module()
    is_wide = dtype in ("float32", "float64")
    wide = dtype if is_wide else "float32"
    asked = call.precision if dtype == "float32" else "exact"
    precision = cuda.precision_of(dtype, asked)
    by_rows = call.cell.resets_before or {"weight_hr", "gamma_ih"} & set(call.kinds)
    if by_rows and not is_wide:
        dtype, precision = wide, "tf32"
    T = 256  # a multiple of any alignment, so that the quotient is exact

    def view(shape: tuple[int, ...], dtype: str) -> Any:
        return module.View(256, shape, None, dtype, device, None)  # any address but 0

    shapes = zip(call.kinds, call.parameter_shapes(I, H, R), strict=True)
    arrays = {
        name: view(shape, wide if name == "weight_ch" else dtype) for name, shape in shapes
    }
    arrays |= {"x": view((T, 1, I), dtype), "y": view((T, 1, R), dtype)}
    kernel = module.Kernel(call.cell.name, precision, device, 0)
    arrays["packed"] = None if by_rows else view((kernel.packed_bytes(H, False),), "uint8")
    arrays["cells"] = view((T, 1, H), wide) if call.keeps_cells(True) else None
    options = module.Options(*values_of(call.options), False)
    return int(kernel.saved_bytes(arrays, options)) // T
