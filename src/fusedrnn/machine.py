"""The machine and the installed packages, as reports describe them."""

from __future__ import annotations

import itertools
import os
import platform
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path, PurePosixPath

from . import _cpu

LIBRARIES = ("torch", "onnxruntime", "openvino", "cupy", "jax", "matplotlib", "rich")


def cpu_name() -> str:
    """Return the processor's name, family and model as the operating system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    numbers = (f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    return f"{fields.get('model name', platform.machine())} ({', '.join(numbers)})"


def cores() -> int:
    """Return how many processors this process may use at the same time.

    They are those of its affinity mask, but no more than its quota.
    """
    return _cpu.usable_cores()


def quota(root: Path = Path("/")) -> float | None:
    """Return how many processors the control groups of this process allow it, None for all.

    A group is allowed no more than the groups that it is in. A container may see its own group
    as the root of all. Both versions of Linux' control groups count.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return None
    mounted, allowed = root / "sys/fs/cgroup", []
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            tops, files = (mounted, mounted / "unified"), ["cpu.max"]
        elif "cpu" in controllers.split(","):
            tops = (mounted / "cpu", mounted / controllers)
            files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for top, part in itertools.product(tops, (group, *group.parents)):
            with suppress(OSError, ValueError):
                texts = [(top / part / name).read_text("utf-8") for name in files]
                microseconds, period = map(float, " ".join(texts).split())
                if microseconds > 0:
                    allowed.append(microseconds / period)
    return min(allowed, default=None)


def summary() -> str:
    """Return the processor, instruction set and compiler in one line."""
    return f"{cpu_name()}, {cores()} cores · {_cpu.get_isa()} · {_cpu.compiler}"


def versions(names: tuple[str, ...]) -> list[str]:
    """Return "name version" for each of `names` that is installed."""
    from importlib.metadata import distributions  # slow to import

    installed = {d.name: d.version for d in distributions() if d.name in names}
    return [f"{name} {installed[name]}" for name in names if name in installed]


def gil() -> str:
    """Return in words whether this Python has a global interpreter lock and uses it."""
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "on"
    in_use = sys._is_gil_enabled()  # type: ignore[attr-defined,unused-ignore]
    return "free-threaded, the GIL " + ("on" if in_use else "off")


def environment() -> list[str]:
    """Return the environment variables that affect threads and kernels, as "name=value"."""
    prefixes = ("FUSEDRNN_", "OMP_", "GOMP_", "KMP_", "MKL_NUM", "OPENBLAS_NUM", "CUDA_VISIBLE")
    return [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(prefixes)]
