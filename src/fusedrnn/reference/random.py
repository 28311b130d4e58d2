"""The masks of zoneout and dropout, random numbers that depend on seed and position alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import like
from .types import Array, Options

ZONEOUT, RECURRENT, WEIGHTS, BETWEEN = range(4)  # the kinds of masks


def philox(counter: Sequence[Any], seed: int) -> list[Array]:
    """Philox4x32-10 (Salmon et al. 2011): four words of 32 bits for one counter and key.

    >>> [hex(int(w)) for w in philox([0, 0, 0, 0], 0)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, np.uint64) for word in np.broadcast_arrays(*counter)]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        products = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        (high0, low0), (high1, low1) = ((p >> np.uint64(32), p & low) for p in products)
        c = [high1 ^ c[1] ^ np.uint64(key[0]), low1, high0 ^ c[3] ^ np.uint64(key[1]), low0]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def drawn(
    kind: int, words: int, first: int, i: Any, j: Any, n: int, p: float, o: Options
) -> Array:
    """Return whether each of n elements of row (i, j) is drawn, with the probability p.

    A block of 16 elements takes one word of each of 16 successive counters. `words` blocks
    share the same counters and take their words from `first` on.
    """
    e = np.arange(n)
    block, word = e // 16 // words, e // 16 % words + first
    counter = [block * 16 + e % 16, i[..., None], j[..., None], kind | o.where << 8]
    threshold = min(int(p * 2**32 + 0.5), 2**32 - 1)
    return np.asarray(np.choose(word, philox(counter, o.seed)) < threshold)


def dropped(kind: int, i: Any, j: Any, n: int, p: float, o: Options, a: Any) -> Array:
    """Return 0 for dropped elements and 1/(1-p) for the others, as an array like a."""
    is_dropped = drawn(kind, 4, 0, np.asarray(i), np.asarray(j), n, p, o)
    mask: Array = like(a, np.where(is_dropped, 0, 1 / (1 - p)), a.dtype)
    return mask


def dropout(y: Array, p: float, seed: int, where: int) -> Array:
    """Return the dropout mask for y (T, B, …) of layer `where`."""
    i, j = np.ogrid[: y.shape[0], : y.shape[1]]
    return dropped(BETWEEN, i, j, y.shape[-1], p, Options(seed=seed, where=where), y)
