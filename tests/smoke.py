"""Does an installed wheel work? Needs NumPy alone: python tests/smoke.py

Each cell forward and backward on each instruction set that this processor has, against the
reference; threads; a layer with options; the commands; no page that is writable and executable.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

import fusedrnn as fr
from fusedrnn import cli

# Sizes that end within a vector of any instruction set.
T, B, I, H = 9, 5, 7, 19


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / (1 + np.abs(expected).max()))


def check_cells(rng: np.random.Generator) -> None:
    x, dy = (rng.normal(size=(T, B, n)).astype(np.float32) for n in (I, H))
    for name in ("LSTM", "GRU", "RNN"):
        parameters = list(getattr(fr, name)(I, H, rng=rng).state_dict().values())
        op = f"{name.lower()}_vjp"
        results = []
        for module, dtype in ((fr, np.float32), (fr.reference, np.float64)):
            given = [a.astype(dtype) for a in (x, *parameters)]
            (y, *_), pullback = getattr(module, op)(*given)
            grads = pullback(dy.astype(dtype))
            results.append((y, grads.x, grads.weight_ih, grads.weight_hh))
        worst = max(relative(a, e) for a, e in zip(*results, strict=True))
        assert worst < 1e-5, (fr.get_isa(), name, worst)


def check_threads(rng: np.random.Generator) -> None:
    layer = fr.GRU(I, 64, num_layers=2, layer_norm=True, zoneout=0.1, rng=rng)
    x = rng.normal(size=(50, 16, I)).astype(np.float32)
    lengths = rng.integers(0, 51, 16)
    expected = layer(x, lengths=lengths)[0]
    found: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: found.append(layer(x, lengths=lengths)[0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all((y == expected).all() for y in found)


def check_pages() -> None:
    maps = Path("/proc/self/maps")  # of Linux
    pages = maps.read_text().splitlines() if maps.exists() else []
    assert not [page for page in pages if "wx" in page.split()[1]]


if __name__ == "__main__":
    isas = fr.show_config("dict")["isas available"]
    for isa in isas:
        fr.set_isa(isa)
        check_cells(np.random.default_rng(0))
        check_threads(np.random.default_rng(1))
    fr.set_isa(None)
    assert cli.main(["info"]) == 0
    check_pages()
    print(f"fusedrnn works on {', '.join(isas)}")
