"""A session of onnxruntime with our provider against the same session without it.

Each model has one node. Sessions without the provider are as onnxruntime makes them: their
threads spin. onnxruntime and its packages are imported by the functions here alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from . import narrow
from .cases import Case
from .contenders import Inputs, Run, exact, onnx_model, onnxruntime, with_state
from .forms import Sizes
from .race import (
    BATCH_SECONDS,
    LIMITS,
    REST_SECONDS,
    USUAL_REST_SECONDS,
    quartiles,
    seconds_of,
)

CASES: tuple[tuple[str, Sizes, str], ...] = (  # cell, T, B, I, H, form
    ("LSTM", (1, 1, 128, 128), ""),
    ("LSTM", (96, 32, 64, 128), ""),
    ("LSTM", (100, 32, 128, 256), ""),
    ("LSTM", (200, 1, 256, 256), "both-directions"),
    ("GRU", (1, 1, 128, 128), ""),
    ("GRU", (96, 32, 64, 128), ""),
    ("GRU", (100, 32, 128, 256), ""),
    ("GRU", (1000, 4, 10, 128), "both-directions"),
)
PRECISIONS = ("float32", "bfloat16", "int8")
ROUNDS = 15


def provided(precision: Any, case: Case, inputs: Inputs) -> Run:
    """Run the model in a session with our provider."""
    import onnxruntime as ort

    import fusedrnn as fr

    from ..onnx.provider import add_provider

    fr.set_num_threads(case.threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.log_severity_level = 3  # no warning that the other nodes stay
    add_provider(options, precision)
    run = ort.InferenceSession(onnx_model(case, inputs), options).run
    return with_state(case, inputs, lambda feed: run(None, feed))


def race(case: Case) -> dict[str, list[float]]:
    """Return seconds of a call in each round, by what ran: onnxruntime, then the others.

    Raises
    ------
    RuntimeError: y differs from the definition.
    """
    inputs = Inputs.of(case)
    makers: dict[str, Any] = {"onnxruntime": onnxruntime}
    makers |= {precision: partial(provided, precision) for precision in PRECISIONS}
    makers["onnxruntime int8"] = narrow.onnxruntime_int8
    made = {name: make(case, inputs) for name, make in makers.items()}
    runs: dict[str, Run] = {name: run for name, run in made.items() if run is not None}
    expected, calls = exact(case, inputs), {}
    for name, run in runs.items():
        is_wide = name in ("onnxruntime", "float32")
        limit = LIMITS["float32"] if is_wide else narrow.LARGEST_ERROR
        if not narrow.largest_error(run(), expected) < limit:
            raise RuntimeError(f"y of {name} differs from the definition in {case}")
        calls[name] = max(1, round(BATCH_SECONDS / min(seconds_of(run, 1) for _ in range(5))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            seconds_of(run, calls[name])  # a batch that is not timed
            times[name].append(seconds_of(run, calls[name]))
            if case.threads > 1:  # threads keep their cores for a while
                time.sleep(REST_SECONDS.get(name.partition(" ")[0], USUAL_REST_SECONDS))
    return times


def rows() -> Iterator[tuple[Any, ...]]:
    """Yield the columns' names, then a row of each case with one thread and with two."""
    heads = [f"× {name}" for name in (*PRECISIONS, "onnxruntime int8")]
    yield "cell", "T, B, I, H", "threads", "onnxruntime ms", *heads
    for threads in (1, 2):
        for cell, sizes, form in CASES:
            times = race(Case(cell, "", sizes, "inference", threads, form=form))
            theirs = times.pop("onnxruntime")
            shown = []
            for head in heads:
                ours = times.get(head.removeprefix("× "))
                ratios = quartiles(np.divide(theirs, ours)) if ours else []
                shown.append("{:.2f} ({:.2f}–{:.2f})".format(*ratios) if ratios else "–")
            name = f"{cell}, both directions" if form else cell
            ms = f"{np.median(theirs) * 1e3:.3f}"
            yield name, ", ".join(map(str, sizes)), threads, ms, *shown
