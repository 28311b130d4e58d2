"""Break the CUDA backend in one place at a time: its tests on the emulator must notice.

    python tests/mutants.py [NAME …]

Run it where fusedrnn and its test extra are installed. Each mutant is an edit of one line in a
copy of the sources; the copy is built for the emulator and tested until a test fails. A mutant
that lives is shown, and the status is 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """An edit: a file of cuda/, what stands there once, and what replaces it."""

    file: str
    old: str
    new: str


MUTANTS = {
    # Polls, the fence and the buffers of a grid
    "no fence": Mutant("engine.h", "if (plan_.exchange == Exchange::grid) fence();", ""),
    "one poll": Mutant("engine.h", "        all = false;\n", ""),
    "first quad is not polled": Mutant(
        "engine.h",
        "        if (fullest_word<E>(to[i]) != unwritten) continue;",
        "        if (i == 0 || fullest_word<E>(to[i]) != unwritten) continue;",
    ),
    "buffer cleared too early": Mutant(
        "engine.h", "global_operand(n - 1 + operand_buffers", "global_operand(n"
    ),
    "buffer never cleared": Mutant(
        "engine.h",
        "clears_previous = plan_.exchange == Exchange::grid",
        "clears_previous = false",
    ),
    # The copy of an operand into shared memory
    "last quad is not copied": Mutant(
        "engine.h",
        "quad < row_quads() ? quad * rows",
        "quad < row_quads() - 1 ? quad * rows",
    ),
    "rows of other warps": Mutant(
        "engine.h",
        "          row += threads() / 32;",
        "          row += threads() / 32 + 1;",
    ),
    "row for another": Mutant(
        "engine.h",
        "shared_operand(n) + place[i] % rows * plan_.row_bytes",
        "shared_operand(n) + (place[i] + 1) % rows * plan_.row_bytes",
    ),
    # h' in the gradient of R
    "h0 does not enter": Mutant(
        "layer.h",
        "    if (call.h0) {\n      const void* first",
        "    if (false) {\n      const void* first",
    ),
    "h0 enters the last step": Mutant(
        "layer.h", "call.reverse ? rows - B : 0", "call.reverse ? 0 : rows - B"
    ),
    "y of the same step": Mutant("layer.h", "call.reverse ? B : 0, rows - B)", "0, rows - B)"),
    "parts are not added": Mutant(
        "products.h",
        "        adds = true;\n      }\n    });\n  }\n};",
        "      }\n    });\n  }\n};",
    ),
    "resets enter": Mutant(
        "layer.h", "call.lengths || call.resets || drops", "call.lengths || drops"
    ),
    "lengths enter": Mutant(
        "layer.h", "call.lengths || call.resets || drops", "call.resets || drops"
    ),
    "dropped units enter": Mutant(
        "layer.h",
        "call.resets || drops(call.options) || recomputes",
        "call.resets || recomputes",
    ),
    "one step has no rows": Mutant(
        "layer.h", "recomputes ||\n           call.T == 1", "recomputes"
    ),
    "reset h bypasses": Mutant("recurrence.h", "is_reset ? A{0} : in.prev_h", "in.prev_h"),
    # The gradient of the biases
    "bias of one launch": Mutant("recurrence.h", "sums && begin > 0 ?", "sums && begin < 0 ?"),
    "bias of one row": Mutant(
        "recurrence.h",
        "dbias_now[o][k] += own.at[o * 2 + r]",
        "dbias_now[o][k] = own.at[o * 2 + r]",
    ),
    "bias of all tiles at one place": Mutant(
        "recurrence.h", "engine.row() / 2 * slots", "engine.row() / 4 * slots"
    ),
    "bias of half the rows": Mutant(
        "layer.h",
        "                                 Scratch::operand_rows(plan) / 2,",
        "                                 Scratch::operand_rows(plan) / 4,",
    ),
    # σ
    "rest of the product": Mutant("vec.h", "(1 + bounded(rest * ln_2, -0.5f, 1))", "1"),
    "infinite product": Mutant("vec.h", "bounded(rest * ln_2, -0.5f, 1)", "rest * ln_2"),
}


def run(command: list[object], folder: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command; return "" or its output if it fails."""
    try:
        done = subprocess.run(
            list(map(str, command)),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "FAILED: no end within 600 s"
    return "" if done.returncode == 0 else done.stdout + done.stderr or "failed"


def main() -> int:
    """Test the named mutants, or all."""
    import pybind11

    import fusedrnn

    names = sys.argv[1:] or list(MUTANTS)
    alive = []
    with tempfile.TemporaryDirectory() as temporary:
        tree, build, site = (Path(temporary, name) for name in ("tree", "build", "site"))
        tree.mkdir()
        for name in ("cuda", "csrc", "tests", "CMakeLists.txt", "pyproject.toml"):
            copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
            copy(PROJECT / name, tree / name)  # type: ignore[operator]
        shutil.copytree(Path(fusedrnn.__path__[0]), site / "fusedrnn")
        shutil.copytree(PROJECT / "src" / "fusedrnn", site / "fusedrnn", dirs_exist_ok=True)
        for backend in (site / "fusedrnn").glob("_cuda*.so"):
            backend.unlink()
        environment = os.environ | {
            "PYTHONPATH": str(site),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        configure = [
            "cmake",
            "-S",
            tree,
            "-B",
            build,
            "-G",
            "Ninja",
            "-DFUSEDRNN_CUDA=EMULATED",
        ]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        problem = run(configure, tree)
        if problem:
            print(problem)
            return 2
        for name in names:
            file, old, new = MUTANTS[name]
            path = tree / "cuda" / file
            text = path.read_text("utf-8")
            assert text.count(old) == 1, f"{name}: its line is there {text.count(old)} times"
            path.write_text(text.replace(old, new), "utf-8")
            begin = time.monotonic()
            problem = run(["cmake", "--build", build, "--target", "_cuda"], tree)
            assert not problem, f"{name} does not compile:\n{problem}"
            for backend in build.glob("_cuda*.so"):
                shutil.copy(backend, site / "fusedrnn")
            tests = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "auto", "-m", "gpu"]
            tests += [
                "-p",
                "no:cacheprovider",
                "tests/test_cuda.py",
                "tests/test_cuda_layers.py",
            ]
            output = run(tests, tree, environment)
            failed = [line for line in output.splitlines() if line.startswith("FAILED")]
            assert failed or not output, output
            seconds = time.monotonic() - begin
            print(f"{name}: {'; '.join(failed)[:100] or 'ALIVE'} ({seconds:.0f} s)", flush=True)
            alive += [] if failed else [name]
            path.write_text(text, "utf-8")
    print(f"{len(names) - len(alive)} of {len(names)} mutants fail; alive: {alive or 'none'}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
