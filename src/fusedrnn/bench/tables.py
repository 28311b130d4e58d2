"""Results as tables, for a terminal and in Markdown, and two runs compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .contenders import PEERS
from .narrow import peers_of
from .race import Result

UNRESOLVED = "not resolved"
SLOWER = 0.95  # a ratio to an earlier build that matters


@dataclass(frozen=True)
class Table:
    """Rows of text below a title, and notes."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> Iterator[str]:
        """Yield its lines."""
        yield ""
        yield f"### {self.title}"
        yield ""
        yield f"| {' | '.join(self.columns)} |"
        yield "|---" * len(self.columns) + "|"
        for row in self.rows:
            yield f"| {' | '.join(row)} |"
        for note in self.notes:
            yield ""
            yield note


def with_spread(quartiles: Sequence[float] | None) -> str:
    """Return median (quartiles) of a ratio; not resolved where 1 lies inside them."""
    if quartiles is None:
        return "–"
    median, low, high = quartiles
    text = f"{median:.2f} ({low:.2f}–{high:.2f})"
    return f"{text} {UNRESOLVED}" if low < 1 < high else text


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return float(np.exp(np.mean(np.log(values))))


def best(result: Result) -> float | None:
    """Return the ratio to the fastest peer, None without any."""
    ratios = result["ratios"]
    return min((ratios[n][0] for n in _peers(result) if n in ratios), default=None)


def _peers(result: Result) -> tuple[str, ...]:
    """Return the names of the peers that a case competes with."""
    weights = result.get("weights", "")
    if weights:
        return peers_of(weights, PEERS)
    return (*PEERS, "torch-float32") if result["dtype"] == "bfloat16" else PEERS


class Group(NamedTuple):
    """The properties that all results of a table share."""

    cell: str
    mode: str
    dtype: str
    where: str
    interface: str
    weights: str

    @classmethod
    def of(cls, result: Result) -> Group:
        """Return the group of a result."""
        count = result["threads"]
        where = f"{count} thread" + "s" * (count > 1) if result["device"] == "cpu" else "GPU"
        what = (result["cell"], result["mode"], result["dtype"], where)
        return cls(*what, result.get("interface", "numpy"), result.get("weights", ""))

    def __str__(self) -> str:
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        through = ", PyTorch" if self.interface == "torch" else ""
        weights = f", {self.weights} weights" if self.weights else ""
        return f"{self.cell} {self.mode}{through}, {self.where}{dtype}{weights}"


def grouped(results: Iterable[Result]) -> dict[Group, list[Result]]:
    """Return the results of each table, in order."""
    groups: dict[Group, list[Result]] = {}
    for result in results:
        groups.setdefault(Group.of(result), []).append(result)
    return groups


def _optional(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def table_of(group: Group, results: list[Result]) -> Table:
    """Return one table: our time, how near it is to the floor, and peers' times over ours."""
    others = list(dict.fromkeys(name for r in results for name in r["ratios"]))
    known = _peers(results[0])
    peers = [name for name in known if name in others]
    peers += [name for name in others if name not in known]
    has_best = any(name in known for name in peers)
    has_plan = any(r.get("plan") for r in results)
    has_reference = any("reference" in r["seconds"] for r in results)
    columns = ["T, B, I, H", "ms", "GFLOP/s", "floor", *(f"× {n}" for n in peers)]
    columns += ["× best peer"] * has_best + ["× reference"] * has_reference
    columns += ["plan"] * has_plan
    table = Table(str(group), columns)
    for result in results:
        label = result["label"]
        if "ours" in result["wrong"]:
            table.rows.append([label, "WRONG", *["–"] * (len(columns) - 2)])
        else:
            ours = result["seconds"]["ours"][0]
            row = [
                label,
                f"{ours * 1e3:.4f}",
                f"{result['flops'] / ours / 1e9:.0f}",
                f"{result['floor'] / ours:.2f}" if result["floor"] else "–",
            ]
            row += [
                "WRONG" if n in result["wrong"] else with_spread(result["ratios"].get(n))
                for n in peers
            ]
            row += [_optional(best(result), 2)] * has_best
            slow = result["seconds"].get("reference")
            row += [_optional(slow and slow[0] / ours, 0)] * has_reference
            row += [result.get("plan", "–")] * has_plan
            table.rows.append(row)
        if not result.get("same bits", True):
            table.notes.append(f"Other bits than before: {result['case']}")
        table.notes.extend(
            f"WRONG {result['case']}: {name}, {what}" for name, what in result["wrong"].items()
        )
    medians = {
        name: [r["ratios"][name][0] for r in results if name in r["ratios"]] for name in peers
    }
    if "before" in medians:
        slower = sum(r["ratios"]["before"][2] < SLOWER for r in results)
        table.notes.append(f"Slower than before by more than 5%, resolved: {slower}")
    medians["best peer"] = [ratio for r in results if (ratio := best(r)) is not None]
    means = [
        f"× {name} {geometric_mean(values):.2f} (least {min(values):.2f})"
        for name, values in medians.items()
        if values
    ]
    if means:
        table.notes.append(f"Geometric mean: {', '.join(means)}")
    return table


def error_tables(results: Iterable[Result]) -> Iterator[Table]:
    """Yield the largest errors of y of cases with fewer bits than float32."""
    with_errors = [r for r in results if "y errors" in r]
    for group, members in grouped(with_errors).items():
        names = list(dict.fromkeys(name for r in members for name in r["y errors"]))
        table = Table(f"Largest error of y, {group}", ["T, B, I, H", *names])
        for r in members:
            found = [r["y errors"].get(name) for name in names]
            table.rows.append([r["label"], *("–" if e is None else f"{e:.1e}" for e in found)])
        yield table


def cost_tables(results: Iterable[Result]) -> Iterator[Table]:
    """Yield what each form costs, the plain layer's time being 1: a table for each shape."""
    by_table: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        group = Group.of(result)
        shape = ", ".join(map(str, result["sizes"]))
        by_table.setdefault((shape, group.where, group.dtype), []).append(result)
    for (shape, where, dtype), members in by_table.items():
        columns = list(dict.fromkeys((r["cell"], r["mode"]) for r in members))
        title = f"Time over the plain layer's, T, B, I, H = {shape}, {where}"
        title += "" if dtype == "float32" else f", {dtype}"
        table = Table(title, ["form", *map(" ".join, columns)])
        for form in dict.fromkeys(r["form"] for r in members):
            entries = {
                (r["cell"], r["mode"]): with_spread(_inverse(r["ratios"]["plain"]))
                for r in members
                if r["form"] == form
            }
            table.rows.append([form, *(entries.get(column, "") for column in columns)])
        yield table


def _inverse(quartiles: Sequence[float]) -> list[float]:
    median, low, high = quartiles
    return [1 / median, 1 / high, 1 / low]


def tables(results: Iterable[Result]) -> list[Table]:
    """Return the tables of a run."""
    results = list(results)
    costs = [r for r in results if "plain" in r["ratios"]]
    races = [r for r in results if r not in costs or "before" in r["ratios"]]
    found = [table_of(group, members) for group, members in grouped(races).items()]
    return [*found, *error_tables(races), *cost_tables(costs)]


def comparison(before: Iterable[Result], now: Iterable[Result]) -> Table:
    """Compare our times of two runs, by the peers that both have.

    A machine's clock and neighbours change from run to run, also for the peers. So the ratios
    to a peer are compared, and a case counts only if all peers agree. Without peers, times are
    compared, which is worth little. The spread is that of the farthest quartiles; a case whose
    spread contains 1 is not resolved.
    """
    old = {r["case"]: r for r in before if "ours" in r["seconds"]}
    table = Table(
        "Compared with the earlier run",
        ["case", "T, B, I, H", "earlier ms", "ms", "× as fast", ""],
    )
    verdicts = []
    for result in now:
        earlier = old.get(result["case"])
        if earlier is None or "ours" not in result["seconds"]:
            continue
        if earlier["sizes"] != result["sizes"]:
            continue
        median, low, high = _gain(earlier, result)
        verdict = "faster" if low > 1 else "slower" if high < 1 else UNRESOLVED
        verdicts.append(verdict)
        table.rows.append(
            [
                result["case"],
                ", ".join(map(str, result["sizes"])),
                f"{earlier['seconds']['ours'][0] * 1e3:.4f}",
                f"{result['seconds']['ours'][0] * 1e3:.4f}",
                f"{median:.2f} ({low:.2f}–{high:.2f})",
                verdict,
            ]
        )
    counts = ", ".join(
        f"{verdicts.count(verdict)} {verdict}" for verdict in ("faster", "slower", UNRESOLVED)
    )
    table.notes.append(f"Of {len(verdicts)} cases of both runs: {counts}")
    return table


def _gain(before: Result, now: Result) -> tuple[float, float, float]:
    """How many times as fast ours is, and the least and the most that may be."""
    common = [name for name in now["ratios"] if name in before["ratios"]]
    pairs = [(now["ratios"][name], before["ratios"][name]) for name in common]
    if not pairs:
        pairs = [(before["seconds"]["ours"], now["seconds"]["ours"])]
    median = geometric_mean([a[0] / b[0] for a, b in pairs])
    return median, min(a[1] / b[2] for a, b in pairs), max(a[2] / b[1] for a, b in pairs)
