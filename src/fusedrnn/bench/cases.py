"""The named cases and the suites made of them: those of `fusedrnn bench` and of `pytest bench`.

A case is a cell, sizes, a mode, a dtype and a count of threads. Inference runs a layer whose
weights stay packed, as in service; training runs forward and backward with weights that were
just changed, so packing is part of it. Streaming runs a layer step by step, each call given the
state that the last one returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Sizes = tuple[int, int, int, int]

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
# Those whose figures of other machines and peers are known.
USUAL = tuple(SHAPES)[:11]
# One size varies, for curves.
WIDTHS: dict[str, Sizes] = {f"width-{H}": (50, 16, H, H) for H in (32, 64, 128, 256, 512, 1024)}
ROWS: dict[str, Sizes] = {f"rows-{B}": (50, B, 256, 256) for B in (1, 2, 4, 8, 32, 64, 128)}
STEPS: dict[str, Sizes] = {f"step-{H}": (1, 1, H, H) for H in (64, 128, 256, 512)}
# A GPU's, the widths that people use first.
GPU_SHAPES: dict[str, Sizes] = {
    f"H{H}-B{B}-T{T}": (T, B, H, H)
    for T in (1024, 256)
    for H in (768, 512, 1024, 256, 128, 64, 2048)
    for B in (16, 1, 64, 256)
}
NAMED = SHAPES | WIDTHS | ROWS | STEPS | GPU_SHAPES

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
CELLS = ("LSTM", "GRU")  # those of a suite, unless others are asked for
MODES = ("inference", "training", "streaming")
DTYPES = {"cpu": ("float32", "float64"), "cuda": ("bfloat16", "float16", "float32", "tf32")}


@dataclass(frozen=True)
class Case:
    """What is timed; "tf32" stands for float32 on a GPU's matrix units."""

    cell: str
    shape: str
    sizes: Sizes
    mode: str
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"

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
    def flops(self) -> int:
        """2·G·H·(I+H)·B·T forward, three times that in training."""
        T, B, I, H = self.sizes
        return 2 * self.gates * H * (I + H) * B * T * (3 if self.training else 1)

    @property
    def bytes_read(self) -> int:
        """W once and R once a step, twice as much in training, and x, y and their gradients."""
        T, B, I, H = self.sizes
        weights = self.gates * H * (I + H * T) * self.item
        return (2 if self.training else 1) * (weights + T * B * (I + H) * self.item)

    def __str__(self) -> str:
        usual = self.device == "cpu" and self.dtype == "float32"
        parts = [self.cell, self.shape, *[self.dtype] * (not usual), self.mode]
        return "-".join([*parts, str(self.threads)] if self.device == "cpu" else parts)


@dataclass(frozen=True)
class Suite:
    """Which shapes run in which mode.

    Attributes
    ----------
    shapes: by mode, run with the most threads, or with every count asked for if every_count.
    scaling: by mode, run with 1, 2, 4 … threads up to the most.
    seconds: about how long the rounds of a case take.
    """

    shapes: dict[str, Sequence[str]]
    seconds: float
    every_count: bool = False
    scaling: dict[str, Sequence[str]] = field(default_factory=dict)


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
            [f"H{H}-B{B}-T1024" for H in (256, 512, 768, 1024) for B in (1, 16, 64)]
        ),
        seconds=0.25,
    ),
    "full": Suite(_with_training(tuple(GPU_SHAPES)), seconds=0.25),
}
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
        seconds=1.5,
    ),
    "full": Suite(
        {
            "inference": (*SHAPES, *WIDTHS, *ROWS),
            "training": (*SHAPES, *WIDTHS, *ROWS),
            "streaming": tuple(STEPS),
        },
        every_count=True,
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
) -> list[Case]:
    """Return a suite's cases, each once, or those of `shapes` instead of its own."""
    most = max(threads)
    usual = threads if suite.every_count or shapes else [most]

    def combine(count: int, mode: str, named: Mapping[str, Sizes]) -> Iterator[Case]:
        for name, (T, B, I, H) in named.items():
            steps = 1 if mode == "streaming" else T  # a stream takes one step at a time
            for dtype in dtypes:
                for cell in cells:
                    yield Case(cell, name, (steps, B, I, H), mode, count, dtype, device)

    def of(names: Sequence[str]) -> dict[str, Sizes]:
        return {name: NAMED[name] for name in names}

    found = [
        case
        for count in usual
        for mode in modes
        for case in combine(count, mode, shapes or of(suite.shapes.get(mode, ())))
    ]
    if not shapes:
        found += [
            case
            for mode in modes
            for count in counts_up_to(most)
            for case in combine(count, mode, of(suite.scaling.get(mode, ())))
        ]
    return list(dict.fromkeys(found))
