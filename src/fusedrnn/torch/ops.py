"""Layers as operators of PyTorch: `fusedrnn::forward` and `fusedrnn::backward`.

Both take tensors and two strings that describe the call, so that a graph shows it. Second
derivatives and forward-mode derivatives are those of the cell's definition
(`fusedrnn.reference`), which also runs on tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch._library.autograd import make_autograd_impl

from .call import READ, SMOOTH_OUTPUTS, Call, Inputs, Maybe, Outputs, parse
from .definition import define, state_dtype
from .kernels import (
    NeedsChecksError,
    compute_backward,
    compute_forward,
    saved_shape,
    try_forward,
)


def _fake_forward(layers: str, asked: str, *tensors: Any) -> Outputs:
    call, given = parse(layers, asked), Inputs(*tensors)
    of_y, of_state = call.dtype(given), state_dtype(given.x)
    dtypes = (of_y, of_state, of_state, of_state, of_y)
    shapes = call.output_shapes(call.sizes(given), given.is_on_gpu)
    made = [
        given.x.new_empty(
            (0,) if shape is None else shape, dtype=of_y if shape is None else dtype
        )
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    shape = saved_shape(call, given)
    is_bytes = given.is_on_gpu and shape != (0,)
    saved = given.x.new_empty(shape, dtype=torch.uint8 if is_bytes else of_y)
    return (*made, saved)  # type: ignore[return-value]


def _fake_backward(
    layers: str, asked: str, wanted: Sequence[bool], *tensors: Any
) -> list[Tensor]:
    call, given = parse(layers, asked), Inputs(*tensors[READ:])
    s, of_state = call.sizes(given), state_dtype(given.x)
    of_x, of_h, of_c = (s.T, s.B, s.I), *call.output_shapes(s, False)[1:3]
    like = [(of_x, given.x.dtype), (of_h, of_state), (of_c, of_state)]
    like += [(tuple(p.shape), p.dtype) for p in given.parameters]
    return [
        given.x.new_empty(shape, dtype=dtype)
        for (shape, dtype), is_wanted in zip(like, wanted, strict=True)
        if is_wanted and shape is not None
    ]


_KINDS = ["Tensor", *["Tensor?"] * 2, "Tensor[]", *["Tensor?"] * 4]
_ARGUMENTS = ", ".join(
    f"{kind} {name}" for kind, name in zip(_KINDS, Inputs._fields, strict=True)
)


def _forward(layers: str, asked: str, *tensors: Any) -> Outputs:
    return compute_forward(parse(layers, asked), *tensors, checked=False)


def _backward(layers: str, asked: str, wanted: Sequence[bool], *tensors: Any) -> list[Tensor]:
    return compute_backward(parse(layers, asked), wanted, *tensors, checked=False)


forward = library.custom_op(
    "fusedrnn::forward",
    _forward,
    mutates_args=(),
    schema=f"(str layers, str asked, {_ARGUMENTS}) -> (" + ", ".join(["Tensor"] * 6) + ")",
)
backward = library.custom_op(
    "fusedrnn::backward",
    _backward,
    mutates_args=(),
    schema=(
        "(str layers, str asked, bool[] wanted, Tensor? dy, Tensor? dh_n, Tensor? dc_n, "
        f"Tensor? d_cells, Tensor y, Tensor cells, Tensor saved, {_ARGUMENTS}) -> Tensor[]"
    ),
)
forward.register_fake(_fake_forward)
backward.register_fake(_fake_backward)


_C: Any = torch._C


# Derivatives


# Returns the hooks that autograd calls for tensors that it saves, or None. PyTorch 2.6 does not
# have this function, and calls no hooks for y there.
_top_saved_hooks: Any = getattr(
    _C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: None
)


# The gradients of the last tensors of `Inputs`: masks and the seed have none.
_NO_GRADIENTS = (None,) * len(Inputs._fields[4:])


def _flat(given: Sequence[Any]) -> list[Maybe]:
    """Return the tensors of `Inputs` in one list, the parameters last."""
    return [*given[:3], *given[4:], *given[3]]


def _inputs(flat: Sequence[Any]) -> Inputs:
    """Return the `Inputs` that `_flat` put into one list."""
    x, h0, c0, *others = flat
    count = len(_NO_GRADIENTS)
    return Inputs(x, h0, c0, others[count:], *others[:count])


def _of_smooth(needs: Sequence[bool]) -> list[bool]:
    """Return which of `Inputs.smooth` need gradients, from flags for the list of `_flat`."""
    return [*needs[:3], *needs[3 + len(_NO_GRADIENTS) :]]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    layers, asked, *given = inputs
    ctx.call = parse(layers, asked)
    y, _, _, cells, trace, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(trace, saved)
    ctx.save_for_backward(y, cells, saved, *_flat(given))


def _gradients(
    call: Call, needs: Sequence[bool], d: Sequence[Maybe], read: Sequence[Any], given: Inputs
) -> list[Maybe]:
    """Return the needed gradients of `Inputs.smooth`, and None for the others."""
    seeds = [g if here else None for g, here in zip(d, call.has_results, strict=False)]
    if all(g is None for g in seeds):
        return [None] * len(needs)
    found = iter(run_backward(call, needs, *seeds, *read, *given))
    return [next(found) if is_needed else None for is_needed in needs]


def _pull(ctx: Any, *d: Maybe) -> tuple[Any, ...]:
    y, cells, saved, *flat = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [*needs[2:5], *needs[5]]
    found = _gradients(ctx.call, wanted, d, (y, cells, saved), _inputs(flat))
    return None, None, *found[:3], found[3:], *_NO_GRADIENTS


class _Eager(torch.autograd.Function):
    """`forward` and its derivative for plain autograd, in a third of an operator's time.

    It takes the tensors in one list. y is kept on `ctx`, so that it may be changed in place.
    If it was, backward computes it again.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, prepares: bool, *flat: Any) -> Outputs:
        inputs = _inputs(flat)
        made = compute_forward(call, *inputs) if prepares else try_forward(call, inputs)
        if made is None:
            raise NeedsChecksError
        y, _, _, cells, trace, saved = made
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(trace, saved)
        if _top_saved_hooks(False) is None:
            ctx.y, kept = y.detach(), saved
        else:  # hooks that move or drop saved tensors get y, too
            ctx.y, kept = None, y
        ctx.save_for_backward(kept, cells, saved, *flat)
        return made

    @staticmethod
    def backward(ctx: Any, *d: Maybe) -> tuple[Any, ...]:
        kept, cells, saved, *flat = ctx.saved_tensors
        given, y = _inputs(flat), kept if ctx.y is None else ctx.y
        if y._version and ctx.y is not None:
            y, _, _, _, _, saved = compute_forward(ctx.call, *given)
        needs = ctx.needs_input_grad[2:]
        found = _gradients(ctx.call, _of_smooth(needs), d, (y, cells, saved), given)
        return None, None, *found[:3], *_NO_GRADIENTS, *found[3:]


class _EagerStep(torch.autograd.Function):
    """`_Eager` for one step on the CPU, from x (B, I), h and c (B, ·) to the next state."""

    @staticmethod
    def forward(ctx: Any, call: Call, layers: Any, *read: Any) -> Any:
        x, h, c, *weights = read
        made = layers.forward(x, h, c, weights, None, None, None, call.options, True, True)
        if made is None:
            raise NeedsChecksError
        *state, saved = made
        y = state[0]
        ctx.call, ctx.layers = call, layers
        ctx.set_materialize_grads(False)
        kept = None
        if _top_saved_hooks(False) is None:
            ctx.y = y.detach()
        else:
            ctx.y, kept = None, y
        ctx.save_for_backward(kept, saved, *read)
        return tuple(state) if call.has_c else y

    @staticmethod
    def backward(ctx: Any, dy: Maybe, dc: Maybe = None) -> tuple[Any, ...]:
        kept, saved, x, h, c, *weights = ctx.saved_tensors
        call, layers, y = ctx.call, ctx.layers, kept if ctx.y is None else ctx.y
        masks = (None, None, None, call.options)
        if y._version and ctx.y is not None:
            y, *_, saved = layers.forward(x, h, c, weights, *masks, True, True)
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # a second derivative may follow
            h, c = (None if s is None else s.unsqueeze(0) for s in (h, c))
            given = Inputs(x.unsqueeze(0), h, c, weights)
            d_h, d_c = (None if g is None else g.unsqueeze(0) for g in (dy, dc))
            read = (y.unsqueeze(0), y.new_empty(0), saved)
            seeds: tuple[Maybe, ...] = (d_h, None, d_c, None)
            found: Any = _gradients(call, needs, seeds, read, given)
            of_call = (g if g is None or n > 2 else g[0] for n, g in enumerate(found))
            return None, None, *of_call
        if dy is None and dc is None:
            return (None,) * (2 + len(needs))
        if dy is not None and not dy.is_contiguous():  # the gradient of a sum
            dy = dy.contiguous()
        if dc is not None and not dc.is_contiguous():
            dc = dc.contiguous()
        seeds, given_to = (dy, None, dc, None), (x, h, c, weights, *masks, True)
        found = layers.backward(needs, seeds, y, None, saved, *given_to)
        made = iter(found)
        return None, None, *[next(made) if is_needed else None for is_needed in needs]


class _Transformed(torch.autograd.Function):
    """`forward` for the transforms of torch.func, which reject an operator's derivative."""

    @staticmethod
    def forward(call: Call, *flat: Any) -> Outputs:
        return compute_forward(call, *_inputs(flat))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.call, *flat = inputs
        y, _, _, cells, trace, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(trace, saved)
        ctx.save_for_backward(y, cells, saved, *flat)

    @staticmethod
    def backward(ctx: Any, *d: Maybe) -> tuple[Any, ...]:
        y, cells, saved, *flat = ctx.saved_tensors
        needs = _of_smooth(ctx.needs_input_grad[1:])
        found = _gradients(ctx.call, needs, d, (y, cells, saved), _inputs(flat))
        return None, *found[:3], *_NO_GRADIENTS, *found[3:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, *flat: Any) -> Any:
        return _vmap_forward(info.batch_size, call, _inputs(in_dims[1:]), _inputs(flat))


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    layers, asked, ctx.wanted, *tensors = inputs
    ctx.call = parse(layers, asked)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:READ], *_flat(tensors[READ:]))


def _pull_second(ctx: Any, d: Sequence[Maybe]) -> tuple[list[Maybe], list[Maybe]]:
    """Differentiate the gradients of the definition.

    Returns the gradients of the four gradients that `backward` takes, and of `Inputs.smooth`.
    """
    call = ctx.call
    dy, dh_n, dc_n, d_cells, _, _, _, *flat = ctx.saved_tensors
    given = _inputs(flat)
    exists = call.has_results
    seeds = [g for g, here in zip((dy, dh_n, dc_n, d_cells), exists, strict=True) if here]
    smooth = given.smooth
    names = [n for n, a in enumerate(smooth) if a is not None]
    wanted = [names.index(n) for n, is_wanted in enumerate(ctx.wanted) if is_wanted]

    def results(*values: Any) -> tuple[Tensor, ...]:
        changed = list(smooth)
        for n, value in zip(names, values, strict=True):
            changed[n] = value
        made = define(call, *changed[:3], changed[3:], *given[4:])[:SMOOTH_OUTPUTS]
        return tuple(a for a, here in zip(made, exists, strict=True) if here)

    vjp: Any = torch.func.vjp
    values: list[Any] = [smooth[n] for n in names]
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
    by_input: list[Maybe] = [None] * len(smooth)
    for n, gradient in zip(names, d_values, strict=True):
        by_input[n] = gradient
    by_seed = iter(d_seeds)
    of_seeds = [next(by_seed) if here else None for here in exists]
    given_seeds = zip(of_seeds, (dy, dh_n, dc_n, d_cells), strict=True)
    known = [None if given is None else d_seed for d_seed, given in given_seeds]
    return known, by_input


def _pull_second_of_operator(ctx: Any, d: Sequence[Maybe]) -> tuple[Any, ...]:
    known, found = _pull_second(ctx, d)
    of_inputs = (*found[:3], found[3:], *_NO_GRADIENTS)
    return None, None, None, *known, None, None, None, *of_inputs


class _TransformedBackward(torch.autograd.Function):
    """`backward` for the transforms of torch.func."""

    @staticmethod
    def forward(call: Call, wanted: Sequence[bool], *tensors: Any) -> tuple[Tensor, ...]:
        read, flat = tensors[:READ], tensors[READ:]
        return tuple(compute_backward(call, wanted, *read, *_inputs(flat)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, ctx.wanted, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *d: Maybe) -> tuple[Any, ...]:
        known, found = _pull_second(ctx, d)
        of_inputs = (*found[:3], *_NO_GRADIENTS, *found[3:])
        return None, None, *known, None, None, None, *of_inputs

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], call: Call, wanted: Sequence[bool], *tensors: Any
    ) -> Any:
        dims = [*in_dims[2 : 2 + READ], *_inputs(in_dims[2 + READ :])]
        given = [*tensors[:READ], *_inputs(tensors[READ:])]
        made, of_made = _vmap_backward(info.batch_size, call, wanted, dims, given)
        return tuple(made), tuple(of_made)


forward.register_autograd(_pull, setup_context=_keep)
backward.register_autograd(_pull_second_of_operator, setup_context=_keep_for_second)
# States are at least float32. The modules cast x to autocast's dtype. PyTorch 2.6 does not have
# this method.
if hasattr(forward, "register_autocast"):
    forward.register_autocast("cpu", torch.float32)
    forward.register_autocast("cuda", torch.float32)


def _keys(device: str) -> int:
    names = (device, f"Autograd{device}")
    kernel, autograd = (_C.DispatchKeySet(getattr(_C.DispatchKey, n)) for n in names)
    return int((kernel | autograd).raw_repr())


# The keys that autograd's kernel gets from the dispatcher if only our kernel follows.
_ONLY_KERNEL_FOLLOWS = {_keys("CPU"), _keys("CUDA")}


def _shorten(operator: Any, run: Callable[..., Any]) -> None:
    """Let an operator call the kernels directly if nothing else observes the call.

    `library.custom_op` runs three functions in Python before them, which takes 30 µs. The first
    is its autograd kernel for all devices. The dispatcher prefers a kernel that is registered
    for one device. That kernel calls the first one, which PyTorch's private
    `make_autograd_impl` creates, if the call is recorded.
    """
    recorded = make_autograd_impl(operator._opoverload, operator)

    def kernel(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() or keys.raw_repr() not in _ONLY_KERNEL_FOLLOWS:
            return recorded(keys, *args)
        return run(*args)

    for key in ("AutogradCPU", "AutogradCUDA"):
        operator._lib.impl(operator._name, kernel, key, with_keyset=True)


_shorten(forward, _forward)
_shorten(backward, _backward)


# Batches of calls

_ROWS = {"x": 1, "h0": 1, "c0": 1, "lengths": 0, "resets": 1, "mask": 1}  # where inputs have B
_OUTPUT_ROWS = (1, 1, 1, 1, 2, 1)


def _vmap_forward(V: int, call: Call, dims: Inputs, tensors: Inputs) -> Any:
    """Join the rows of all calls into one call if nothing else differs, else call in turn."""
    differ = {n for n, d in zip(Inputs._fields, dims, strict=True) if d is not None}
    is_shared = all(d is None for d in dims.parameters)
    differ -= {"parameters"} if is_shared else set()
    if call.saves or call.options.is_random or not differ <= set(_ROWS):
        made = [run_forward(call, *of_call) for of_call in _each_call(V, dims, tensors)]
        return tuple(map(torch.stack, zip(*made, strict=True))), (0,) * len(_OUTPUT_ROWS)
    joined: list[Any] = []
    a: Any
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
    joint = run_forward(call, *joined)
    exists = [a.dim() > 1 for a in joint]
    views = [
        a.unflatten(at, (V, a.shape[at] // V)) if here else a
        for a, at, here in zip(joint, _OUTPUT_ROWS, exists, strict=True)
    ]
    where = [at if here else None for at, here in zip(_OUTPUT_ROWS, exists, strict=True)]
    return tuple(views), tuple(where)


def _vmap_backward(
    V: int, call: Call, wanted: Sequence[bool], dims: Sequence[Any], tensors: Sequence[Any]
) -> Any:
    calls = _each_call(V, dims, tensors)
    made = [run_backward(call, wanted, *of_call) for of_call in calls]
    stacked = [torch.stack(of_input) for of_input in zip(*made, strict=True)]
    return stacked, [0] * len(stacked)


def _select(a: Any, d: Any, v: int) -> Any:
    if isinstance(a, (list, tuple)):
        return [_select(b, e, v) for b, e in zip(a, d, strict=True)]
    return a if d is None else a.select(d, v)


def _each_call(V: int, dims: Sequence[Any], tensors: Sequence[Any]) -> Any:
    """Yield the tensors of each of V calls."""
    for v in range(V):
        yield [_select(a, d, v) for a, d in zip(tensors, dims, strict=True)]


@forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], layers: str, asked: str, *tensors: Any) -> Any:
    call, dims = parse(layers, asked), Inputs(*in_dims[2:])
    return _vmap_forward(info.batch_size, call, dims, Inputs(*tensors))


@backward.register_vmap
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    layers: str,
    asked: str,
    wanted: Sequence[bool],
    *tensors: Any,
) -> Any:
    call = parse(layers, asked)
    return _vmap_backward(info.batch_size, call, wanted, in_dims[3:], tensors)


# Calls


# `apply` of PyTorch's core. It skips the check for a transform, which was made before.
_in_autograd: Any = super(torch.autograd.Function, _Eager).apply
_step_in_autograd: Any = super(torch.autograd.Function, _EagerStep).apply
_in_transform: Any = _Transformed.apply
_back_in_transform: Any = _TransformedBackward.apply
_OWN = {Tensor, torch.nn.Parameter, type(None)}


def is_transformed() -> bool:
    """Whether a transform of torch.func is active."""
    return _C._functorch.peek_interpreter_stack() is not None


def _is_observed(tensors: Sequence[Any]) -> bool:
    """Whether a mode, tracer or subclass observes a call, or the device has no kernels."""
    x = tensors[0]
    if _C._len_torch_dispatch_stack() > 0 or not (x.is_cpu or x.is_cuda):
        return True
    if _C._get_tracing_state() is not None:  # torch.jit.trace
        return True
    return not set(map(type, _flat(tensors))) <= _OWN


def has_gradient(tensors: Iterable[Any]) -> bool:
    """Whether autograd records a call."""
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors)


def run_forward(call: Call, *tensors: Any) -> Outputs:
    """Call the operator or, directly, its kernels; for forward-mode AD its definition."""
    results: Outputs
    if torch.compiler.is_compiling():
        results = forward(*call.text, *tensors)
    elif torch.autograd.forward_ad._current_level >= 0:
        results = define(call, *tensors)
    elif is_transformed():
        results = _in_transform(call, *_flat(tensors))
    elif _is_observed(tensors):
        results = forward(*call.text, *tensors)
    elif call.saves:
        results = _in_autograd(call, True, *_flat(tensors))
    else:
        results = compute_forward(call, *tensors)
    return results


def record(
    call: Call, x: Tensor, h0: Maybe, c0: Maybe, weights: Sequence[Tensor]
) -> Sequence[Tensor]:
    """`run_forward` for a call without masks that only autograd records.

    Raises `NeedsChecksError` if the kernels cannot read an argument directly.
    """
    flat = (x, h0, c0, *_NO_GRADIENTS, *weights)
    made: Sequence[Tensor] = _in_autograd(call, False, *flat)
    return made


def record_step(
    call: Call, layers: Any, x: Tensor, h: Maybe, c: Maybe, weights: Sequence[Tensor]
) -> Any:
    """Take one step that only autograd records, and return the next state.

    x is (B, I), and states are (B, ·). Raises `NeedsChecksError` if the kernels cannot read an
    argument directly.
    """
    return _step_in_autograd(call, layers, x, h, c, *weights)


def run_backward(call: Call, wanted: Sequence[bool], *tensors: Any) -> Sequence[Tensor]:
    """Call the operator or, directly, its kernels."""
    gradients: Sequence[Tensor]
    if torch.compiler.is_compiling():
        gradients = backward(*call.text, wanted, *tensors)
    elif is_transformed():
        flat = (*tensors[:READ], *_flat(tensors[READ:]))
        gradients = _back_in_transform(call, wanted, *flat)
    elif torch.is_grad_enabled() or _is_observed(tensors[READ:]):
        gradients = backward(*call.text, wanted, *tensors)
    else:
        gradients = compute_backward(call, wanted, *tensors)
    return gradients
