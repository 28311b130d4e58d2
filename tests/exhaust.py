"""Let each allocation of calls fail, one after the other: `python tests/exhaust.py`.

A failing call must raise MemoryError and change nothing, leak nothing, and the next call must
have the same bits. `tests/failing_alloc.c`, which is compiled here and preloaded, makes the
allocations fail. Each call runs in forked children, so that one that dies is reported, too.

Some small requests of others end the process where they fail: pybind11's record of a new
`Layers`, which an op and a first call make; glibc's of a destructor, in a thread's first call;
PyTorch's in destructors of nodes and in its engine, which may also leave gradients off. So
faults of ops and of PyTorch's modules are printed, but do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import mmap
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fusedrnn as fr

# Errors that a failure may raise. PyTorch's allocator raises a RuntimeError, and NumPy's
# reductions forget to raise anything, which Python notices.
ALLOWED = r"^MemoryError|^RuntimeError: .*(alloc|memory)|^SystemError: .* of numpy\.ufunc"
OF_OTHERS = r"op$|torch"  # kinds that also make such requests of others
REPEATS = 4  # of each failure: a block more each time is a leak

Arrays = list[np.ndarray]
Call = Callable[[], Arrays]
# A kind of calls: its inputs, which must not change, and the call.
Kind = Callable[[], tuple[Arrays, Call]]
KINDS: dict[str, Kind] = {}


def arrays_in(value: Any) -> Arrays:
    """Return the arrays of a nested result, in order."""
    if value is None:
        return []
    if isinstance(value, dict):
        return arrays_in(list(value.values()))
    if isinstance(value, (tuple, list)):
        return [a for part in value for a in arrays_in(part)]
    if hasattr(value, "detach"):
        value = value.detach()
        value = (value.float() if value.dtype.itemsize == 2 else value).numpy()
    return [np.array(value, copy=True)]


def kind(function: Kind) -> Kind:
    KINDS[function.__name__] = function
    return function


def of_layer(name: str, make: Callable[[], Any], **options: Any) -> None:
    """Register inference and training of a layer."""

    def x_of(layer: Any) -> np.ndarray:
        rng = np.random.default_rng(0)
        return rng.normal(size=(9, 5, layer.input_size)).astype(layer.dtype)

    def infer() -> tuple[Arrays, Call]:
        layer = make()
        x = x_of(layer)
        return [x, *layer.state_dict().values()], lambda: arrays_in(layer(x, **options))

    def train() -> tuple[Arrays, Call]:
        layer = make()
        x = x_of(layer)

        def call() -> Arrays:
            results, pullback = layer.vjp(x, **options, seed=1)
            return arrays_in([results, pullback(results[0])])

        return [x, *layer.state_dict().values()], call

    KINDS[name] = infer
    if name not in ("int8", "float16"):
        KINDS[f"{name} vjp"] = train


_RNG = np.random.default_rng(5)
_MASK = _RNG.random((9, 5)) < 0.6
_RESETS = _RNG.random((9, 5)) < 0.3
of_layer("lstm", lambda: fr.LSTM(8, 33, rng=0))
of_layer("gru stacked", lambda: fr.GRU(8, 20, 3, bidirectional=True, dropout=0.3, rng=0))
of_layer("rnn float64", lambda: fr.RNN(8, 9, dtype="float64", rng=0))
of_layer("large", lambda: fr.LSTM(64, 160, 2, rng=0))
of_layer("lengths", lambda: fr.LSTM(8, 20, 2, rng=0), lengths=[9, 0, 3, 9, 1])
of_layer("mask", lambda: fr.GRU(8, 20, 2, rng=0), mask=_MASK, resets=_RESETS)
of_layer("repeats", lambda: fr.LSTM(8, 20, rng=0), mask=_MASK, masked_output="last")
of_layer("batch_first", lambda: fr.GRU(8, 20, batch_first=True, reset_after=False, rng=0))
of_layer(
    "options",
    lambda: fr.LSTM(
        8, 20, 2, proj_size=7, peephole=True, layer_norm=True, zoneout=0.1,
        recurrent_dropout=0.2, weight_dropout=0.3, clip=2.0, rng=0,
    ),
    return_cells=True, trace=True,
)  # fmt: skip
of_layer("coupled", lambda: fr.LSTM(8, 20, coupled_gates=True, rng=0), trace=True)
of_layer("int8", lambda: fr.LSTM(8, 33, 2, rng=0).quantize("int8"))
of_layer("float16", lambda: fr.GRU(8, 33, rng=0).quantize("float16"))
try:
    import ml_dtypes  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    dropout = {"dropout": 0.3, "weight_dropout": 0.3}
    of_layer("bfloat16", lambda: fr.GRU(8, 40, 2, dtype="bfloat16", rng=0, **dropout))


@kind
def op() -> tuple[Arrays, Call]:
    rng = np.random.default_rng(0)
    x, W, R = (rng.normal(size=s).astype("f") for s in ((7, 3, 4), (15, 4), (15, 5)))
    out = np.empty((7, 3, 5), np.float32)

    def call() -> Arrays:
        results = fr.gru(x, W, R, None, None, None)
        return arrays_in([results, fr.gru(x, W, R, None, None, None, out=out)])

    return [x, W, R], call


@kind
def recompute() -> tuple[Arrays, Call]:
    layer = fr.LSTM(8, 20, 2, rng=0)
    x = np.random.default_rng(0).normal(size=(9, 5, 8)).astype("f")

    def call() -> Arrays:
        results, pullback = layer.vjp(x, recompute=True, bptt=4)
        return arrays_in([results, pullback(results[0], results[1])])

    return [x], call


@kind
def stream() -> tuple[Arrays, Call]:
    stream = fr.Stream(fr.LSTM(4, 20, 2, rng=0), 3)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("f")
    stream.step(x)
    start = stream._state

    def call() -> Arrays:
        try:
            y = stream.step(x)
        except BaseException:
            assert stream._state is start, "the state changed"
            raise
        try:
            return arrays_in([y, stream._state])
        finally:
            stream._state = start

    return [x], call


def of_torch(name: str, make: Callable[[Any, Any], Any], grad: bool = True) -> None:
    """Register a call of a module, with its gradients."""

    def build() -> tuple[Arrays, Call]:
        import torch

        import fusedrnn.torch as ft

        torch.manual_seed(0)
        module = make(ft, torch)
        dtype = next(iter(module.parameters())).dtype if grad else torch.float32
        x = torch.randn(9, 5, 8).to(dtype)

        def call() -> Arrays:
            torch.manual_seed(1)
            if not grad:
                with torch.no_grad():
                    return arrays_in(module(x))
            leaf = x.clone().requires_grad_()
            results = module(leaf)
            found = torch.autograd.grad(results[0].sum(), [leaf, *module.parameters()])
            return arrays_in([results, found])

        return arrays_in([x, *(module.parameters() if grad else [])]), call

    KINDS[f"torch {name}"] = build


of_torch("infer", lambda ft, _: ft.LSTM(8, 33, 2), grad=False)
of_torch("train", lambda ft, _: ft.LSTM(8, 33, 2, bidirectional=True))
of_torch("large", lambda ft, _: ft.GRU(8, 160, 2))
of_torch("options", lambda ft, _: ft.LSTM(8, 20, zoneout=0.1, layer_norm=True, proj_size=7))
of_torch("bfloat16", lambda ft, torch: ft.GRU(8, 33, weight_dropout=0.2).to(torch.bfloat16))
of_torch("int8", lambda ft, _: ft.quantize(ft.LSTM(8, 33), "int8").model, grad=False)

# The library and the children

SHIM: Any = ctypes.CDLL(None)  # of this process, into which the library is preloaded


def build(folder: Path) -> Path:
    """Compile the library that makes allocations fail."""
    library = folder / "failing_alloc.so"
    source = Path(__file__).with_name("failing_alloc.c")
    command = [os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True)
    return library


def disarm() -> bool:
    """Let no allocation fail any more; return whether one did."""
    failed = None
    while failed is None:
        with contextlib.suppress(MemoryError):  # it may be one of this call
            failed = bool(SHIM.fired())
    return failed


def in_use() -> tuple[int, int]:
    gc.collect()
    fr.release_memory()
    return SHIM.blocks_in_use(), SHIM.mapped_bytes()


def attempt(call: Call, n: int) -> tuple[bool, str, Arrays | None]:
    """Call with the n-th allocation failing; return whether one did, the error, the result."""
    error, results = "", None
    try:
        SHIM.fail_at(n)
        results = call()
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    return disarm(), error, results


def same(a: Arrays, b: Arrays) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
    )


def check(name: str, n: int, threads: int, first: bool, at: mmap.mmap) -> list[str]:
    """Let the allocations from n on fail, or in a first call the n-th; return the faults."""
    faults: list[str] = []
    fr.set_num_threads(threads)
    inputs, call = KINDS[name]()
    before = [a.copy() for a in inputs]
    expected = None if first else call()
    if not first:
        call()
    gc.collect()
    gc.freeze()  # the next collections are short
    while True:
        at[:8] = struct.pack("q", n)
        signal.alarm(300)
        for _ in range(1 if first else 3):  # caches grow at first, a leak goes on
            used = in_use()
            for _ in range(1 if first else REPEATS):
                failed, error, results = attempt(call, n)
                if not failed:
                    at[8:9] = b"\1"
                    return faults if not error else [*faults, f"without a failure: {error}"]
                if error and not re.search(ALLOWED, error, re.DOTALL):
                    faults.append(f"{n}: {error[:200]}")
                if results is not None and expected and not same(results, expected):
                    faults.append(f"{n}: other results of the call")
                del results
            blocks, mapped = (b - a for a, b in zip(used, in_use(), strict=True))
            leaks = blocks >= REPEATS or mapped >= REPEATS << 16
            if not leaks:
                break
        if leaks and not first:
            faults.append(f"{n}: {REPEATS} calls leak {blocks} blocks, {mapped} mapped bytes")
        if not same(inputs, before):
            faults.append(f"{n}: an input changed")
        again = call()
        if expected is not None and not same(again, expected):
            faults.append(f"{n}: other results of the next call")
        if first:
            return faults
        n += 1


def run(name: str, threads: int, first: bool) -> tuple[int, list[str]]:
    """Return how many allocations a kind of calls has, and what was wrong when they failed."""
    at, faults, n = mmap.mmap(-1, 4096), list[str](), 1
    while not at[8]:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                found = check(name, n, threads, first, at)
            except BaseException as error:
                disarm()
                at[8:9] = b"\1"
                found = [f"{struct.unpack('q', at[:8])[0]}: the check failed: {error!r}"]
            os.write(write, json.dumps(found).encode()[-60_000:])
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        (n,) = struct.unpack("q", at[:8])
        faults += json.loads(text) if text else []
        if status:
            faults.append(f"{n}: the process died of {status}")
        n += 1
    return n - 2, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of calls that match")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--first", action="store_true", help="the first call, not later ones")
    parser.add_argument("--small", action="store_true", help="Python's own small objects, too")
    chosen = parser.parse_args()
    if "FAILING_ALLOC" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            library = str(build(Path(folder)))
            allocator = "malloc" if chosen.small else "default"
            own = {"LD_PRELOAD": library, "FAILING_ALLOC": library, "PYTHONMALLOC": allocator}
            return subprocess.run([sys.executable, *sys.argv], env=os.environ | own).returncode
    SHIM.blocks_in_use.restype = SHIM.mapped_bytes.restype = ctypes.c_long
    SHIM.fail_at.argtypes = [ctypes.c_long]
    fr.RNN(1, 1)(np.zeros((1, 1, 1), np.float32))  # imports what a first call needs
    wrong = 0
    names = [name for name in KINDS if re.search(chosen.only, name)]
    if any(name.startswith("torch") for name in names):
        import torch

        import fusedrnn.torch  # noqa: F401

        torch.set_num_threads(1)
    for name in names:
        for threads in chosen.threads:
            count, faults = run(name, threads, chosen.first)
            wrong += 0 if re.match(OF_OTHERS, name) else len(faults)
            found = f"{count} allocations, {len(faults)} faults"
            print(f"{name}, {threads} threads: {found}", *faults, sep="\n  ", flush=True)
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
