"""Run every script of this folder and print one table, as docs/packages.md has it.

    python examples/packages/run.py --threads 1 2

Packages that are not installed are left out, with a line that says how to install them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shared import NOT_INSTALLED, header, parse, parser

from fusedrnn import machine

SCRIPTS = (
    "recurrent_ppo",
    "g2p",
    "genomes",
    "darts_forecast",
    "resemblyzer_voices",
    "silero",
)


def main() -> None:
    """Print the machine, the table, and what was left out."""
    args = parse(parser(__doc__))
    threads = map(str, args.threads)
    options = ["--threads", *threads, "--seconds", str(args.seconds)]
    options += ["--short"] * args.short
    print(machine.summary())
    print(*machine.versions(("numpy", "torch")), sep=", ", end="\n\n")
    print(header(args.threads))
    others = []
    for script in SCRIPTS:
        path = Path(__file__).with_name(f"{script}.py")
        with subprocess.Popen(
            [sys.executable, path, *options], stdout=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout or ():
                if not line.startswith("|"):
                    others.append(line)
                elif line.strip() not in header(args.threads):
                    print(line, end="", flush=True)
        if process.returncode not in (0, NOT_INSTALLED):
            sys.exit(f"{path.name} failed with status {process.returncode}")
    print("", *others, sep="\n", end="")


if __name__ == "__main__":
    main()
