"""Results as one page of HTML that needs nothing else: tables and matplotlib's plots."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .race import Result
from .tables import Group, Table, best, geometric_mean, grouped, tables

COLOURS = {
    "ours": "#0b62c4",
    "torch": "#e0641b",
    "onnxruntime": "#2f8f3a",
    "openvino": "#8a4fbf",
    "reference": "#8c8c8c",
    "compiled": "#c2185b",
    "plain": "#00838f",
    "before": "#6d4c41",
}
MARKERS = {"inference": "o", "training": "s", "streaming": "^"}
CELL_COLOURS = {"LSTM": "#0b62c4", "GRU": "#e0641b", "RNN": "#2f8f3a"}
ENOUGH = 3  # points that make a curve

STYLE = """
:root { color-scheme: light dark; --line: #8884; --card: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } h3 { margin: 1.5rem 0 .4rem; }
.about { color: #888; } .tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.5rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .6rem 1rem; }
.tile b { display: block; font-size: 1.6rem; }
figure { margin: 1rem 0; background: #fff; color: #000; border-radius: .5rem; padding: .5rem; }
figure svg { width: 100%; height: auto; } figcaption { padding: 0 .7rem .4rem; color: #555; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.wrong { color: #d22; font-weight: bold; }
"""


def page(run: Mapping[str, Any], compared: Table | None) -> str:
    """Return the page of a run as `command` keeps it."""
    results: list[Result] = run["cases"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>fusedrnn bench, {html.escape(run['when'])}</title>",
        f"<style>{STYLE}</style></head><body>",
        "<h1>fusedrnn bench</h1>",
        *(f'<div class="about">{html.escape(line)}</div>' for line in run["about"]),
        *(_tiles(results)),
        *(part for figure in _figures(run) for part in figure),
        "<h2>Every case</h2>",
        "<p>× is a contender’s time over ours, the median over rounds of ratios within a "
        "round, in brackets their quartiles; not resolved where 1 lies between them. Floor: "
        "the least time that this machine’s multipliers and caches allow over ours.</p>",
    ]
    properties = [Table(**table) for table in run["tables"]]
    for table in [*tables(results), *properties, *([compared] if compared else [])]:
        parts += _table(table)
    return "\n".join([*parts, "</body></html>\n"])


def _tiles(results: list[Result]) -> Iterator[str]:
    yield '<div class="tiles">'
    for group, members in grouped(results).items():
        ratios = [ratio for r in members if (ratio := best(r)) is not None]
        if ratios:
            yield (
                f'<div class="tile"><b>{geometric_mean(ratios):.2f}×</b>{group}<br>'
                f"the best peer’s time over ours, least {min(ratios):.2f}</div>"
            )
    yield "</div>"


def _table(table: Table) -> Iterator[str]:
    def row(tag: str, cells: Iterable[str]) -> str:
        each = (
            f"<{tag}{' class=wrong' if c == 'WRONG' else ''}>{html.escape(c)}</{tag}>"
            for c in cells
        )
        return f"<tr>{''.join(each)}</tr>"

    yield f"<h3>{html.escape(table.title)}</h3>"
    yield f'<div class="scroll"><table>{row("th", table.columns)}'
    yield from (row("td", cells) for cells in table.rows)
    yield "</table></div>"
    yield from (f"<p>{html.escape(note)}</p>" for note in table.notes)


def _figures(run: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield every plot for which there are enough results."""
    results = [r for r in run["cases"] if "ours" in r["seconds"]]
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        for title, axis, curves in (
            ("Speed against H", "H = I", _curves(results, _against_H)),
            ("Speed against B", "B", _curves(results, _against_B)),
            ("Speed against threads", "threads", _scaling(results)),
        ):
            for key, panels in curves.items():
                figure = _panels(panels, axis)
                yield [f"<h2>{title}{key}</h2>", _svg(figure), "</figure>"]
        if results and run["rates"]:
            yield [
                "<h2>Roofline</h2>",
                _svg(_roofline(results, run["rates"])),
                "<figcaption>FLOP of a call over the bytes that it reads: W once, R once a "
                "step, x and y. Lines: what reading them from a level of the memory allows, as "
                "measured beside this run. Hollow: fewer threads.</figcaption></figure>",
            ]


Curve = list[tuple[int, Result]]


def _against_H(r: Result) -> tuple[Hashable, int, str] | None:
    T, B, I, H = r["sizes"]
    is_plain = I == H and not r["form"]
    return ((T, B), H, f"T = {T}, B = {B}") if is_plain else None


def _against_B(r: Result) -> tuple[Hashable, int, str] | None:
    T, B, I, H = r["sizes"]
    return None if r["form"] else ((T, I, H), B, f"T = {T}, I = {I}, H = {H}")


def _curves(
    results: list[Result], split: Callable[[Result], tuple[Hashable, int, str] | None]
) -> dict[str, list[tuple[str, Curve]]]:
    """By what a figure is about, its panels: a title and the results along the axis."""
    curves: dict[tuple[Any, ...], Curve] = {}
    for r in results:
        parts = split(r)
        if parts:
            constant, at, text = parts
            key = (Group.of(r), constant, text)
            curves.setdefault(key, []).append((at, r))
    figures: dict[str, list[tuple[str, Curve]]] = {}
    for (group, _, text), curve in curves.items():
        if len({at for at, _ in curve}) >= ENOUGH:
            title = f": {group.mode}, {group.where}, {group.dtype}"
            panel = (f"{group.cell}, {text}", sorted(curve, key=lambda point: point[0]))
            figures.setdefault(title, []).append(panel)
    return figures


def _scaling(results: list[Result]) -> dict[str, list[tuple[str, Curve]]]:
    curves: dict[tuple[Any, ...], Curve] = {}
    for r in results:
        if r["form"]:
            continue
        key = (r["mode"], r["dtype"], r["cell"], *r["sizes"])
        curves.setdefault(key, []).append((r["threads"], r))
    # The largest of those that ran with the most counts tell most.
    most = max((len(curve) for curve in curves.values()), default=0)
    figures: dict[str, list[tuple[str, Curve]]] = {}
    if most < 2:
        return figures
    for key, curve in sorted(curves.items(), key=lambda item: -item[1][0][1]["flops"]):
        mode, dtype, cell, *sizes = key
        panels = figures.setdefault(f": {mode}, {dtype}", [])
        if len(curve) == most and len(panels) < 4:
            text = ", ".join(f"{n} = {size}" for n, size in zip("TBIH", sizes, strict=True))
            panels.append((f"{cell}, {text}", sorted(curve, key=lambda point: point[0])))
    return {title: panels for title, panels in figures.items() if panels}


def _panels(panels: list[tuple[str, Curve]], axis: str) -> Figure:
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(11, 3.6 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, curve) in zip(axes.flat, panels, strict=False):
        _draw_speeds(ax, curve)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(axis)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=6,
        frameon=False,
    )
    return figure


def _draw_speeds(ax: Axes, curve: Curve) -> None:
    for name, colour in COLOURS.items():
        points = [
            (at, r["flops"] / r["seconds"][name][0]) for at, r in curve if name in r["seconds"]
        ]
        if points:
            x, speed = np.array(points).T
            width = 2.4 if name == "ours" else 1.4
            ax.plot(x, speed / 1e9, "o-", color=colour, lw=width, ms=4, label=name)
    floors = [(at, r["flops"] / r["floor"]) for at, r in curve if r["floor"]]
    if floors:
        x, speed = np.array(floors).T
        ax.plot(x, speed / 1e9, "k:", lw=1.2, label="floor")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sorted({at for at, _ in curve}))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    _plain(ax)
    ax.set_ylabel("GFLOP/s")


def _plain(ax: Axes) -> None:
    """Numbers as they are said, not powers of ten."""
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3, which="both")


def _roofline(results: list[Result], rates: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    ax = figure.subplots()
    threads = max(r["threads"] for r in results)
    points = [
        (r["flops"] / r["bytes"], r["flops"] / r["seconds"]["ours"][0] / 1e9, r)
        for r in results
    ]
    intensities = [x for x, _, _ in points]
    x = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
    peak = rates["peak"] * threads / 1e9
    for name, dashes in zip(rates["reads"], ("-", "--", "-.", ":"), strict=True):
        roof = np.minimum(peak, x * rates["reads"][name] * threads / 1e9)
        ax.plot(x, roof, color="#666", ls=dashes, lw=1.2, label=f"{name}, {threads} threads")
    seen = set()
    for intensity, speed, r in points:
        label = f"{r['cell']} {r['mode']}"
        full = r["threads"] == threads
        ax.plot(
            intensity,
            speed,
            MARKERS[r["mode"]],
            color=CELL_COLOURS[r["cell"]],
            mfc=CELL_COLOURS[r["cell"]] if full else "none",
            ms=6,
            label=None if label in seen or not full else label,
        )
        if full:
            seen.add(label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    _plain(ax)
    ax.set_xlabel("FLOP per byte read")
    ax.set_ylabel("GFLOP/s")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    drawn = buffer.getvalue()
    return "<figure>" + drawn[drawn.index("<svg") :]
