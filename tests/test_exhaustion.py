"""Memory that cannot be had raises MemoryError, changes nothing and leaks nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedrnn as fr

# A library that is preloaded makes allocations fail.
is_possible = sys.platform == "linux" and hasattr(os, "fork") and shutil.which("cc")
needs_failures = pytest.mark.skipif(
    not is_possible or "LD_PRELOAD" in os.environ, reason="needs Linux, cc and no sanitizer"
)


@needs_failures
def test_every_allocation_may_fail() -> None:
    """If any one allocation of a call fails, it raises MemoryError, inputs and state stay,
    nothing leaks, and the next call has the same bits.
    """
    script = Path(__file__).with_name("exhaust.py")
    command = [sys.executable, str(script), "--threads", "1", "--only", "^(mask vjp|stream)$"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


LIMITED = """
import resource, sys
import numpy as np, fusedrnn as fr

fr.set_num_threads(2)
layer = fr.LSTM(16, 256, 2, rng=0)
x = np.random.default_rng(0).normal(size=(20, 128, 16)).astype("f")
(y, _), pullback = layer.vjp(x)
expected = [y.copy(), pullback(y).x]
del y, pullback
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
failed = 0
for megabytes in range(0, 96, 8):
    fr.release_memory()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
    try:
        (y, _), pullback = layer.vjp(x)
        found = [y, pullback(y).x]
    except MemoryError as error:
        failed += 1
    else:
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))
        del y, found
    pullback = None
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
(y, _), pullback = layer.vjp(x)
assert (y == expected[0]).all() and (pullback(y).x == expected[1]).all()
assert failed
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_limited_memory() -> None:
    """Under a limit of the address space a call raises MemoryError or has the same bits."""
    subprocess.run([sys.executable, "-c", LIMITED], check=True)


def repeated(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """An array of zeros that takes the memory of one."""
    return np.broadcast_to(np.zeros((), dtype), shape)


LAYER = fr.LSTM(4, 8, 2, rng=0)
MANY = 2**40
WEIGHTS = np.zeros((8, 4), np.float32), np.zeros((8, 8), np.float32)
TOO_LARGE: dict[str, Callable[[], Any]] = {
    "x": lambda: LAYER(repeated(MANY, 2**18, 4)),
    "x in training": lambda: LAYER.vjp(repeated(MANY, 1, 4)),
    "batch_first": lambda: fr.GRU(4, 16, batch_first=True)(repeated(2**27, 2**30, 4)),
    "narrow": lambda: LAYER.quantize("int8")(repeated(2**30, 2**27, 4)),
    "lengths": lambda: LAYER(repeated(5, MANY, 4), lengths=repeated(MANY, dtype=int)),
    "mask": lambda: LAYER(repeated(MANY, 2**18, 4), mask=repeated(MANY, 2**18, dtype=bool)),
    "no step": lambda: LAYER(repeated(0, 2**56, 4)),
    "stream": lambda: fr.Stream(fr.GRU(4, 1024), 2**31).state,
    "op": lambda: fr.rnn(repeated(2**30, 2**28, 4), *WEIGHTS, None, None, None),
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_sizes_beyond_memory(what: str) -> None:
    """Sizes whose product is more than memory, or than an integer holds, raise MemoryError."""
    with pytest.raises(MemoryError):
        TOO_LARGE[what]()


@pytest.mark.parametrize("given", ["lengths", "resets", "mask", "nothing"])
def test_many_steps_of_no_row(given: str) -> None:
    """Without rows a call does nothing, however many steps they would have."""
    x, flags = np.empty((2**50, 0, 4), np.float32), np.empty((2**50, 0), bool)
    masks = {"lengths": np.empty(0, int), "resets": flags, "mask": flags}
    (y, _), pullback = LAYER.vjp(x, **{k: v for k, v in masks.items() if k == given})
    assert y.shape == (2**50, 0, 8)
    assert pullback(y).x.shape == x.shape


@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers"])
def test_sizes_of_layers(name: str) -> None:
    """Sizes that no layer can have are named; others that memory has not raise MemoryError."""
    sizes = {"input_size": 2, "hidden_size": 2}
    with pytest.raises(ValueError, match=f"{name} must be from 1 to"):
        fr.GRU(**sizes | {name: MANY})
    if name != "num_layers":
        with pytest.raises(MemoryError):
            fr.GRU(**sizes | {name: 2**31})


def test_tensors_beyond_memory() -> None:
    """Modules raise MemoryError for sizes whose product is too large."""
    torch = pytest.importorskip("torch")
    import fusedrnn.torch as ft

    x = torch.zeros(1, 1, 4)
    for module in (ft.LSTM(4, 8, 2), ft.GRU(4, 8, batch_first=True)):
        for shape in ((MANY, 2**18, 4), (2**30, 2**25, 4), (MANY, 1, 4)):
            with pytest.raises(MemoryError):
                module(x.expand(shape))
            with torch.no_grad(), pytest.raises(MemoryError):
                module(x.expand(shape))
    with pytest.raises(MemoryError):
        ft.LSTMCell(4, 8)(x[0].expand(2**50, 4))
