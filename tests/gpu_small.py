"""Small training steps in each exchange that their sizes allow, for compute-sanitizer."""

from __future__ import annotations

import numpy as np
from gpu import EXCHANGES, choose_plan, exists, put
from helpers import Sizes, arguments, cotangents, op

from fusedrnn.cells import CELLS

SIZES = Sizes(3, 9, 72, 72)

for name in ("lstm", "gru"):
    cell = CELLS[name]
    for precision in ("bfloat16", "float32"):
        values = put(arguments(cell, SIZES, np.float64), precision)
        for exchange in (None, *EXCHANGES):
            choose_plan(exchange=exchange)
            if exists(cell, precision, SIZES):
                results, pullback = op(cell, "_vjp")(**values)
                y = cotangents([r.numpy() for r in results[:1]])[0]
                pullback(put({"x": y}, precision)["x"])
                print(name, precision, exchange or "free", flush=True)
        choose_plan()
