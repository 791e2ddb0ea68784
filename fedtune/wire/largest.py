"""The positions of the largest numbers, exactly: which are kept must be the same on every machine.

To part 8 million numbers at the k-th largest takes longer than all else that a stage does with them. So a sample tells between
which bounds that one lies, and only numbers between them are parted. A sample that misleads costs time, and changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedtune.wire.stage import Array

SAMPLE = 2**14  # numbers
MARGIN = 6  # standard deviations of the rank of a number in a sample
FEW = 8 * SAMPLE  # numbers that need no sample


def largest(sizes: Array, count: int) -> Array:
    """Positions of the `count` largest, ascending; of equal ones the first, so that every machine keeps the same."""
    if count in (0, sizes.size):
        return np.arange(count)
    low, high = _bounds(sizes, count) if sizes.size > FEW else (-math.inf, math.inf)
    candidates = np.flatnonzero(sizes >= low)
    if candidates.size < count:
        candidates = np.arange(sizes.size)
    values = sizes[candidates]
    least = _least_of_the_largest(values, count, high)
    kept = values > least
    equal = np.flatnonzero(values == least)
    kept[equal[: count - np.count_nonzero(kept)]] = True
    chosen: Array = candidates[kept]
    return chosen


def _bounds(sizes: Array, count: int) -> tuple[float, float]:
    """Two numbers between which the `count`-th largest lies almost surely, by every so-manieth number."""
    sample = np.sort(sizes[:: sizes.size // SAMPLE | 1])[::-1]  # an odd stride does not stay in one column of a matrix
    rank = sample.size * count / sizes.size
    margin = MARGIN * (math.sqrt(rank) + MARGIN)
    return float(sample[min(math.ceil(rank + margin), sample.size - 1)]), float(sample[max(math.floor(rank - margin), 0)])


def _least_of_the_largest(values: Array, count: int, high: float) -> Any:
    """The `count`-th largest; those above `high` need not be parted."""
    between = values[values <= high]
    wanted = count - (values.size - between.size)
    if wanted <= 0:
        between, wanted = values, count
    return np.partition(between, between.size - wanted)[between.size - wanted]
