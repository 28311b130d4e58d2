"""Options in all pairs, for tests that need them: they take a second to find."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from helpers import MASKS, Sizes, options_of

from fusedrnn.cells import CELLS


def pairwise(columns: list[list[Any]], seed: int = 0) -> list[tuple[Any, ...]]:
    """Few rows in which every pair of values of two columns stands together (AETG's greedy)."""
    rng = np.random.default_rng(seed)
    left = {
        (i, a, j, b)
        for (i, first), (j, second) in itertools.combinations(enumerate(columns), 2)
        for a in range(len(first))
        for b in range(len(second))
    }
    rows = []
    while left:
        best: tuple[int, list[int]] = (-1, [])
        for _ in range(30):
            i, a, j, b = sorted(left)[rng.integers(len(left))]
            row = [int(rng.integers(len(c))) for c in columns]
            row[i], row[j] = a, b
            for k in rng.permutation(len(columns)):
                if k in (i, j):
                    continue
                gains = []
                for value in range(len(columns[k])):
                    row[k] = value
                    gains.append(len(covered(row) & left))
                row[k] = int(np.argmax(gains))
            best = max(best, (len(covered(row) & left), row))
        rows.append(tuple(c[v] for c, v in zip(columns, best[1], strict=True)))
        left -= covered(best[1])
    return rows


def covered(row: list[int]) -> set[tuple[int, int, int, int]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def matrix(name: str) -> list[tuple[Any, ...]]:
    """Options on or off, and direction, dtype, shape and threads, in all pairs."""
    flags = [n for n in options_of(CELLS[name]) if n != "zoneout in inference"]
    columns = [
        *([None, flag] for flag in [*flags, *MASKS[:2]]),
        [None, "mask", "mask last"],
        [False, True],
        ["float32", "float64"],
        [Sizes(5, 3, 4, 7), Sizes(4, 40, 7, 50), Sizes(40, 13, 3, 16), Sizes(9, 1, 6, 33)],
        [1, 2, 3],
    ]
    return pairwise(columns)


CASES = [(name, row) for name in CELLS for row in matrix(name)]
CASE_IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
