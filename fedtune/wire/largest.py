"""The positions of the largest numbers, exactly: which are kept must be the same on every machine."""

from __future__ import annotations

import numpy as np

from fedtune.wire.stage import Array


def largest(sizes: Array, count: int) -> Array:
    """Positions of the `count` largest, ascending; of equal ones the first, so that every machine keeps the same."""
    if count in (0, sizes.size):
        return np.arange(count)
    least = np.partition(sizes, sizes.size - count)[sizes.size - count]
    above = np.flatnonzero(sizes > least)
    equal = np.flatnonzero(sizes == least)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))
