"""Another build of fusedrnn as a contender, in a process of its own: `--before PYTHON`.

This file is also the program of that process. It runs under the other build's interpreter, but
with this build's cases and forms, so that an older build runs calls that it had no case for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import Case


def bits_of(results: dict[str, Any]) -> str:
    """Return a digest of the bits of results."""
    return hashlib.sha256(b"".join(v.tobytes() for v in results.values())).hexdigest()


class OtherBuild:
    """A run whose calls are made by the process of another build.

    Attributes
    ----------
    bits: `bits_of` its results.
    """

    def __init__(self, command: str, case: Case) -> None:
        self._process = subprocess.Popen(
            [*shlex.split(command), __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.bits = self._ask(asdict(case))

    def __call__(self) -> None:
        """Make a call."""
        self.seconds_of(1)

    def seconds_of(self, calls: int) -> float:
        """Return the seconds of a call, over that many."""
        return float(self._ask(calls))

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError("the other build's process has ended") from None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the other build ended with status {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def _serve() -> None:
    """Prepare a case and time its calls, one JSON value a line."""
    answers, sys.stdout = sys.stdout, sys.stderr
    package = "benchmark_of_this_build"  # fusedrnn itself is the other build
    spec = importlib.util.spec_from_file_location(
        package, Path(__file__).with_name("__init__.py")
    )
    assert spec
    sys.modules[package] = importlib.util.module_from_spec(spec)
    cases = importlib.import_module(f"{package}.cases")
    contenders = importlib.import_module(f"{package}.contenders")
    run: Callable[[], Any] = dict
    for line in sys.stdin:
        question = json.loads(line)
        answer: Any
        if isinstance(question, dict):
            case = cases.Case(**question | {"sizes": tuple(question["sizes"])})
            run = contenders.ours(case, contenders.Inputs.of(case))
            answer = bits_of(run())
        else:
            begin = time.perf_counter()
            for _ in range(question):
                run()
            answer = (time.perf_counter() - begin) / question
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
