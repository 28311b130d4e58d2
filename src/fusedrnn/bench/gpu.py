"""A case on a GPU: ours against torch's nn.LSTM and nn.GRU, which are cuDNN's.

Inference is a call without gradients; training is forward and backward, with gradients of x
and all parameters. Before a case is timed, a sequence of 12 steps of the same sizes is
compared with torch in float64 without cuDNN, in memory that held NaN; afterwards ours and
torch's are compared in places of the whole sequence. Both are timed with CUDA events around
batches of calls, alternating. A layer with an option is timed against the plain layer.

The floor of a call is the largest of

    latency     steps · l(H), counting forward and backward steps. l is the least time of a
                step that the meeting of the blocks, the matrix units and the cell allow:
                LATENCY, interpolated linearly in log H, and 1.5 times that in float32
    bytes       x and y, in training x, y and dy again and dx, and the weights, at the
                measured rate of device memory; and in every step the part of R that does
                not fit registers and shared memory, at the rate of the L2 cache
    arithmetic  2·G·H·(I+H)·B·T FLOP, three times that in training, at the measured rate of
                the library's matrix product in this precision
"""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

import fusedrnn as fr

from . import forms
from .cases import Case
from .race import Result, described, summed_up

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "tf32": torch.float32,
}
# ‖ours - reference‖ / ‖reference‖, of results and of gradients.
LIMITS = {"bfloat16": 2e-2, "float16": 3e-3, "tf32": 3e-3, "float32": 1e-5}

CHECKED_STEPS = 12
BATCH_SECONDS = 0.002
SLOWEST_SECONDS = 2.0

# Microseconds of a forward step of up to 8 rows in 16 bits: estimates.
LATENCY = {128: 0.3, 256: 0.32, 512: 0.5, 768: 0.65, 1024: 0.75, 2048: 1.4}

Tensors = dict[str, torch.Tensor]
Run = Callable[[], Tensors]


def precision(case: Case) -> Literal["exact", "tf32"]:
    """Return the argument that the dtype of a case stands for."""
    return "tf32" if case.dtype == "tf32" else "exact"


@dataclass(frozen=True)
class Card:
    """A GPU and its software, and rates that were measured."""

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
    size = case.item
    steps = T * (2 if case.training else 1)
    waits = steps * latency(H) * (1.5 if size == 4 else 1)

    R = case.gates * H * H * size
    sequences = T * B * (I + H) * size * (3 if case.training else 1)
    weights = R + case.gates * H * I * size
    moves = (sequences + weights * (2 if case.training else 1)) / card.memory_rate
    moves += steps * max(0, R - card.chip_bytes) / card.l2_rate

    return max(waits, moves, case.flops / card.matmul_rates[case.dtype])


def bytes_needed(case: Case) -> int:
    """About what a case takes, ours and torch's together."""
    T, B, _, H = case.sizes
    size = case.item
    inputs_and_outputs = 6 * size
    ours = case.gates * (4 + (2 * size if case.training else 0))
    theirs = case.gates * size * (3 if case.training else 1)
    return T * B * H * (inputs_and_outputs + ours + theirs)


@dataclass(frozen=True)
class Problem:
    """A module of torch's with random parameters, x and the gradient of y."""

    case: Case
    module: torch.nn.RNNBase
    x: torch.Tensor
    dy: torch.Tensor

    @classmethod
    def of(cls, case: Case, T: int) -> Problem:
        """Draw them, of T steps; sets what torch may do in float32."""
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
        """In the order of `fusedrnn.lstm`."""
        return [p.detach().clone() for p in self.module.parameters()]


STATES = {"LSTM": ("h_n", "c_n"), "GRU": ("h_n",), "RNN": ("h_n",)}
GRADIENTS = ("dx", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh")


def ours(problem: Problem, **masks: Any) -> Run:
    """Run this package's op, which packs weights anew."""
    case, x, dy, weights = problem.case, problem.x, problem.dy, problem.weights
    results = ("y", *STATES[case.cell])
    options = {"precision": precision(case)} | masks
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
    """Run the module."""
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
    """Return the results in float64 from the inputs as rounded, by torch's own kernels."""
    module = getattr(torch.nn, problem.case.cell)(
        *problem.case.sizes[2:], device="cuda", dtype=torch.float64
    )
    module.load_state_dict(problem.module.state_dict())
    module.train(problem.case.training)
    exact = Problem(problem.case, module, problem.x.double(), problem.dy.double())
    with torch.backends.cudnn.flags(enabled=False):
        return theirs(exact)()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖actual - expected‖ / ‖expected‖; NaN where there is one."""
    expected = expected.double()
    norm = torch.linalg.vector_norm
    return float(norm(actual.double() - expected) / norm(expected))


def spoil_memory() -> None:
    """Fill what torch will hand out next with NaN."""
    sizes = [1 << 28, *[1 << 18] * 8]
    for spoilt in [torch.empty(n // 4, device="cuda") for n in sizes]:
        spoilt.fill_(torch.nan)


def errors(case: Case) -> dict[str, tuple[float, float]]:
    """Return ours and torch's, by name, for a short sequence."""
    problem = Problem.of(case, CHECKED_STEPS)
    expected = reference(problem)
    run, run_theirs = ours(problem), theirs(problem)
    spoil_memory()
    actual, their = run(), run_theirs()
    return {k: (error(actual[k], e), error(their[k], e)) for k, e in expected.items()}


def beyond(errors: dict[str, float], limit: float) -> str:
    """Return the errors that are not below the limit in words; NaN never is below it."""
    return ", ".join(f"{k} off by {e:.0e}" for k, e in errors.items() if not e < limit)


def timed(run: Callable[[], Any], calls: int = 1) -> float:
    """Return the seconds of a call on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / calls


def in_turn(runs: dict[str, Run], seconds: float) -> dict[str, list[float]]:
    """Return the times of each, of rounds that take about that long."""
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


def rate(run: Callable[[], Any], units: float) -> float:
    """Return units a second."""
    run()
    return units / statistics.median(timed(run) for _ in range(7))


def describe_card() -> Card:
    """Measure the first GPU."""
    device = torch.cuda.get_device_properties(0)

    def copies(size: int, calls: int) -> float:
        a = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        return rate(lambda: [b.copy_(a) for _ in range(calls)], 2 * size * calls)

    matmuls = {}
    for name, dtype in DTYPES.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        matmuls[name] = rate(partial(torch.matmul, a, b), 2 * 8192**3)
    cudnn = torch.backends.cudnn.version()
    on_chip = (227 + 256) << 10  # of a multiprocessor of Hopper, for one block
    return Card(
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


_checked: dict[Case, dict[str, tuple[float, float]]] = {}


def plan_of(case: Case) -> str:
    """Return how the recurrence runs (in training, backward): exchange, blocks, threads."""
    plan = fr.cuda.explain(
        case.cell.lower(),
        *case.sizes,
        dtype=str(DTYPES[case.dtype]).removeprefix("torch."),
        backward=case.training,
        precision=precision(case),
    )
    parts = [f"{plan[key]} {key}" for key in ("blocks", "threads") if plan.get(key)]
    return ", ".join([str(plan["exchange"]), *parts])


def layer_of(case: Case, form: str) -> Run:
    """Run a layer in a form: a call, or forward and backward by `vjp`."""
    T, B, I, H = case.sizes
    where: dict[str, Any] = {"device": "cuda", "dtype": DTYPES[case.dtype]}
    dtype = str(DTYPES[case.dtype]).removeprefix("torch.")
    layer = getattr(fr, case.cell)(I, H, rng=0, **forms.layer_arguments(form, H))
    layer = layer.to("cuda", dtype)
    torch.manual_seed(0)
    x = torch.randn(*((B, T) if layer.batch_first else (T, B)), I, **where)
    masks = {
        name: torch.from_numpy(mask).cuda() if isinstance(mask, np.ndarray) else mask
        for name, mask in forms.FORMS[form].call(T, B).items()
    }
    if not case.training:
        return lambda: {"y": layer(x, **masks)[0]}
    if layer.zoneout or layer.recurrent_dropout or layer.weight_dropout:
        masks["seed"] = 1
    dy = torch.randn_like(layer(x)[0])

    def train() -> Tensors:
        (y, *_), pullback = layer.vjp(x, **masks)
        return {"y": y, "dx": pullback(dy).x}

    return train


def measure(case: Case, names: Sequence[str], seconds: float) -> Result:
    """Return a case's result, as `race.measure` does, without its floor.

    Raises
    ------
    MemoryError, TimeoutError: the case needs more memory, or more time, than there is.
    """
    result = described(case) | summed_up({}) | {"wrong": {}, "floor": None}
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    needed = bytes_needed(case)
    if needed > 0.9 * free:
        raise MemoryError(f"needs {needed / 2**30:.0f} GiB of {free / 2**30:.0f}")
    if case.form:
        runs = {"ours": layer_of(case, case.form)}
        runs |= {"plain": layer_of(case, "")} if "plain" in names else {}
        return result | summed_up(in_turn(runs, seconds))
    result["plan"] = plan_of(case)

    same = replace(case, shape="", sizes=(CHECKED_STEPS, *case.sizes[1:]))
    if same not in _checked:
        _checked[same] = errors(case)
    pairs = result["errors"] = _checked[same]
    limit = LIMITS[case.dtype]
    wrong = beyond({name: mine for name, (mine, _) in pairs.items()}, limit)
    if wrong:
        return result | {"wrong": {"ours": wrong}}

    T = case.sizes[0]
    problem = Problem.of(case, T)
    runs = {"ours": ours(problem)} | ({"torch": theirs(problem)} if "torch" in names else {})
    if "torch" in runs:
        mine, their = (run() for run in runs.values())
        somewhere = [*range(0, T, 64), T - 1]
        compared = ("y", "dx") if case.training else ("y",)
        apart = {
            name: error(mine[name][somewhere], their[name][somewhere]) for name in compared
        }
        del mine, their
        wrong = beyond(apart, 3 * limit)
        if wrong:
            return result | {"wrong": {"ours": f"against torch's: {wrong}"}}

    return result | summed_up(in_turn(runs, seconds))
