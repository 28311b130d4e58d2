"""The command `fusedrnn`: `fusedrnn demo`, `bench`, `convert` and `info`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__, show_config
from .bench.cases import CELLS, DTYPES, GATES, MODES, SUITES, WEIGHTS
from .files import UserError


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fusedrnn", description="Fused LSTM, GRU and RNN kernels for NumPy.")
    parser.add_argument("--version", action="version", version=f"fusedrnn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_demo(commands)
    _add_bench(commands)
    convert = commands.add_parser(
        "convert",
        help="tell which recurrent nodes a model of ONNX has, and which of them run here",
        description="List the LSTM, GRU and RNN nodes of a model of ONNX, also those within If "
        "and Loop, each as the layer of fusedrnn that it becomes, or with the reason why it "
        "cannot be one.",
    )
    convert.add_argument("model", type=Path, metavar="model.onnx")
    commands.add_parser(
        "info",
        help="print what a bug report needs: versions, system, kernels, threads, GPUs",
    )
    return parser


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="forecast New York's temperature a day ahead from real observations",
        description="Train an LSTM and a GRU on the hourly weather of New York's airports in "
        "2013 and forecast the next 24 hours of temperature in a period held out.",
    )
    demo.add_argument(
        "--airport", choices=("EWR", "JFK", "LGA"), default="JFK", help="default: JFK"
    )
    demo.add_argument("--epochs", type=_count, default=8, help="per cell; default: 8")
    demo.add_argument("--hidden-size", type=_count, default=48, help="default: 48")
    demo.add_argument("--seed", type=_seed, default=0, help="default: 0")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("fusedrnn-demo.png"),
        metavar="PNG",
        help="file to write the picture to; default: fusedrnn-demo.png",
    )


def _add_bench(commands: argparse._SubParsersAction[_Parser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="time the kernels against PyTorch, onnxruntime, OpenVINO and the NumPy reference",
        description="Time the kernels and the installed peers alternately in one run, after "
        "checking the results of each. Exit status: 0; 1 if a result is wrong; 2 if you can "
        "fix the error; 130 after Ctrl-C, which shows and keeps the measurements so far.",
    )

    def several(option: str, choices: Sequence[str], help: str, default: object = None) -> None:
        bench.add_argument(
            option, nargs="+", choices=choices, default=default, help=help, metavar=option[2:-1]
        )

    bench.add_argument(
        "--suite",
        choices=(*SUITES, "properties"),
        default="quick",
        help="quick (a minute), shapes (the tables of the README), options (what each costs), "
        "modules (fusedrnn.torch against torch.nn), narrow (weights of 8 and 16 bits), "
        "bfloat16 (training in 16 bits), "
        "properties (scaling, memory, small calls …), full; default: quick",
    )
    bench.add_argument("--device", choices=DTYPES, default="cpu", help="default: cpu")
    cells = f"any of {' '.join(GATES)}; default: {' '.join(CELLS)}"
    several("--cells", tuple(GATES), cells, CELLS)
    several("--modes", MODES, f"any of {' '.join(MODES)}; default: all")
    bench.add_argument(
        "--dtypes",
        nargs="+",
        metavar="dtype",
        help="; ".join(f"on {device}: {' '.join(known)}" for device, known in DTYPES.items())
        + "; default: the suite's, or the first",
    )
    bench.add_argument(
        "--weights",
        type=lambda text: text.split(","),
        metavar="weight,…",
        help=f"narrow weights in inference, with the error of each contender: any of "
        f"{', '.join(WEIGHTS)}",
    )
    bench.add_argument(
        "--shapes",
        nargs="+",
        metavar="T,B,I,H",
        help="shapes instead of the suite's, by sizes (96,64,7,64) or name (weather)",
    )
    bench.add_argument(
        "--forms",
        nargs="+",
        metavar="form",
        help="forms instead of the suite's: two-layers both-directions batch-first lengths "
        "cell, or an option, as zoneout",
    )
    bench.add_argument(
        "--only",
        default="",
        metavar="PATTERN",
        help="only cases whose name matches this regular expression",
    )
    bench.add_argument(
        "--seconds", type=_seconds, metavar="S", help="about how long to time each case"
    )
    bench.add_argument(
        "--budget", type=_seconds, metavar="S", help="start no case after so many seconds"
    )
    bench.add_argument(
        "--threads", nargs="+", type=_count, metavar="n", help="default: 1, and one per core"
    )
    bench.add_argument(
        "--against",
        nargs="*",
        metavar="peer",
        help="any of torch onnxruntime openvino reference, compiled (our module under "
        "torch.compile), plain (our layer without the form); with --weights also float32 (our "
        "layer) and torch-bfloat16 torch-int8 onnxruntime-int8 openvino-bfloat16; with "
        "--dtypes bfloat16 also float32 and torch-float32; without a name, fusedrnn runs "
        "alone; default: the suite's",
    )
    bench.add_argument(
        "--before",
        default="",
        metavar="PYTHON",
        help="time the build of fusedrnn that this interpreter imports as well, in place of "
        "the peers",
    )
    for options, what in (
        (["--json"], "write the results, for --compare"),
        (["--html"], "write a page with tables and plots"),
        (["--report", "--markdown"], "write the tables as Markdown"),
    ):
        bench.add_argument(*options, type=Path, metavar="FILE", help=what)
    bench.add_argument(
        "--compare", type=Path, metavar="JSON", help="compare with an earlier run"
    )


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 10000, got {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer from 0, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def _run(chosen: argparse.Namespace) -> int:
    if chosen.command == "info":
        show_config()
        return 0
    if chosen.command == "demo":
        from . import demo

        demo.run(chosen.airport, chosen.epochs, chosen.hidden_size, chosen.seed, chosen.output)
        return 0
    if chosen.command == "convert":
        from .onnx.report import report

        print(report(chosen.model))
        return 0
    from .bench import command

    request = {name: value for name, value in vars(chosen).items() if name != "command"}
    return command.run(command.Request(**request))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for an error that the user can fix."""
    chosen = _parser().parse_args(arguments)
    name = f"fusedrnn {chosen.command}"
    try:
        return _run(chosen)
    except ModuleNotFoundError as error:
        extra = {"convert": "onnx"}.get(chosen.command, chosen.command)
        needed = f'{error.name}; install it with: pip install "fusedrnn[{extra}]"'
        print(f"{name}: needs {needed}", file=sys.stderr)
    except (UserError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 2
