"""What a report says of the machine and of what is installed."""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from pathlib import Path

from . import _cpu

LIBRARIES = ("torch", "onnxruntime", "openvino", "cupy", "jax", "matplotlib", "rich")


def cpu_name() -> str:
    """Return the processor's name as its maker and the kernel tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    numbers = (f"{key} {found[key]}" for key in ("cpu family", "model") if key in found)
    return f"{found.get('model name', platform.machine())} ({', '.join(numbers)})"


def cores() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def told() -> str:
    """Return the processor, instruction set and compiler in one line."""
    return f"{cpu_name()}, {cores()} cores · {_cpu.get_isa()} · {_cpu.compiler}"


def versions(names: tuple[str, ...]) -> list[str]:
    """Return "name version" of each that is installed."""
    from importlib.metadata import distributions  # slow to import

    found = {d.name: d.version for d in distributions() if d.name in names}
    return [f"{name} {found[name]}" for name in names if name in found]


def gil() -> str:
    """Tell whether this Python has the global interpreter lock, and whether it is in use."""
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "on"
    in_use = sys._is_gil_enabled()  # type: ignore[attr-defined,unused-ignore]
    return "free-threaded, the GIL " + ("on" if in_use else "off")


def environment() -> list[str]:
    """Return the variables that steer the threads and kernels, as set."""
    prefixes = ("FUSEDRNN_", "OMP_", "GOMP_", "KMP_", "MKL_NUM", "OPENBLAS_NUM", "CUDA_VISIBLE")
    return [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(prefixes)]
