"""The results of stacked layers, put together from runs of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from helpers import double

from fusedrnn import reference
from fusedrnn.cells import Cell


class Stack:
    """Layers and directions in float64. `arguments` are those of a layer."""

    def __init__(self, cell: Cell, arguments: dict[str, Any], parameters: Any) -> None:
        self.cell, self.arguments = cell, arguments
        self.parameters = double(parameters)
        self.D = 1 + arguments.get("bidirectional", False)
        self.layers = arguments.get("num_layers", 1)

    def run(
        self, x: np.ndarray, state: list[Any], asked: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
        """Return the results of x (T, B, I) by name, and a pullback to gradients by name.

        `asked` are masks and options of a call.
        """
        cell, D, p = self.cell, self.D, self.arguments.get("dropout", 0.0)
        drops = p > 0 and asked.get("training", False)
        below, factors, pullbacks, ends = x, [], {}, []
        gates: dict[str, Any] = {}
        for l in range(self.layers):
            factor: Any = 1.0
            if l and drops:
                factor = reference.dropout(below, p, seed=asked["seed"], where=l - 1)
                if "mask" in asked:  # steps count that are taken
                    numbers = (asked["mask"].cumsum(0) - 1).clip(0)
                    factor = np.take_along_axis(factor, numbers[..., None], 0)
            factors.append(factor)
            below, sides, cells = below * factor, [], []
            for d in range(D):
                suffix, where = f"l{l}" + "_reverse" * d, l * D + d
                own = {
                    k.rpartition("_l")[0]: v
                    for k, v in self.parameters.items()
                    if k.endswith(f"_{suffix}")
                }
                first = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                results, pullbacks[where] = reference.op(
                    cell.reference,
                    below,
                    [own.pop(name, None) for name in first],
                    [None if s is None else s[where] for s in state],
                    where=where,
                    reverse=self.arguments.get("reverse", False) or d == 1,
                    return_cells="c" in cell.states,
                    trace=True,
                    **own,
                    **asked,
                )
                y, *final = results[: 1 + len(cell.states)]
                sides.append(y)
                cells.append(results[-2])
                ends.append(final)
                gates |= {f"{letter}_{suffix}": g for letter, g in results[-1].items()}
            below = np.concatenate(sides, -1)
        names = [f"{letter}_n" for letter in cell.states]
        found = {"y": below} | dict(
            zip(names, map(np.stack, zip(*ends, strict=True)), strict=True)
        )
        if "c" in cell.states:
            found["cells"] = np.concatenate(cells, -1)

        def pullback(dy: Any, d_state: list[Any], d_cells: Any = None) -> dict[str, Any]:
            gradients: dict[str, Any] = {}
            starts: list[Any] = [None] * self.layers * D
            for l in reversed(range(self.layers)):
                dx: Any = 0.0
                for d, part in enumerate(np.split(dy, D, -1)):
                    where, is_last = l * D + d, l == self.layers - 1
                    d_own = (
                        np.split(d_cells, D, -1)[d] if is_last and d_cells is not None else None
                    )
                    of_run = pullbacks[where](part, *[s[where] for s in d_state], d_cells=d_own)
                    dx = dx + of_run.x
                    starts[where] = [g for g in (of_run.h0, of_run.c0) if g is not None]
                    suffix = f"l{l}" + "_reverse" * d
                    gradients |= {
                        f"{k}_{suffix}": v
                        for k, v in of_run._asdict().items()
                        if v is not None and k not in ("x", "h0", "c0")
                    }
                dy = dx * factors[l]
            for at, letter in enumerate(cell.states):
                gradients[f"{letter}0"] = np.stack([s[at] for s in starts])
            return gradients | {"x": dy}

        return found | gates, pullback
