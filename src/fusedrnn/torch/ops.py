"""A layer in one direction as operators of PyTorch: `fusedrnn::forward` and `::backward`.

Both take flat tensors and one string that says what is asked for, so that a graph shows it.
Derivatives of derivatives, and forward-mode ones, come from the cell's definition
(`fusedrnn.reference`), which runs on tensors, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from .. import reference
from .call import READ, SMOOTH, SMOOTH_OUTPUTS, Inputs, Maybe, Outputs, parse
from .kernels import clean_saved, compute_backward, compute_forward, saved_shape, with_seed


def _state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of states for x: at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_forward(text: str, *tensors: Any) -> Outputs:
    call, given = parse(text), Inputs(*tensors)
    of_x, of_state = given.x.dtype, _state_dtype(given.x)
    dtypes = (of_x, of_state, of_state, of_state, of_x)
    made = [
        given.x.new_empty(
            (0,) if shape is None else shape, dtype=of_x if shape is None else dtype
        )
        for shape, dtype in zip(call.output_shapes(given), dtypes, strict=True)
    ]
    shape = saved_shape(call, given)
    is_bytes = given.is_on_gpu and shape != (0,)
    saved = given.x.new_empty(shape, dtype=torch.uint8 if is_bytes else of_x)
    return (*made, saved)  # type: ignore[return-value]


def _fake_backward(text: str, wanted: int, *tensors: Any) -> list[Tensor]:
    call, given = parse(text), Inputs(*tensors[READ:])
    _, B, _, H, R = call.sizes(given)
    of_state = _state_dtype(given.x)
    shapes = {"h0": (B, R), "c0": (B, H)}
    return [
        given.x.new_empty(shapes[name], dtype=of_state)
        if name in shapes
        else given.x.new_empty(a.shape)
        for n, (name, a) in enumerate(zip(Inputs._fields[:SMOOTH], given, strict=False))
        if wanted >> n & 1 and a is not None
    ]


_KINDS = ["Tensor"] + ["Tensor?"] * 2 + ["Tensor"] * 2 + ["Tensor?"] * 11
_ARGUMENTS = ", ".join(
    f"{kind} {name}" for kind, name in zip(_KINDS, Inputs._fields, strict=True)
)


def _forward(text: str, *tensors: Any) -> Outputs:
    made = compute_forward(text, *tensors)
    clean_saved(text, made[-1], *tensors)
    return made


forward = library.custom_op(
    "fusedrnn::forward",
    _forward,
    mutates_args=(),
    schema=f"(str call, {_ARGUMENTS}) -> (" + ", ".join(["Tensor"] * 6) + ")",
)
backward = library.custom_op(
    "fusedrnn::backward",
    compute_backward,
    mutates_args=(),
    schema=(
        "(str call, int wanted, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? d_cells, "
        f"Tensor y, Tensor cells, Tensor saved, {_ARGUMENTS}) -> Tensor[]"
    ),
)
forward.register_fake(_fake_forward)
backward.register_fake(_fake_backward)


# Derivatives


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.text, *tensors = inputs
    y, _, _, cells, trace, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(trace, saved)
    ctx.save_for_backward(y, cells, saved, *tensors)


def _pull(ctx: Any, *d: Maybe) -> tuple[Maybe, ...]:
    needs = ctx.needs_input_grad[1 : 1 + SMOOTH]
    names = [n for n, is_needed in enumerate(needs) if is_needed]
    none: list[Maybe] = [None] * (1 + len(Inputs._fields))
    is_there = parse(ctx.text).is_there
    of_outputs = [g if here else None for g, here in zip(d, is_there, strict=False)]
    if all(g is None for g in of_outputs):
        return tuple(none)
    wanted = sum(1 << n for n in names)
    tensors = (*of_outputs, *ctx.saved_tensors)
    for n, gradient in zip(names, run_backward(ctx.text, wanted, *tensors), strict=True):
        none[1 + n] = gradient
    return tuple(none)


class _Eager(torch.autograd.Function):
    """The same as `forward` with its derivative: an operator takes three times as long."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Outputs:
        made = compute_forward(*args)
        _keep(ctx, args, made)
        return made

    backward = staticmethod(_pull)


def define(text: str, *tensors: Any) -> Outputs:
    """Compute what `forward` does by operations of PyTorch, which know every derivative.

    16 bits are float32 in between, as states are.
    """
    of_state, of_x = _state_dtype(tensors[0]), tensors[0].dtype
    wide = [a.to(of_state) if a is not None and a.is_floating_point() else a for a in tensors]
    call, given = parse(text), Inputs(*wide)
    options = with_seed(call, given).options
    run: Any = reference.run
    done = run(
        call.cell.reference,
        given.x,
        given.parameters,
        given[1 : 1 + len(call.cell.states)],
        given.lengths,
        given.resets,
        call.reverse,
        options,
    )
    none = given.x.new_empty(0)
    gates = list(done.gates.values())
    return (
        done.y.to(of_x),
        done.state[0],
        done.state[1] if call.has_c else none,
        done.cells if call.keeps_cells else none,
        torch.stack(gates, 2).to(of_x) if call.request.trace else none,
        none,
    )


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.text, ctx.wanted, *tensors = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _pull_second(ctx: Any, *d: Maybe) -> tuple[Any, ...]:
    """Differentiate the gradients of the definition."""
    call = parse(ctx.text)
    dy, dh_n, dc_n, d_cells, *_ = tensors = ctx.saved_tensors
    given = Inputs(*tensors[READ:])
    is_there = call.is_there
    seeds = [g for g, here in zip((dy, dh_n, dc_n, d_cells), is_there, strict=True) if here]
    names = [n for n, a in enumerate(given[:SMOOTH]) if a is not None]
    wanted = [names.index(n) for n in range(SMOOTH) if ctx.wanted >> n & 1]

    def results(*values: Any) -> tuple[Tensor, ...]:
        changed = list(given)
        for n, value in zip(names, values, strict=True):
            changed[n] = value
        made = define(ctx.text, *changed)[:SMOOTH_OUTPUTS]
        return tuple(a for a, here in zip(made, is_there, strict=True) if here)

    vjp: Any = torch.func.vjp
    values: list[Any] = [given[n] for n in names]
    shapes = results(*values) if any(g is None for g in seeds) else seeds
    seeds = [
        torch.zeros_like(s) if g is None else g for g, s in zip(seeds, shapes, strict=True)
    ]

    def gradients(values: list[Any], seeds: list[Tensor]) -> tuple[Tensor, ...]:
        _, pull = vjp(results, *values)
        found = pull(tuple(seeds))
        return tuple(found[n] for n in wanted)

    first, pull = vjp(gradients, values, seeds)
    d_values, d_seeds = pull(
        tuple(torch.zeros_like(f) if g is None else g for g, f in zip(d, first, strict=True))
    )
    by_input: list[Maybe] = [None] * len(Inputs._fields)
    for n, gradient in zip(names, d_values, strict=True):
        by_input[n] = gradient
    by_seed = iter(d_seeds)
    of_seeds = [next(by_seed) if here else None for here in is_there]
    given_seeds = zip(of_seeds, (dy, dh_n, dc_n, d_cells), strict=True)
    known = [None if given is None else d_seed for d_seed, given in given_seeds]
    return (None, None, *known, None, None, None, *by_input)


forward.register_autograd(_pull, setup_context=_keep)
backward.register_autograd(lambda ctx, d: _pull_second(ctx, *d), setup_context=_keep_for_second)
# As states are float32 at least. The modules cast to what autocast says; PyTorch 2.6 cannot.
if hasattr(forward, "register_autocast"):
    forward.register_autocast("cpu", torch.float32)
    forward.register_autocast("cuda", torch.float32)


# Batches of calls

_ROWS = {"x": 1, "h0": 0, "c0": 0, "lengths": 0, "resets": 1}  # where inputs have B
_OUTPUT_ROWS = (1, 0, 0, 1, 1, 1)


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], text: str, *tensors: Any) -> Any:
    """Let rows of all calls be rows of one, where only those differ; else call after call."""
    call, V, dims = parse(text), info.batch_size, in_dims[1:]
    differ = [n for n, d in zip(Inputs._fields, dims, strict=True) if d is not None]
    is_split = call.saves and tensors[0].device.type != "cpu"
    if is_split or call.request.is_random or not set(differ) <= set(_ROWS):
        made = [run_forward(text, *of_call) for of_call in _each_call(V, dims, tensors)]
        return tuple(map(torch.stack, zip(*made, strict=True))), (0,) * len(_OUTPUT_ROWS)
    joined = []
    for name, a, d in zip(Inputs._fields, tensors, dims, strict=True):
        if a is None or name not in _ROWS:
            joined.append(a)
            continue
        at = _ROWS[name]
        if d is None:
            a = a.unsqueeze(at).expand(*a.shape[:at], V, *a.shape[at:])
        else:
            a = a.movedim(d, at)
        joined.append(a.flatten(at, at + 1))
    joint = run_forward(text, *joined)
    is_there = [a.dim() > 1 for a in joint]
    views = [
        a.unflatten(at, (V, a.shape[at] // V)) if here else a
        for a, at, here in zip(joint, _OUTPUT_ROWS, is_there, strict=True)
    ]
    where = [at if here else None for at, here in zip(_OUTPUT_ROWS, is_there, strict=True)]
    return tuple(views), tuple(where)


def _vmap_backward(
    info: Any, in_dims: tuple[Any, ...], text: str, wanted: int, *tensors: Any
) -> Any:
    calls = _each_call(info.batch_size, in_dims[2:], tensors)
    made = [run_backward(text, wanted, *of_call) for of_call in calls]
    stacked = [torch.stack(of_input) for of_input in zip(*made, strict=True)]
    return stacked, [0] * len(stacked)


def _each_call(V: int, dims: Sequence[int | None], tensors: Sequence[Any]) -> Any:
    """Yield the tensors of each of V calls."""
    for v in range(V):
        yield [a if d is None else a.select(d, v) for a, d in zip(tensors, dims, strict=True)]


forward.register_vmap(_vmap_forward)
backward.register_vmap(_vmap_backward)


class _Forward(torch.autograd.Function):
    """`forward` for torch.func's transforms, which do not take an operator's derivative."""

    forward = staticmethod(compute_forward)
    setup_context = staticmethod(_keep)
    backward = staticmethod(_pull)
    vmap = staticmethod(_vmap_forward)


class _Backward(torch.autograd.Function):
    """`backward` likewise."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(compute_backward(*args))

    setup_context = staticmethod(_keep_for_second)
    backward = staticmethod(_pull_second)

    @staticmethod
    def vmap(*args: Any) -> Any:
        gradients, dims = _vmap_backward(*args)
        return tuple(gradients), tuple(dims)


# Calls


_in_autograd: Any = _Eager.apply
_in_transform: Any = _Forward.apply
_back_in_transform: Any = _Backward.apply
_C = torch._C
_OWN = {Tensor, torch.nn.Parameter, type(None)}


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return _C._functorch.peek_interpreter_stack() is not None


def _is_unobserved(x: Tensor, tensors: Sequence[Any]) -> bool:
    """Whether only autograd looks, no mode, tracer or subclass, and kernels are there."""
    if _C._len_torch_dispatch_stack() > 0 or not (x.is_cpu or x.is_cuda):
        return False
    if _C._get_tracing_state() is not None:  # torch.jit.trace
        return False
    return set(map(type, tensors)) <= _OWN


def is_for_autograd_alone(tensors: Sequence[Any]) -> bool:
    """Whether x is on the CPU, and at most autograd looks at a call."""
    return not (
        torch.compiler.is_compiling()
        or torch.autograd.forward_ad._current_level >= 0
        or is_transformed()
        or torch.is_autocast_enabled("cpu")
        or not tensors[0].is_cpu
        or not _is_unobserved(tensors[0], tensors)
    )


def has_gradient(tensors: Iterable[Any]) -> bool:
    """Whether autograd looks at a call."""
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors)


def _padded(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Return all that operators take: what is left out at the end is None."""
    return (*tensors, *(None,) * (len(Inputs._fields) - len(tensors)))


def run_with_gradient(text: str, tensors: Sequence[Any]) -> Outputs:
    """Call what `run_forward` does when only autograd looks."""
    results: Outputs = _in_autograd(text, *_padded(tensors))
    return results


def run_forward(text: str, *given: Any) -> Outputs:
    """Call the operator, or what it does, or for forward-mode derivatives its definition."""
    tensors = _padded(given)
    results: Outputs
    if torch.compiler.is_compiling():
        results = forward(text, *tensors)
    elif torch.autograd.forward_ad._current_level >= 0:
        results = define(text, *tensors)
    elif is_transformed():
        results = _in_transform(text, *tensors)
    elif not _is_unobserved(tensors[0], tensors):
        results = forward(text, *tensors)
    elif parse(text).saves:
        results = _in_autograd(text, *tensors)
    else:
        results = compute_forward(text, *tensors)
    return results


def run_backward(text: str, wanted: int, *tensors: Any) -> Sequence[Tensor]:
    """Call the operator, or what it does."""
    gradients: Sequence[Tensor]
    if torch.compiler.is_compiling():
        gradients = backward(text, wanted, *tensors)
    elif is_transformed():
        gradients = _back_in_transform(text, wanted, *tensors)
    elif torch.is_grad_enabled() or not _is_unobserved(tensors[READ], tensors):
        gradients = backward(text, wanted, *tensors)
    else:
        gradients = compute_backward(text, wanted, *tensors)
    return gradients
