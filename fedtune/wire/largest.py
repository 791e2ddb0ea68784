"""The positions of the largest numbers, exactly: which are kept must be the same on every machine.

To part 8 million numbers at the k-th largest takes longer than all else that a stage does with them. So a sample tells where
that one lies about, and only the numbers from a little below on are looked at closely. A sample that misleads costs time, and
changes nothing.
"""

from __future__ import annotations

import math

import numpy as np

from fedtune.wire.stage import Array

SAMPLE = 2**14  # numbers
MARGIN = 6  # standard deviations of the rank of a number in a sample
FEW = 8 * SAMPLE  # numbers that need no sample


def largest(sizes: Array, count: int) -> Array:
    """Positions of the `count` largest, ascending; of equal ones the first, so that every machine keeps the same."""
    if count in (0, sizes.size):
        return np.arange(count)
    candidates = _candidates(sizes, count)
    values = sizes[candidates]
    least = np.partition(values, values.size - count)[values.size - count]
    kept = values > least
    equal = np.flatnonzero(values == least)
    kept[equal[: count - np.count_nonzero(kept)]] = True
    chosen: Array = candidates[kept]
    return chosen


def _candidates(sizes: Array, count: int) -> Array:
    """Positions, ascending, at least `count`: if one is among them, so are all that are as large."""
    if sizes.size > FEW:
        found = np.flatnonzero(sizes >= _a_little_below(sizes, count))
        if found.size >= count:
            return found
    return np.arange(sizes.size)


def _a_little_below(sizes: Array, count: int) -> float:
    """A number that almost surely is at most the `count`-th largest, by every so-manieth number."""
    sample = sizes[:: sizes.size // SAMPLE | 1]  # an odd stride does not stay in one column of a matrix
    above = sample.size * count / sizes.size
    place = math.ceil(above + MARGIN * (math.sqrt(above) + MARGIN))
    return float(np.partition(sample, max(sample.size - place, 0))[max(sample.size - place, 0)])
