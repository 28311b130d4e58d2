"""Run a layer over a data set on several processes or machines, by Ray Data.

    pip install "fusedrnn[ray]"
    python examples/ray_batches.py --workers 2

A folder of Parquet files holds sequences of several lengths. Each worker is a process with a
copy of the layer and one thread, and maps one batch after the other to the last state of its
sequences. One process without Ray computes the same; the states must be the same bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import ray

import fusedrnn as fr

Batch = dict[str, np.ndarray]
FEATURES, BATCH = 8, 256


class Encode:
    """A worker: it is made once in its process, and called with one batch after the other."""

    def __init__(self, layer: fr.LSTM) -> None:
        fr.set_num_threads(1)  # there is a worker for each core
        self.layer = layer

    def __call__(self, batch: Batch) -> Batch:
        """Map sequences (B, T, I) and their lengths to the last h, (B, H)."""
        _, (h_n, _) = self.layer(batch["x"], lengths=batch["length"])
        return {"id": batch["id"], "h": h_n[-1]}


def write_sequences(folder: str, count: int, steps: int) -> None:
    """Write sequences (T, I) with their lengths as Parquet files."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, steps, FEATURES)).astype(np.float32)
    lengths = rng.integers(steps // 2, steps + 1, count)
    rows = [{"id": n, "x": x[n], "length": lengths[n]} for n in range(count)]
    ray.data.from_items(rows, override_num_blocks=16).write_parquet(folder)


def by_ray(data: Any, layer: fr.LSTM, workers: int) -> Iterable[Batch]:
    """Return batches of states, in any order, from some workers."""
    done = data.map_batches(
        Encode,
        fn_constructor_args=(layer,),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    states: Iterable[Batch] = done.iter_batches(batch_size=None)
    return states


def by_one_process(data: Any, layer: fr.LSTM) -> Iterable[Batch]:
    """Return batches of states from this process."""
    return map(Encode(layer), data.iter_batches(batch_size=BATCH))


def collect(name: str, batches: Iterable[Batch]) -> np.ndarray:
    """Return the states in the order of their ids, and print the speed."""
    begin, ends, parts = time.perf_counter(), [], []
    for batch in batches:
        parts.append(batch)
        ends.append(time.perf_counter())
    ids, h = (np.concatenate([part[key] for part in parts]) for key in ("id", "h"))
    print(f"{name}: {len(ids) / (ends[-1] - begin):.0f} rows a second with the start", end="")
    later = len(ids) - len(parts[0]["id"])
    if later:
        print(f", {later / (ends[-1] - ends[0]):.0f} after the first batch", end="")
    print()
    return h[ids.argsort()]


def main() -> None:
    """Write the data, compute their states both ways, compare, and print the speed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument("--rows", type=int, default=16384, help="default: 16384")
    parser.add_argument("--short", action="store_true", help="a quick run, as a test")
    args = parser.parse_args()
    if args.workers < 1 or args.rows < 1:
        parser.error("--workers and --rows must be 1 or more")
    rows, steps, hidden = (300, 20, 32) if args.short else (args.rows, 100, 256)
    # On a cluster, ray.init() without arguments. One CPU more than workers reads the files.
    ray.init(num_cpus=args.workers + 1, include_dashboard=False, logging_level="warning")
    ray.data.DataContext.get_current().enable_progress_bars = False
    layer = fr.LSTM(FEATURES, hidden, batch_first=True, rng=np.random.default_rng(1))
    with tempfile.TemporaryDirectory() as folder:
        write_sequences(folder, rows, steps)
        # Ray reads blocks of up to 128 MB, and a small data set as one block, for one worker.
        data = ray.data.read_parquet(folder).repartition(target_num_rows_per_block=BATCH)
        alone = collect("one process", by_one_process(data, layer))
        together = collect(
            f"{args.workers} worker" + "s" * (args.workers > 1),
            by_ray(data, layer, args.workers),
        )
    ray.shutdown()
    if not np.array_equal(together, alone):
        raise SystemExit("the states differ")
    print(f"the same bits in all {rows} states")


if __name__ == "__main__":
    main()
