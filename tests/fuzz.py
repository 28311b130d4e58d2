"""Calls fusedrnn at random and compares with the reference, in a process that may crash.

python tests/fuzz.py --seconds 60         for a minute, from a new seed
python tests/fuzz.py --calls 1000000      as many calls
python tests/fuzz.py --case 7:1234        what the number 1234 of the seed 7 draws
python tests/fuzz.py --case 7:1200-1234   all of these in one process
python tests/fuzz.py --kinds op layer     only these kinds of calls

Everything that a number draws follows from the seed and the number. A failure is printed with
the command that repeats it. Failures are a result off the reference or with other bits, a wrong
argument that no sentence refuses by its name, a crash, and an answer that takes too long. The
exit status is 1 after a failure. `tests/sanitize.sh asan` runs it on a build with sanitizers.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import random
import secrets
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from typing import Any

# The kinds of scenes: the module that has the function <kind>_scene, and its share.
KINDS = {
    "op": ("fuzz_calls", 30),
    "layer": ("fuzz_layers", 20),
    "stream": ("fuzz_layers", 12),
    "narrow": ("fuzz_layers", 10),
    "wrong": ("fuzz_wrong", 13),
    "torch": ("fuzz_torch", 15),
}
MOST_FAILURES = 20
IN_A_PROCESS = 10_000  # numbers
CACHES = (None, 4096, 65536)  # with small ones, small shapes reach every order of tiles


def environment(seed: int, number: int) -> dict[str, str]:
    """The environment of the process for a number."""
    rng = random.Random(f"{seed}:{number // IN_A_PROCESS}")
    made = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    if l2 := rng.choice(CACHES):
        made |= {"FUSEDRNN_L1_BYTES": str(l2 // 4), "FUSEDRNN_L2_BYTES": str(l2)}
    made["FUSEDRNN_FIXED_THREADS"] = rng.choice("011")
    return made


class Worker:
    """A process that runs the numbers from `first` to `last`, one answer each."""

    def __init__(self, options: argparse.Namespace, first: int, last: int) -> None:
        command = [sys.executable, __file__, "--worker", f"{options.seed}:{first}-{last}"]
        command += ["--kinds", *options.kinds]
        command += ["--plant", options.plant] if options.plant else []
        self._limit = options.limit
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            bufsize=0,  # so that select() knows of every answer
            env=environment(options.seed, first),
        )
        assert self._process.stdout
        self._process.stdout.readline()  # it has started

    def receive(self) -> dict[str, Any]:
        """Return the next answer; if there is none, the failure in words."""
        channel = self._process.stdout
        assert channel
        if not select.select([channel], [], [], self._limit)[0]:
            return {"failure": f"no answer in {self._limit:g} s", "ended": True}
        line = channel.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return {"failure": f"the process {how}", "ended": True}

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def run(options: argparse.Namespace, first: int, last: float) -> int:
    """Run the numbers until `last`, the time or the calls are over; print what came of them."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin, number = time.monotonic(), first
    total: Counter[str] = Counter()
    worker = None
    try:
        while number <= last and total["failures"] < MOST_FAILURES:
            of_process = min(last, (number // IN_A_PROCESS + 1) * IN_A_PROCESS - 1)
            worker = worker or Worker(options, number, int(of_process))
            answer = worker.receive()
            for key in ("good", "refused"):
                total[key] += answer.get(key, 0)
            total["numbers"] += 1
            if "failure" in answer:
                total["failures"] += 1
                print(f"FAILURE {answer['failure']}", flush=True)
                print(f"  python tests/fuzz.py --case {options.seed}:{number}", flush=True)
            if "ended" in answer or number == of_process:
                worker.end()
                worker = None
            number += 1
            calls, seconds = total["good"] + total["refused"], time.monotonic() - begin
            if calls >= options.calls or seconds >= options.seconds:
                break
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        if worker:
            worker.end()
    calls, seconds = total["good"] + total["refused"], time.monotonic() - begin
    print(
        f"{calls} calls from {total['numbers']} numbers of seed {options.seed}: "
        f"{total['good']} good, {total['refused']} refused, {total['failures']} failures "
        f"({seconds:.0f} s)"
    )
    return int(total["failures"] > 0)


def kind_of(seed: int, number: int) -> str:
    """Return the kind of a number."""
    drawn = random.Random(f"kind {seed}:{number}")
    return drawn.choices(list(KINDS), [share for _, share in KINDS.values()])[0]


def plant(fault: str) -> None:
    """Commit a fault, to try the parent process."""
    if fault == "abort":
        os.abort()
    if fault == "hang":
        time.sleep(3600)


def run_number(seed: int, number: int, kind: str) -> dict[str, Any]:
    """Make the calls of a number; return how many, and the failure if there is one."""
    calls: Any = importlib.import_module("fuzz_calls")
    scene = getattr(importlib.import_module(KINDS[kind][0]), f"{kind}_scene")
    draw, answer = calls.Draw(seed, number), {}
    try:
        with warnings.catch_warnings(), calls.np.errstate(all="ignore"):
            warnings.simplefilter("error")
            scene(draw)
    except Exception:
        answer["failure"] = f"{kind}: {traceback.format_exc()}"
    return answer | {"good": draw.good, "refused": draw.refused}


def work(seed: int, first: int, last: int, kinds: list[str], planted: str) -> None:
    """Run numbers and answer with a line for each."""
    faulthandler.enable()
    channel, sys.stdout = sys.stdout, sys.stderr
    print(file=channel, flush=True)
    fault, _, at = planted.partition(":")
    for number in range(first, last + 1):
        if fault and number == int(at):
            plant(fault)
        kind = kind_of(seed, number)
        answer = run_number(seed, number, kind) if kind in kinds else {}
        print(json.dumps(answer), file=channel, flush=True)


def case(text: str) -> tuple[int, int, int]:
    """Read SEED:NUMBER or SEED:FIRST-LAST."""
    seed, _, numbers = text.partition(":")
    first, _, last = numbers.partition("-")
    return int(seed), int(first), int(last or first)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after so long"
    )
    parser.add_argument("--calls", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--seed", type=int, help="of all choices; a new one if left out")
    parser.add_argument("--first", type=int, default=0, help="the number to begin with")
    parser.add_argument("--case", type=case, help="SEED:NUMBER or SEED:FIRST-LAST")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one number")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--worker", type=case, help=argparse.SUPPRESS)
    parser.add_argument("--plant", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        seed, first, last = options.worker
        work(seed, first, last, options.kinds, options.plant)
        return 0
    if options.case:
        options.seed, first, last = options.case
        return run(options, first, last)
    if options.seed is None:
        options.seed = secrets.randbelow(10**6)
    print(f"seed {options.seed}", flush=True)
    return run(options, options.first, float("inf"))


if __name__ == "__main__":
    sys.exit(main())
