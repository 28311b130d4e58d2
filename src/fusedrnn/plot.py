"""Plots of a layer's gates; needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import checks, cuda
from .reference import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Gates after σ are shown from 0 to 1, after tanh from -1 to 1, others to their largest value.
_SIGMOIDS = "iforz"
_BOUNDED = "gn"
_NAME = re.compile(r"([a-z])(?:_(l\d+(?:_reverse)?))?")


def gates(
    trace: Mapping[str, Any],
    row: int = 0,
    *,
    cells: Any = None,
    batch_first: bool = False,
    units: Any = None,
    title: str | None = None,
) -> Figure:
    """Draw each gate over time, as a heat map of units by steps for each gate and layer.

    Gates after σ (i, f, o, r, z) are shown from 0 to 1, those after tanh (g, n) from -1 to 1;
    an RNN's h and the cells up to their largest absolute value.

    Parameters
    ----------
    trace: the gates that a call with ``trace=True`` returns: of a layer ("i_l0", "f_l0" …), a
        module of `fusedrnn.torch` or an op ("i", "f" …); each (T, B, H), (B, T, H) with
        batch_first, or (T, H).
    row: the index of a row of the batch.
    cells: the cells that a call with ``return_cells=True`` returns, drawn beside the last
        layer's gates.
    batch_first: whether arrays of rank 3 are (B, T, H).
    units: the units to show, as NumPy's indices: ``slice(0, 16)`` or a list; None for all.
    title: the title of the figure.

    Returns
    -------
    A matplotlib `Figure`, which a notebook shows and ``savefig`` writes.

    Raises
    ------
    ImportError: matplotlib is not installed. TypeError: trace is not such a dict.
    ValueError: a wrong shape, or a row out of range.

    >>> import numpy as np, fusedrnn as fr
    >>> from fusedrnn import plot
    >>> lstm = fr.LSTM(3, 16, num_layers=2, rng=0)
    >>> x = np.random.default_rng(0).normal(size=(40, 2, 3)).astype(np.float32)
    >>> y, state, cells, trace = lstm(x, return_cells=True, trace=True)
    >>> figure = plot.gates(trace, row=1, cells=cells)
    >>> [axes.get_title() for axes in figure.axes[:4]]
    ['i, l0', 'f, l0', 'g, l0', 'o, l0']
    """
    panels = _panels(trace, cells, row, checks.flag("batch_first", batch_first), units)
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            f'fusedrnn.plot needs {error.name}; install it with: pip install "fusedrnn[plot]"'
        ) from None

    rows, columns = len(panels), max(map(len, panels.values()))
    figure = Figure(figsize=(1 + 3 * columns, 0.6 + 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for line, (layer, maps) in zip(axes, panels.items(), strict=True):
        for ax, (letter, values) in zip(line, maps.items(), strict=False):
            low, high, colours = _scale(letter, values)
            image = ax.imshow(
                values.T,
                aspect="auto",
                interpolation="nearest",
                vmin=low,
                vmax=high,
                cmap=colours,
            )
            ax.set_title(f"{letter}, {layer}" if layer else letter, fontsize=10)
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
        for ax in line[len(maps) :]:
            ax.set_visible(False)
        line[0].set_ylabel("unit" if units is None else "chosen unit")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    if title is not None:
        figure.suptitle(title)
    return figure


def _panels(
    trace: Mapping[str, Any], cells: Any, row: int, batch_first: bool, units: Any
) -> dict[str, dict[str, Array]]:
    """Return the arrays to draw, (T, units), by layer and letter."""
    if not isinstance(trace, Mapping):
        raise TypeError(f"trace must be a dict of gates, got {type(trace).__name__}")
    if not trace:
        raise TypeError("trace must be a dict of gates, got an empty one")
    panels: dict[str, dict[str, Array]] = {}
    for name, values in trace.items():
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise TypeError(f'trace must have names as "i" or "i_l0", got {name!r}')
        letter, layer = match[1], match[2] or ""
        array = _of_row(f"trace[{name!r}]", values, row, batch_first, units)
        panels.setdefault(layer, {})[letter] = array
    if cells is not None:
        directions = [
            p for p in panels if p.partition("_")[0] == list(panels)[-1].partition("_")[0]
        ]
        array = _of_row("cells", cells, row, batch_first, None)
        if array.shape[1] % len(directions):
            raise ValueError(
                f"cells must have H units for each of {len(directions)} directions, "
                f"got {array.shape[1]} in all"
            )
        shares = np.split(array, len(directions), axis=1)
        for layer, share in zip(directions, shares, strict=True):
            panels[layer]["c"] = share if units is None else share[:, units]
    return panels


def _of_row(name: str, values: Any, row: int, batch_first: bool, units: Any) -> Array:
    if hasattr(values, "detach"):
        values = values.detach().cpu().float()
    array = np.asarray(cuda.on_host(values) if cuda.framework_of(values) else values)
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} must be (T, B, H) or (T, H), got {array.shape}")
    if array.ndim == 3:
        axis = 0 if batch_first else 1
        if not -array.shape[axis] <= row < array.shape[axis]:
            raise ValueError(
                f"row must be below {array.shape[axis]}, the rows of {name}, got {row}"
            )
        array = np.take(array, row, axis)
    return array if units is None else array[:, units]


def _scale(letter: str, values: Array) -> tuple[float, float, str]:
    if letter in _SIGMOIDS:
        return 0.0, 1.0, "viridis"
    extent = 1.0 if letter in _BOUNDED else float(np.abs(values).max(initial=0.0)) or 1.0
    return -extent, extent, "RdBu_r"
