"""`topk(density)`: the largest numbers by magnitude travel, with their positions; the rest is 0, or waits (error feedback).

Positions are ascending; of each travels how many are skipped before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedtune.errors import MalformedMessage
from fedtune.wire.largest import largest
from fedtune.wire.stage import Array, Draw, Form, Kind, Stage

Density = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class TopK(Stage):
    name: ClassVar[str] = "topk"
    density: Density = 0.1

    def carrier(self, given: Form) -> Form:
        return Form((kept(self.density, given.count),))

    def sides(self, given: Form) -> Mapping[str, Form]:
        return {"gaps": Form((kept(self.density, given.count),), Kind.GAPS, 0, max(given.count - 1, 0))}

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        flat = x.reshape(-1)
        positions = largest(np.abs(flat), kept(self.density, flat.size))
        return flat[positions], {"gaps": gaps_of(positions)}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        return scattered(carrier, positions_of(sides["gaps"], given.count), given.count)

    def error(self, x: Array) -> float:
        """All but the largest, and no more."""
        left = x.size - kept(self.density, x.size)
        return float(np.linalg.norm(np.partition(np.abs(np.ravel(x)), left - 1)[:left].astype(np.float64))) if left else 0.0


def kept(density: float, count: int) -> int:
    """How many of `count` numbers travel: the density as it was typed, so that 0.07 of 100 are 7 and not 8; rounded up."""
    return math.ceil(Fraction(str(density)) * count)


def gaps_of(positions: Array) -> Array:
    return np.diff(positions, prepend=-1) - 1


def positions_of(gaps: Array, count: int) -> Array:
    """Raises MalformedMessage where they lead out of an array of so many numbers."""
    last = int(gaps.sum(dtype=np.float64)) + gaps.size - 1  # exact up to 2^53, and beyond that still far too much
    if last >= count:
        raise MalformedMessage(f"a position is {last}, of {count} numbers")
    positions = gaps.astype(np.int64)
    positions += 1
    np.cumsum(positions, out=positions)
    positions -= 1
    return positions


def scattered(values: Array, positions: Array, count: int) -> Array:
    """Zeros but for these."""
    x = np.zeros(count, np.float32)
    x[positions] = values
    return x
