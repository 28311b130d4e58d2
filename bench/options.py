"""The cost of each option: its time over the plain cell's, measured in turn.

python bench/options.py             both thread counts, some 8 minutes
python bench/options.py 1           one thread
python bench/options.py --report FILE

Float32, without backward and with it, at three narrow shapes and a wide one. An entry is the
median of the rounds' ratios, with their quartiles; "at most" is the target. Below, lengths
drawn evenly against torch's PackedSequence, and the memory that a forward leaves to its
backward with and without recompute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from turns import in_turn, report, spread

import fusedrnn as fr
from fusedrnn.bench.cases import Sizes

CELLS = ("LSTM", "GRU", "RNN")
MODES = ("inference", "training")
WIDE: Sizes = (100, 32, 128, 256)  # T, B, I, H
SHAPES: tuple[Sizes, ...] = ((24, 256, 8, 32), (96, 64, 7, 64), (100, 1, 64, 128), WIDE)
TURN_SECONDS = 0.004


@dataclass(frozen=True)
class Option:
    """An option: keywords of layer and call, the target, and where it has an effect."""

    of_layer: dict[str, Any] = field(default_factory=dict)
    of_call: dict[str, Any] = field(default_factory=dict)
    at_most: float | None = None
    modes: tuple[str, ...] = MODES


PLAIN = Option()


def options_of(cell: str, sizes: Sizes) -> dict[str, Option]:
    """The options of a cell by what the table calls them."""
    T, B, _, H = sizes
    rng = np.random.default_rng(0)
    is_lstm, is_wide, training = cell == "LSTM", sizes == WIDE, ("training",)
    alone: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "lengths, all full": ({}, {"lengths": np.full(B, T)}),
        "resets, one in twenty": ({}, {"resets": rng.random((T, B)) < 0.05}),
        "zoneout": ({"zoneout": 0.1}, {}),
        "recurrent_dropout": ({"recurrent_dropout": 0.2}, {}),
        "clip": ({"clip": 3.0}, {}),
    }
    if is_lstm:
        alone |= {
            "peephole": ({"peephole": True}, {}),
            "coupled_gates": ({"coupled_gates": True}, {}),
            "cell_clip": ({"cell_clip": 3.0}, {}),
            "return_cells": ({}, {"return_cells": True}),
        }
    of_unit = 1.1 if is_wide else 1.12
    found = {
        name: Option(*asked, of_unit, training if "dropout" in name else MODES)
        for name, asked in alone.items()
    }
    of_layer, of_call = (
        {k: v for a in alone.values() for k, v in a[i].items()} for i in (0, 1)
    )
    found["all of these"] = Option(of_layer, of_call, 1.3)
    if B > 1:
        drawn = {"lengths": rng.integers(1, T + 1, B)}
        found["lengths, drawn evenly from 1…T"] = Option({}, drawn, 0.65 if is_wide else None)
    dropped = {"weight_dropout": 0.2}
    found["weight_dropout"] = Option(dropped, modes=training)
    regularisers = {"zoneout": 0.1, "recurrent_dropout": 0.2, **dropped}
    found["all regularisers"] = Option(regularisers, {}, 1.3 if is_wide else None, training)
    if is_lstm:
        found["proj_size, H/2"] = Option({"proj_size": H // 2}, {}, 1.0 if is_wide else None)
    if cell == "GRU":
        found["reset_after=False"] = Option(
            {"reset_after": False}, {}, 1.25 if is_wide else 1.35
        )
    if cell != "RNN":
        found["layer_norm"] = Option({"layer_norm": True}, {}, 1.35 if is_wide else 2.0)
        found["trace"] = Option({}, {"trace": True})
        found["bptt, 20"] = Option({}, {"bptt": 20}, modes=training)
        found["recompute"] = Option({}, {"recompute": True}, 1.4 if is_wide else None, training)
    return found


def run_of(cell: str, sizes: Sizes, mode: str, option: Option = PLAIN) -> Callable[[], Any]:
    """A call of a layer, or a training step."""
    T, B, I, H = sizes
    rng = np.random.default_rng(0)
    layer = getattr(fr, cell)(I, H, rng=rng, **option.of_layer)
    x = rng.normal(size=(T, B, I)).astype(np.float32)
    if mode == "inference":
        return lambda: layer(x, **option.of_call)
    dy = rng.normal(size=(T, B, layer._width)).astype(np.float32)
    seed = {"seed": 1} if layer._draws else {}

    def step() -> None:
        _, pullback = layer.vjp(x, **option.of_call, **seed)
        pullback(dy)

    return step


def options(threads: int, sizes: Sizes) -> Iterator[str]:
    told = f"{threads} thread{'s' * (threads > 1)}"
    yield f"### T, B, I, H = {', '.join(map(str, sizes))}, {told}"
    yield ""
    columns = [(cell, mode) for cell in CELLS for mode in MODES]
    yield f"| option | {' | '.join(map(' '.join, columns))} | at most |"
    yield "|---" * (len(columns) + 2) + "|"
    by_cell = {cell: options_of(cell, sizes) for cell in CELLS}
    for name in by_cell["LSTM"] | by_cell["GRU"]:
        entries, at_most = [], None
        for cell, mode in columns:
            option = by_cell[cell].get(name)
            if option is None or mode not in option.modes:
                entries.append("")
                continue
            runs = [run_of(cell, sizes, mode), run_of(cell, sizes, mode, option)]
            times = in_turn(runs, at_least=TURN_SECONDS)
            entries.append(spread(times[:, 1] / times[:, 0], 2))
            at_most = option.at_most
        yield f"| {name} | {' | '.join(entries)} | {'' if at_most is None else at_most} |"
    yield ""


def packed(threads: int) -> Iterator[str]:
    """Lengths drawn evenly, against torch's PackedSequence."""
    import torch

    torch.set_num_threads(threads)
    T, B, I, H = WIDE
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

        ours = run_of(cell, WIDE, "training", Option({}, {"lengths": lengths}))
        times = in_turn([ours, theirs])
        yield f"{cell} {spread(times[:, 1] / times[:, 0])}, at least 3."
    yield ""


def memory() -> Iterator[str]:
    """Bytes kept for backward beside x, y and the arguments."""
    T, B, I, H = WIDE
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
    for sizes in SHAPES:
        yield from options(threads, sizes)
    yield from packed(threads)


if __name__ == "__main__":
    report(
        sys.argv[1:],
        "Options, their time over the plain cell's",
        of_threads,
        memory,
    )
