"""The named cases and the suites made of them: those of `fusedrnn bench` and of `pytest bench`.

A case is a cell, sizes, a form, a mode, a dtype and a number of threads. Inference runs a layer
whose weights stay packed, as in service; training runs forward and backward with weights that
were just changed, so packing is part of it. Streaming runs a layer step by step, and each call
receives the state that the previous one returned. A case is called through NumPy's interface,
or through the modules of `fusedrnn.torch`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .forms import FORMS, OPTIONS, Sizes, drawn_lengths

SHAPES: dict[str, Sizes] = {  # T, B, I, H
    "one-step": (1, 1, 512, 512),
    "stream-small": (100, 1, 64, 128),
    "stream": (100, 1, 256, 256),
    "stream-large": (50, 1, 1024, 1024),
    "few-rows": (100, 8, 128, 256),
    "speech": (100, 32, 128, 256),
    "large": (50, 64, 512, 512),
    "larger": (25, 128, 1024, 1024),
    "narrow": (24, 256, 8, 32),
    "weather": (96, 64, 7, 64),
    "long": (200, 16, 40, 128),
    "stream-middle": (50, 1, 512, 512),
    "odd": (60, 7, 9, 100),
    "three-rows": (100, 3, 64, 200),
    "one-feature": (1000, 1, 1, 64),
    "hundred": (100, 1, 100, 100),
    "digits": (28, 64, 28, 128),
}
# For narrow weights, beside those above.
NARROW_SHAPES: dict[str, Sizes] = {
    "one-step-large": (1, 1, 1024, 1024),
    "stream-speech": (100, 1, 80, 192),
    "speech-large": (50, 32, 256, 512),
}
# Those whose figures of other machines and peers are known.
USUAL = tuple(SHAPES)[:11]
# One size varies, for curves.
WIDTHS: dict[str, Sizes] = {f"width-{H}": (50, 16, H, H) for H in (32, 64, 128, 256, 512, 1024)}
ROWS: dict[str, Sizes] = {f"rows-{B}": (50, B, 256, 256) for B in (1, 2, 4, 8, 32, 64, 128)}
STEPS: dict[str, Sizes] = {f"step-{H}": (1, 1, H, H) for H in (64, 128, 256, 512)}
ROW_STEPS: dict[str, Sizes] = {
    f"step-{H}-rows-{B}": (1, B, H, H) for H, B in ((64, 8), (128, 32), (512, 32))
}
# A GPU's, the widths that people use first.
GPU_SHAPES: dict[str, Sizes] = {
    f"H{H}-B{B}-T{T}": (T, B, H, H)
    for T in (1024, 256)
    for H in (768, 512, 1024, 256, 128, 64, 2048)
    for B in (16, 1, 64, 256)
}
# Those of the suite "shapes" come first, because a run may be cut short.
GPU_ORDER = tuple(
    sorted(
        GPU_SHAPES,
        key=lambda name: (
            GPU_SHAPES[name][1] == 256 or GPU_SHAPES[name][3] not in (256, 512, 768, 1024),
            GPU_SHAPES[name][0] != 1024,
        ),
    )
)
NAMED = SHAPES | NARROW_SHAPES | WIDTHS | ROWS | STEPS | ROW_STEPS | GPU_SHAPES

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
CELLS = ("LSTM", "GRU")  # those of a suite, unless others are asked for
MODES = ("inference", "training", "streaming")
WEIGHTS = ("int8", "int8-x8", "bfloat16", "float16")  # int8-x8: x_bits = 8
DTYPES = {
    "cpu": ("float32", "float64", "bfloat16"),
    "cuda": ("bfloat16", "float16", "float32", "tf32"),
}


@dataclass(frozen=True)
class Case:
    """One thing that is timed.

    Attributes
    ----------
    form: a name of `forms.FORMS`, "" for the plain layer.
    dtype: "tf32" stands for float32 on a GPU's matrix units.
    interface: "numpy", or "torch" for the modules of `fusedrnn.torch` under autograd.
    weights: the precision of our layer's weights, "" for the dtype.
    """

    cell: str
    shape: str
    sizes: Sizes
    mode: str
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    form: str = ""
    interface: str = "numpy"
    weights: str = ""

    @property
    def gates(self) -> int:
        """G."""
        return GATES[self.cell]

    @property
    def training(self) -> bool:
        """Whether backward runs, too."""
        return self.mode == "training"

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return {"float64": 8, "bfloat16": 2, "float16": 2}.get(self.dtype, 4)

    @property
    def passes(self) -> list[Sizes]:
        """Sizes of each layer and direction; T is the mean where rows have lengths."""
        T, B, I, H = self.sizes
        if self.form == "lengths":
            T = max(1, round(float(drawn_lengths(T, B).mean())))
        layer = FORMS[self.form].layer
        directions = 1 + layer.get("bidirectional", False)
        widths = [I] + [H * directions] * (layer.get("num_layers", 1) - 1)
        return [(T, B, width, H) for width in widths for _ in range(directions)]

    @property
    def is_rounded(self) -> bool:
        """Whether a layer on the CPU computes with fewer bits than float32 has."""
        return self.device == "cpu" and (bool(self.weights) or self.dtype == "bfloat16")

    @property
    def quantisation(self) -> tuple[str, int | None]:
        """The arguments of `quantize`, the first of them "" for none."""
        precision, _, bits = self.weights.partition("-x")
        return precision, int(bits) if bits else None

    @property
    def layers(self) -> int:
        """The number of layers."""
        return int(FORMS[self.form].layer.get("num_layers", 1))

    @property
    def flops(self) -> int:
        """2·G·H·(I+H)·B·T for each layer and direction, three times that in training."""
        forward = sum(2 * self.gates * H * (I + H) * B * T for T, B, I, H in self.passes)
        return forward * (3 if self.training else 1)

    @property
    def bytes_read(self) -> int:
        """W once and R once a step, twice as much in training, and x, y and their gradients."""
        precision, _ = self.quantisation
        of_weights = {"": self.item, "int8": 1}.get(precision, 2)
        read = sum(
            self.gates * H * (I + H * T) * of_weights + T * B * (I + H) * self.item
            for T, B, I, H in self.passes
        )
        return (2 if self.training else 1) * read

    @property
    def label(self) -> str:
        """The sizes, and the form where it is not the plain one."""
        sizes = ", ".join(map(str, self.sizes))
        return f"{sizes}, {self.form}" if self.form else sizes

    def __str__(self) -> str:
        usual = self.device == "cpu" and self.dtype == "float32"
        parts = [self.cell, *["torch"] * (self.interface == "torch"), self.shape]
        parts += [*[self.form] * bool(self.form), *[self.dtype] * (not usual)]
        parts += [*[self.weights] * bool(self.weights), self.mode]
        return "-".join([*parts, str(self.threads)] if self.device == "cpu" else parts)


@dataclass(frozen=True)
class Suite:
    """Which shapes run in which mode and form.

    Attributes
    ----------
    shapes: by mode, run with the most threads, or with every number asked for if every_count.
    scaling: by mode, run with 1, 2, 4 … threads up to the most.
    forms: by form, the shapes that run in it, in each mode that the form has.
    seconds: about how long the rounds of a case take.
    interface: of the cases; a form "cell" always has PyTorch's.
    weights: the precisions of weights that run.
    dtypes: those that run, unless others are asked for.
    against: the contenders beside ours, None for the installed peers and the reference.
    """

    shapes: dict[str, Sequence[str]]
    seconds: float
    every_count: bool = False
    scaling: dict[str, Sequence[str]] = field(default_factory=dict)
    forms: dict[str, Sequence[str]] = field(default_factory=dict)
    interface: str = "numpy"
    against: Sequence[str] | None = None
    weights: Sequence[str] = ("",)
    dtypes: Sequence[str] = ("float32",)


def _with_training(shapes: Sequence[str]) -> dict[str, Sequence[str]]:
    return {"inference": shapes, "training": shapes}


GPU_SUITES = {
    "quick": Suite(
        _with_training(
            [f"H{H}-B16-T256" for H in (64, 128, 256, 512, 768, 1024)]
            + [f"H512-B{B}-T256" for B in (1, 64, 256)]
        ),
        seconds=0.25,
    ),
    "shapes": Suite(
        _with_training(
            [f"H{H}-B{B}-T1024" for H in (768, 512, 1024, 256) for B in (16, 64, 1)]
        ),
        seconds=0.25,
    ),
    "full": Suite(_with_training(GPU_ORDER), seconds=0.25),
    "options": Suite(
        {},
        forms=dict.fromkeys(("lengths", *OPTIONS), ("H512-B16-T256",)),
        seconds=0.25,
        against=("plain",),
    ),
}
_OF_STRUCTURES: dict[str, Sequence[str]] = {
    "two-layers": ("step-64", "stream-small", "weather"),
    "both-directions": ("step-64", "stream-small", "weather"),
    "batch-first": ("step-64", "weather"),
    "lengths": ("step-64", "weather", "speech"),
    "cell": ("step-64", "step-256", *ROW_STEPS),
}
_OPTION_SHAPES = ("narrow", "weather", "stream-small", "speech")
SUITES = {
    "quick": Suite(
        {
            "inference": (
                "width-64",
                "width-128",
                "width-256",
                "width-512",
                "rows-1",
                "rows-64",
            ),
            "training": ("weather", "digits", "narrow"),
            "streaming": ("step-128",),
        },
        scaling={"inference": ("width-256",)},
        seconds=0.25,
    ),
    "shapes": Suite(
        {"inference": tuple(SHAPES), "training": tuple(SHAPES), "streaming": tuple(STEPS)},
        every_count=True,
        forms=_OF_STRUCTURES,
        seconds=1.5,
    ),
    "options": Suite(
        {},
        every_count=True,
        forms=dict.fromkeys(("lengths", *OPTIONS), _OPTION_SHAPES),
        seconds=0.4,
        against=("plain",),
    ),
    "modules": Suite(
        {"training": USUAL, "inference": ("step-64", "step-128", "stream-small", "weather")},
        every_count=True,
        forms=_OF_STRUCTURES,
        seconds=1.0,
        interface="torch",
        against=("torch", "compiled"),
    ),
    "narrow": Suite(
        {
            "inference": (
                "step-256",
                "one-step",
                "one-step-large",
                "stream-speech",
                "stream",
                "stream-middle",
                "stream-large",
                "few-rows",
                "speech-large",
                "large",
                "larger",
                "weather",
                "narrow",
                "odd",
                "three-rows",
            ),
            "streaming": tuple(STEPS),
        },
        every_count=True,
        forms={"two-layers": ("stream-speech",), "both-directions": ("stream-speech",)},
        seconds=1.0,
        weights=("int8", "bfloat16"),
    ),
    "bfloat16": Suite(
        {
            "training": (*USUAL, "stream-middle", "odd", "three-rows", "hundred", "digits"),
            "inference": ("stream", "speech", "large", "larger", "weather", "narrow"),
        },
        every_count=True,
        forms={
            "two-layers": ("weather",),
            "both-directions": ("weather",),
            "lengths": ("speech",),
            "cell": ("step-256", *ROW_STEPS),
        },
        seconds=1.0,
        dtypes=("bfloat16",),
    ),
    "full": Suite(
        {
            "inference": (*SHAPES, *WIDTHS, *ROWS),
            "training": (*SHAPES, *WIDTHS, *ROWS),
            "streaming": tuple(STEPS),
        },
        every_count=True,
        forms=_OF_STRUCTURES,
        scaling=dict.fromkeys(("inference", "training"), ("width-256", "width-512", "speech")),
        seconds=1.5,
    ),
}


def counts_up_to(threads: int) -> list[int]:
    """1, 2, 4 … and `threads`."""
    return [*(2**n for n in range(threads.bit_length()) if 2**n < threads), threads]


def cases_of(
    suite: Suite,
    cells: Sequence[str] = CELLS,
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] = ("float32",),
    threads: Sequence[int] = (1, 2),
    shapes: Mapping[str, Sizes] | None = None,
    device: str = "cpu",
    forms: Sequence[str] | None = None,
    weights: Sequence[str] | None = None,
) -> list[Case]:
    """Return a suite's cases, each once; `shapes`, `forms` and `weights` replace its own."""
    weights = suite.weights if weights is None else weights
    most = max(threads)
    usual = threads if suite.every_count or shapes else [most]

    def named(names: Sequence[str]) -> Mapping[str, Sizes]:
        return shapes or {name: NAMED[name] for name in names}

    chosen = [("", mode, named(suite.shapes.get(mode, ()))) for mode in modes]
    if shapes and forms is None:
        forms = () if suite.shapes else tuple(suite.forms)
    elif forms is not None:
        chosen = []
    for form in suite.forms if forms is None else forms:
        found = named(suite.forms.get(form, USUAL))
        chosen += [(form, mode, found) for mode in modes if mode in FORMS[form].modes]
    scaled = [
        ("", mode, named(suite.scaling.get(mode, ())), counts_up_to(most))
        for mode in modes
        if not shapes and forms is None
    ]

    def combine(
        form: str, mode: str, shapes: Mapping[str, Sizes], counts: Sequence[int]
    ) -> Iterator[Case]:
        interface = "torch" if form == "cell" else suite.interface
        for count, (name, (T, B, I, H)), dtype, cell, narrow in itertools.product(
            counts, shapes.items(), dtypes, cells, weights
        ):
            if cell in FORMS[form].cells and not (narrow and mode == "training"):
                # A stream and a cell take one step at a time.
                steps = 1 if mode == "streaming" or form == "cell" else T
                sizes = (steps, B, I, H)
                where = (count, dtype, device, form, interface, narrow)
                yield Case(cell, name, sizes, mode, *where)

    groups = [(*one, [count]) for count in usual for one in chosen] + scaled
    cases = list(dict.fromkeys(case for group in groups for case in combine(*group)))
    if device == "cuda":  # all of a shape together, since a run may be cut short
        order = list(dict.fromkeys(case.shape for case in cases))
        cases.sort(key=lambda case: (order.index(case.shape), dtypes.index(case.dtype)))
    return cases
