"""Ours against torch's nn.LSTM and nn.GRU (cuDNN) on a GPU.

python bench/gpu.py                              the cases in order, within --budget seconds
python bench/gpu.py --json x.json --markdown x.md
python bench/gpu.py --only 'LSTM-training-bf16'  cases whose name matches
python bench/gpu.py --from x.json                the tables of an earlier run
python bench/gpu.py --dry-run                    the cases; needs no GPU
python bench/gpu.py sanitize                     a few small calls, for compute-sanitizer

Inference is a call without gradients; training is forward and backward, with gradients of x
and all parameters. Before a case is timed, a sequence of 12 steps of the same sizes is
compared with torch in float64 without cuDNN, in memory that held NaN; afterwards ours and
torch's are compared in places of the whole sequence. Both are timed with CUDA events around
batches of calls, in turn; the ratio is the median over rounds of torch's time / ours, and
not resolved (~) where 1 lies between its quartiles.

The floor of a call is the largest of

    latency     turns · l(H), where a turn is a step forward or backward, and l what the
                meeting of the blocks, the matrix units and the cell leave of a step at best:
                LATENCY, between its entries linear in log H, 1.5 times that in float32
    bytes       x and y, in training x, y and dy again and dx, and the weights, at the
                measured rate of device memory; and in every turn what of R no register and
                no shared memory has room for, at that of the L2 cache
    arithmetic  2·G·H·(I+H)·B·T FLOP, three times that in training, at the measured rate of
                the library's matrix product in this precision

A process of its own runs the cases. Where one ends that or gives no answer in time, it is
reported and another process goes on with the next.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import pathlib
import re
import statistics
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import options as costs
import torch
from conftest import commit, geometric_mean

import fusedrnn as fr

CELLS = {"LSTM": 4, "GRU": 3}  # gates
MODES = ("inference", "training")
LENGTHS = (1024, 256)
WIDTHS = (768, 512, 1024, 256, 128, 64, 2048)
BATCHES = (16, 1, 64, 256)
TARGET_WIDTHS = (256, 512, 768, 1024)
TARGET_BATCHES = (1, 16, 64)
DTYPES = {
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f16": torch.float16,
    "tf32": torch.float32,
}
# ‖ours - reference‖ / ‖reference‖, of results and of gradients.
LIMITS = {"bf16": 2e-2, "f16": 3e-3, "tf32": 3e-3, "f32": 1e-5}

CHECKED_STEPS = 12
CASE_SECONDS = 0.25
BATCH_SECONDS = 0.002
SLOWEST_SECONDS = 2.0
ANSWER_SECONDS = 20.0
PROBE_SECONDS = 30.0
START_SECONDS = 60.0

# Microseconds of a forward step of up to 8 rows in 16 bits: estimates.
LATENCY = {128: 0.3, 256: 0.32, 512: 0.5, 768: 0.65, 1024: 0.75, 2048: 1.4}

Result = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Run = Callable[[], Tensors]


@dataclass(frozen=True)
class Case:
    cell: str
    mode: str
    dtype: str
    H: int
    B: int
    T: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.T, self.B, self.H, self.H

    @property
    def gates(self) -> int:
        return CELLS[self.cell]

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def precision(self) -> str:
        return "tf32" if self.dtype == "tf32" else "exact"

    @property
    def is_target(self) -> bool:
        return self.T == 1024 and self.H in TARGET_WIDTHS and self.B in TARGET_BATCHES

    def __str__(self) -> str:
        return f"{self.cell}-{self.mode}-{self.dtype}-H{self.H}-B{self.B}-T{self.T}"


def cases() -> list[Case]:
    """All cases, what tells most first: targets in bf16 and f32, in f16 and tf32, the rest."""

    def tier(case: Case) -> int:
        if case.is_target:
            return 0 if case.dtype in ("bf16", "f32") else 1
        return 2 if case.T == 1024 else 3

    grid = [
        Case(cell, mode, dtype, H, B, T)
        for T in LENGTHS
        for cell in CELLS
        for dtype in DTYPES
        for H in WIDTHS
        for B in BATCHES
        for mode in MODES
    ]
    return sorted(grid, key=tier)


@dataclass(frozen=True)
class Card:
    name: str
    capability: str
    multiprocessors: int
    torch: str
    cudnn: str
    cuda: str
    chip_bytes: int  # shared memory and registers
    memory_rate: float  # bytes/s, as is L2's
    l2_rate: float
    matmul_rates: dict[str, float]  # FLOP/s by dtype

    def __str__(self) -> str:
        rates = " ".join(f"{k} {v / 1e12:.0f}" for k, v in self.matmul_rates.items())
        return (
            f"{self.name} ({self.capability}, {self.multiprocessors} SMs) · torch "
            f"{self.torch} · cuDNN {self.cudnn} · CUDA {self.cuda} · measured: matmul {rates} "
            f"TFLOP/s, memory {self.memory_rate / 1e12:.2f}, L2 {self.l2_rate / 1e12:.2f} TB/s"
        )


def latency(H: int) -> float:
    """Seconds of a step of up to 8 rows in 16 bits."""
    at = np.log2(list(LATENCY))
    return float(np.interp(np.log2(H), at, list(LATENCY.values()))) * 1e-6


def floor_seconds(case: Case, card: Card) -> float:
    """The floor that this file's head defines."""
    T, B, I, H = case.sizes
    size = DTYPES[case.dtype].itemsize
    turns = T * (2 if case.training else 1)
    waits = turns * latency(H) * (1.5 if size == 4 else 1)

    R = case.gates * H * H * size
    sequences = T * B * (I + H) * size * (3 if case.training else 1)
    weights = R + case.gates * H * I * size
    moves = (sequences + weights * (2 if case.training else 1)) / card.memory_rate
    moves += turns * max(0, R - card.chip_bytes) / card.l2_rate

    flops = 2 * case.gates * H * (I + H) * B * T * (3 if case.training else 1)
    return max(waits, moves, flops / card.matmul_rates[case.dtype])


def bytes_needed(case: Case) -> int:
    """About what a case takes, ours and torch's together."""
    T, B, _, H = case.sizes
    size = DTYPES[case.dtype].itemsize
    inputs_and_outputs = 6 * size
    ours = case.gates * (4 + (2 * size if case.training else 0))
    theirs = case.gates * size * (3 if case.training else 1)
    return T * B * H * (inputs_and_outputs + ours + theirs)


# What follows, up to the worker, runs in its process.


@dataclass(frozen=True)
class Problem:
    case: Case
    module: torch.nn.RNNBase
    x: torch.Tensor
    dy: torch.Tensor

    @classmethod
    def of(cls, case: Case, T: int) -> Problem:
        """Random inputs; sets what torch may do in float32."""
        torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
        torch.manual_seed(zlib.crc32(f"{case} {T}".encode()))
        where: dict[str, Any] = {"device": "cuda", "dtype": DTYPES[case.dtype]}
        _, B, I, H = case.sizes
        module = getattr(torch.nn, case.cell)(I, H, **where)
        module.train(case.training)
        return cls(case, module, torch.randn(T, B, I, **where), torch.randn(T, B, H, **where))

    @property
    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.module.parameters()]


STATES = {"LSTM": ("h_n", "c_n"), "GRU": ("h_n",)}
GRADIENTS = ("dx", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh")


def ours(problem: Problem, **masks: Any) -> Run:
    case, x, dy, weights = problem.case, problem.x, problem.dy, problem.weights
    results = ("y", *STATES[case.cell])
    options = {"precision": case.precision} | masks
    if not case.training:
        op = getattr(fr, case.cell.lower())
        return lambda: dict(zip(results, op(x, *weights, **options), strict=True))
    vjp = getattr(fr, f"{case.cell.lower()}_vjp")

    def train() -> Tensors:
        outputs, pullback = vjp(x, *weights, **options)
        grads = pullback(dy)
        named = {name: getattr(grads, name.removeprefix("d")) for name in GRADIENTS}
        return dict(zip(results, outputs, strict=True)) | named

    return train


def theirs(problem: Problem) -> Run:
    case, module, dy = problem.case, problem.module, problem.dy

    def named(y: torch.Tensor, state: Any) -> Tensors:
        states = state if case.cell == "LSTM" else (state,)
        final = (s[0].detach() for s in states)
        return {"y": y} | dict(zip(STATES[case.cell], final, strict=True))

    if not case.training:

        def infer() -> Tensors:
            with torch.no_grad():
                return named(*module(problem.x))

        return infer
    x = problem.x.clone().requires_grad_()
    leaves = (x, *module.parameters())

    def train() -> Tensors:
        y, state = module(x)
        gradients = torch.autograd.grad(y, leaves, dy)
        return named(y.detach(), state) | dict(zip(GRADIENTS, gradients, strict=True))

    return train


def reference(problem: Problem) -> Tensors:
    """In float64 from the inputs as rounded, by torch's own kernels."""
    module = getattr(torch.nn, problem.case.cell)(
        problem.x.shape[-1], problem.case.H, device="cuda", dtype=torch.float64
    )
    module.load_state_dict(problem.module.state_dict())
    module.train(problem.case.training)
    exact = Problem(problem.case, module, problem.x.double(), problem.dy.double())
    with torch.backends.cudnn.flags(enabled=False):
        return theirs(exact)()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; NaN where there is one."""
    expected = expected.double()
    norm = torch.linalg.vector_norm
    return float(norm(actual.double() - expected) / norm(expected))


def spoil_memory() -> None:
    """Fill what torch will hand out next with NaN."""
    sizes = [1 << 28, *[1 << 18] * 8]
    for spoilt in [torch.empty(n // 4, device="cuda") for n in sizes]:
        spoilt.fill_(torch.nan)


def errors(case: Case) -> dict[str, tuple[float, float]]:
    """Ours and torch's, by name, for a short sequence."""
    problem = Problem.of(case, CHECKED_STEPS)
    expected = reference(problem)
    run, run_theirs = ours(problem), theirs(problem)
    spoil_memory()
    actual, their = run(), run_theirs()
    return {k: (error(actual[k], e), error(their[k], e)) for k, e in expected.items()}


def beyond(found: dict[str, float], limit: float) -> str:
    """What of it is not below the limit, as NaN never is."""
    return ", ".join(f"{k} off by {e:.0e}" for k, e in found.items() if not e < limit)


def plan_of(case: Case, backward: bool) -> Result:
    try:
        return dict(
            fr.cuda.explain(
                case.cell.lower(),
                *case.sizes,
                dtype=str(DTYPES[case.dtype]).removeprefix("torch."),
                backward=backward,
                precision=case.precision,
            )
        )
    except Exception as failure:  # it only informs
        return {"exchange": "?", "note": repr(failure)}


def timed(run: Callable[[], Any], calls: int = 1) -> float:
    """Seconds of a call on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls


def in_turn(runs: dict[str, Run], seconds: float) -> dict[str, list[float]]:
    """Times of each, of rounds that take about that long."""
    calls = {}
    for name, run in runs.items():
        run()
        calls[name] = int(np.clip(BATCH_SECONDS / timed(run), 1, 64))
    once = {name: timed(run, calls[name]) for name, run in runs.items()}
    if sum(once.values()) > SLOWEST_SECONDS:
        took = ", ".join(f"{name} {s:.2f} s" for name, s in once.items())
        raise TimeoutError(f"a call takes too long: {took}")
    one_round = sum(once[name] * calls[name] for name in runs)
    rounds = int(np.clip(seconds / one_round, 5, 25))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(rounds):
        for name in list(runs) if n % 2 else reversed(runs):
            times[name].append(timed(runs[name], calls[name]))
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """Median, lower and upper quartile."""
    return [float(q) for q in np.percentile(values, [50, 25, 75])]


_checked: dict[Case, dict[str, tuple[float, float]]] = {}


def measure(case: Case) -> Result:
    result: Result = {"plan": plan_of(case, False)}
    if case.training:
        result["backward plan"] = plan_of(case, True)
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    needed = bytes_needed(case)
    if needed > 0.9 * free:
        note = f"needs {needed / 2**30:.0f} GiB of {free / 2**30:.0f}"
        return result | {"status": "no memory", "note": note}

    same = Case(case.cell, case.mode, case.dtype, case.H, case.B, CHECKED_STEPS)
    if same not in _checked:
        _checked[same] = errors(case)
    found = result["errors"] = _checked[same]
    limit = LIMITS[case.dtype]
    wrong = beyond({name: mine for name, (mine, _) in found.items()}, limit)
    if wrong:
        return result | {"status": "wrong", "note": wrong}

    problem = Problem.of(case, case.T)
    runs = {"ours": ours(problem), "torch": theirs(problem)}
    mine, their = (run() for run in runs.values())
    somewhere = [*range(0, case.T, 64), case.T - 1]
    names = ("y", "dx") if case.training else ("y",)
    apart = {name: error(mine[name][somewhere], their[name][somewhere]) for name in names}
    del mine, their
    wrong = beyond(apart, 3 * limit)
    if wrong:
        return result | {"status": "wrong", "note": f"against torch's: {wrong}"}

    try:
        times = in_turn(runs, CASE_SECONDS)
    except TimeoutError as slow:
        return result | {"status": "too slow", "note": str(slow)}
    ratios = [b / a for a, b in zip(times["ours"], times["torch"], strict=True)]
    return result | {
        "status": "measured",
        "seconds": {name: quartiles(t) for name, t in times.items()},
        "ratio": quartiles(ratios),
        "rounds": len(ratios),
    }


def rate(run: Callable[[], Any], units: float) -> float:
    run()
    return units / statistics.median(timed(run) for _ in range(7))


def describe_card() -> Result:
    device = torch.cuda.get_device_properties(0)

    def copies(size: int, calls: int) -> float:
        a = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        return rate(lambda: [b.copy_(a) for _ in range(calls)], 2 * size * calls)

    matmuls = {}
    for name, dtype in DTYPES.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        matmuls[name] = rate(lambda a=a, b=b: a @ b, 2 * 8192**3)
    cudnn = torch.backends.cudnn.version()
    on_chip = (227 + 256) << 10  # of a multiprocessor of Hopper, for one block
    card = Card(
        name=device.name,
        capability=f"{device.major}.{device.minor}",
        multiprocessors=device.multi_processor_count,
        torch=torch.__version__,
        cudnn=f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}",
        cuda=str(torch.version.cuda),
        chip_bytes=on_chip * device.multi_processor_count,
        memory_rate=copies(1 << 30, 1),
        l2_rate=copies(8 << 20, 100),
        matmul_rates=matmuls,
    )
    return {"status": "measured", "card": asdict(card)}


def differ(a: Tensors, b: Tensors) -> torch.Tensor:
    """Whether any element does, as a tensor, so that nobody waits for it."""
    return torch.stack([(a[name] != b[name]).any() for name in a]).any()


def repeat() -> Result:
    """1000 times the same small training step, bit for bit."""
    times, rows = 1000, []
    for cell, dtype, H in (
        ("LSTM", "bf16", 256),
        ("LSTM", "bf16", 768),
        ("LSTM", "f32", 256),
        ("GRU", "bf16", 256),
        ("GRU", "bf16", 768),
    ):
        case = Case(cell, "training", dtype, H, 16, 16)
        run = ours(Problem.of(case, case.T))
        first = run()
        others = sum(differ(run(), first).int() for _ in range(times))
        rows.append((f"{case}: {times} repetitions", f"{int(others)} differ", not others))
    return {"status": "measured", "rows": rows}


def replay() -> Result:
    """A captured training step, its input changed, against the same outside of a graph."""
    rows = []
    for cell, dtype, H in (("LSTM", "bf16", 256), ("GRU", "bf16", 768), ("LSTM", "f32", 512)):
        case = Case(cell, "training", dtype, H, 16, 32)
        problem = Problem.of(case, case.T)
        run = ours(problem)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        unlike = 0
        for _ in range(10):
            problem.x.copy_(torch.randn_like(problem.x))
            graph.replay()
            unlike += int(differ(captured, run()))
        rows.append((f"{case}: 10 replays of a graph", f"{unlike} differ", unlike == 0))
    return {"status": "measured", "rows": rows}


def masked() -> Result:
    """What lengths and resets cost; full lengths change nothing."""
    rows = []
    for mode in MODES:
        case = Case("LSTM", mode, "bf16", 768, 16, 1024)
        problem = Problem.of(case, case.T)
        lengths = torch.full((case.B,), case.T, device="cuda")
        resets = torch.rand(case.T, case.B, device="cuda") < 0.05
        runs = {
            "plain": ours(problem),
            "lengths, all full": ours(problem, lengths=lengths),
            "resets, 5%": ours(problem, resets=resets),
        }
        plain, full = runs["plain"](), runs["lengths, all full"]()
        unlike = [name for name in plain if not torch.equal(plain[name], full[name])]
        same = "" if not unlike else f"; {', '.join(unlike)} differ"
        times = in_turn(runs, 2 * CASE_SECONDS)
        for name in list(runs)[1:]:
            pairs = zip(times[name], times["plain"], strict=True)
            median, low, high = quartiles([a / b for a, b in pairs])
            told = f"{median:.3f} ({low:.3f}–{high:.3f}) of plain"
            with_lengths = name.startswith("lengths")
            rows.append(
                (
                    f"{case}: {name}",
                    told + (same if with_lengths else ""),
                    not (with_lengths and unlike),
                )
            )
    return {"status": "measured", "rows": rows}


def optional() -> Result:
    """What each option costs a training step, forward and backward."""
    rows = []
    where: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    T, B, H = costs.T, costs.B, 512
    x = torch.randn(T, B, H, **where)
    plain: tuple[Any, ...] = ({}, {}, "LSTM GRU", None)
    for cell in CELLS:
        runs: dict[str, Run] = {}
        for name, (of_layer, of_call, cells, _) in ({"plain": plain} | costs.OPTIONS).items():
            if cell not in cells.split():
                continue
            layer = getattr(fr, cell)(H, H, rng=0, **of_layer).to("cuda", "bfloat16")
            dy = torch.randn(T, B, layer.proj_size or H, **where)

            def step(layer: Any = layer, dy: Any = dy, asked: Any = of_call) -> Tensors:
                (y, *_), pullback = layer.vjp(x, **asked)
                return {"y": y, "dx": pullback(dy).x}

            runs[name] = step
        times = in_turn(runs, len(runs) * CASE_SECONDS / 4)
        for name in list(runs)[1:]:
            pairs = zip(times[name], times["plain"], strict=True)
            median, low, high = quartiles([a / b for a, b in pairs])
            told = f"{median:.3f} ({low:.3f}–{high:.3f}) of plain"
            rows.append((f"{cell} training bf16 {T}, {B}, {H}: {name}", told, True))
    return {"status": "measured", "rows": rows}


PROBES: dict[str, Callable[[], Result]] = {
    "repeat": repeat,
    "replay": replay,
    "masked": masked,
    "optional": optional,
}
TASKS: dict[str, Callable[..., Result]] = {
    "card": describe_card,
    "measure": measure,
    **PROBES,
}


def work(connection: Connection) -> None:
    """Answer tasks, (name, *arguments), until the device is lost."""
    connection.send({"status": "ready"})
    while True:
        name, *arguments = connection.recv()
        try:
            answer = TASKS[name](*arguments)
        except (torch.OutOfMemoryError, MemoryError) as failure:
            answer = {"status": "no memory", "note": str(failure)}
        except Exception as failure:
            answer = {"status": "failed", "note": f"{type(failure).__name__}: {failure}"}
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as failure:
            note = f"{answer.get('note', '')}; the device is lost: {failure}"
            connection.send({"status": "failed", "note": note, "lost": True})
            return
        connection.send(answer)


class Worker:
    """A process that runs tasks, started anew after it was lost."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def ask(self, *task: Any, seconds: float) -> Result:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, far_end = context.Pipe()
            self._process = context.Process(target=work, args=(far_end,), daemon=True)
            self._process.start()
            far_end.close()
            ready = self._answer(START_SECONDS)
            if "lost" in ready:
                return ready
        with contextlib.suppress(OSError):  # of a process that is gone, as _answer finds out
            self._connection.send(task)
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Result:
        try:
            if self._connection.poll(seconds):
                answer: Result = self._connection.recv()
            else:
                note = f"no answer in {seconds:.0f} s"
                answer = {"status": "failed", "note": note, "lost": True}
        except (EOFError, OSError):
            self._process.join(5)
            note = f"the process ended with status {self._process.exitcode}"
            answer = {"status": "failed", "note": note, "lost": True}
        if "lost" in answer:
            self.stop()
        return answer

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(10)
            self._connection.close()
        self._process = None


def shortened(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def run_all(chosen: list[Case], budget: float, name_of_commit: str) -> Result:
    """Everything within about that many seconds."""
    deadline = time.monotonic() + budget
    worker = Worker()
    lost: Counter[tuple[str, str, str, int]] = Counter()

    def ask(*task: Any, seconds: float = ANSWER_SECONDS) -> Result:
        left = deadline - time.monotonic()
        if left <= 0:
            return {"status": "not run", "note": "the time was over"}
        answer = worker.ask(*task, seconds=min(seconds, left))
        if "lost" in answer and time.monotonic() >= deadline:
            answer = {"status": "not run", "note": "the time was over"}
        return answer | {"note": shortened(answer.get("note", ""))}

    first = ask("card")
    card = Card(**first["card"]) if "card" in first else None
    print(card or f"the card: {first['note']}", flush=True)
    results: list[Result] = []
    probes: dict[str, Result] = {}
    for case in chosen:
        result: Result
        group = (case.cell, case.mode, case.dtype, case.H)
        if card is None:
            result = {"status": "not run", "note": "there is no card to run on"}
        elif lost[group] >= 2:
            result = {"status": "not run", "note": "two like it were lost"}
        else:
            result = ask("measure", case)
        lost[group] += "lost" in result
        if result["status"] == "measured" and card:
            result["floor"] = floor_seconds(case, card)
        results.append({"case": asdict(case)} | result)
        if result["status"] != "not run":
            print(case, compact(results[-1]), result["note"], flush=True)
        if len(results) == 1 and card:
            for name in PROBES:
                probes[name] = ask(name, seconds=PROBE_SECONDS)
                print(name, probes[name]["status"], probes[name]["note"], flush=True)
    worker.stop()
    return {
        "commit": name_of_commit,
        "fusedrnn": fr.__version__,
        "card": asdict(card) if card else None,
        "cases": results,
        "probes": probes,
        "seconds": budget - (deadline - time.monotonic()),
    }


def is_resolved(result: Result) -> bool:
    _, low, high = result["ratio"]
    return not low < 1 < high


def microseconds(result: Result, name: str) -> float:
    """Of a step."""
    return result["seconds"][name][0] / result["case"]["T"] * 1e6


def plan_used(result: Result) -> Result:
    plan: Result = result.get("backward plan", result["plan"])
    return plan


def of_floor(result: Result) -> float:
    return float(result["floor"] / result["seconds"]["ours"][0])


def compact(result: Result) -> str:
    """ours/torch µs a step, ratio, fraction of the floor and the exchange's first letter."""
    if result["status"] != "measured":
        return str(result["status"])
    mine, their = (microseconds(result, name) for name in ("ours", "torch"))
    mark = "" if is_resolved(result) else "~"
    exchange = plan_used(result)["exchange"][0]
    ratio = result["ratio"][0]
    return f"{mine:.2f}/{their:.2f} {ratio:.2f}{mark} {of_floor(result):.2f}{exchange}"


def heading(run: Result) -> Iterator[str]:
    yield str(Card(**run["card"])) if run["card"] else "no card"
    statuses = Counter(result["status"] for result in run["cases"])
    counted = ", ".join(f"{n} {status}" for status, n in statuses.most_common())
    yield (
        f"fusedrnn {run['fusedrnn']}, commit {run['commit']} · {run['seconds']:.0f} s · "
        f"cases: {counted}"
    )


def means(run: Result) -> Iterator[list[str]]:
    yield ["cell, mode", *DTYPES]
    for cell in CELLS:
        for mode in MODES:
            row = [f"{cell} {mode}"]
            for dtype in DTYPES:
                ratios = [
                    r["ratio"][0]
                    for r in run["cases"]
                    if r["status"] == "measured"
                    and (r["case"]["cell"], r["case"]["mode"], r["case"]["dtype"])
                    == (cell, mode, dtype)
                ]
                row.append(
                    f"{geometric_mean(ratios):.2f} least {min(ratios):.2f} of {len(ratios)}"
                    if ratios
                    else "–"
                )
            yield row


def targets(run: Result) -> Iterator[list[str]]:
    yield ["cell mode dtype H", *(f"B = {B}" for B in TARGET_BATCHES)]
    found = {Case(**result["case"]): result for result in run["cases"]}
    for cell in CELLS:
        for mode in MODES:
            for dtype in DTYPES:
                for H in TARGET_WIDTHS:
                    of = [
                        found.get(Case(cell, mode, dtype, H, B, 1024)) for B in TARGET_BATCHES
                    ]
                    if any(r and r["status"] != "not run" for r in of):
                        row = [compact(r) if r else "–" for r in of]
                        yield [f"{cell} {mode[:5]} {dtype} {H}", *row]


def worst_errors(run: Result) -> Iterator[list[str]]:
    """By dtype the largest relative error, ours and torch's, and where ours is."""
    yield ["dtype", "limit", "ours", "torch", "where"]
    for dtype in DTYPES:
        found = [
            (*pair, f"{name} of {Case(**result['case'])}")
            for result in run["cases"]
            if result["case"]["dtype"] == dtype
            for name, pair in result.get("errors", {}).items()
        ]
        if found:
            mine, _, where = max(found, key=lambda e: (not e[0] < np.inf, e[0]))
            their = max(their for _, their, _ in found)
            yield [dtype, f"{LIMITS[dtype]:.0e}", f"{mine:.1e}", f"{their:.1e}", where]


def probe_rows(run: Result) -> Iterator[list[str]]:
    yield ["check", "found", ""]
    for name, probe in run["probes"].items():
        if probe["status"] != "measured":
            mark = "failed" if probe["status"] == "failed" else ""
            yield [name, f"{probe['status']}: {probe['note']}", mark]
        for what, told, good in probe.get("rows", ()):
            yield [what, told, "" if good else "failed"]


def meeting_rows(run: Result) -> Iterator[list[str]]:
    """Nanoseconds by number of blocks; of clusters alone / of as many as fit."""
    yield ["meeting", "ns by blocks (clusters: alone / all that fit)"]
    by_name: dict[str, dict[int, list[str]]] = {}
    for row in (run.get("meetings") or {}).get("rows", ()):
        told = row["note"] or f"{row['ns']:.0f}"
        if row["wrong"]:
            told += f" ({row['wrong']} wrong)"
        by_name.setdefault(row["meeting"], {}).setdefault(row["blocks"], []).append(told)
    for name, blocks in by_name.items():
        yield [name, " · ".join(f"{n}: {' / '.join(ns)}" for n, ns in blocks.items())]


def unmeasured(run: Result) -> Iterator[list[str]]:
    """By status and note, how many cases and the first."""
    yield ["status", "cases", "first", "note"]
    groups: dict[tuple[str, str], list[Case]] = {}
    for result in run["cases"]:
        if result["status"] != "measured":
            key = (result["status"], result["note"])
            groups.setdefault(key, []).append(Case(**result["case"]))
    for (status, note), of in groups.items():
        yield [status, str(len(of)), str(of[0]), note]


def aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()


def summary(run: Result) -> Iterator[str]:
    """What fits a screen or two."""
    most_rows = 14
    yield from heading(run)
    for title, rows in (
        ("torch's time / ours: geometric mean, least", list(means(run))),
        (
            "T = 1024: µs a step ours/torch, ratio (~ not resolved), of the floor, exchange "
            "(in training the backward's)",
            list(targets(run)),
        ),
        ("largest error against float64", list(worst_errors(run))),
        ("checks", list(probe_rows(run))),
        ("meetings", list(meeting_rows(run))),
        ("not measured", [[*r[:3], shortened(r[3], 60)] for r in unmeasured(run)]),
    ):
        if len(rows) > 1:
            limit = len(rows) if title.startswith("T =") else most_rows
            yield f"\n{title}"
            yield from aligned(rows[:limit])
            if len(rows) > limit:
                yield f"and {len(rows) - limit} more"


def measured_rows(run: Result, cell: str, mode: str, dtype: str) -> Iterator[list[str]]:
    yield [
        *("T, B, H", "ours µs a step", "torch µs a step", "torch / ours (quartiles)"),
        *("floor µs a step", "of floor", "exchange", "blocks", "threads", "weights"),
    ]
    for result in run["cases"]:
        case = Case(**result["case"])
        if (case.cell, case.mode, case.dtype) != (cell, mode, dtype):
            continue
        if result["status"] != "measured":
            continue
        median, low, high = result["ratio"]
        plan = plan_used(result)
        yield [
            f"{case.T}, {case.B}, {case.H}",
            *(f"{microseconds(result, name):.3f}" for name in ("ours", "torch")),
            f"{median:.2f} ({low:.2f}–{high:.2f})"
            + ("" if is_resolved(result) else " not resolved"),
            f"{result['floor'] / case.T * 1e6:.3f}",
            f"{of_floor(result):.2f}",
            *(str(plan.get(key, "–")) for key in ("exchange", "blocks", "threads", "weights")),
        ]


def markdown(run: Result) -> Iterator[str]:
    yield from heading(run)
    sections: dict[str, Iterable[list[str]]] = {
        "Geometric mean of torch's time / ours, and the least": means(run)
    }
    for cell in CELLS:
        for mode in MODES:
            for dtype in DTYPES:
                rows = measured_rows(run, cell, mode, dtype)
                sections[f"{cell} {mode}, {dtype}"] = rows
    sections |= {
        "Largest error against float64": worst_errors(run),
        "Checks": probe_rows(run),
        "Meetings of blocks": meeting_rows(run),
        "Not measured": unmeasured(run),
    }
    for title, section in sections.items():
        header, *rows = section
        if rows:
            yield f"\n### {title}\n"
            yield f"| {' | '.join(header)} |"
            yield "|---" * len(header) + "|"
            for row in rows:
                yield f"| {' | '.join(cell.replace('|', '·') for cell in row)} |"


def failed(run: Result) -> bool:
    """Whether something computed was wrong or broke."""
    broken = any(result["status"] in ("wrong", "failed") for result in run["cases"])
    return broken or not run["card"] or any(row[2] for row in list(probe_rows(run))[1:])


def sanitize() -> None:
    """Small training steps in each exchange that the sizes allow; free choice must do."""
    module = fr.cuda._module()
    for cell in CELLS:
        for dtype in ("bf16", "f32"):
            case = Case(cell, "training", dtype, 72, 9, 3)
            run = ours(Problem.of(case, case.T))
            for exchange, name in enumerate(("free", "cluster", "grid", "step"), -1):
                module.wish(exchange=exchange)
                try:
                    run()
                    torch.cuda.synchronize()
                    print(case, name, flush=True)
                except Exception as failure:
                    print(case, name, failure, flush=True)
                    if exchange < 0:
                        raise
            module.wish()


def git_commit() -> str:
    try:
        return commit()
    except OSError:
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("bench", "sanitize"), default="bench")
    parser.add_argument(
        "--budget", type=float, default=240, help="seconds in all (%(default)s)"
    )
    parser.add_argument("--only", default="", help="cases that match this pattern")
    parser.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    parser.add_argument("--markdown", type=pathlib.Path, help="write the tables to this file")
    parser.add_argument("--meetings", type=pathlib.Path, help="what meetings.cu printed")
    parser.add_argument("--commit", help="what was measured; git's answer if not given")
    parser.add_argument("--from", dest="earlier", type=pathlib.Path, help="an earlier --json")
    parser.add_argument("--dry-run", action="store_true", help="list the cases")
    options = parser.parse_args()
    if options.what == "sanitize":
        sanitize()
        return
    chosen = [case for case in cases() if re.search(options.only, str(case))]
    if options.dry_run:
        for case in chosen:
            print(f"{case}  {bytes_needed(case) / 2**30:.2f} GiB")
        print(f"{len(chosen)} cases")
        return
    if options.earlier:
        run = json.loads(options.earlier.read_text("utf-8"))
    else:
        run = run_all(chosen, options.budget, options.commit or git_commit())
    if options.meetings:
        try:
            run["meetings"] = json.loads(options.meetings.read_text("utf-8"))
        except (OSError, ValueError) as failure:
            print(f"no costs of meetings: {failure}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(run, indent=1) + "\n", "utf-8")
    if options.markdown:
        options.markdown.write_text("\n".join(markdown(run)) + "\n", "utf-8")
    print("\n".join(summary(run)))
    sys.exit(failed(run))


if __name__ == "__main__":
    main()
