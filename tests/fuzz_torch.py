"""Random calls of the modules of fusedrnn.torch, compared with the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fuzz_calls import Draw, assert_same, laid_out
from fuzz_layers import LayerCall, spread_out
from fuzz_wrong import OF_CALLS, OF_OPTIONS, no_array, refuse, wrong_shape
from helpers import MASKS, assert_close
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn as fr
import fusedrnn.torch as ft
from fusedrnn.weights import PRECISIONS

ERRORS = (TypeError, ValueError, RuntimeError, IndexError)


def tensor(draw: Draw, a: Any) -> Any:
    """The same values as a tensor, of any strides that PyTorch has."""
    if a is None:
        return None
    view = laid_out(draw, np.ascontiguousarray(a))
    if min(view.strides, default=0) < 0 or any(s % view.itemsize for s in view.strides):
        view = view.copy()
    if not view.flags.aligned or not view.flags.writeable:
        view = view.copy()
    return torch.from_numpy(view)


def arrays_of(results: Any) -> Any:
    """Tensors in tuples and dicts as arrays."""
    if isinstance(results, tuple):
        return tuple(map(arrays_of, results))
    if isinstance(results, dict):
        return {k: arrays_of(v) for k, v in results.items()}
    return results.detach().numpy()


class TorchCall(LayerCall):
    """A module of ours, with the parameters of a layer of ours in NumPy."""

    may_be_empty = False

    def build(self) -> Any:
        draw, cell, sizes = self.draw, self.cell, self.sizes
        dtype = getattr(torch, self.dtype)
        name = cell.op.upper()
        layer = getattr(fr, name)(
            *sizes[2:], dtype=self.dtype, rng=draw.getrandbits(31), **self.arguments
        )
        spread_out(draw, layer)
        self.module = getattr(ft, name)(*sizes[2:], dtype=dtype, **self.arguments)
        values = {k: torch.from_numpy(v.copy()) for k, v in layer.state_dict().items()}
        self.module.load_state_dict(values)
        if draw.chance(0.1):
            self.module = copy.deepcopy(self.module)
        return layer

    def given(self) -> dict[str, Any]:
        """Draw the other arguments of a call."""
        masks = {k: tensor(self.draw, np.asarray(v)) for k, v in self.user_masks().items()}
        kept = {k: v for k, v in self.asked.items() if k in ("masked_output", "bptt")}
        return masks | kept | self.extras() | {"seed": self.seed}

    def tensors(self) -> tuple[Any, list[Any]]:
        """x, and the states that there are, as leaves."""
        x = tensor(self.draw, self.user(self.x)).requires_grad_()
        states = [] if self.state[0] is None else [self.user_state([s]) for s in self.state]
        return x, [tensor(self.draw, s).requires_grad_() for s in map(np.asarray, states)]

    def hx(self, states: list[Any]) -> Any:
        return None if not states else tuple(states) if len(states) > 1 else states[0]

    def call(self, x: Any = None, state: Any = None, **more: Any) -> dict[str, Any]:
        """Call the module without gradients, or the layer in NumPy."""
        if x is not None or more or self.draw.chance(0.3):
            return super().call(x, state, **more)
        self.module.train(self.asked["training"])
        tensor_x, states = self.tensors()
        with self.draw.choice([torch.no_grad, torch.inference_mode])():
            results = self.draw.call(self.module, tensor_x, self.hx(states), **self.given())
        return self.named(arrays_of(results))

    def vjp(self) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
        draw, given = self.draw, self.given() | {"recompute": self.draw.chance(0.3)}
        self.module.train(self.asked["training"])
        x, states = self.tensors()
        results = draw.call(self.module, x, self.hx(states), **given)
        y, end, *others = results
        ends = end if isinstance(end, tuple) else (end,)
        cells = others[:1] if given.get("return_cells") else []
        leaves = dict(self.module.named_parameters()) | {"x": x}
        leaves |= {f"{n}0": s for n, s in zip(self.cell.states, states, strict=False)}

        def pull(dy: Any, d_state: list[Any], d_cells: Any) -> dict[str, Any]:
            outputs = [y, *ends, *([] if d_cells is None else cells)]
            given = [self.user(dy), *(np.asarray(self.user_state([d])) for d in d_state)]
            given += [] if len(outputs) == len(given) else [self.user(d_cells)]
            tensors = [tensor(draw, d) for d in given]
            values = list(leaves.values())
            found = draw.call(torch.autograd.grad, outputs, values, tensors, True)
            gradients = dict(zip(leaves, arrays_of(tuple(found)), strict=True))
            gradients["x"] = self.ours(gradients["x"])
            for name in ("h0", "c0"):
                if name in gradients:
                    (gradients[name],) = self.ours_state(gradients[name])
            return gradients

        return self.named(arrays_of(results)), pull

    def expected(self, x: Any, state: Any, parameters: Any) -> Any:
        results, pullback = super().expected(x, state, parameters)

        def pull(*weights: Any) -> dict[str, Any]:
            found = pullback(*weights)
            absent = ("h0", "c0") if self.state[0] is None else ()
            return {k: v for k, v in found.items() if k not in absent}

        return results, pull

    # Other ways

    def packed(self) -> None:
        """A PackedSequence of the rows."""
        if {*self.asked} & {*MASKS} != {"lengths"} or self.unbatched:
            return
        draw, lengths = self.draw, self.asked["lengths"]
        if self.asked["training"] or "bptt" in self.asked or not lengths.all():
            return
        self.module.eval()
        x, states = self.tensors()
        first = self.arguments["batch_first"]
        sequence = pack_padded_sequence(
            x, torch.from_numpy(lengths), first, enforce_sorted=False
        )
        y, end = draw.call(self.module, sequence, self.hx(states))
        padded, _ = pad_packed_sequence(y, first, total_length=self.sizes.T)
        self.same(self.named(arrays_of((padded, end))), "a PackedSequence")

    def stepped(self) -> None:
        """The cell of the first layer takes the first step."""
        a = self.arguments
        if a["num_layers"] > 1 or a["bidirectional"] or a.get("proj_size") or self.unbatched:
            return
        if self.asked["training"] or {*self.asked} & {*MASKS}:
            return
        options = {k: v for k, v in a.items() if k not in ("num_layers", "bidirectional")}
        options.pop("batch_first")
        name = f"{self.cell.op.upper()}Cell"
        cell = getattr(ft, name)(*self.sizes[2:], dtype=getattr(torch, self.dtype), **options)
        cell.load_state_dict(
            {k.removesuffix("_l0"): v for k, v in self.module.state_dict().items()}
        )
        cell.eval()
        state = self.hx([None if s is None else tensor(self.draw, s[0]) for s in self.state])
        state = None if self.state[0] is None else state
        ys = []
        with torch.set_grad_enabled(self.draw.chance(0.5)):
            for x in self.x:
                state = self.draw.call(cell, tensor(self.draw, x), state)
                ys.append(arrays_of(state[0] if isinstance(state, tuple) else state))
        ends = arrays_of(state if isinstance(state, tuple) else (state,))
        found = {f"{n}_n": s[None] for n, s in zip(self.cell.states, ends, strict=True)}
        self.same({"y": np.stack(ys)} | found, "steps of a cell")

    def swapped(self) -> None:
        """A module of torch.nn computes the same, and with the same bits once it is swapped."""
        theirs = (
            "num_layers",
            "bias",
            "batch_first",
            "bidirectional",
            "proj_size",
            "nonlinearity",
        )
        if {*self.arguments} - {*theirs} or {*self.asked} - {"training"}:
            return
        if self.cell.name == "rnn_identity" or self.dtype == "bfloat16":
            return
        given = dict(self.arguments)
        kind = getattr(nn, self.cell.op.upper())
        module = kind(*self.sizes[2:], dtype=getattr(torch, self.dtype), **given)
        module.load_state_dict(self.module.state_dict())
        model, (x, states) = nn.Sequential(module).eval(), self.tensors()
        with torch.no_grad():
            theirs_y = module(x, self.hx(states))[0]
            self.draw.call(ft.swap, model)
            results = self.draw.call(model[0], x, self.hx(states))
        assert_close(results[0], arrays_of(theirs_y), self.dtype, "y of torch.nn")
        self.same(self.named(arrays_of(results)), "a swapped module")
        self.draw.call(ft.restore, model)
        assert type(model[0]) is kind

    def quantized(self) -> None:
        """The narrow module has the bits of the narrow layer."""
        if self.dtype != "float32" or self.asked["training"] or "bptt" in self.asked:
            return
        precision = self.draw.choice(PRECISIONS)
        narrow = self.draw.call(ft.quantize, self.module, precision).model
        layer = self.draw.call(self.layer.quantize, precision)
        x, states = self.tensors()
        found = self.named(arrays_of(self.draw.call(narrow, x, self.hx(states))))
        state = self.user_state(self.state)
        wanted = self.named(self.draw.call(layer, self.user(self.x), state))
        assert_same(found, wanted, "a narrow module")

    def refused(self) -> None:
        """Wrong arguments of a call and of a module."""
        draw, (x, states) = self.draw, self.tensors()
        hx = self.hx(states)
        for _ in range(4):
            kind = draw.randrange(5)
            if kind == 0:
                a = self.user(self.x)
                wrong = draw.choice(
                    [
                        torch.from_numpy(
                            np.ascontiguousarray(wrong_shape(draw, a, [a.ndim - 1]))
                        ),
                        x.to(torch.complex64),
                        x.to(torch.int64),
                        x.detach().numpy(),
                        no_array(draw),
                        x.to("meta"),
                        None,
                    ]
                )
                refuse(draw, ["input"], self.module, wrong, hx, errors=ERRORS)
            elif kind == 1:
                wrong = draw.choice([(x, x, x), "a", 5, (x.flatten(),) * 2, object(), {}])
                refuse(draw, ["hx", "hx[0]", "h_0"], self.module, x, wrong, errors=ERRORS)
            elif kind == 2:
                name = draw.choice(["seed", "bptt", "trace", "masked_output", "recompute"])
                wrong = draw.choice(OF_CALLS[name])
                refuse(draw, [name], self.module, x, hx, errors=ERRORS, **{name: wrong})
            elif kind == 3:
                shape = tuple(x.shape[:-1])
                values = [torch.full(shape, 2), torch.zeros(1, *shape), "a", 1.5, object()]
                name = draw.choice(["resets", "mask", "lengths"])
                values += [
                    [2**70],
                    [[1], [2, 3]],
                    2j,
                    torch.zeros(shape, dtype=torch.complex64),
                ]
                if name == "lengths" and not self.unbatched:
                    values += [torch.full((self.sizes.B,), n) for n in (-1, 10**6, 2**62)]
                wrong = draw.choice(values)
                refuse(draw, [name], self.module, x, hx, errors=ERRORS, **{name: wrong})
            else:
                name = draw.choice(["clip", "zoneout", "recurrent_dropout", "activation"])
                wrong = draw.choice(OF_OPTIONS[name])
                given = dict(self.cell.arguments) | {name: wrong}
                kinds = type(self.module), getattr(ft, f"{self.cell.op.upper()}Cell")
                refuse(draw, [name], draw.choice(kinds), 3, 4, errors=ERRORS, **given)

    WAYS = (*LayerCall.WAYS[:4], packed, packed, stepped, swapped, quantized, refused)


def torch_scene(draw: Draw) -> None:
    """A module of PyTorch."""
    TorchCall(draw).check()
