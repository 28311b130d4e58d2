"""The command `fusedrnn`: `fusedrnn demo` and `fusedrnn info`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, show_config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedrnn", description="Fused LSTM, GRU and RNN kernels for NumPy."
    )
    parser.add_argument("--version", action="version", version=f"fusedrnn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

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
    demo.add_argument("--seed", type=int, default=0, help="default: 0")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("fusedrnn-demo.png"),
        metavar="PNG",
        help="where the picture goes; default: fusedrnn-demo.png",
    )

    commands.add_parser("info", help="print version, compiler, instruction sets and threads")
    return parser


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 10000, got {text!r}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for what the user can mend."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command == "info":
        show_config()
        return 0
    try:
        from . import demo
    except ModuleNotFoundError as error:
        print(
            f'fusedrnn demo: needs {error.name}; install it with: pip install "fusedrnn[demo]"',
            file=sys.stderr,
        )
        return 2
    try:
        demo.run(chosen.airport, chosen.epochs, chosen.hidden_size, chosen.seed, chosen.output)
    except demo.DemoError as error:
        print(f"fusedrnn demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fusedrnn demo: interrupted", file=sys.stderr)
        return 130
    return 0
