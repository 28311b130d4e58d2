"""fusedrnn.torch against torch.nn, through autograd, in turn.

python bench/modules.py             both thread counts, some 5 minutes
python bench/modules.py 1           one thread
python bench/modules.py --report FILE

Forward and backward of one layer, float32, gradients of x and of the parameters: torch.nn's
time over ours, and ours compiled over ours. A row is the median of the rounds' ratios, with
their quartiles. Below, a PackedSequence of lengths drawn evenly, and what a call of a module
takes beyond a call of a layer of NumPy's at sizes where that is a few microseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from turns import in_turn, report, spread

import fusedrnn as fr
import fusedrnn.torch as ft
from fusedrnn import _cpu
from fusedrnn.bench.cases import CELLS, SHAPES, USUAL
from fusedrnn.bench.race import seconds_of
from fusedrnn.torch import kernels, ops

LEAST = {"LSTM": 1.5, "GRU": 4.0}


def modules_of(cell: str, I: int, H: int) -> tuple[Any, Any]:
    theirs, ours = getattr(torch.nn, cell)(I, H), getattr(ft, cell)(I, H)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step(call: Any, module: Any, x: Any, dy: Any) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad()
        x.grad = None
        call(x)[0].backward(dy)

    return run


def training(threads: int) -> Iterator[str]:
    torch.set_num_threads(threads)
    yield f"### {threads} thread{'s' * (threads > 1)}, training"
    yield ""
    yield "| cell | T, B, I, H | ours, ms | × torch.nn | compiled / ours |"
    yield "|---|---|---|---|---|"
    for cell in CELLS:
        medians = []
        for name in USUAL:
            T, B, I, H = SHAPES[name]
            theirs, ours = modules_of(cell, I, H)
            x, dy = torch.randn(T, B, I, requires_grad=True), torch.randn(T, B, H)
            assert torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-5)
            torch._dynamo.reset()
            compiled = torch.compile(ours, fullgraph=True)
            runs = [
                step(ours, ours, x, dy),
                step(theirs, theirs, x, dy),
                step(compiled, ours, x, dy),
            ]
            times = in_turn(runs, 9, 0.05)
            ratios = times[:, 1:] / times[:, :1]
            medians.append(np.median(ratios[:, 0]))
            shown = f"{np.median(times[:, 0]) * 1e3:.3f}"
            columns = (spread(ratios[:, 0], 2), spread(ratios[:, 1]))
            yield f"| {cell} | {T}, {B}, {I}, {H} | {shown} | {' | '.join(columns)} |"
        mean, least = np.exp(np.mean(np.log(medians))), min(medians)
        told = f"{mean:.2f}, least {least:.2f}"
        yield f"| {cell} | geometric mean | | {told} (at least {LEAST[cell]}, 1.0) | |"
    yield ""


def packed(threads: int) -> Iterator[str]:
    T, B, I, H = SHAPES["speech"]
    lengths = np.random.default_rng(0).integers(1, T + 1, B)
    yield f"PackedSequence, T, B, I, H = {T}, {B}, {I}, {H}, lengths drawn evenly from 1…T:"
    for cell in CELLS:
        theirs, ours = modules_of(cell, I, H)
        x = torch.randn(T, B, I)
        given = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        dy = torch.randn(len(given.data), H)

        def run(module: Any, given: Any = given, dy: Any = dy) -> None:
            module.zero_grad()
            module(given)[0].data.backward(dy)

        times = in_turn([lambda m=ours, r=run: r(m), lambda m=theirs, r=run: r(m)])
        ratios = spread(times[:, 1] / times[:, 0], 2)
        yield f"{cell}: torch.nn's time over ours {ratios}, at least 3."
    yield ""


def overhead() -> Iterator[str]:
    fr.set_num_threads(1)
    torch.set_num_threads(1)
    yield "Microseconds of a call, module (NumPy's layer), least of the rounds, one thread:"
    yield ""
    yield "| cell | T, B, I, H | inference | beyond, at most 15 | with backward | torch.nn |"
    yield "|---|---|---|---|---|---|"
    for cell in CELLS:
        for T, B, I, H in ((1, 1, 64, 64), (1, 1, 128, 128), (20, 2, 16, 32)):
            theirs, ours = modules_of(cell, I, H)
            layer = getattr(fr, cell)(I, H)
            leaf, d = torch.randn(T, B, I), torch.randn(T, B, H)
            x, dy = leaf.numpy(), d.numpy()
            state: Any = (torch.randn(1, B, H), torch.randn(1, B, H))
            arrays: Any = tuple(s.numpy() for s in state)
            if cell == "GRU":
                state, arrays = state[0], arrays[0]
            with_gradient = leaf.clone().requires_grad_()

            def pulled(layer: Any = layer, x: Any = x, dy: Any = dy) -> None:
                _, pullback = layer.vjp(x)
                pullback(dy)

            inference = [
                lambda ours=ours, x=leaf, state=state: ours(x, state),
                lambda layer=layer, x=x, arrays=arrays: layer(x, arrays),
            ]
            runs = [
                step(ours, ours, with_gradient, d),
                pulled,
                step(theirs, theirs, with_gradient, d),
            ]
            with torch.no_grad():
                us = list(in_turn(inference, 15, 0.02).min(0) * 1e6)
            us += list(in_turn(runs, 15, 0.02).min(0) * 1e6)
            beyond = us[0] - us[1]
            yield (
                f"| {cell} | {T}, {B}, {I}, {H} | {us[0]:.1f} ({us[1]:.1f}) | {beyond:.1f} | "
                f"{us[2]:.0f} ({us[3]:.0f}) | {us[4]:.0f} |"
            )
    yield ""


class Chain(torch.nn.Module):
    """Four elementwise operations, for what compiling costs whatever it compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = torch.nn.ParameterList(torch.ones(64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        a, b, c, d = self.vectors
        return (torch.sin(x * a + b) * c + d,)


def around() -> Iterator[str]:
    """What a compiled module and an operator cost by themselves, forward and backward."""
    x, dy = torch.randn(1, 1, 64, requires_grad=True), torch.randn(1, 1, 64)
    chain, gru = Chain(), ft.GRU(64, 64)
    text = '{"cell": "gru", "save": true}'
    rest = (None, None, *gru.parameters(), *[None] * 9)
    ways = [ops.run_forward, ops.forward]
    runs = [
        step(chain, chain, x, dy),
        step(torch.compile(chain, fullgraph=True), chain, x, dy),
        *(step(lambda x, way=way: way(text, x, *rest), gru, x, dy) for way in ways),
    ]
    us = in_turn(runs, 15, 0.02).min(0) * 1e6
    yield f"A chain of four elementwise operations: {us[0]:.0f}, compiled {us[1]:.0f} µs."
    yield f"A GRU's step (H = 64) in the eager way: {us[2]:.0f}, by operators {us[3]:.0f} µs."
    yield ""


def beside_torch() -> Iterator[str]:
    """Two threads, on PyTorch's or on our own, after an operation that PyTorch shares out."""
    torch.set_num_threads(2)
    fr.set_num_threads(2)
    T, B, I, H = SHAPES["weather"]
    gru, x, dy = ft.GRU(I, H), torch.randn(T, B, I, requires_grad=True), torch.randn(T, B, H)
    train, big = step(gru, gru, x, dy), torch.randn(1000, 1000)

    def after(shares: bool) -> float:
        kernels.share_team() if shares else _cpu.share_team("")
        seconds = []
        for _ in range(60):
            torch.relu(big)
            seconds.append(seconds_of(train, 1))
        return float(np.median(seconds)) * 1e3

    own, shared = after(False), after(True)
    yield f"GRU, T, B, I, H = {T}, {B}, {I}, {H}, training after torch.relu, 2 threads:"
    yield f"{own:.1f} ms on threads of our own, {shared:.1f} ms on PyTorch's."
    yield ""


def at_last() -> Iterator[str]:
    yield from overhead()
    yield from around()
    yield from beside_torch()


def of_threads(threads: int) -> Iterator[str]:
    yield from training(threads)
    yield from packed(threads)


if __name__ == "__main__":
    title = f"fusedrnn.torch against torch.nn {torch.__version__}, float32"
    report(sys.argv[1:], title, of_threads, at_last)
