"""Draws docs/images/*.svg: `python docs/diagrams.py`.

Needs nothing beyond Python, and writes the same files each time. A drawing is a white card, so
that it reads on a dark page, too; its units are pixels at a page's full width.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "images"
WIDTH = 736
FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
INK, SOFT, FAINT = "#1f2933", "#5b6673", "#c9d0d8"

# Of a gate or a kind of thing: how its box is filled and lined.
COLOURS = {
    "i": ("#d9e8f6", "#2f6ca8"),
    "f": ("#fde6cd", "#b9681a"),
    "g": ("#d9eed8", "#37803c"),
    "o": ("#eadff4", "#7350a0"),
    "r": ("#d9e8f6", "#2f6ca8"),
    "z": ("#fde6cd", "#b9681a"),
    "n": ("#d9eed8", "#37803c"),
    "q": ("#eadff4", "#7350a0"),
    "h": ("#d9eed8", "#37803c"),
    "plain": ("#f1f4f7", "#6b7785"),
    "none": ("#ffffff", "#a9b3bd"),
    "reset": ("#f8d7d7", "#b03a3a"),
}

Point = tuple[float, float]


class Drawing:
    """Shapes on a white card."""

    def __init__(self, height: float, title: str) -> None:
        self.height, self.title = height, title
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 14,
        anchor: str = "middle",
        colour: str = INK,
        bold: bool = False,
    ) -> None:
        """Write words around the point (x, y), or from it or up to it."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y + size * 0.35:g}" font-size="{size:g}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight}>{escape(words, quote=False)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str = "",
        kind: str = "plain",
        size: float = 14,
        corner: float = 5,
        dashed: bool = False,
        bold: bool = False,
    ) -> None:
        """Draw a box around the point (x, y)."""
        fill, line = COLOURS[kind]
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" '
            f'height="{height:g}" rx="{corner:g}" fill="{fill}" stroke="{line}" '
            f'stroke-width="1.3"{dash}/>'
        )
        if words:
            self.text(x, y, words, size, bold=bold)

    def node(self, x: float, y: float, sign: str) -> None:
        """Draw a circle with × or +, drawn by lines so that it is the same in every font."""
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="13" fill="#ffffff" stroke="{INK}" '
            'stroke-width="1.5"/>'
        )
        d = 5 if sign == "×" else 6.5
        ends = (
            [(-d, -d, d, d), (-d, d, d, -d)] if sign == "×" else [(-d, 0, d, 0), (0, -d, 0, d)]
        )
        for a, b, c, e in ends:
            self.parts.append(
                f'<line x1="{x + a:g}" y1="{y + b:g}" x2="{x + c:g}" y2="{y + e:g}" '
                f'stroke="{INK}" stroke-width="1.7"/>'
            )

    def dot(self, x: float, y: float, radius: float = 3.2, colour: str = INK) -> None:
        """Draw a point where a line branches, or a mark."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}"/>')

    def line(
        self,
        *points: Point,
        arrow: bool = True,
        colour: str = INK,
        width: float = 1.6,
        dashed: bool = False,
    ) -> None:
        """Draw a line through points, its head at the last."""
        path = "M" + " L".join(f"{x:g},{y:g}" for x, y in points)
        head = f' marker-end="url(#{"soft" if colour == SOFT else "ink"})"' if arrow else ""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke-linejoin="round" stroke="{colour}" '
            f'stroke-width="{width:g}"{dash}{head}/>'
        )

    def kept(self, x: float, y: float) -> None:
        """Mark what is kept for backward."""
        self.dot(x, y, 4.2, "#c2255c")

    def legend(self, x: float, y: float, words: str) -> None:
        """Say what that mark means."""
        self.kept(x, y)
        self.text(x + 12, y, words, 13, "start", SOFT)

    def write(self, name: str) -> None:
        """Write the file."""
        heads = "".join(
            f'<marker id="{i}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" '
            f'markerHeight="9" markerUnits="userSpaceOnUse" orient="auto">'
            f'<path d="M0,0.8 L10,5 L0,9.2 z" fill="{colour}"/></marker>'
            for i, colour in (("ink", INK), ("soft", SOFT))
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:g}" '
            f'width="{WIDTH}" height="{self.height:g}" role="img" font-family="{FONT}">',
            f"<title>{escape(self.title)}</title>",
            f"<defs>{heads}</defs>",
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1:g}" rx="6" '
            f'fill="#ffffff" stroke="{FAINT}"/>',
            *self.parts,
            "</svg>",
        ]
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / name).write_text("\n".join(lines) + "\n", "utf-8")


def segments(d: Drawing, y: float, parts: Sequence[tuple[float, float, str, str]]) -> None:
    """Draw a bar of pre-activations: from, to, words and kind of each part."""
    for left, right, words, kind in parts:
        d.box((left + right) / 2, y, right - left, 40, words, kind, corner=2)


def draw_lstm() -> None:
    """The LSTM's cell."""
    d = Drawing(384, "LSTM cell: c = f c' + i g, h = o tanh(c)")
    x = dict(zip("ifgo", (190, 300, 410, 520), strict=True))
    top, bar, gate = 62, 312, 226
    d.text(30, top, "c'", 16, bold=True)
    d.line((44, top), (x["f"] - 13, top))
    d.line((x["f"] + 13, top), (x["g"] - 13, top))
    d.line((x["g"] + 13, top), (686, top))
    d.text(704, top, "c", 16, bold=True)
    d.kept(719, top)
    # The gates.
    segments(d, bar, [(x[k] - 55, x[k] + 55, f"a_{k}", k) for k in "ifgo"])
    for k in "ifgo":
        d.line((x[k], bar - 20), (x[k], gate + 19))
        d.box(x[k], gate, 76, 38, f"{k} = {'tanh' if k == 'g' else 'σ'}", k)
        d.kept(x[k] + 38, gate - 19)
    d.line((x["f"], gate - 19), (x["f"], 140), arrow=False)  # a gap where i crosses
    d.line((x["f"], 128), (x["f"], top + 13))
    d.line((x["i"], gate - 19), (x["i"], 134), (x["g"] - 13, 134))
    d.line((x["g"], gate - 19), (x["g"], 134 + 13))
    d.line((x["g"], 134 - 13), (x["g"], top + 13))
    d.node(x["f"], top, "×")
    d.node(x["g"], top, "+")
    d.node(x["g"], 134, "×")
    d.text(x["f"] - 22, top + 24, "f c'", 13, "end", SOFT)
    d.text(x["g"] + 20, 98, "i g", 13, "start", SOFT)
    # h.
    d.dot(610, top)
    d.line((610, top), (610, 93))
    d.box(610, 110, 62, 34, "tanh")
    d.line((610, 127), (610, 165))
    d.line((x["o"], gate - 19), (x["o"], 178), (610 - 13, 178))
    d.node(610, 178, "×")
    d.line((623, 178), (686, 178))
    d.text(704, 178, "h", 16, bold=True)
    # What comes in.
    d.text(34, bar, "x, h'", 16, bold=True)
    d.line((58, bar), (x["i"] - 55, bar))
    d.text(590, bar - 10, "a = W x + b_ih", 14, "start")
    d.text(604, bar + 10, "+ R h' + b_hh", 14, "start")
    d.legend(140, 358, "kept for backward")
    d.write("cell-lstm.svg")


def draw_gru() -> None:
    """The GRU's cell, reset after the matmul."""
    d = Drawing(418, "GRU cell: n = tanh(W_n x + b_in + r q), h = (1-z) n + z h'")
    x = {"z": 170, "r": 290, "q": 410, "n": 540}
    top, bar, gate = 58, 346, 272
    segments(
        d,
        bar,
        [
            (110, 230, "a_z", "z"),
            (230, 350, "a_r", "r"),
            (350, 475, "R_n h' + b_hn", "q"),
            (475, 605, "W_n x + b_in", "n"),
        ],
    )
    for k in "zr":
        d.line((x[k], bar - 20), (x[k], gate + 19))
        d.box(x[k], gate, 76, 38, f"{k} = σ", k)
        d.kept(x[k] + 38, gate - 19)
    # z takes of h', 1 - z of n.
    d.text(30, top, "h'", 16, bold=True)
    d.line((44, top), (x["z"] - 13, top))
    d.line((x["z"], gate - 19), (x["z"], top + 13))
    d.line((x["z"] + 13, top), (x["n"] - 13, top))
    d.text(x["z"] + 100, top - 13, "z h'", 13, colour=SOFT)
    d.dot(x["z"], 112)
    d.line((x["z"], 112), (238, 112))
    d.box(265, 112, 54, 30, "1 − z")
    d.line((292, 112), (x["n"] - 13, 112))
    d.node(x["z"], top, "×")
    d.node(x["n"], top, "+")
    d.node(x["n"], 112, "×")
    d.line((x["n"], 99), (x["n"], top + 13))
    d.line((x["n"] + 13, top), (686, top))
    d.text(704, top, "h", 16, bold=True)
    d.text(x["n"] + 20, 85, "(1 − z) n", 13, "start", SOFT)
    # n.
    d.line((x["r"], gate - 19), (x["r"], 214), (x["q"] - 13, 214))
    d.line((x["q"], bar - 20), (x["q"], 227))
    d.line((x["q"] + 13, 214), (x["n"] - 13, 214))
    d.line((x["n"], bar - 20), (x["n"], 227))
    d.line((x["n"], 201), (x["n"], 182))
    d.box(x["n"], 163, 84, 38, "n = tanh", "n")
    d.kept(x["n"] + 42, 144)
    d.line((x["n"], 144), (x["n"], 125))
    d.node(x["q"], 214, "×")
    d.node(x["n"], 214, "+")
    d.text(x["q"] + 64, 203, "r q", 13, colour=SOFT)
    d.text(x["q"] + 12, 270, "q", 14, "start")
    d.kept(x["q"] + 32, 271)
    # What comes in.
    d.text(34, bar, "x, h'", 16, bold=True)
    d.line((58, bar), (110, bar))
    d.text(618, bar - 10, "a = W x + b_ih", 13, "start")
    d.text(630, bar + 10, "+ R h' + b_hh", 13, "start")
    d.legend(125, 392, "kept for backward")
    d.write("cell-gru.svg")


def draw_rnn() -> None:
    """The Elman RNN's cell."""
    d = Drawing(118, "RNN cell: h = φ(W x + b_ih + R h' + b_hh)")
    y = 50
    d.text(44, y, "x, h'", 16, bold=True)
    d.line((68, y), (140, y))
    d.box(265, y, 250, 40, "a = W x + b_ih + R h' + b_hh", "h", corner=2)
    d.line((390, y), (450, y))
    d.box(512, y, 124, 40, "h = φ(a)", "h")
    d.line((574, y), (660, y))
    d.text(680, y, "h", 16, bold=True)
    d.text(512, 92, "φ: tanh, relu or identity", 13, colour=SOFT)
    d.write("cell-rnn.svg")


def draw_step() -> None:
    """Weights, panels, a tile, the cell."""
    d = Drawing(490, "How weights become panels, and a step of a tile of rows")
    kinds = "ifgo"
    # Weights as PyTorch has them.
    d.text(24, 26, "1  Weights as PyTorch has them", 14, "start", bold=True)
    left, top, cell = 92, 62, 32
    d.text(left + 36, 49, "W", 14)
    d.text(left + 132, 49, "R", 14)
    for k, kind in enumerate(kinds):
        y = top + cell * (k + 0.5)
        d.box(left + 36, y, 72, cell, "", kind, corner=0)
        d.box(left + 132, y, 112, cell, "", kind, corner=0)
        d.text(left - 14, y, kind, 15, bold=True)
        fill = COLOURS[kind][1]
        for x, w in ((left, 72), (left + 76, 112)):
            d.parts.append(
                f'<rect x="{x:g}" y="{y - 6:g}" width="{w:g}" height="8" fill="{fill}"/>'
            )
    d.text(56, top + 2 * cell, "4·H", 13, "end", SOFT)
    d.text(left + 36, top + 4 * cell + 14, "I", 13, colour=SOFT)
    d.text(left + 132, top + 4 * cell + 14, "H", 13, colour=SOFT)
    d.text(24, 228, "dark: the same few units in each gate,", 13, "start", SOFT)
    d.text(24, 246, "as many as a vector register has lanes", 13, "start", SOFT)
    # A panel.
    d.line((left + 196, top + 64), (356, top + 64))
    d.text(322, top + 50, "pack", 13, colour=SOFT)
    d.text(356, 26, "2  A panel: all gates of those units, for all k", 14, "start", bold=True)
    for row in range(6):
        y = 62 + row * 22 + 11 + (8 if row > 2 else 0)
        for k, kind in enumerate(kinds):
            d.box(400 + k * 54 + 27, y, 54, 22, kind if row in (0, 3) else "", kind, 13, 0)
    d.text(392, 95, "k", 13, "end", SOFT)
    d.text(392, 169, "k", 13, "end", SOFT)
    d.text(628, 95, "I rows, of W", 13, "start", SOFT)
    d.text(628, 169, "H rows, of R", 13, "start", SOFT)
    d.text(400, 228, "one vector next to the other, read in this", 13, "start", SOFT)
    d.text(400, 246, "order, once for each tile of rows", 13, "start", SOFT)
    # A tile.
    d.line((24, 268), (WIDTH - 24, 268), arrow=False, colour=FAINT, width=1)
    d.text(24, 292, "3  A step of a tile: the product, then the cell", 14, "start", bold=True)
    for row in range(4):
        y = 346 + row * 24
        d.box(116, y, 88, 24, "", "none", corner=0)
        d.text(62, y, f"row {row}", 12, "end", SOFT)
        for k, kind in enumerate(kinds):
            d.box(272 + k * 44, y, 44, 24, f"a_{kind}", kind, 13, 0)
        d.box(578, y, 44, 24, "c", "plain", 13, 0)
        d.box(622, y, 44, 24, "h", "plain", 13, 0)
    d.text(116, 321, "x, then h'", 13, colour=SOFT)
    d.text(338, 321, "sums: one vector per gate", 13, colour=SOFT)
    d.text(600, 321, "results", 13, colour=SOFT)
    d.line((164, 382), (246, 382))
    d.text(204, 370, "· panel", 13, colour=SOFT)
    d.line((430, 382), (552, 382))
    d.text(490, 370, "the cell", 13, colour=SOFT)
    d.text(490, 395, "σ, tanh", 13, colour=SOFT)
    d.text(24, 450, "Bias first, then W x, then R h', in one accumulator:", 13, "start", SOFT)
    d.text(24, 468, "no sum with R h' goes to memory and back.", 13, "start", SOFT)
    d.text(480, 450, "From here to memory: h and c,", 13, "start", SOFT)
    d.text(480, 468, "and in training the gates.", 13, "start", SOFT)
    d.write("fused-step.svg")


def draw_loop() -> None:
    """Draw W x by time blocks, the steps, the saved values, and backward."""
    d = Drawing(404, "The time loop, forward and backward, in time blocks")
    left, step, gap, wide = 92, 50, 14, 40
    xs = [left + t * step + gap * (t // 4) for t in range(10)]
    blocks = [(xs[0], xs[3] + wide), (xs[4], xs[7] + wide), (xs[8], xs[9] + wide)]
    last = xs[-1] + wide
    d.text(24, 26, "Forward", 14, "start", bold=True)
    d.text(
        108,
        26,
        "W x of a time block is one matmul; a step adds R h' and applies the cell",
        13,
        "start",
        SOFT,
    )
    d.text(40, 66, "x", 14)
    for k, (a, b) in enumerate(blocks):
        d.box((a + b) / 2, 66, b - a, 32, "W x …" if k == 2 else "W x, one matmul", "i", 13)
    for t, x in enumerate(xs):
        mid = x + wide / 2
        d.line((mid, 82), (mid, 105))
        d.box(mid, 122, wide, 34, "step", "g", 13)
        if t + 1 < len(xs):
            d.line((x + wide, 122), (xs[t + 1], 122))
        d.line((mid, 139), (mid, 163), colour=SOFT, width=1.2)
        d.box(mid, 176, wide, 26, "", "none", 10, 2)
        for k, kind in enumerate("ifgo"):
            d.text(x + 6 + k * 7, 176, kind, 11, colour=COLOURS[kind][1])
        d.text(x + 34, 176, "c", 11)
    d.text(42, 122, "h0, c0", 13)
    d.line((68, 122), (left, 122))
    d.line((last, 122), (last + 28, 122))
    d.text(last + 34, 122, "h_n, c_n", 13, "start")
    d.kept(30, 176)
    d.text(42, 176, "saved", 13, "start", SOFT)
    d.text(
        92,
        208,
        "in training only; a gate overwrites its own pre-activation",
        13,
        "start",
        SOFT,
    )
    d.line((24, 232), (WIDTH - 24, 232), arrow=False, colour=FAINT, width=1)
    d.text(24, 256, "Backward", 14, "start", bold=True)
    d.text(108, 256, "from the end, also in time blocks", 13, "start", SOFT)
    for t, x in enumerate(xs):
        mid = x + wide / 2
        d.box(mid, 294, wide, 34, "da", "o", 13)
        if t:
            d.line((x, 294), (xs[t - 1] + wide, 294))
        d.line((mid, 311), (mid, 336), colour=SOFT, width=1.2)
    for k, (a, b) in enumerate(blocks):
        d.box((a + b) / 2, 353, b - a, 34, "…" if k == 2 else "dx, dW, dR, db", "f", 13)
    d.line((left, 294), (76, 294))
    d.text(40, 294, "dh0, dc0", 13)
    d.text(last + 34, 294, "dh_n, dc_n", 13, "start")
    d.line((last + 30, 294), (last, 294))
    d.text(
        92,
        387,
        "da of a time block is multiplied while it is in cache, then discarded",
        13,
        "start",
        SOFT,
    )
    d.write("time-loop.svg")


def draw_lengths() -> None:
    """Rows that end early, and resets."""
    d = Drawing(268, "Lengths and resets: which steps a row takes, and from what state")
    left, top, width, height = 150, 44, 50, 34
    lengths, resets = [7, 10, 0, 4], {(0, 3), (1, 5), (3, 1)}
    d.text(24, 22, "time", 13, "start", SOFT)
    for t in range(10):
        d.text(left + t * (width + 4) + width / 2, 22, str(t), 13, colour=SOFT)
    for b, length in enumerate(lengths):
        y = top + b * (height + 8) + height / 2
        d.text(24, y, f"row {b}: length {length}", 13, "start")
        for t in range(10):
            x = left + t * (width + 4) + width / 2
            taken = t < length
            kind = "reset" if (b, t) in resets else "i" if taken else "none"
            words = "0 →" if (b, t) in resets else "y" if taken else "0"
            d.box(x, y, width, height, words, kind, 13, 3, dashed=not taken)
        end = left + length * (width + 4) - 4
        if length:
            d.dot(end, y, 5, COLOURS["i"][1])
        else:
            d.dot(left - 8, y, 5, COLOURS["i"][1])
    y = 226
    d.box(44, y, 26, 22, "y", "i", 13, 3)
    d.text(64, y, "step taken", 13, "start", SOFT)
    d.box(170, y, 34, 22, "0 →", "reset", 13, 3)
    d.text(194, y, "taken from a zero state", 13, "start", SOFT)
    d.box(398, y, 26, 22, "0", "none", 13, 3, dashed=True)
    d.text(418, y, "not taken: y is 0, x is not read", 13, "start", SOFT)
    d.dot(44, y + 26, 5, COLOURS["i"][1])
    d.text(
        64,
        y + 26,
        "h_n and c_n are the state here; a row of length 0 returns h0 and c0",
        13,
        "start",
        SOFT,
    )
    d.write("lengths.svg")


def draw_layers() -> None:
    """A stack of two layers in both directions."""
    d = Drawing(352, "Two layers in both directions: parameters, states and y")
    ways, middle = ((130, "l{}", "time →", "i"), (350, "l{}_reverse", "← time", "g")), 240
    d.text(middle, 330, "x  (T, B, I)", 14, bold=True)
    for layer, y in ((0, 246), (1, 112)):
        d.line((middle, y + (59 if layer else 70)), (middle, y + 52), arrow=False)
        for x, name, way, kind in ways:
            d.line((middle, y + 52), (x, y + 52), (x, y + 27))
            d.box(x, y, 180, 54, "", kind)
            d.text(x, y - 10, f"weight_ih_{name.format(layer)} …", 13)
            d.text(x, y + 12, way, 13, colour=SOFT)
            d.line((x, y - 27), (x, y - 47))
        words = ("side by side  (T, B, 2·H)", "y  (T, B, 2·H)")[layer]
        d.box(middle, y - 61, 400, 28, words, "plain", 13, bold=layer == 1)
    d.line((462, 24), (462, 328), arrow=False, colour=FAINT, width=1)
    d.text(484, 36, "h_n, c_n  (4, B, H)", 14, "start", bold=True)
    for k in range(4):
        _, name, _, kind = ways[k % 2]
        d.text(500, 76 + k * 38, f"[{k}]", 13, "middle", SOFT)
        d.box(610, 76 + k * 38, 172, 32, name.format(k // 2), kind, 13)
    d.text(484, 236, "Layer by layer, forward", 13, "start", SOFT)
    d.text(484, 256, "before reverse; h0 and c0", 13, "start", SOFT)
    d.text(484, 276, "have the same order.", 13, "start", SOFT)
    d.write("layers.svg")


def draw_layout() -> None:
    """How x lies in memory."""
    d = Drawing(222, "x of shape (T, B, I) in memory")
    lefts = (52, 284, 552)
    for x, words in zip(lefts, ("t = 0", "t = 1", "t = T−1"), strict=True):
        d.text(x + 66, 24, words, 13, colour=SOFT)
        for b in range(3):
            for i in range(4):
                d.box(x + i * 33 + 16.5, 52 + b * 26, 33, 26, "", "igf"[b], corner=0)
        d.text(x - 12, 78, "B", 13, "end", SOFT)
        d.text(x + 66, 126, "I", 13, colour=SOFT)
    d.text(468, 76, "…", 18, colour=SOFT)
    for x in lefts:
        for b in range(3):
            d.box(x - 34 + b * 66 + 33, 162, 66, 24, f"row {b}", "igf"[b], 12, 0)
    d.text(468, 160, "…", 18, colour=SOFT)
    d.text(
        18,
        200,
        "in memory: time after time, row after row; a row's I values side by side",
        13,
        "start",
        SOFT,
    )
    d.write("layout.svg")


if __name__ == "__main__":
    for draw in (
        draw_lstm,
        draw_gru,
        draw_rnn,
        draw_step,
        draw_loop,
        draw_lengths,
        draw_layers,
        draw_layout,
    ):
        draw()
