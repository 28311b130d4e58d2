"""The instruction set and the number of threads of the kernels, and a report of this build."""

from __future__ import annotations

import math
import os
import platform
from typing import Any, Literal, overload

import numpy as np

from . import _cpu, checks, cuda, machine
from ._version import __version__


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use.

    Parameters
    ----------
    n: a positive number, or 0, the default, for as many as OpenMP uses (OMP_NUM_THREADS, or
       one thread per core), or PyTorch once `fusedrnn.torch` was called; these are at most as
       many as the process may use at the same time, by its affinity mask, its control group's
       quota and OMP_THREAD_LIMIT. A number that is set here may be larger, which is slow. A
       call that is too small to gain from more threads uses fewer, and so does one for which
       the system has no more threads. On Linux calls also leave out threads while other work
       uses their cores, unless FUSEDRNN_FIXED_THREADS=1, or once `fusedrnn.torch` was called.

    Raises
    ------
    TypeError, ValueError: n is not an integer, or is negative.

    >>> set_num_threads(1)
    >>> get_num_threads()
    1
    >>> set_num_threads(0)
    """
    _cpu.set_num_threads(checks.integer("n", n, 0, 4096))


def get_num_threads() -> int:
    """Return how many threads a call may use; results never depend on it."""
    return _cpu.get_num_threads()


def limit_threads() -> None:
    """Let calls use no more threads than the quota of this process allows."""
    _cpu.set_quota(math.ceil(machine.quota() or 0))


def _thread_limits() -> list[str]:
    """Return what the number of threads comes from if the user sets none, in words."""
    limits = [f"{_cpu.get_threads_asked_for()} asked for by OpenMP or PyTorch"]
    if hasattr(os, "sched_getaffinity"):
        limits.append(f"{len(os.sched_getaffinity(0))} processors in the affinity mask")
    if quota := machine.quota():
        limits.append(f"{quota:g} processors in the control group's quota")
    if "OMP_THREAD_LIMIT" in os.environ:
        limits.append(f"{_cpu.get_thread_limit()} by OMP_THREAD_LIMIT")
    return limits


def release_memory() -> None:
    """Release the memory that is kept for later calls.

    Freed blocks of 64 kB and more are kept, because fresh pages of memory are slow: at most
    80 MB in all or three times the largest of the last 32 requests, never more than 256 MB, and
    no block that the last 32 requests did not use. Each thread also keeps up to 1 MB of scratch
    memory until it ends. This function frees the blocks of all threads and the scratch memory
    of the calling one.

    >>> release_memory()
    """
    _cpu.release_memory()


def set_isa(name: str | None) -> None:
    """Choose the instruction set; None, the default, stands for the best of this CPU.

    The environment variable FUSEDRNN_ISA does the same when fusedrnn is imported. Weights that
    are already packed (of a layer that was called, of a pullback) stay with their instruction
    set.

    Raises
    ------
    TypeError: name is not a string.
    ValueError: this build or this CPU does not have it; the message lists those available.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a string or None, got {type(name).__name__}")
    try:
        _cpu.set_isa(name or "")
    except ValueError as error:
        raise ValueError(f"name {error}") from None


def get_isa() -> str:
    """Return the name of the instruction set in use."""
    return _cpu.get_isa()


def select_isa_from_environment() -> None:
    """Use the instruction set that FUSEDRNN_ISA names; raise ImportError if it is missing."""
    name = os.environ.get("FUSEDRNN_ISA")
    if name:
        try:
            _cpu.set_isa(name)
        except ValueError as error:
            raise ImportError(f"the environment variable FUSEDRNN_ISA {error}") from None


@overload
def show_config(mode: Literal["print"] = "print") -> None: ...
@overload
def show_config(mode: Literal["dict"]) -> dict[str, Any]: ...
def show_config(mode: str = "print") -> dict[str, Any] | None:
    """Print what a bug report needs, or return it as a dict.

    It contains the versions of this package, Python, NumPy and the installed frameworks, the
    system and processor, compiler, instruction sets, threads and their limits, GPUs, and the
    environment variables that affect them.

    Parameters
    ----------
    mode: "print" or "dict".

    >>> show_config("dict")["isa"] == get_isa()
    True
    """
    if mode not in ("print", "dict"):
        raise ValueError(f'mode must be "print" or "dict", got {mode!r}')
    supported = _cpu.isas()
    config = {
        "fusedrnn": __version__,
        "location": os.path.dirname(__file__),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "gil": machine.gil(),
        "numpy": np.__version__,
        "libraries": machine.versions(machine.LIBRARIES),
        "system": platform.platform(),
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
        "compiler": _cpu.compiler,
        "isa": get_isa(),
        "isas available": [name for name, here in supported.items() if here],
        "isas compiled": list(supported),
        "threads": get_num_threads(),
        "thread limits": _thread_limits(),
        "cuda": cuda.status(),
        "environment": machine.environment(),
    }
    if mode == "dict":
        return config
    width = max(map(len, config))
    for key, value in config.items():
        text = (", ".join(value) or "–") if isinstance(value, list) else value
        print(f"{key:<{width}}  {text}")
    return None
