"""The memory that a training process takes, for the properties "memory" and "soak".

A program of its own, which imports only the library that it measures:

    python footprint.py step fusedrnn|torch LSTM|GRU [DTYPE [T,B,I,H]]
                                                         MB of the peak of a training step
    python footprint.py soak THREADS SECONDS PARTS       MB at the start and after each part
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (100, 32, 128, 256)


def megabytes(name: str) -> float:
    """Return a figure of this process: VmRSS, or VmHWM for the peak."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def step(library: str, cell: str, dtype: str = "float32", sizes: str = "") -> None:
    """Print what the peak of a training step is above the memory before it."""
    T, B, I, H = map(int, sizes.split(",")) if sizes else SIZES
    x, dy = np.ones((T, B, I), np.float32), np.ones((T, B, H), np.float32)
    if library == "torch":
        import torch

        torch.set_num_threads(1)

        def train(x: Any, dy: Any) -> None:
            kind = getattr(torch, dtype)
            layer = getattr(torch.nn, cell)(x.shape[2], dy.shape[2], dtype=kind)
            leaf = torch.from_numpy(x).to(kind).requires_grad_()
            layer(leaf)[0].backward(torch.from_numpy(dy).to(kind))
    else:
        import fusedrnn as fr

        fr.set_num_threads(1)

        def train(x: Any, dy: Any) -> None:
            layer = getattr(fr, cell)(x.shape[2], dy.shape[2], dtype=dtype)
            x, dy = x.astype(layer.dtype), dy.astype(layer.dtype)
            parameters = layer.state_dict().values()
            getattr(fr, f"{cell.lower()}_vjp")(x, *parameters)[1](dy)

    train(x[:2, :2, :2].copy(), dy[:2, :2, :2].copy())  # what loading the library takes
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # the peak starts anew
    before = megabytes("VmRSS")
    train(x, dy)
    print(megabytes("VmHWM") - before)


def soak(threads: int, seconds: float, parts: int) -> None:
    """Train on random shapes; print the memory at the start, after each part, and at last."""
    import fusedrnn as fr

    fr.set_num_threads(1)
    layers: list[Any] = [fr.LSTM(32, 64), fr.GRU(32, 64, 2, bidirectional=True)]
    is_over = threading.Event()

    def train(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not is_over.is_set():
            x = np.ones((rng.integers(1, 200), rng.integers(1, 17), 32), np.float32)
            (y, _), pullback = layers[rng.integers(2)].vjp(x)
            pullback(y)

    def tell() -> None:
        print(f"{megabytes('VmRSS'):.0f}", flush=True)

    tell()
    workers = [threading.Thread(target=train, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for _ in range(parts):
        time.sleep(seconds / parts)
        tell()
    is_over.set()
    for worker in workers:
        worker.join()
    gc.collect()
    tell()
    fr.release_memory()
    tell()


if __name__ == "__main__":
    if sys.argv[1] == "step":
        step(*sys.argv[2:])
    else:
        soak(int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
