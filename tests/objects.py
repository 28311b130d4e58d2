#!/usr/bin/env python3
"""Print the size and the compile time of each object of a finished build, and check them.

    python tests/objects.py BUILD

BUILD is a build directory of CMake's. The check fails if the code of an instruction set or an
extension module is larger than its limit below, or if an object that is compiled for an
instruction set defines a weak symbol that is not of that set's namespace, fusedrnn::<isa>::.
The linker keeps one definition of a weak symbol for all objects, so such a function, compiled
for AVX-512, could run on a processor that has no AVX-512.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

# Bytes of machine code of all objects of an instruction set, and of an extension module.
MOST_CODE = {"avx512": 515_000, "avx2": 410_000, "portable": 272_000, "narrow": 660_000}
MOST_MODULE = {"_cpu": 2_660_000}

# The targets of an instruction set are fusedrnn_<isa>_<element> and fusedrnn_narrow_<set>, and
# their namespaces fusedrnn::<isa> and fusedrnn::narrow_<set>. All narrow ones have one limit.
ISA_OBJECT = re.compile(r"(?:^|/)fusedrnn_(?:(narrow_\w+)|(\w+?)_(?:float|double))\.dir/")


def run(*command: str | Path) -> list[str]:
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return result.stdout.splitlines()


def section_bytes(path: Path, prefix: str) -> int:
    """Return the bytes of all sections of an object whose names begin so."""
    rows = (line.split() for line in run("size", "-A", "-d", path))
    return sum(int(row[1]) for row in rows if len(row) == 3 and row[0].startswith(prefix))


def compile_seconds(build: Path) -> dict[str, float]:
    """Return how long ninja ran for each output; empty where another generator built."""
    log = build / ".ninja_log"
    seconds: dict[str, float] = {}
    if log.exists():
        for line in log.read_text("utf-8").splitlines()[1:]:
            begin, end, _, output, _ = line.split("\t")
            seconds[output] = (int(end) - int(begin)) / 1000
    return seconds


def foreign_weak_symbols(path: Path, isa: str) -> list[str]:
    """Return the weak symbols that an object defines without its own namespace in their name.

    A template over the set's own vectors has the namespace among its arguments, so that no
    other object can define it. Names are compared as they are mangled, whole or with what
    stands for fusedrnn, because nm -C leaves some of the longest as they are.
    """
    own = re.compile(rf"(?:8fusedrnn|S\w?_){len(isa)}{isa}")
    lines = (line.split() for line in run("nm", "--defined-only", path))
    weak = [row[-1] for row in lines if row[-2] in "VvWwu"]
    foreign = [name for name in weak if not own.search(name)]
    return run("c++filt", *foreign) if foreign else []


def main(build: Path) -> list[str]:
    """Print the table; return what is wrong."""
    problems = []
    seconds = compile_seconds(build)
    code: dict[str, int] = defaultdict(int)
    print(f"{'object':58}{'code kB':>9}{'GPU kB':>9}{'seconds':>9}")
    for path in sorted(build.rglob("*.o")):
        name = str(path.relative_to(build))
        if "CompilerIdC" in name or "CMakeScratch" in name:
            continue
        bytes_of_code = section_bytes(path, ".text")
        gpu = section_bytes(path, ".nv_fatbin")
        shown = re.sub(r"CMakeFiles/|\.dir\b", "", name)
        time = f"{seconds[name]:9.1f}" if name in seconds else f"{'':9}"
        device = f"{gpu / 1000:9.0f}" if gpu else f"{'':9}"
        print(f"{shown:58}{bytes_of_code / 1000:9.0f}{device}{time}")
        if found := ISA_OBJECT.search(name):
            isa = found[1] or found[2]
            code["narrow" if found[1] else isa] += bytes_of_code
            problems += [
                f"{shown} defines {symbol}, a weak symbol outside fusedrnn::{isa}::"
                for symbol in foreign_weak_symbols(path, isa)
            ]
    if not code:
        problems.append(f"{build} has no object of an instruction set")
    sizes = [(f"code of {isa}", size, MOST_CODE.get(isa)) for isa, size in code.items()]
    for module in sorted(build.glob("_c*.so")):
        stem = module.name.split(".")[0]
        sizes.append((module.name, module.stat().st_size, MOST_MODULE.get(stem)))
    for what, size, most in sizes:
        print(f"{what}: {size} bytes" + (f" of {most}" if most else ""))
        if most and size > most:
            problems.append(f"{what} has {size} bytes, more than {most}")
    return problems


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = main(Path(sys.argv[1]))
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(bool(found))
