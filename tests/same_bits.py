"""Compares two builds of fusedrnn bit for bit, forward and backward.

python tests/same_bits.py BEFORE NOW              7000 cases, some 4 minutes on 2 cores
python tests/same_bits.py BEFORE NOW --case JSON  one case, and where its arrays differ
python tests/same_bits.py BEFORE NOW --device cuda    on a GPU, or on the emulated one

BEFORE and NOW are the Python interpreters of two environments in which fusedrnn is installed
(or commands, as "env PYTHONPATH=… python"). Each case runs on both, in processes that know one
instruction set: same_bits_worker.py draws the inputs from the case's seed and answers with a
digest of every array, over its shape, type and bytes, so that -0 and the bits of NaN count.
First comes each cell with each option alone, for each type and instruction set, on small
shapes; then random combinations. NOW's processes are told caches of several sizes
(FUSEDRNN_L1_BYTES, FUSEDRNN_L2_BYTES), on which no result may depend, so that small shapes
reach every branch.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import random
import select
import shlex
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Case = dict[str, Any]
Answer = dict[str, Any]

LIMIT_SECONDS = 120  # for one case
MOST_FAILURES = 50
USUAL_CASES = {"cpu": 5000, "cuda": 1000}  # the random ones
CACHES = (None, 4096, 65536, 1 << 20)
LANES = {"avx512": 16, "avx2": 8, "neon": 4, "portable": 4}  # of float32
DTYPES = {
    "cpu": ["float32", "float64"],
    "cuda": ["float32", "float64", "bfloat16", "float16", "tf32"],
}
GRADIENTS = ("dy", "dh_n", "dc_n", "d_cells")
FROZEN = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_ch")
FROZEN += ("gamma_ih", "gamma_hh", "gamma_c", "beta_c")


# The cases


class Cases:
    """Draws cases for what a build has."""

    def __init__(self, build: Answer, device: str, seed: int) -> None:
        self.gates = {name: cell["gates"] for name, cell in build["cells"].items()}
        self.has_c = {name: cell["has_c"] for name, cell in build["cells"].items()}
        self.on_cpu = device == "cpu"
        self.isas = build["isas"] if self.on_cpu else ["cuda"]
        self.dtypes = DTYPES[device]
        self.rng = random.Random(seed)

    def option(self, name: str, cell: str, sizes: list[int]) -> Any:
        """Draw the value of an option."""
        rng, T = self.rng, sizes[0]
        if name == "zoneout":
            return [0.25, rng.choice([0.0, 0.4])] if self.has_c[cell] else 0.25
        if name in ("recurrent_dropout", "weight_dropout"):
            return rng.choice([0.3, 0.5])
        if name in ("clip", "cell_clip"):
            return rng.choice([0.25, 0.5, 0.8])
        if name == "bptt":
            return rng.randint(1, max(T, 1))
        return True

    def options_of(self, cell: str) -> list[str]:
        """Return the names of the options that a cell has."""
        has_c: bool = self.has_c[cell]
        names = ["zoneout", "recurrent_dropout", "weight_dropout", "clip", "trace", "bptt"]
        names += ["recompute"] + ["layer_norm"] * (self.gates[cell] > 1)
        of_c = ["peephole", "cell_clip", "return_cells", "projection"]
        return names + of_c * has_c

    def systematic(self) -> Iterator[Case]:
        """Each cell with each option alone, type, instruction set and three shapes."""
        counter = itertools.count()
        alone: list[Case] = [
            {},
            {"training": False, "options": {"zoneout": None}},
            {"lengths": "drawn", "padding": True},
            {"lengths": "full"},
            {"lengths": "none"},
            {"resets": "drawn"},
            {"bias": False},
            {"state": False},
        ]
        for cell, dtype, isa in itertools.product(self.gates, self.dtypes, self.isas):
            lanes = LANES.get(isa, 8) // (1 + (dtype == "float64"))
            shapes = [[5, 3, 4, max(lanes - 1, 1)], [4, 19, 7, 2 * lanes + 1], [7, 6, 33, 37]]
            each: list[Case] = [{"options": {name: None}} for name in self.options_of(cell)]
            for more, sizes in itertools.product(alone + each, shapes):
                n = next(counter)
                options = {
                    name: self.option(name, cell, sizes) for name in more.get("options", {})
                }
                case = {"way": "op", "cell": cell, "dtype": dtype, "isa": isa, "sizes": sizes}
                case |= more | {"seed": n, "threads": 1 + n % 3, "reverse": n // 3 % 2 == 1}
                yield self._complete(case | {"options": options}, n)

    def drawn(self) -> Iterator[Case]:
        """Random combinations without end."""
        rng = self.rng
        for n in itertools.count():
            ways = ("op", "layer", "torch", "stream", "math")
            weights = (40, 30, 22, 8, 0.5) if self.on_cpu else (70, 30, 0, 0, 0)
            way = rng.choices(ways, weights)[0]
            case = {
                "way": way,
                "cell": rng.choice(list(self.gates)),
                "dtype": rng.choice(self.dtypes),
                "isa": rng.choice(self.isas),
                "seed": rng.getrandbits(31),
                "threads": rng.randint(1, 3),
            }
            case["sizes"] = self._sizes(case)
            getattr(self, f"_draw_{way}")(case)
            yield self._complete(case, n)

    def _complete(self, case: Case, n: int) -> Case:
        """Add the device or cache, and leave out what is as usual."""
        if self.on_cpu:
            case["l2"] = CACHES[n % len(CACHES)]
        else:
            case["device"], case["threads"] = "cuda", None
            if n % 2:
                case["exchange"] = ("cluster", "grid", "step")[n // 2 % 3]
        usual = {"training": True, "bias": True, "state": True}
        return {
            k: v
            for k, v in case.items()
            if v is not usual.get(k, False) and v is not None and v != {}
        }

    def _sizes(self, case: Case) -> list[int]:
        """Draw T, B, I and H, mostly small, of products that are not too long."""
        rng = self.rng
        lanes = LANES.get(case["isa"], 8) // (1 + (case["dtype"] == "float64"))
        most = rng.choice([1e7, 1e8, 1e8, 4e8]) if self.on_cpu else 2e5
        if case["isa"] == "portable":
            most /= 3
        if case["threads"] == 3:  # which may be more than there are cores
            most /= 3
        few_rows, empty, long = (rng.random() < share for share in (0.1, 0.01, 0.15))
        shares_work = self.on_cpu and not (few_rows or empty) and rng.random() < 0.7
        while True:
            most *= 1.02  # so that it ends
            kind = rng.random()
            if kind < 0.4:
                H = max(rng.randint(1, 5) * lanes + rng.randint(-1, 1), 1)
            elif kind < 0.65:
                H = rng.choice([1, 2, 3, 5, 7, 11, 13, 23, 29, 37, 41, 43, 53, 61])
            elif kind < 0.9:
                H = rng.randint(64, 130)
            else:
                H = rng.choice([150, 191, 256, 257, 300, 384, 500, 512])
            B = rng.choice([1, 1, 2, 3, 5, 8, rng.randint(4, 20), rng.randint(9, 70)])
            B = rng.randint(200, 600) if rng.random() < 0.1 else B
            T = rng.choice([1, 2, rng.randint(2, 12), rng.randint(2, 12), rng.randint(9, 40)])
            I = rng.choice([1, 2, rng.randint(2, 20), rng.randint(9, 70), rng.randint(9, 70)])
            I = rng.randint(100, 600) if rng.random() < 0.06 else I
            if few_rows:  # weights are not packed
                T, B = rng.choice([(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2)])
            elif empty:
                T, B = rng.choice([(0, 3), (3, 0), (0, 0)])
            elif long and self.on_cpu:  # several stretches of steps
                B = rng.randint(1, 60)
                T = rng.randint(500, 1500) // B + 1
            per_unit = 2 * self.gates[case["cell"]] * H * B
            if 3 * per_unit * (I + H) * T > most:
                continue
            if not shares_work or case["threads"] == 1:
                return [T, B, I, H]
            # What the kernels take more than one thread for.
            if min(per_unit * H / 3e4, per_unit * (I + H) * T / 2.5e5) >= case["threads"]:
                return [T, B, I, H]

    def _draw_options(self, case: Case, most: int = 5) -> None:
        """Draw options, sizes of a projection, and whether random numbers are drawn."""
        names = self.options_of(case["cell"])
        count = min(self.rng.choice([0, 0, 0, 1, 1, 2, 3, most]), len(names))
        case["options"] = {
            name: self.option(name, case["cell"], case["sizes"])
            for name in self.rng.sample(names, count)
        }
        H = case["sizes"][3]
        if "projection" in case["options"]:
            if case["way"] == "layer" and H == 1:
                del case["options"]["projection"]
            else:
                case["R"] = self.rng.choice(
                    [1, H // 2 + 1, max(H - 1, 1), self.rng.randint(1, H)]
                )
                case["R"] = min(case["R"], H - (case["way"] == "layer"))
        case["training"] = self.rng.random() < 0.7

    def _draw_values(self, case: Case) -> None:
        """Draw what the values are like, where they lie, and which gradients there are."""
        rng = self.rng
        case["bias"], case["state"] = rng.random() < 0.8, rng.random() < 0.8
        case["values"] = rng.choice(
            [None] * 5 + ["zeros", "zeros", "large", "tiny", "nan", "inf"]
        )
        if self.on_cpu:
            layouts = ["batch first", "sliced", "second rows", "stepped", "backwards"]
            layouts += ["unaligned", "broadcast", "read-only"]
            case["layout"] = rng.choice([*[None] * 8, *layouts])
        if rng.random() < 0.4:
            count = rng.randint(0, len(GRADIENTS) - 1)
            case["given"] = sorted(rng.sample(GRADIENTS, count))

    def _draw_masks(self, case: Case) -> None:
        rng = self.rng
        if rng.random() < 0.35:
            case["lengths"] = rng.choice(["drawn", "drawn", "drawn", "full", "none", "equal"])
            case["padding"] = rng.random() < 0.6 and case.get("layout") != "broadcast"
        if rng.random() < 0.25:
            case["resets"] = rng.choice(["drawn", "drawn", "first", "all"])

    def _draw_op(self, case: Case) -> None:
        self._draw_options(case)
        self._draw_values(case)
        self._draw_masks(case)
        case["reverse"] = self.rng.random() < 0.5
        case["out"] = self.on_cpu and min(case["sizes"]) > 0 and self.rng.random() < 0.2
        case["unbatched"] = case["sizes"][1] == 1 and self.rng.random() < 0.5

    def _draw_layer(self, case: Case) -> None:
        rng = self.rng
        self._draw_options(case)
        self._draw_values(case)
        self._draw_masks(case)
        case["layers"], case["bidirectional"] = rng.choice([1, 1, 2, 3]), rng.random() < 0.5
        case["batch_first"] = rng.random() < 0.3
        case["unbatched"] = case["sizes"][1] == 1 and rng.random() < 0.5
        case["dropout"] = 0.3 if case["layers"] > 1 and rng.random() < 0.4 else None

    def _draw_torch(self, case: Case) -> None:
        self._draw_layer(case)
        case["sizes"] = [max(size, 1) for size in case["sizes"]]
        case["layout"] = case["dropout"] = None  # which PyTorch draws
        share = self.rng.choice([0.0, 0.3, 0.6, 1.0])
        case["frozen"] = [n for n in ("x", *FROZEN) if self.rng.random() < share]

    def _draw_stream(self, case: Case) -> None:
        self._draw_options(case)
        self._draw_values(case)
        case["layers"] = self.rng.choice([1, 1, 2])
        case["unbatched"] = case["sizes"][1] == 1 and self.rng.random() < 0.5
        case["sizes"][:2] = [max(size, 1) for size in case["sizes"][:2]]
        for name in ("projection", "trace", "return_cells", "bptt", "recompute"):
            case["options"].pop(name, None)

    def _draw_math(self, case: Case) -> None:
        """Draw nothing: the seed says all."""


# The processes


class Worker:
    """A process that runs cases on one build, with one instruction set and size of cache."""

    def __init__(self, command: str, isa: str | None, l2: int | None, flips: bool) -> None:
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        asked = {"ISA": isa, "L2_BYTES": l2, "L1_BYTES": l2 and l2 // 4}
        for name, value in ((f"FUSEDRNN_{name}", value) for name, value in asked.items()):
            environment.pop(name, None)
            if value is not None:
                environment[name] = str(value)
        script = Path(__file__).with_name("same_bits_worker.py")
        self._process = subprocess.Popen(
            [*shlex.split(command), str(script), *["--flip"] * flips],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.is_alive = True
        self.build = self.receive()
        if "error" in self.build:
            raise SystemExit(f"{command} cannot run {script.name}: {self.build['error']}")

    def send(self, case: Case) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # receive() tells why

    def receive(self) -> Answer:
        """Return the answer; one that takes too long or never comes is an error."""
        channel = self._process.stdout
        assert channel
        if select.select([channel], [], [], LIMIT_SECONDS)[0]:
            line = channel.readline()
            if line:
                answer: Answer = json.loads(line)
                return answer
            code = self._process.wait()
            told = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        else:
            told = f"did not answer in {LIMIT_SECONDS} s"
        self.end()
        return {"error": f"the process {told}"}

    def answer(self, case: Case) -> Answer:
        self.send(case)
        return self.receive()

    def end(self) -> None:
        self.is_alive = False
        self._process.kill()
        self._process.wait()


class Builds:
    """The processes of both builds, started when a case needs them."""

    def __init__(self, commands: list[str], flips: bool) -> None:
        self.commands, self.flips = commands, flips
        self._workers: dict[tuple[int, str | None, int | None], Worker] = {}

    def worker(self, build: int, case: Case) -> Worker:
        """Return the process of one build for a case."""
        key = build, case.get("isa"), case.get("l2") if build == 1 else None
        if key[1] == "cuda":
            key = build, None, None
        found = self._workers.get(key)
        if found is None or not found.is_alive:
            found = Worker(self.commands[build], *key[1:], self.flips and build == 1)
            self._workers[key] = found
        return found

    def run(self, case: Case) -> tuple[Answer, Answer]:
        """Return both answers; the builds compute at the same time if on one thread each."""
        workers = [self.worker(build, case) for build in (0, 1)]
        if case.get("threads", 1) > 1:
            before, now = (worker.answer(case) for worker in workers)
            return before, now
        for worker in workers:
            worker.send(case)
        before, now = (worker.receive() for worker in workers)
        return before, now

    def end(self) -> None:
        for worker in self._workers.values():
            worker.end()


# The comparison


def differences(before: Answer, now: Answer, any_nan: bool) -> list[str]:
    """Return what is not the same, in words."""
    if "error" in before or "error" in now:
        told = [answer.get("error", "arrays") for answer in (before, now)]
        return [] if told[0] == told[1] else [f"before: {told[0]}", f"now: {told[1]}"]
    a, b = before["arrays"], now["arrays"]
    if list(a) != list(b):
        return [f"other arrays: before {', '.join(a)}; now {', '.join(b)}"]
    found = []
    for name in a:
        if a[name][1] != b[name][1]:
            found.append(name)
        elif a[name][0] != b[name][0] and not any_nan:
            found.append(f"{name} (only the bits of NaN)")
    return found


def value_of(dtype: str, raw: bytes) -> str:
    """Return a value's bits and what they mean."""
    code = {"<f2": "<e", "<f4": "<f", "<f8": "<d"}.get(dtype)
    meaning = f" = {struct.unpack(code, raw)[0]!r}" if code else ""
    return f"0x{raw[::-1].hex()}{meaning}"


def show_first_differences(before: Answer, now: Answer) -> bool:
    """Print, for each array that is not the same, how many values differ and the first."""
    same = True
    for name, (dtype, shape, data) in before["dumped"].items():
        other_dtype, other_shape, other_data = now["dumped"].get(name, (None, None, ""))
        if (dtype, shape) != (other_dtype, other_shape):
            print(f"{name}: {dtype} {shape} before, {other_dtype} {other_shape} now")
            same = False
            continue
        a, b = base64.b64decode(data), base64.b64decode(other_data)
        item = int(dtype[2:])
        where = [i for i in range(0, len(a), item) if a[i : i + item] != b[i : i + item]]
        if not where:
            continue
        same, at, left = False, list(shape), where[0] // item
        for axis in reversed(range(len(shape))):
            left, at[axis] = divmod(left, shape[axis])
        values = [value_of(dtype, raw[where[0] : where[0] + item]) for raw in (a, b)]
        print(f"{name} {shape}: {len(where)} of {len(a) // item} values differ, first at {at}")
        print(f"  before {values[0]}")
        print(f"  now    {values[1]}")
    return same


def show_case(builds: Builds, case: Case) -> int:
    """Run one case and tell where its arrays differ."""
    before, now = builds.run(case | {"dump": True})
    if "error" in before or "error" in now:
        print(f"before: {before.get('error', 'arrays')}\nnow: {now.get('error', 'arrays')}")
        return int(before != now)
    same = show_first_differences(before, now)
    print("the same bits" if same else f"--case '{json.dumps(case)}'")
    return int(not same)


def shared(cases: list[Case]) -> str:
    """Return what all of these cases have in common."""
    fields = ("way", "cell", "dtype", "isa", "l2", "threads", "reverse", "lengths", "layout")
    same = {k: cases[0].get(k) for k in fields if len({c.get(k) for c in cases}) == 1}
    return ", ".join(f"{k} {v}" for k, v in same.items() if v is not None) or "nothing"


def compare(builds: Builds, arguments: argparse.Namespace) -> int:
    """Run the cases and tell of those that differ; return 1 if any does."""
    before_build, build = (builds.worker(n, {}).build for n in (0, 1))
    build["isas"] = [isa for isa in build["isas"] if isa in before_build["isas"]]
    cases = Cases(build, arguments.device, arguments.seed)
    count = None
    if arguments.minutes is None:
        count = USUAL_CASES[arguments.device] if arguments.cases is None else arguments.cases
    chosen = itertools.chain(
        () if arguments.no_systematic else cases.systematic(),
        itertools.islice(cases.drawn(), count),
    )
    begin, ran, arrays = time.monotonic(), 0, 0
    failed: list[Case] = []
    refused: Counter[str] = Counter()
    for case in chosen:
        seconds = time.monotonic() - begin
        if arguments.minutes is not None and seconds > 60 * arguments.minutes:
            break
        line = json.dumps(case)
        if not all(word in line for word in arguments.only.split()):
            continue
        before, now = builds.run(case)
        ran += 1
        arrays += len(before.get("arrays", ()))
        found = differences(before, now, arguments.any_nan)
        if found:
            failed.append(case)
            print(f"DIFFERENT {'; '.join(found)}\n  --case '{line}'", flush=True)
            if len(failed) == MOST_FAILURES:
                print("and no more are tried")
                break
        elif "error" in before:
            refused[before["error"]] += 1
        if arguments.verbose:
            print(f"{time.monotonic() - begin - seconds:.3f} s {line}", flush=True)
    for error, times in refused.most_common():
        print(f"both refuse {times} cases: {error}")
    seconds = time.monotonic() - begin
    if failed:
        print(f"{len(failed)} of {ran} cases differ; they share {shared(failed)}")
        return 1
    print(f"{ran} cases, {arrays} arrays, the same bits ({seconds:.0f} s)")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="the interpreter of the build to compare with")
    parser.add_argument("now", help="the interpreter of the build to check")
    parser.add_argument("--cases", type=int, help="how many random cases to run")
    parser.add_argument("--minutes", type=float, help="go on for so long instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases")
    parser.add_argument("--only", default="", help="words that the line of a case must have")
    parser.add_argument("--case", type=json.loads, help="run this case alone")
    parser.add_argument("--device", choices=DTYPES, default="cpu")
    parser.add_argument("--any-nan", action="store_true", help="take every NaN for the same")
    parser.add_argument("--no-systematic", action="store_true", help="random cases alone")
    parser.add_argument("--verbose", action="store_true", help="print each case and its time")
    parser.add_argument("--flip", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    builds = Builds([arguments.before, arguments.now], arguments.flip)
    try:
        if arguments.case:
            return show_case(builds, arguments.case)
        return compare(builds, arguments)
    finally:
        builds.end()


if __name__ == "__main__":
    sys.exit(main())
