"""Test and measure fusedrnn on a machine with a GPU in minutes: what is worth most comes first.

    python bench/gpu/run.py [--out DIR] [--seconds N] [--site DIR] [STAGE …]

The stages, in this order; each takes its share of the time that is left:

    build     the package: --site, if this Python can import it, else built for this card
    smoke     a training step in each exchange, precision and direction, each alone; σ and tanh
    meetings  what it costs blocks to meet, with what they send (meetings.cu)
    plans     recurrences of many layers by many plans; costs fitted to them (plans.py, fit.py)
    race      `fusedrnn bench --device cuda`: against PyTorch's layers, which are cuDNN's
    profile   Nsight Compute's report of a forward and a backward recurrence
    tests     pytest -m gpu, with a time limit for each
    memcheck  compute-sanitizer on small layers
    options   `fusedrnn bench` again: what options cost

DIR (build/gpu-results) gets eight files: results.jsonl, to which every result is appended at
once, race.json and .md, options.json and .md, costs.inc, profile.ncu-rep, and logs.tar.gz. A
stage that fails, crashes or takes too long is noted, and the next one runs. The status is 1 if
something was wrong, not if something is missing or slow.

Python needs NumPy; race and options PyTorch for CUDA and rich; fit SciPy; tests pytest,
pytest-xdist, pytest-timeout and hypothesis. bench/gpu/carry.sh builds a --site on another
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent

# Shares of the time, in seconds of eight minutes.
SHARES = {
    "build": 15,
    "smoke": 25,
    "meetings": 15,
    "plans": 145,
    "race": 90,
    "profile": 30,
    "tests": 100,
    "memcheck": 30,
    "options": 30,
}
BUILD_SECONDS = 240  # where the package has to be built
EXCHANGES = ("cluster", "grid", "step")
PRECISIONS = ("bfloat16", "float16", "float32", "tf32", "float64")
WAIT_LIMIT = 4  # seconds that blocks wait for each other in a build that is made here
LOGGED_BYTES = 1 << 20  # of each log in the archive: its end


class Script:
    """The stages, the clock and the results."""

    def __init__(self, request: argparse.Namespace, work: Path) -> None:
        self.request = request
        self.begin = time.monotonic()
        self.out: Path = request.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.work = work
        self.logs = work / "logs"
        self.logs.mkdir()
        self.results = self.out / "results.jsonl"
        self.results.unlink(missing_ok=True)
        self.site: Path = request.site.resolve()
        self.table: list[str] = []
        self.wrong = False
        self.waiting = [name for name in SHARES if name in ("build", *request.stages)]
        # A driver that no process uses may take seconds to start again.
        with contextlib.suppress(OSError):
            self.device = os.open("/dev/nvidia0", os.O_RDWR)

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.begin

    def left(self) -> float:
        """Return the seconds that are left."""
        return max(self.request.seconds - self.seconds(), 1)

    def append(self, **line: object) -> None:
        """Append a result."""
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def note(self, name: str, text: str) -> None:
        """Add a line to the table."""
        self.table.append(f"{name:<10} {text}")
        print(f"[{self.seconds():3.0f} s] {name}: {text}", flush=True)

    # Processes

    def environment(self) -> dict[str, str]:
        """Return the environment in which the package and its libraries are found."""
        own = [str(self.site)] if self.site.is_dir() else []
        libraries = [str(self.site / "lib")]
        nvidia = importlib.util.find_spec("nvidia")
        for root in (nvidia.submodule_search_locations or ()) if nvidia else ():
            libraries += map(str, Path(root).glob("*/lib"))
        compiler = shutil.which("nvcc")
        if compiler:
            libraries.append(str(Path(compiler).resolve().parent.parent / "lib64"))

        def joined(first: list[str], name: str) -> str:
            return os.pathsep.join([*first, *filter(None, [os.environ.get(name)])])

        return os.environ | {
            "PYTHONPATH": joined(own, "PYTHONPATH"),
            "LD_LIBRARY_PATH": joined(libraries, "LD_LIBRARY_PATH"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def run(self, name: str, limit: float, *command: object, **variables: str) -> str:
        """Run a command with its output in a log; return "" or what went wrong."""
        words = [str(word) for word in command]
        spoilt = self.request.spoil.get(name.partition("-")[0])
        if spoilt:
            action = {"crash": "kill -SEGV $$", "hang": "sleep 600", "fail": "exit 7"}[spoilt]
            words = ["sh", "-c", action]
        with (self.logs / f"{name}.log").open("ab") as log:
            log.write((" ".join(words) + "\n").encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    words,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=self.environment() | variables,
                    cwd=PROJECT,
                    start_new_session=True,
                )
            except OSError as error:
                return f"cannot be run: {error}"
            status = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(limit)
                if status is None:  # what pytest and the benchmark have, they write now
                    process.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(min(5, limit))
            finally:  # what it started may still run
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        if status is None:
            return f"no end within {limit:.0f} s"
        return "" if status == 0 else f"status {status}"

    def last_line(self, name: str) -> str:
        """Return the last line of a log that has text."""
        lines = (self.logs / f"{name}.log").read_text("utf-8", "replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:100]

    def python(self, name: str, limit: float, *command: object, **variables: str) -> str:
        """Run Python."""
        return self.run(name, limit, sys.executable, *command, **variables)

    # Stages

    def build(self, limit: float) -> str:
        """Find or build the package, and append what the device is."""
        check = [HERE / "smoke.py", self.results, "device"]
        if self.site.is_dir():
            problem = self.python("build-check", max(limit, min(60, self.left())), *check)
            # Building helps where the package cannot be imported, not where the GPU fails.
            builds = problem.startswith("status") and problem != "status 4"
            if not builds or self.request.small:
                return problem and f"{problem}: {self.last_line('build-check')}"
        self.site = self.work / "site"
        architecture = self.architecture()
        problem = self.python(
            "build-pip",
            min(BUILD_SECONDS, self.left()),
            *["-m", "pip", "install", "--disable-pip-version-check", "--no-index"],
            *["--no-build-isolation", "--no-deps", "--upgrade", "--target", self.site],
            *["-C", "cmake.define.FUSEDRNN_CUDA=ON"],
            *["-C", "cmake.define.FUSEDRNN_ISAS=portable"],
            *["-C", f"cmake.define.FUSEDRNN_WAIT_LIMIT={WAIT_LIMIT}"],
            *["-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}-real", "."],
            CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count() or 1),
            CMAKE_GENERATOR="Ninja",
        )
        return problem or self.python("build-check", 60, *check)

    def architecture(self) -> str:
        """Return the card's architecture as nvcc names it."""
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            number = found.split()[0].replace(".", "")
        except (OSError, subprocess.CalledProcessError, IndexError):
            number = "90"
        return "90a" if number == "90" else number

    def smoke(self, limit: float) -> str:
        """Run each exchange, precision and direction in a process of its own."""
        tasks = [("math",)]
        for precision, direction in itertools.product(PRECISIONS, ("forward", "backward")):
            tasks += [(exchange, precision, direction) for exchange in EXCHANGES]
        if self.request.small:
            tasks = tasks[:3]
        end = time.monotonic() + limit

        def one(task: tuple[str, ...]) -> str:
            name = "-".join(("smoke", *task))
            seconds = min(15.0, end - time.monotonic())
            if seconds <= 0:
                return "not begun"
            problem = self.python(name, seconds, HERE / "smoke.py", self.results, *task)
            if problem:
                last = self.last_line(name)
                self.append(stage="smoke", task=" ".join(task), failed=f"{problem}: {last}")
            return problem

        with ThreadPoolExecutor(8) as pool:
            problems = dict(zip(tasks, pool.map(one, tasks), strict=True))
        late = sum(problem == "not begun" for problem in problems.values())
        failed = [" ".join(task) for task, problem in problems.items() if problem]
        shown = ", ".join(failed[:4]) + (", …" if len(failed) > 4 else "")
        text = f"{len(failed) - late} of {len(tasks)} failed, {late} not begun: {shown}"
        return text if failed else ""

    def meetings(self, limit: float) -> str:
        """Measure meetings, whose program is built if --site has none."""
        program = self.work / "meetings"
        if (self.site / "meetings").exists():
            shutil.copy(self.site / "meetings", program)
            program.chmod(0o755)
        else:
            architecture = self.architecture()
            problem = self.run(
                "meetings-build",
                60,
                *["nvcc", "-O3", "-std=c++20", HERE / "meetings.cu", "-o", program],
                *["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"],
            )
            if problem:
                return f"its program was not built: {problem}"
        command = f'"{program}" >>"{self.results}"'
        return self.run("meetings", limit, "bash", "-c", command)

    def plans(self, limit: float) -> str:
        """Measure plans; a process that lost the device is followed by another."""
        end = time.monotonic() + limit
        small = ["--small"] if self.request.small else []
        problem, attempts = "", 0
        while attempts < 20 and (seconds := end - 15 - time.monotonic()) > 0:
            attempts += 1
            command = [HERE / "plans.py", self.results, f"{seconds:.1f}", *small]
            problem = self.python("plans", seconds + 5, *command)
            if not problem.startswith("status"):
                break  # else a plan cost its process, and the next one is for the others
        fit = [HERE / "fit.py", self.results, "--write", self.out / "costs.inc"]
        unfitted = self.python("plans-fit", max(end - time.monotonic(), 5), *fit)
        lost = f"the process was lost {attempts - 1} times" if attempts > 1 else ""
        unfitted = unfitted and f"no costs were fitted: {unfitted}"
        return "; ".join(filter(None, (problem, lost, unfitted)))

    def bench(self, name: str, limit: float, *arguments: object) -> str:
        """Run the benchmark for most of the time."""
        budget = max(limit - 25, 5)
        small = ["--shapes", "6,3,8,16", "--seconds", "0.01"] if self.request.small else []
        return self.python(
            name,
            limit,
            *["-m", "fusedrnn", "bench", "--device", "cuda", "--budget", f"{budget:.0f}"],
            *[
                "--cells",
                "LSTM",
                "GRU",
                "--json",
                self.out / f"{name}.json",
                "--report",
                self.out / f"{name}.md",
            ],
            *arguments,
            *small,
        )

    def race(self, limit: float) -> str:
        """Race against PyTorch."""
        dtypes = ["bfloat16", "float16", "float32"]
        suite = [] if self.request.small else ["--suite", "shapes"]
        return self.bench("race", limit, *suite, "--dtypes", *dtypes)

    def options(self, limit: float) -> str:
        """Measure what options cost."""
        return self.bench("options", limit, "--suite", "options", "--dtypes", "bfloat16")

    def profile(self, limit: float) -> str:
        """Profile H = 768 with Nsight Compute."""
        if not shutil.which("ncu"):
            return "not run: ncu is not on the PATH"
        report = self.out / "profile.ncu-rep"
        small = ["--small"] if self.request.small else []
        problem = self.run(
            "profile",
            limit,
            *["ncu", "--clock-control", "none", "--set", "full", "-f", "-o", report],
            *["--kernel-name-base", "demangled", "-k", "regex:Recurrence"],
            *["--launch-skip", "2", "--launch-count", "2"],
            *[sys.executable, HERE / "profiled.py", *small],
        )
        details = ["ncu", "--import", report, "--page", "details"]
        return problem or self.run("profile-details", 30, *details)

    def tests(self, limit: float) -> str:
        """Run the tests, in processes that a lost device ends."""
        chosen = ["-k", "integers or whole_range"] if self.request.small else []
        return self.python(
            "tests",
            limit,
            *["-m", "pytest", "-q", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider"],
            *["-p", "xdist.plugin", "-p", "pytest_timeout", "-n", min(8, os.cpu_count() or 1)],
            *["-W", "default", "--max-worker-restart", "50"],
            *chosen,
            *sorted((PROJECT / "tests").glob("test_cuda*.py")),
            PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        )

    def memcheck(self, limit: float) -> str:
        """Look for accesses beyond arrays."""
        if not shutil.which("compute-sanitizer"):
            return "not run: compute-sanitizer is not on the PATH"
        checker = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no"]
        small = [PROJECT / "tests" / "gpu_small.py"]
        return self.run(
            "memcheck", limit, *checker, "--error-exitcode", "9", sys.executable, *small
        )

    def archive(self) -> None:
        """Pack the logs, so that there are eight files to copy."""
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            for log in sorted(self.logs.glob("*.log")):
                text = log.read_bytes()[-LOGGED_BYTES:]
                info = tarfile.TarInfo(log.name)
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text))
        for unfinished in self.out.glob("*.part"):
            unfinished.unlink()

    def go(self) -> int:
        """Run all stages; return the exit status."""
        works = True
        while self.waiting:
            name = self.waiting[0]
            share = self.left() * SHARES[name] / sum(SHARES[n] for n in self.waiting)
            self.waiting.pop(0)
            begin = time.monotonic()
            if works or name == "meetings":
                try:
                    problem = getattr(self, name)(share)
                except Exception as error:  # a fault here must not cost the other stages
                    problem = f"{type(error).__name__}: {error}"
            else:
                problem = "not run: the package was not built"
            took = time.monotonic() - begin
            self.append(stage=name, problem=problem, took=round(took, 1), share=round(share, 1))
            self.note(name, f"{problem or 'good'} ({took:.0f} of {share:.0f} s)")
            missing = problem.startswith(("not run", "no end"))
            self.wrong |= bool(problem) and not missing
            works &= name != "build" or not problem
            self.archive()
        return 1 if self.wrong else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PROJECT / "build" / "gpu-results")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--site", type=Path, default=PROJECT / "build" / "gpu-site")
    # For rehearsals: small sizes, and stages that crash, hang or fail.
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--spoil", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("stages", nargs="*", metavar="STAGE", default=list(SHARES))
    request = parser.parse_args()
    for name in request.stages:
        if name not in SHARES:
            parser.error(f"STAGE must be among {', '.join(SHARES)}, got {name}")
    request.spoil = dict(word.split("=") for word in request.spoil)
    return request


def main() -> int:
    """Run the stages, and show what came of them."""
    request = parse()
    with tempfile.TemporaryDirectory() as work:
        script = Script(request, Path(work))
        status = script.go()
    print()
    for name in ("race.md", "options.md"):
        path = script.out / name
        if path.exists():
            print(path.read_text("utf-8"))
    print(*script.table, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
