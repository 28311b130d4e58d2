"""Two training steps of an LSTM of 768 units in bfloat16, for a profiler."""

from __future__ import annotations

import sys

import numpy as np

import fusedrnn as fr
from fusedrnn import cuda

T, B, H = (4, 3, 40) if "--small" in sys.argv else (64, 16, 768)

rng = np.random.default_rng(0)
shapes = ((T, B, H), (4 * H, H), (4 * H, H), (4 * H,), (4 * H,))
x, *parameters = (
    cuda.array(rng.uniform(-1, 1, shape) * H**-0.5, "bfloat16") for shape in shapes
)
for _ in range(2):
    (y, *_), pullback = fr.lstm_vjp(x, *parameters)
    print(abs(pullback(y).x.numpy()).max())
