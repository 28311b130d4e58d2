"""What calls keep of memory is bounded, whatever their sizes, and can be given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

SOAK = """
import sys, threading
import numpy as np
import fusedrnn as fr

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def train(seed):
    rng = np.random.default_rng(seed)
    layers = fr.LSTM(32, 64, rng=0), fr.GRU(32, 64, 2, bidirectional=True, rng=0)
    for call in range(calls):
        x = np.ones((rng.integers(1, 200), rng.integers(1, 17), 32), np.float32)
        (y, _), pullback = layers[call % 2].vjp(x)
        pullback(y)

calls, count = map(int, sys.argv[1:])
fr.set_num_threads(1)
start = resident()
threads = [threading.Thread(target=train, args=(seed,)) for seed in range(count)]
for thread in threads: thread.start()
for thread in threads: thread.join()
kept = resident() - start
fr.release_memory()
print(kept, resident() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("calls", "threads"), [(300, 1), (60, 8)])
def test_training_on_many_sizes_keeps_little(calls: int, threads: int) -> None:
    """Less than 100 MB are kept when the threads have ended, and little once it is released."""
    command = [sys.executable, "-c", SOAK, str(calls), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, rest = map(float, done.stdout.split())
    assert kept < 100
    assert rest < 40
