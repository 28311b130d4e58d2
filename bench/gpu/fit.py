"""Fit the costs by which a plan is chosen to measured times, and write them as cuda/costs.inc.

    python fit.py RESULTS [--write FILE]

RESULTS is what run.py wrote: the device and the measured plans. The logarithms of the costs are
fitted so that those of estimated and measured cycles agree, the more the faster a plan is
compared with the best of its layer; a cost that no time depends on stays. For each layer the
table shows the time of the plan that is chosen with the costs of before and with the new ones,
over that of the best plan that was measured. Needs SciPy, and fusedrnn with the CUDA backend,
but no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from fusedrnn import _cuda

COSTS = Path(__file__).resolve().parent.parent.parent / "cuda" / "costs.inc"
HEADER = """\
// These are the costs by which tuning.cpp chooses a plan, in cycles of a multiprocessor.
// bench/gpu/fit.py writes what it fits to measured times into this file. The values here
// were fitted to {plans} plans of {layers} layers on {device}
// at {clock:.0f} MHz.
"""
STIFFNESS = 0.05  # of a cost, against a residual of 1


class Layer:
    """The measured plans of a layer and direction."""

    def __init__(self, name: str, lines: list[dict[str, Any]], clock: float) -> None:
        self.name = name
        self.plans = [line["plan"] for line in lines]
        self.cycles = np.array([line["seconds"] for line in lines]) * clock
        self.weights = self.cycles.min() / self.cycles

    def residuals(self, costs: dict[str, float]) -> np.ndarray:
        """Return the errors of the estimates' logarithms, weighted."""
        estimated = np.array(_cuda.estimates(self.plans, costs))
        return self.weights * np.log(estimated / self.cycles)

    def regret(self, costs: dict[str, float]) -> float:
        """Return the time of the plan with the lowest estimate over the shortest time."""
        chosen = int(np.argmin(_cuda.estimates(self.plans, costs)))
        return float(self.cycles[chosen] / self.cycles.min())


def read(results: Path) -> tuple[dict[str, Any], list[Layer]]:
    """Return the device and the measured layers."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    device = next((line for line in lines if line["stage"] == "device"), None)
    if device is None:
        raise SystemExit(f"{results} has no line of the device")
    groups = defaultdict(list)
    for line in lines:
        if line["stage"] == "plans" and "seconds" in line and not line["wrong"]:
            way = "backward" if line["backward"] else "forward"
            sizes = f"T={line['T']} B={line['B']} I={line['I']} H={line['H']}"
            groups[f"{line['cell']} {line['dtype']} {sizes} {way}"].append(line)
    if not groups:
        raise SystemExit(f"{results} has no measured plans")
    return device, [Layer(name, of, device["clock"]) for name, of in groups.items()]


def fit(layers: list[Layer], start: dict[str, float]) -> dict[str, float]:
    """Return the fitted costs."""
    names = list(start)
    origin = np.log([start[name] for name in names])

    def costs_at(point: np.ndarray) -> dict[str, float]:
        return dict(zip(names, np.exp(point).tolist(), strict=True))

    def residuals(point: np.ndarray) -> np.ndarray:
        costs = costs_at(point)
        errors = [layer.residuals(costs) for layer in layers]
        return np.concatenate([*errors, STIFFNESS * (point - origin)])

    # Steps are larger than the estimates' kinks, where another resource is the slowest.
    found = least_squares(residuals, origin, loss="soft_l1", f_scale=0.2, diff_step=1e-2)
    return costs_at(found.x)


def write(costs: dict[str, float], header: str, to: Path) -> None:
    """Write the file of costs with other values, with its comments."""
    text = COSTS.read_text("utf-8")
    lines = text[text.index("COST(") :]
    for name, value in costs.items():
        number = f"{float(f'{value:.3g}'):g}"
        lines, count = re.subn(rf"(COST\({name}, )[^)]+", rf"\g<1>{number}", lines)
        assert count == 1, name
    to.write_text(header + lines, "utf-8")


def main() -> int:
    """Fit, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", type=Path)
    request = parser.parse_args()
    device, layers = read(request.results)
    before = _cuda.costs()
    after = fit(layers, before)
    print(f"{'layer':<48} plans  best µs  before  after   (time over the best)")
    for layer in layers:
        best = layer.cycles.min() / device["clock"] * 1e6
        regrets = f"{layer.regret(before):6.2f} {layer.regret(after):6.2f}"
        print(f"{layer.name:<48} {len(layer.plans):5} {best:8.2f}  {regrets}")
    print()
    for name in before:
        print(f"{name:<16} {before[name]:8.4g} -> {after[name]:.4g}")
    if request.write:
        plans = sum(len(layer.plans) for layer in layers)
        header = HEADER.format(
            plans=plans,
            layers=len(layers),
            device=device["name"],
            clock=device["clock"] / 1e6,
        )
        write(after, header, request.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
