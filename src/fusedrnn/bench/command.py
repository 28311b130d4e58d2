"""`fusedrnn bench`: choose the cases, run them, show and keep what was measured."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable

import fusedrnn as fr

from .. import floor, machine
from ..files import UserError, check_output, writing
from . import narrow, race
from .cases import DTYPES, GPU_SUITES, MODES, NAMED, SUITES, WEIGHTS, Case, Suite, cases_of
from .contenders import CONTENDERS, PEERS, missing
from .forms import FORMS, OPTIONS, Sizes
from .race import Result
from .tables import Table, comparison, tables

FORMAT = 1  # of the JSON
LARGEST = 1 << 30  # elements of an array
# Options of the command that choose cases.
_OF_CASES = (
    "shapes",
    "forms",
    "compare",
    "before",
    "against",
    "dtypes",
    "weights",
    "modes",
    "threads",
    "budget",
)
_ROUNDED = ("float32", "torch-float32")  # contenders for cases of bfloat16
_HAVE_OPTIONS = ("plain", "compiled")  # contenders for the forms with an option

Measure = Callable[[Case, Sequence[str]], Result]


@dataclass(frozen=True)
class Request:
    """The options of the command line, None where one is not given."""

    suite: str
    device: str
    cells: Sequence[str]
    modes: Sequence[str] | None
    dtypes: Sequence[str] | None
    weights: Sequence[str] | None
    shapes: Sequence[str] | None
    forms: Sequence[str] | None
    only: str
    seconds: float | None
    budget: float | None
    threads: Sequence[int] | None
    against: Sequence[str] | None
    before: str
    json: Path | None
    html: Path | None
    report: Path | None
    compare: Path | None


def run(request: Request) -> int:
    """Run the command; return its exit status, 1 if a result was wrong, 130 if interrupted."""
    properties = _properties(request)
    cases = [] if request.suite == "properties" else _cases(request)
    names = _contenders(request)
    for option, path in (
        ("json", request.json),
        ("html", request.html),
        ("report", request.report),
    ):
        if path:
            check_output(f"--{option}", path, {"report": ".md"}.get(option, f".{option}"))
    earlier = _earlier(request.compare) if request.compare else None
    if request.html:
        from . import page  # noqa: F401  a missing package is reported before any work

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    versions = machine.versions((*names, "numpy"))
    about = [
        machine.summary(),
        " · ".join([f"fusedrnn {fr.__version__}", *versions, *commit()]),
    ]
    for line in about:
        console.print(line, highlight=False)
    rates: dict[str, Any] | None = None
    with contextlib.ExitStack() as stack:
        if request.device == "cpu":
            threads = max((case.threads for case in cases), default=machine.cores())
            rates = floor.rates(threads)
            about.append(floor.summary(rates))
            seconds = request.seconds or (_suite(request).seconds if cases else 0.0)
            measure: Measure = partial(race.measure, seconds=seconds, before=request.before)
        else:
            card, measure = _on_gpu(request, stack)
            about.append(card)
        console.print(about[-1], highlight=False)

        measured: dict[str, Any] = {
            "format": FORMAT,
            "when": time.strftime("%Y-%m-%d %H:%M"),
            "suite": request.suite,
            "about": about,
            "config": fr.show_config("dict"),
            "rates": rates,
            "cases": [],
            "tables": [],
            "left out": {},
            "interrupted": True,
        }
        names_of = partial(_contenders_of, names=names, before=request.before)
        done = _measure(cases, names_of, measured, console, measure, request)
    for name in properties if done else ():
        try:
            table = run_property(name, request.seconds)
        except KeyboardInterrupt:
            done = False
            break
        except (ModuleNotFoundError, RuntimeError) as failure:
            measured["left out"][name] = str(failure)
            console.print(f"Left out {name}: {failure}", highlight=False)
            continue
        _print(table, console)
        measured["tables"].append(asdict(table))
    measured["interrupted"] = not done
    _show(measured, earlier, console)
    _keep(measured, earlier, request, console)
    if measured["interrupted"]:
        return 130
    return 1 if any(result["wrong"] for result in measured["cases"]) else 0


def commit() -> list[str]:
    """Return ["commit X"] if the working directory is a checkout of the project."""
    project = Path("pyproject.toml")
    if not project.is_file() or 'name = "fusedrnn"' not in project.read_text("utf-8"):
        return []
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [f"commit {found.stdout.strip()}"]


def _on_gpu(request: Request, stack: contextlib.ExitStack) -> tuple[str, Measure]:
    """Return the GPU in words, and the function that measures a case on it."""
    from . import gpu
    from .worker import Worker

    worker = Worker()
    stack.callback(worker.stop)
    try:
        card = worker.ask("describe_card", seconds=60.0)
    except RuntimeError as failure:
        raise UserError(f"--device cuda: the GPU cannot be used: {failure}") from None
    seconds = request.seconds or _suite(request).seconds

    def measure(case: Case, names: Sequence[str]) -> Result:
        result = worker.measure(case, list(names), seconds)
        if not case.form:
            result["floor"] = gpu.floor_seconds(case, card)
        return result

    return str(card), measure


def _properties(request: Request) -> list[str]:
    """Return the names of the properties to measure."""
    if request.suite != "properties":
        return []
    for option in _OF_CASES:
        if getattr(request, option) not in (None, ""):
            raise UserError(
                f"--{option} is for cases, which the suite properties does not have"
            )
    if request.device == "cuda":
        raise UserError("--suite properties can only be measured on the CPU")
    from . import properties

    wanted = _pattern(request.only)
    found = [name for name in properties.PROPERTIES if wanted.search(name)]
    if not found:
        known = ", ".join(properties.PROPERTIES)
        raise UserError(f"--only must match one of {known}, got {request.only}")
    return found


def _pattern(only: str) -> re.Pattern[str]:
    try:
        return re.compile(only)
    except re.error as error:
        raise UserError(f"--only must be a regular expression, got {only}: {error}") from None


def run_property(name: str, seconds: float | None) -> Table:
    """Return the table of a property."""
    from . import properties

    return properties.measure(name, seconds)


def _cases(request: Request) -> list[Case]:
    if request.device == "cuda":
        if not fr.cuda.is_available():
            raise UserError(f"--device cuda: there is no GPU to use: {fr.cuda.status()}")
        if missing("torch"):
            raise UserError(
                '--device cuda needs torch; install it with: pip install "fusedrnn[peers]"'
            )
        if "streaming" in (request.modes or ()):
            raise UserError("--modes streaming can only be measured on the CPU")
    known = DTYPES[request.device]
    dtypes = request.dtypes or (
        _suite(request).dtypes if request.device == "cpu" else known[:1]
    )
    for dtype in dtypes:
        if dtype not in known:
            raise UserError(
                f"--dtypes must be among {', '.join(known)} on {request.device}, got {dtype}"
            )
    threads = request.threads
    if threads is None:
        threads = sorted({1, machine.cores()})
    elif max(threads) > machine.cores():
        raise UserError(
            f"--threads must be at most the {machine.cores()} available cores, "
            f"got {max(threads)}"
        )
    shapes = {text: _sizes(text) for text in request.shapes or ()}
    for form in request.forms or ():
        if form not in FORMS:
            known_forms = ", ".join(filter(None, FORMS))
            raise UserError(f"--forms must be among {known_forms}, got {form}")
    weights = request.weights
    for name in weights or ():
        if name not in WEIGHTS:
            raise UserError(f"--weights must be among {', '.join(WEIGHTS)}, got {name}")
    if weights and (request.device != "cpu" or tuple(dtypes) != ("float32",)):
        raise UserError("--weights can only be measured on the CPU, with float32")
    cases = cases_of(
        _suite(request),
        request.cells,
        request.modes or (MODES if request.device == "cpu" else MODES[:2]),
        dtypes,
        threads if request.device == "cpu" else (1,),
        shapes,
        request.device,
        request.forms,
        weights,
    )
    wanted = _pattern(request.only)
    found = [case for case in cases if wanted.search(str(case))]
    if not found:
        raise UserError(
            f"--only {request.only} matches the name of none of {len(cases)} cases, such as "
            f"{cases[0]}"
            if cases
            else "--cells, --modes and --forms leave no case"
        )
    if missing("torch"):
        possible = [case for case in found if case.interface != "torch"]
        if not possible:
            raise UserError(
                'these cases need torch; install it with: pip install "fusedrnn[peers]"'
            )
        return possible
    return found


def _suite(request: Request) -> Suite:
    suites = GPU_SUITES if request.device == "cuda" else SUITES
    if request.suite not in suites:
        raise UserError(
            f"--suite must be one of {', '.join(suites)} on {request.device}, "
            f"got {request.suite}"
        )
    return suites[request.suite]


def _sizes(text: str) -> Sizes:
    if text in NAMED:
        return NAMED[text]
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", text):
        raise UserError(
            f"--shapes must be T,B,I,H (such as 96,64,7,64) or a name among "
            f"{', '.join(NAMED)}, got {text}"
        )
    T, B, I, H = map(int, text.split(","))
    if max(T * B * max(I, 4 * H), 4 * H * max(I, H)) > LARGEST:
        raise UserError(f"--shapes {text}: no array may have more than {LARGEST} elements")
    return T, B, I, H


def _contenders(request: Request) -> list[str]:
    """Return the named contenders, or the suite's, or the installed peers and reference."""
    if request.suite == "properties":
        return []
    suite = _suite(request).against
    if request.before and request.device == "cuda":
        raise UserError("--before can only be used on the CPU")
    if request.before:
        _check_build(request.before)
    if request.before and request.against is None:
        return ["plain"] if suite == ("plain",) else []
    if request.device == "cpu":
        offered = tuple(name for name in CONTENDERS if name not in ("ours", *_ROUNDED))
        if _has_narrow(request):
            offered += ("float32", *narrow.CONTENDERS)
        if _has_bfloat16(request):
            offered += _ROUNDED
    else:
        offered = ("torch", "plain")
    if request.against is None:
        usual = suite or ((*PEERS, "reference") if request.device == "cpu" else ("torch",))
        if _has_narrow(request):
            usual = (*PEERS, "float32", *narrow.CONTENDERS)
        if _has_bfloat16(request):
            usual = ("torch", *_ROUNDED)
        return [name for name in usual if not missing(name)]
    for name in request.against:
        if name not in offered:
            raise UserError(
                f"--against must be among {', '.join(offered)} on {request.device}, got {name}"
            )
        if missing(name):
            raise UserError(
                f"--against {name} needs {' and '.join(missing(name))}; install it with: "
                'pip install "fusedrnn[peers]"'
            )
    impossible = [name for name in request.against if name not in _HAVE_OPTIONS]
    if impossible and request.forms and set(request.forms) <= set(OPTIONS):
        raise UserError(
            f"--against must be among {', '.join(_HAVE_OPTIONS)} for the forms "
            f"{', '.join(request.forms)}, got {impossible[0]}"
        )
    return list(dict.fromkeys(request.against))


def _has_narrow(request: Request) -> bool:
    """Whether cases have narrow weights."""
    return bool(request.weights or any(_suite(request).weights))


def _has_bfloat16(request: Request) -> bool:
    """Whether cases on the CPU have arrays of bfloat16."""
    dtypes = request.dtypes or _suite(request).dtypes
    return request.device == "cpu" and "bfloat16" in dtypes


def _check_build(command: str) -> None:
    """Raise UserError if a command is not a Python that imports fusedrnn."""
    try:
        test = [*shlex.split(command), "-c", "import fusedrnn"]
        done = subprocess.run(test, capture_output=True, text=True, check=False)
        why = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
    except (OSError, ValueError) as error:
        done, why = None, str(error)
    if done is None or done.returncode:
        raise UserError(
            f"--before must be a Python that imports fusedrnn, got {command}: {why}"
        )


def _contenders_of(case: Case, names: Sequence[str], before: str) -> list[str]:
    """Return the contenders that can run a case; an option is compared with none."""
    if case.form not in OPTIONS:
        return list(names)
    return [n for n in names if n in _HAVE_OPTIONS] or ([] if before else ["plain"])


def _earlier(path: Path) -> dict[str, Any]:
    try:
        measured = json.loads(path.read_text("utf-8"))
        if measured["format"] != FORMAT:
            raise UserError(
                f"--compare must be a file of format {FORMAT}, got {measured['format']}: {path}"
            )
        for result in measured["cases"]:
            _check_result(result)
        comparison(measured["cases"], measured["cases"])
    except OSError as error:
        raise UserError(f"--compare cannot be read, {error.strerror}: {path}") from None
    except UserError:
        raise
    except Exception:  # JSON of any other form
        raise UserError(
            f"--compare must be a file that --json of this command wrote, got {path}"
        ) from None
    return dict(measured)


def _check_result(result: dict[str, Any]) -> None:
    """Raise an error unless the times of a result can be compared."""
    for quartiles in (*result["seconds"].values(), *result["ratios"].values()):
        if len(quartiles) != 3 or not all(0 < float(n) < math.inf for n in quartiles):
            raise ValueError(f"quartiles must be three positive numbers, got {quartiles}")


def _measure(
    cases: Sequence[Case],
    names_of: Callable[[Case], Sequence[str]],
    measured: dict[str, Any],
    console: Console,
    measure: Measure,
    request: Request,
) -> bool:
    """Append and keep each result when it is known; return False if interrupted."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    disable = not console.is_terminal
    begin = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task("", total=len(cases))
        try:
            for n, case in enumerate(cases):
                if request.budget and time.monotonic() - begin > request.budget:
                    measured["left out"] |= dict.fromkeys(
                        map(str, cases[n:]), "the time was over"
                    )
                    console.print(f"Left out {len(cases) - n} cases: the time was over.")
                    break
                progress.update(task, description=str(case))
                if disable:
                    console.print(f"{n + 1}/{len(cases)} {case}", highlight=False)
                try:
                    measured["cases"].append(measure(case, names_of(case)))
                except (MemoryError, TimeoutError, RuntimeError) as failure:
                    measured["left out"][str(case)] = str(failure)
                    console.print(f"Left out {case}: {failure}", highlight=False)
                if request.json:
                    _write_json(measured, request.json)
                progress.advance(task)
        except KeyboardInterrupt:
            return False
        finally:
            fr.set_num_threads(0)
    return True


def _show(measured: dict[str, Any], earlier: dict[str, Any] | None, console: Console) -> None:
    for table in tables(measured["cases"]):
        _print(table, console)
    if any(result["ratios"] for result in measured["cases"]):
        console.print(
            "\n×: a contender's time over ours, ± half the distance of the quartiles over "
            "rounds, ~ where 1 lies between them; floor: the least time possible over ours.",
            highlight=False,
            style="dim",
        )
    if earlier:
        _print(comparison(earlier["cases"], measured["cases"]), console)
        if earlier["about"][0] != measured["about"][0]:
            console.print(
                f"The earlier run was on another machine or build: {earlier['about'][0]}",
                highlight=False,
            )
    if measured["interrupted"]:
        console.print(f"Interrupted after {len(measured['cases'])} cases.", highlight=False)


def _tables(measured: dict[str, Any]) -> list[Table]:
    return [*tables(measured["cases"]), *(Table(**table) for table in measured["tables"])]


def _print(table: Table, console: Console) -> None:
    """Print a table, without its last columns if the terminal is too narrow."""
    for dropped in range(3):
        shown = RichTable(
            title=table.title,
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
        )
        kept = len(table.columns) - dropped
        for n, column in enumerate(table.columns[:kept]):
            shown.add_column(column, justify="right" if n else "left", no_wrap=True)
        for row in table.rows:
            shown.add_row(*(_short(cell) for cell in row[:kept]))
        endless = console.options.update_width(10_000)
        if Measurement.get(console, endless, shown).maximum <= console.width:
            break
    console.print()
    console.print(shown)
    for note in table.notes:
        console.print(
            note, highlight=False, style="bold red" if note.startswith("WRONG") else "dim"
        )


def _short(cell: str) -> str:
    """Shorten a ratio: ± half the distance of its quartiles, ~ if it is not resolved."""
    found = re.fullmatch(r"(\S+) \((\S+)–(\S+)\)( not resolved)?", cell)
    if not found:
        return cell
    half = (float(found[3]) - float(found[2])) / 2
    return f"{found[1]}±{half:.2f}{'~' if found[4] else ''}"


def _write_json(measured: dict[str, Any], path: Path) -> None:
    with writing(path) as temporary:
        temporary.write_text(json.dumps(measured, indent=1) + "\n", "utf-8")


def _keep(
    measured: dict[str, Any], earlier: dict[str, Any] | None, request: Request, console: Console
) -> None:
    texts = {}
    if request.json:
        _write_json(measured, request.json)
    if request.report:
        lines = [
            *measured["about"],
            *(line for t in _tables(measured) for line in t.markdown()),
        ]
        texts[request.report] = "\n".join(lines) + "\n"
    if request.html:
        from .page import page

        compared = comparison(earlier["cases"], measured["cases"]) if earlier else None
        texts[request.html] = page(measured, compared)
    for path, text in texts.items():
        with writing(path) as temporary:
            temporary.write_text(text, "utf-8")
    for written in filter(None, (request.json, *texts)):
        console.print(f"Written: {written}", highlight=False, soft_wrap=True)
