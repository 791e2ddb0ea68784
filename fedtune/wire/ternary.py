"""`ternary(density)`: of the largest numbers by magnitude the signs travel, and one size for all of them (ComPEFT 2023).

    x' = a sign(x) where x is kept, 0 elsewhere,  a = mean |kept|

That mean leaves the least squared error of all sizes a: the derivative of sum (|x| - a)^2 is 0 there. The bias is large, and
error feedback is what makes up for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire.largest import largest
from fedtune.wire.stage import Array, Draw, Form, Kind, Stage
from fedtune.wire.topk import Density, gaps_of, kept, positions_of, scattered

UNITS = 32  # bits of the largest number, where the sizes are added up
SLACK = 2**-20  # relative: of the size in float32


@dataclass(frozen=True)
class Ternary(Stage):
    name: ClassVar[str] = "ternary"
    density: Density = 0.1

    def carrier(self, given: Form) -> Form:
        return Form((kept(self.density, given.count),), Kind.SYMBOLS, 0, 1)  # 1 is negative

    def sides(self, given: Form) -> Mapping[str, Form]:
        gaps = Form((kept(self.density, given.count),), Kind.GAPS, 0, max(given.count - 1, 0))
        return {"gaps": gaps, "scale": Form((1,), Kind.WORDS, 0, 2**32 - 1)}  # float32

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        positions = largest(np.abs(flat), kept(self.density, flat.size))
        values = flat[positions]
        scale = np.array([_mean_of(np.abs(values))], np.float32)
        return (values < 0).astype(np.uint8), {"gaps": gaps_of(positions), "scale": scale.view(np.uint32)}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        scale = sides["scale"].view(np.float32)[0]
        if not (np.isfinite(scale) and scale >= 0):
            raise MalformedMessage(f"a scale is {scale}, wanted a finite number from 0 on")
        values = np.array([scale, -scale], np.float32)[carrier]
        return scattered(values, positions_of(sides["gaps"], given.count), given.count)

    def error(self, x: Array) -> float:
        """What the dropped ones are, and how far the others are from their mean."""
        sizes = np.abs(np.ravel(x)).astype(np.float64)
        left = sizes.size - kept(self.density, sizes.size)
        if left == sizes.size:
            return 0.0
        parted = np.partition(sizes, left)
        mean = parted[left:].mean()
        rounding = (SLACK * mean + 2.0**-149) * math.sqrt(sizes.size - left)
        return float(np.hypot(np.linalg.norm(parted[:left]), np.linalg.norm(parted[left:] - mean)) + rounding)


def _mean_of(sizes: Array) -> float:
    """Of float32 numbers from 0 on, as whole multiples of 2^-32 of the largest: the order in which they are added, which
    differs from machine to machine, cannot be seen."""
    largest_of_all = float(sizes.max(initial=0))
    if not largest_of_all:
        return 0.0
    exponent = UNITS - math.frexp(largest_of_all)[1]  # every size times 2^exponent is less than 2^32
    total = int(np.multiply(sizes, math.ldexp(1, exponent), dtype=np.float64).astype(np.int64).sum())
    return math.ldexp(total / sizes.size, -exponent)
