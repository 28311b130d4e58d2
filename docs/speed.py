"""Draw docs/images/speed.svg from what `fusedrnn bench --suite shapes --json` measured.

    python docs/speed.py bench/results/<name>.json

A bar is the geometric mean over the plain shapes of a peer's time over ours; the mark is the
least of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

OUTPUT = Path(__file__).parent / "images/speed.svg"
COLOURS = {"torch": "#e0641b", "onnxruntime": "#2f8f3a", "openvino": "#8a4fbf"}
MODES = ("streaming", "inference", "training")


def draw(run: dict, threads: int) -> Figure:
    """Draw a panel for each mode, a group of bars for each cell."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(MODES), width_ratios=(1.2, 1.2, 0.9))
    for mode, panel in zip(MODES, panels, strict=True):
        labels, at = [], 0.0
        for cell in ("LSTM", "GRU"):
            for peer, colour in COLOURS.items():
                ratios = [
                    r["ratios"][peer][0]
                    for r in run["cases"]
                    if (r["cell"], r["mode"], r["threads"], r["form"])
                    == (cell, mode, threads, "")
                    and r["interface"] == "numpy"
                    and peer in r["ratios"]
                ]
                if ratios:
                    mean = float(np.exp(np.mean(np.log(ratios))))
                    panel.barh(at, mean, color=colour, alpha=0.85)
                    panel.plot(min(ratios), at, "k|", ms=9)
                    panel.text(mean, at, f" {mean:.1f}×", va="center", fontsize=9)
                    labels.append((at, f"{cell}, {peer}"))
                    at -= 1
            at -= 0.5
        panel.axvline(1, color="#444", lw=1, ls=":")
        panel.set_yticks([y for y, _ in labels], [text for _, text in labels])
        panel.set_title(f"{mode}", fontsize=11)
        panel.set_xlim(0, panel.get_xlim()[1] * 1.15)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Time of other libraries divided by that of fusedrnn, {threads} "
        f"thread{'s' * (threads > 1)} of an {run['about'][0].split(' (')[0]}"
    )
    return figure


if __name__ == "__main__":
    with rc_context({"svg.hashsalt": "fusedrnn", "font.size": 9}):
        figure = draw(json.loads(Path(sys.argv[1]).read_text("utf-8")), threads=1)
        figure.savefig(OUTPUT, metadata={"Date": None})
