"""Time two builds of fusedrnn alternately: a table of time before / time now.

    python bench/before_after.py BEFORE NOW            everything, some 30 minutes
    python bench/before_after.py BEFORE NOW --quick    some shapes, 3 minutes: LSTM and GRU,
                                                       float32, one thread by default
    python bench/before_after.py BEFORE NOW --options  what options cost in both, 10 minutes

BEFORE and NOW are the Python interpreters of two environments in which fusedrnn is installed
(or commands). One process of each stays alive; they take turns, each turn after some calls that
are not timed, odd rounds in the other order. A figure is the median of the rounds' ratios with
their quartiles; above 1, NOW is faster. Where a build looks slower, the case is timed again in
new processes. It counts as slower, and is printed in bold, only where the upper quartile of all
rounds is below 0.95. Streams take one step a call, with the batch and width of the shape. With
--options an entry is an option's time over the plain cell's, in both builds, one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Asked = dict[str, Any]

SLOWER = 0.95  # a ratio that matters
TURN_SECONDS = 0.02
BATCHES = 3  # of a turn, of which the quickest counts
REST_SECONDS = 0.015  # until the other threads of a build sleep
CASE_SECONDS = 6.0  # rounds end when a case has taken so long,
FEWEST_ROUNDS = 5  # but not before these
REPETITIONS = 2  # of a case in which a build looks slower
QUICK = {"seconds": 1.0, "rounds": 9, "most_flops": 1e10}
BUILDS = (0, 1)  # before and now


# One build's process


def work() -> None:
    """Prepare and time what comes in, one JSON object a line."""
    import numpy as np

    import fusedrnn as fr
    from fusedrnn import _cpu, machine
    from fusedrnn.bench.cases import SHAPES, STEPS, Case
    from fusedrnn.bench.contenders import Inputs, ours
    from fusedrnn.bench.race import seconds_of

    # The forms of this checkout, because an older build has none.
    path = Path(__file__).parents[1] / "src/fusedrnn/bench/forms.py"
    spec = importlib.util.spec_from_file_location("forms", path)
    assert spec
    assert spec.loader
    forms = sys.modules["forms"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(forms)

    channel, sys.stdout = sys.stdout, sys.stderr

    def tell(what: Any) -> None:
        print(json.dumps(what), file=channel, flush=True)

    def train(layer: Any, x: Any, dy: Any, masks: Asked) -> None:
        _, pullback = layer.vjp(x, **masks)
        pullback(dy)

    def run_of(cell: str, sizes: Sequence[int], mode: str, form: str) -> Callable[[], Any]:
        T, B, I, H = sizes
        rng, arguments = np.random.default_rng(0), forms.layer_arguments(form, H)
        layer = getattr(fr, cell)(I, H, rng=rng, **arguments)
        x = rng.normal(size=(T, B, I)).astype(np.float32)
        masks = forms.FORMS[form].call(T, B)
        if mode == "inference":
            return lambda: layer(x, **masks)
        if layer.zoneout or layer.recurrent_dropout or layer.weight_dropout:
            masks["seed"] = 1
        dy = rng.normal(size=(T, B, arguments.get("proj_size", H))).astype(np.float32)
        return lambda: train(layer, x, dy, masks)

    def prepare(asked: Asked) -> list[Callable[[], Any]]:
        if "option" not in asked:
            case = Case(**{**asked, "sizes": tuple(asked["sizes"])})
            return [ours(case, Inputs.of(case))]
        where = (asked["cell"], asked["sizes"], asked["mode"])
        return [run_of(*where, ""), run_of(*where, asked["option"])]

    def list_options() -> list[Asked]:
        return [
            {"cell": cell, "sizes": SHAPES[shape], "mode": mode, "option": name}
            for cell in forms.ALL_CELLS
            for shape in ("narrow", "weather", "stream-small", "speech")
            for name, form in forms.OPTIONS.items()
            if cell in form.cells
            for mode in form.modes
        ]

    # BEFORE may be a build without `machine.summary`.
    about = (
        f"{machine.cpu_name()}, {machine.cores()} cores · {_cpu.get_isa()} · {_cpu.compiler}"
    )
    tell({"machine": about, "shapes": SHAPES, "steps": STEPS})
    runs: list[Callable[[], Any]] = []
    for line in sys.stdin:
        asked = json.loads(line)
        if "turn" in asked:
            run, calls = runs[asked["turn"]], asked["calls"]
            for _ in range(calls // 4):
                run()
            batches = min(calls, BATCHES)
            tell(min(seconds_of(run, -(-calls // batches)) for _ in range(batches)))
        elif asked == {"list": "options"}:
            tell(list_options())
        else:
            runs.clear()
            runs = prepare(asked)
            results = runs[0]()
            bits = [v.tobytes() for v in results.values()] if isinstance(results, dict) else []
            seconds = [min(seconds_of(run, n) for n in (1, 1, 3)) for run in runs]
            tell({"seconds": seconds, "bits": hashlib.sha256(b"".join(bits)).hexdigest()})


class Build:
    """The process of one build."""

    def __init__(self, command: str) -> None:
        self._command = command
        self.start()

    def start(self) -> None:
        """Start the process, which may lie elsewhere in memory than the last one."""
        self._process = subprocess.Popen(
            [*shlex.split(self._command), __file__, "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._receive()

    def ask(self, **asked: Any) -> Any:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a build's process ended with {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


# Turns


class Times(NamedTuple):
    """Seconds of each build's runs."""

    by_round: list[list[list[float]]]  # [round][build][run]
    same_bits: bool

    def quartiles(self, of_round: Callable[[list[list[float]]], float]) -> list[float]:
        """Lower quartile, median and upper one of a figure that each round has."""
        values = [of_round(one) for one in self.by_round]
        return statistics.quantiles(values, n=4, method="inclusive")

    @property
    def speed(self) -> list[float]:
        """Quartiles of time before / time now."""
        return self.quartiles(lambda one: one[0][0] / one[1][0])

    @property
    def is_slower(self) -> bool:
        return self.speed[2] < SLOWER

    @property
    def is_faster(self) -> bool:
        return self.speed[0] > 1 / SLOWER

    def __str__(self) -> str:
        low, median, high = self.speed
        ratio = f"**{median:.2f}**" if self.is_slower else f"{median:.2f}"
        now = statistics.median(one[1][0] for one in self.by_round)
        bits = "" if self.same_bits else ", other bits"
        return f"{ratio} ({low:.2f}–{high:.2f}), {clock(now)}{bits}"


def take_turns(builds: Sequence[Build], asked: Asked, rounds: int, seconds: float) -> Times:
    """Time a case's runs alternately in both builds."""
    prepared = [build.ask(**asked) for build in builds]
    runs = range(len(prepared[0]["seconds"]))
    slowest = [max(prepared[b]["seconds"][run] for b in BUILDS) for run in runs]
    calls = [math.ceil(TURN_SECONDS / once) for once in slowest]
    rest = REST_SECONDS if asked.get("threads", 1) > 1 else 0.0
    turns = [(build, run) for build in BUILDS for run in runs]
    begin, rounds_taken = time.monotonic(), []
    for n in range(rounds):
        if n >= FEWEST_ROUNDS and time.monotonic() - begin > seconds:
            break
        taken = [[0.0] * len(runs) for _ in BUILDS]
        for build, run in turns if n % 2 == 0 else reversed(turns):
            taken[build][run] = builds[build].ask(turn=run, calls=calls[run])
            time.sleep(rest)
        rounds_taken.append(taken)
    return Times(rounds_taken, prepared[0]["bits"] == prepared[1]["bits"])


def take_turns_again(builds: Sequence[Build], asked: Asked, *limits: Any) -> Times:
    """Time a case; where a build looks slower, again in new processes.

    The addresses of a process's memory can cost it more time than the change that is measured,
    and they stay the same for all of its life.
    """
    times = take_turns(builds, asked, *limits)
    for _ in range(REPETITIONS):
        if not (times.is_slower or times.is_faster):
            break
        for build in builds:
            build.end()
            build.start()
        again = take_turns(builds, asked, *limits)
        times = Times(times.by_round + again.by_round, times.same_bits and again.same_bits)
    return times


# Tables


def clock(seconds: float) -> str:
    """Return a time in a unit that suits it."""
    return f"{seconds * 1e6:.3g} µs" if seconds < 9.995e-4 else f"{seconds * 1e3:.3g} ms"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


class Figure(NamedTuple):
    """The result of one case."""

    name: str
    cell: str
    mode: str
    times: Times

    @property
    def ratio(self) -> float:
        return self.times.speed[1]


def speeds(builds: Sequence[Build], arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a table for each mode, count of threads and dtype, and what they come to."""
    about, figures = builds[1].about, []
    groups = itertools.product(arguments.modes, arguments.threads, arguments.dtypes)
    for mode, threads, dtype in groups:
        yield f"### {mode}, {threads} thread{'s' * (threads > 1)}, {dtype}"
        yield ""
        yield f"| T, B, I, H | {' | '.join(arguments.cells)} |"
        yield "|---" * (len(arguments.cells) + 1) + "|"
        shapes = about["shapes"] | (about["steps"] if mode == "streaming" else {})
        of_table = []
        for name, (T, B, I, H) in shapes.items():
            sizes = [1 if mode == "streaming" else T, B, I, H]
            if arguments.quick and 24 * H * (I + H) * sizes[0] * B > QUICK["most_flops"]:
                continue
            entries = []
            for cell in arguments.cells:
                asked = {"cell": cell, "shape": name, "sizes": sizes, "mode": mode}
                asked |= {"threads": threads, "dtype": dtype}
                case = f"{cell} {name} {mode} {dtype}, {threads} thread{'s' * (threads > 1)}"
                times = take_turns_again(builds, asked, arguments.rounds, arguments.seconds)
                entries.append(str(times))
                of_table.append(Figure(case, cell, mode, times))
            yield f"| {name}: {', '.join(map(str, sizes))} | {' | '.join(entries)} |"
        means = [
            f"{geometric_mean([f.ratio for f in of_table if f.cell == cell]):.3f}"
            for cell in arguments.cells
        ]
        yield f"| geometric mean | {' | '.join(means)} |"
        yield ""
        figures += of_table
    yield from summary(figures, arguments.modes)


def summary(figures: list[Figure], modes: Sequence[str]) -> Iterator[str]:
    """Yield the means of all cases, and the worst of them."""
    yield "### In all"
    yield ""
    for mode in modes:
        of_mode = [f.ratio for f in figures if f.mode == mode]
        yield f"- {mode}: geometric mean {geometric_mean(of_mode):.3f} of {len(of_mode)} cases"
    slower = sum(f.times.is_slower for f in figures)
    yield f"- below {SLOWER} and resolved: {slower} of {len(figures)} cases"
    yield f"- other bits: {sum(not f.times.same_bits for f in figures)} cases"
    yield ""
    yield "The worst:"
    yield ""
    for f in sorted(figures, key=lambda f: f.ratio)[: max(12, slower)]:
        yield f"- {f.name}: {f.times}"


def costs(builds: Sequence[Build], arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a table for each cell: what each option costs before and now."""
    known = builds[1].ask(list="options")
    for cell in arguments.cells:
        of_cell = [asked for asked in known if asked["cell"] == cell]
        columns = list(
            dict.fromkeys((tuple(asked["sizes"]), asked["mode"]) for asked in of_cell)
        )
        columns.sort(key=lambda column: column[1])
        yield f"### {cell}: an option's time over the plain cell's, before → now"
        yield ""
        heads = [f"{', '.join(map(str, sizes))} {mode}" for sizes, mode in columns]
        yield f"| option | {' | '.join(heads)} |"
        yield "|---" * (len(columns) + 1) + "|"
        for name in dict.fromkeys(asked["option"] for asked in of_cell):
            entries = dict.fromkeys(columns, "")
            for asked in of_cell:
                if asked["option"] == name:
                    times = take_turns(builds, asked, arguments.rounds, arguments.seconds)
                    entries[tuple(asked["sizes"]), asked["mode"]] = cost(times)
            yield f"| {name} | {' | '.join(entries.values())} |"
        yield ""


def cost(times: Times) -> str:
    """Return an option's cost before, and now with its quartiles."""
    _, before, _ = times.quartiles(lambda one: one[0][1] / one[0][0])
    low, now, high = times.quartiles(lambda one: one[1][1] / one[1][0])
    return f"{before:.2f} → {now:.2f} ({low:.2f}–{high:.2f})"


def commit() -> str:
    """Return the commit of this checkout, which NOW is likely to be built from."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    here = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="the interpreter of the build to compare with")
    parser.add_argument("now", help="the interpreter of the build to judge")
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--cells", nargs="+")
    parser.add_argument("--modes", nargs="+", default=["inference", "training", "streaming"])
    parser.add_argument("--rounds", type=int, default=15, help="at most, for each case")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--options", action="store_true", help="what options cost instead")
    parser.add_argument("--commits", nargs=2, help="what the two builds are, for the report")
    parser.add_argument("--report", type=Path, help="write the tables to this file, too")
    arguments = parser.parse_args()
    arguments.seconds = CASE_SECONDS
    if arguments.quick:
        arguments.seconds, arguments.rounds = QUICK["seconds"], QUICK["rounds"]
    quick = arguments.quick
    arguments.threads = arguments.threads or ([1] if quick else [1, 2])
    arguments.dtypes = arguments.dtypes or ["float32", "float64"][: 1 if quick else 2]
    arguments.cells = arguments.cells or ["LSTM", "GRU", "RNN"][: 2 if quick else 3]
    before, now = arguments.commits or ("unknown", commit())
    builds = [Build(command) for command in (arguments.before, arguments.now)]
    lines = [
        "# Two builds, alternately",
        "",
        f"{builds[1].about['machine']} · before {before} · now {now}",
        "",
    ]
    print("\n".join(lines), flush=True)
    try:
        for line in (costs if arguments.options else speeds)(builds, arguments):
            print(line, flush=True)
            lines.append(line)
    finally:
        for build in builds:
            build.end()
    if arguments.report:
        arguments.report.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        main()
