"""`randk(density)`: some numbers, drawn by both sides, travel; the receiver multiplies them by n / k: the mean is right.

Every position has a random word of 64 bits, and the k smallest words win: all sets are equally likely up to 2^-64 n. Nothing
but values travels, and those of several clients with the same draw can be summed as they are. Under error feedback it does
not converge, since n / k enlarges what was forgotten: `topk` is for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.wire.stage import Array, Draw, Form, Stage
from fedtune.wire.topk import Density, kept, scattered

PIECE = 2**15  # positions whose words lie in the cache at once
MARGIN = 6  # standard deviations
MOST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RandK(Stage):
    name: ClassVar[str] = "randk"
    unbiased: ClassVar[bool] = True
    amplifies: ClassVar[bool] = True
    density: Density = 0.1

    def carrier(self, given: Form) -> Form:
        return Form((kept(self.density, given.count),))

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return x.reshape(-1)[drawn_positions(kept(self.density, x.size), x.size, draw)], {}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        if not carrier.size:
            return np.zeros(given.count, np.float32)
        enlarged = carrier.astype(np.float64) * (given.count / carrier.size)
        values = np.clip(enlarged, -MOST, MOST).astype(np.float32)
        return scattered(values, drawn_positions(carrier.size, given.count, draw), given.count)

    def error(self, x: Array) -> float:
        """The worst draw: a number that is kept is off by n/k - 1 of itself, one that is not by all of itself."""
        count = kept(self.density, x.size)
        if not count:
            return 0.0
        more, sizes = x.size / count - 1, np.sort(np.abs(np.ravel(x)).astype(np.float64))
        few, many = (sizes[-count:], sizes[:-count]) if more >= 1 else (sizes[:count], sizes[count:])
        rounding = (more + 1) * 2.0**-24 * np.linalg.norm(sizes) + 2.0**-149 * count
        return float(np.hypot(more * np.linalg.norm(few), np.linalg.norm(many)) + rounding)


def drawn_positions(count: int, n: int, draw: Draw) -> Array:
    """`count` of n positions without replacement, ascending; of equal words the first wins."""
    if count in (0, n):
        return np.arange(count)
    for limit in _limits(count, n):
        positions, words = _below(limit, n, draw)
        if positions.size >= count:
            break
    last = np.partition(words, count - 1)[count - 1]
    chosen = words < last
    chosen[np.flatnonzero(words == last)[: count - np.count_nonzero(chosen)]] = True
    won: Array = positions[chosen]
    return won


def _limits(count: int, n: int) -> Iterator[int]:
    """Below which the k smallest words lie: almost surely, then surely."""
    likely = (count + MARGIN * (math.isqrt(count) + MARGIN)) * 2**64 // n
    yield min(likely, 2**64 - 1)
    yield 2**64 - 1


def _below(limit: int, n: int, draw: Draw) -> tuple[Array, Array]:
    """Positions (c,) whose words (c,) are at most `limit`."""
    found, theirs = [], []
    for start in range(0, n, PIECE):
        words = draw.common(8 * min(PIECE, n - start), 8 * start).view("<u8")
        inside = np.flatnonzero(words <= np.uint64(limit))
        found.append(inside + start)
        theirs.append(words[inside])
    return np.concatenate(found), np.concatenate(theirs)
