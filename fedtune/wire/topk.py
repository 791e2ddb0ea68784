"""`topk(density)`: the largest numbers by magnitude travel, with their positions; the rest is 0, or waits (error feedback).

Positions are ascending; of each travels how many are skipped before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedtune.errors import MalformedMessage
from fedtune.wire.stage import Array, Draw, Form, Kind, Stage

Density = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class TopK(Stage):
    name: ClassVar[str] = "topk"
    density: Density = 0.1

    def kept(self, count: int) -> int:
        return min(count, math.ceil(self.density * count))

    def carrier(self, given: Form) -> Form:
        return Form((self.kept(given.count),))

    def sides(self, given: Form) -> Mapping[str, Form]:
        return {"gaps": Form((self.kept(given.count),), Kind.GAPS, 0, max(given.count - 1, 0))}

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        flat = x.reshape(-1)
        positions = largest(np.abs(flat), self.kept(flat.size))
        return flat[positions], {"gaps": gaps_of(positions)}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        return scattered(carrier, positions_of(sides["gaps"], given.count), given.count)

    def error(self, x: Array) -> float:
        """All but the largest."""
        sizes = np.sort(np.abs(np.ravel(x)).astype(np.float64))
        return float(np.linalg.norm(sizes[: sizes.size - self.kept(sizes.size)]))


def largest(sizes: Array, count: int) -> Array:
    """Positions of the `count` largest, ascending; of equal ones the first, so that every machine keeps the same."""
    if count in (0, sizes.size):
        return np.arange(count)
    least = np.partition(sizes, sizes.size - count)[sizes.size - count]
    above = np.flatnonzero(sizes > least)
    equal = np.flatnonzero(sizes == least)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def gaps_of(positions: Array) -> Array:
    return np.diff(positions, prepend=-1) - 1


def positions_of(gaps: Array, count: int) -> Array:
    """Raises MalformedMessage where they lead out of an array of so many numbers."""
    positions = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if positions.size and positions[-1] >= count:
        raise MalformedMessage(f"a position is {positions[-1]}, of {count} numbers")
    return positions


def scattered(values: Array, positions: Array, count: int) -> Array:
    x = np.zeros(count, np.float32)
    x[positions] = values
    return x
