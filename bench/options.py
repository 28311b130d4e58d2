"""What each option costs: forward and backward against the plain cell's, in turn.

python bench/options.py             both thread counts, some 2 minutes
python bench/options.py 1           one thread
python bench/options.py --report FILE

T=100, B=32, I=128, H=256, float32. A row is the median of the rounds' ratios, with their
quartiles; "at most" is the target. Below, lengths drawn evenly against torch's PackedSequence,
and the memory that a forward leaves to its backward with and without recompute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from turns import in_turn, report, spread

import fusedrnn as fr

T, B, I, H = 100, 32, 128, 256

# Of the layer, of the call, of which cells, the target.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str, float | None]] = {
    "lengths, all full": ({}, {"lengths": np.full(B, T)}, "LSTM GRU RNN", 1.10),
    "lengths, drawn evenly from 1…T": (
        {},
        {"lengths": np.random.default_rng(0).integers(1, T + 1, B)},
        "LSTM GRU RNN",
        0.65,
    ),
    "resets, one in twenty": (
        {},
        {"resets": np.random.default_rng(0).random((T, B)) < 0.05},
        "LSTM GRU RNN",
        1.10,
    ),
    "zoneout": ({"zoneout": 0.1}, {}, "LSTM GRU RNN", 1.10),
    "recurrent_dropout": ({"recurrent_dropout": 0.2}, {}, "LSTM GRU RNN", 1.10),
    "weight_dropout": ({"weight_dropout": 0.2}, {}, "LSTM GRU RNN", None),
    "peephole": ({"peephole": True}, {}, "LSTM", 1.10),
    "coupled_gates": ({"coupled_gates": True}, {}, "LSTM", 1.10),
    "clip": ({"clip": 3.0}, {}, "LSTM GRU RNN", 1.10),
    "cell_clip": ({"cell_clip": 3.0}, {}, "LSTM", None),
    "return_cells": ({}, {"return_cells": True}, "LSTM", 1.10),
    "trace": ({}, {"trace": True}, "LSTM GRU", None),
    "proj_size, H/2": ({"proj_size": H // 2}, {}, "LSTM", 1.0),
    "layer_norm": ({"layer_norm": True}, {}, "LSTM GRU", 1.35),
    "reset_after=False": ({"reset_after": False}, {}, "GRU", 1.25),
    "all regularisers": (
        {"zoneout": 0.1, "recurrent_dropout": 0.2, "weight_dropout": 0.2},
        {},
        "LSTM GRU RNN",
        1.3,
    ),
    "bptt, 20": ({}, {"bptt": 20}, "LSTM GRU", None),
    "recompute": ({}, {"recompute": True}, "LSTM GRU", 1.4),
}


def step(cell: str, layer_options: dict[str, Any], call_options: dict[str, Any]) -> Callable:
    """A training step of a layer."""
    rng = np.random.default_rng(0)
    layer = getattr(fr, cell)(I, H, rng=rng, **layer_options)
    x = rng.normal(size=(T, B, I)).astype(np.float32)
    dy = rng.normal(size=(T, B, layer._width)).astype(np.float32)
    seed = {"seed": 1} if layer._draws else {}

    def run() -> None:
        _, pullback = layer.vjp(x, **call_options, **seed)
        pullback(dy)

    return run


def options(threads: int) -> Iterator[str]:
    yield f"### {threads} thread{'s' * (threads > 1)}, time over the plain cell's"
    yield ""
    yield "| option | LSTM | GRU | RNN | at most |"
    yield "|---|---|---|---|---|"
    for name, (of_layer, of_call, cells, most) in OPTIONS.items():
        columns = []
        for cell in ("LSTM", "GRU", "RNN"):
            if cell not in cells.split():
                columns.append("")
                continue
            times = in_turn([step(cell, {}, {}), step(cell, of_layer, of_call)])
            columns.append(spread(times[:, 1] / times[:, 0]))
        yield f"| {name} | {' | '.join(columns)} | {'' if most is None else most} |"
    yield ""


def packed(threads: int) -> Iterator[str]:
    """Lengths drawn evenly, against torch's PackedSequence."""
    import torch

    torch.set_num_threads(threads)
    lengths = np.random.default_rng(0).integers(1, T + 1, B)
    yield f"Lengths drawn evenly, PackedSequence's time over ours, {threads} threads:"
    for cell in ("LSTM", "GRU"):
        module = getattr(torch.nn, cell)(I, H)
        x = torch.randn(T, B, I, requires_grad=True)
        dy = torch.randn(int(lengths.max()), B, H)

        def theirs(module: Any = module, x: Any = x, dy: Any = dy) -> None:
            pack = torch.nn.utils.rnn.pack_padded_sequence(
                x, torch.from_numpy(lengths), enforce_sorted=False
            )
            y, _ = torch.nn.utils.rnn.pad_packed_sequence(module(pack)[0])
            y.backward(dy)

        times = in_turn([step(cell, {}, {"lengths": lengths}), theirs])
        yield f"{cell} {spread(times[:, 1] / times[:, 0])}, at least 3."
    yield ""


def memory() -> Iterator[str]:
    """Bytes kept for backward beside x, y and the arguments."""
    yield "| cell | saved, MB | with recompute, MB | less |"
    yield "|---|---|---|---|"
    for cell, options in (("LSTM", {}), ("GRU", {}), ("LSTM", {"layer_norm": True})):
        layer = getattr(fr, cell)(I, H, **options)
        plain, again = (
            layer.explain(T, B, training=True, recompute=r)["saved_bytes"]
            for r in (False, True)
        )
        name = f"{cell}{', layer_norm' * bool(options)}"
        yield (f"| {name} | {plain / 1e6:.1f} | {again / 1e6:.1f} | {1 - again / plain:.0%} |")
    yield ""


def of_threads(threads: int) -> Iterator[str]:
    yield from options(threads)
    yield from packed(threads)


if __name__ == "__main__":
    report(
        sys.argv[1:],
        f"Options, T, B, I, H = {T}, {B}, {I}, {H}, forward and backward",
        of_threads,
        memory,
    )
