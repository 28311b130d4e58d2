"""Ours against torch's nn.LSTM and nn.GRU (cuDNN) on a GPU.

python bench/gpu.py                              the cases in order, within --budget seconds
python bench/gpu.py --json x.json --markdown x.md
python bench/gpu.py --only 'LSTM.*bfloat16'      cases whose name matches
python bench/gpu.py --from x.json                the tables of an earlier run
python bench/gpu.py --dry-run                    the cases; needs no GPU
python bench/gpu.py sanitize                     a few small calls, for compute-sanitizer

`fusedrnn.bench.gpu` says how a case is measured, and what its floor is; the ratio is the median
over rounds of torch's time / ours, and not resolved (~) where 1 lies between its quartiles.

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
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import options as costs
import torch
from turns import commit

import fusedrnn as fr
from fusedrnn.bench import gpu
from fusedrnn.bench.cases import CELLS, GPU_SUITES, Case, cases_of
from fusedrnn.bench.cases import DTYPES as DTYPES_OF
from fusedrnn.bench.gpu import Card, Problem, Run, Tensors, in_turn, ours
from fusedrnn.bench.race import Result, described, quartiles
from fusedrnn.bench.tables import geometric_mean, with_spread

MODES = ("inference", "training")
DTYPES = DTYPES_OF["cuda"]
TARGETS = GPU_SUITES["shapes"].shapes["training"]
TARGET_WIDTHS = (256, 512, 768, 1024)
TARGET_BATCHES = (1, 16, 64)
CASE_SECONDS = GPU_SUITES["full"].seconds
ANSWER_SECONDS = 20.0
PROBE_SECONDS = 30.0
START_SECONDS = 60.0


def case_of(cell: str, mode: str, dtype: str, H: int, B: int, T: int) -> Case:
    return Case(cell, f"H{H}-B{B}-T{T}", (T, B, H, H), mode, 1, dtype, "cuda")


def cased(result: Result) -> Case:
    """The case that a result is of."""
    told = {field.name: result[field.name] for field in fields(Case)}
    return Case(**told | {"sizes": tuple(result["sizes"])})


def cases() -> list[Case]:
    """All cases, what tells most first: targets in bfloat16 and float32, in the other two."""

    def tier(case: Case) -> int:
        if case.shape in TARGETS:
            return 0 if case.dtype in ("bfloat16", "float32") else 1
        return 2 if case.sizes[0] == 1024 else 3

    grid = cases_of(GPU_SUITES["full"], CELLS, MODES, DTYPES, (1,), device="cuda")
    return sorted(grid, key=tier)


# What follows, up to the worker, runs in its process.


def plan_of(case: Case, backward: bool) -> Result:
    try:
        return dict(
            fr.cuda.explain(
                case.cell.lower(),
                *case.sizes,
                dtype=str(gpu.DTYPES[case.dtype]).removeprefix("torch."),
                backward=backward,
                precision=gpu.precision(case),
            )
        )
    except Exception as failure:  # it only informs
        return {"exchange": "?", "note": repr(failure)}


def measure(case: Case) -> Result:
    result: Result = {"plan": plan_of(case, False)}
    if case.training:
        result["backward plan"] = plan_of(case, True)
    try:
        result |= gpu.measure(case, ["torch"], CASE_SECONDS)
    except MemoryError as failure:
        return result | {"status": "no memory", "note": str(failure)}
    except TimeoutError as slow:
        return result | {"status": "too slow", "note": str(slow)}
    if result["wrong"]:
        return result | {"status": "wrong", "note": result["wrong"]["ours"]}
    return result | {"status": "measured", "ratio": result["ratios"]["torch"]}


def card_of() -> Result:
    return {"status": "measured", "card": asdict(gpu.describe_card())}


def differ(a: Tensors, b: Tensors) -> torch.Tensor:
    """Whether any element does, as a tensor, so that nobody waits for it."""
    return torch.stack([(a[name] != b[name]).any() for name in a]).any()


def repeat() -> Result:
    """1000 times the same small training step, bit for bit."""
    times, rows = 1000, []
    for cell, dtype, H in (
        ("LSTM", "bfloat16", 256),
        ("LSTM", "bfloat16", 768),
        ("LSTM", "float32", 256),
        ("GRU", "bfloat16", 256),
        ("GRU", "bfloat16", 768),
    ):
        case = case_of(cell, "training", dtype, H, 16, 16)
        run = ours(Problem.of(case, case.sizes[0]))
        first = run()
        others = sum(differ(run(), first).int() for _ in range(times))
        rows.append((f"{case}: {times} repetitions", f"{int(others)} differ", not others))
    return {"status": "measured", "rows": rows}


def replay() -> Result:
    """A captured training step, its input changed, against the same outside of a graph."""
    rows = []
    for cell, dtype, H in (
        ("LSTM", "bfloat16", 256),
        ("GRU", "bfloat16", 768),
        ("LSTM", "float32", 512),
    ):
        case = case_of(cell, "training", dtype, H, 16, 32)
        problem = Problem.of(case, case.sizes[0])
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
        case = case_of("LSTM", mode, "bfloat16", 768, 16, 1024)
        problem = Problem.of(case, case.sizes[0])
        T, B, _, _ = case.sizes
        lengths = torch.full((B,), T, device="cuda")
        resets = torch.rand(T, B, device="cuda") < 0.05
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
    (T, B, *_), H = costs.WIDE, 512
    x = torch.randn(T, B, H, **where)
    for cell in CELLS:
        runs: dict[str, Run] = {}
        options = {"plain": costs.PLAIN} | costs.options_of(cell, (T, B, H, H))
        for name, option in options.items():
            layer = getattr(fr, cell)(H, H, rng=0, **option.of_layer).to("cuda", "bfloat16")
            dy = torch.randn(T, B, layer.proj_size or H, **where)

            def step(layer: Any = layer, dy: Any = dy, asked: Any = option.of_call) -> Tensors:
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
    "card": card_of,
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
        group = (case.cell, case.mode, case.dtype, case.sizes[3])
        if card is None:
            result = {"status": "not run", "note": "there is no card to run on"}
        elif lost[group] >= 2:
            result = {"status": "not run", "note": "two like it were lost"}
        else:
            result = ask("measure", case)
        lost[group] += "lost" in result
        if result["status"] == "measured" and card:
            result["floor"] = gpu.floor_seconds(case, card)
        results.append(described(case) | result)
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
    return result["seconds"][name][0] / result["sizes"][0] * 1e6


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
                    and (r["cell"], r["mode"], r["dtype"]) == (cell, mode, dtype)
                ]
                row.append(
                    f"{geometric_mean(ratios):.2f} least {min(ratios):.2f} of {len(ratios)}"
                    if ratios
                    else "–"
                )
            yield row


def targets(run: Result) -> Iterator[list[str]]:
    yield ["cell mode dtype H", *(f"B = {B}" for B in TARGET_BATCHES)]
    found = {cased(result): result for result in run["cases"]}
    for cell in CELLS:
        for mode in MODES:
            for dtype in DTYPES:
                for H in TARGET_WIDTHS:
                    of = [
                        found.get(case_of(cell, mode, dtype, H, B, 1024))
                        for B in TARGET_BATCHES
                    ]
                    if any(r and r["status"] != "not run" for r in of):
                        row = [compact(r) if r else "–" for r in of]
                        yield [f"{cell} {mode[:5]} {dtype} {H}", *row]


def worst_errors(run: Result) -> Iterator[list[str]]:
    """By dtype the largest relative error, ours and torch's, and where ours is."""
    yield ["dtype", "limit", "ours", "torch", "where"]
    for dtype in DTYPES:
        found = [
            (*pair, f"{name} of {cased(result)}")
            for result in run["cases"]
            if result["dtype"] == dtype
            for name, pair in result.get("errors", {}).items()
        ]
        if found:
            mine, _, where = max(found, key=lambda e: (not e[0] < np.inf, e[0]))
            their = max(their for _, their, _ in found)
            yield [dtype, f"{gpu.LIMITS[dtype]:.0e}", f"{mine:.1e}", f"{their:.1e}", where]


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
            groups.setdefault(key, []).append(cased(result))
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
        case = cased(result)
        if (case.cell, case.mode, case.dtype) != (cell, mode, dtype):
            continue
        if result["status"] != "measured":
            continue
        T, B, _, H = case.sizes
        plan = plan_used(result)
        yield [
            ", ".join(map(str, (T, B, H))),
            *(f"{microseconds(result, name):.3f}" for name in ("ours", "torch")),
            with_spread(result["ratio"]),
            f"{result['floor'] / T * 1e6:.3f}",
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
        for dtype in ("bfloat16", "float32"):
            case = case_of(cell, "training", dtype, 72, 9, 3)
            run = ours(Problem.of(case, case.sizes[0]))
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
            print(f"{case}  {gpu.bytes_needed(case) / 2**30:.2f} GiB")
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
