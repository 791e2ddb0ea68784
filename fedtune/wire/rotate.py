"""`rotate`: a random rotation before a quantiser, so that no number is much larger than the others; the receiver turns it back.

Signs are drawn, and the Walsh-Hadamard transform mixes columns of 4,096 numbers (or the largest power of two that there is).
What such columns leave over is mixed by a second rotation, over the last 4,096 numbers: both keep lengths, so the two do,
and no number is added. Only sums and differences of pairs are taken, in a fixed order: all machines get the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.wire.stage import Array, Draw, Form, Stage

LONGEST = 4096  # numbers in a column
WIDTH = 32  # columns that lie in the cache at once
PIECE = 2**16  # signs that do
UNIT = 2.0**-24  # the largest relative error of one float32 operation


@dataclass(frozen=True)
class Rotate(Stage):
    name: ClassVar[str] = "rotate"
    unbiased: ClassVar[bool] = True  # as far as float32 goes

    def carrier(self, given: Form) -> Form:
        return Form((given.count,))

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        turned = np.array(x, np.float32).reshape(-1)
        for number, part in enumerate(_parts(turned)):
            _flip(part, draw, number)
            _mix(part)
        return turned, {}

    @np.errstate(over="ignore", invalid="ignore")  # nonsense from the network ends as nonsense, which the gate refuses
    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        x = np.array(carrier, np.float32).reshape(-1)
        for number, part in reversed(list(enumerate(_parts(x)))):
            _mix(part)
            _flip(part, draw, number)
        return x

    def error(self, x: Array) -> float:
        """Rounding: of the scale, and of the sums at each of log2 (column) levels, there and back."""
        levels = min(x.size, LONGEST).bit_length()
        passes = 2 * len(_parts(np.ravel(x)))
        tiny = passes * 2.0**-150 * math.sqrt(LONGEST * x.size)  # below float32, multiples of 2^-149 are all that there is
        return 1.01 * passes * (levels + 1) * UNIT * float(np.linalg.norm(x.astype(np.float64))) + tiny


def _parts(x: Array) -> list[Array]:
    """What is rotated, one after the other, as views (column, columns); the second overlaps the first."""
    if not x.size:
        return []
    length = min(LONGEST, 1 << x.size.bit_length() - 1)
    whole = x.size // length * length
    first = x[:whole].reshape(length, -1)
    return [first] if whole == x.size else [first, x[-length:].reshape(length, 1)]


def _flip(part: Array, draw: Draw, stream: int) -> None:
    """Half of the signs, in place."""
    words = part.reshape(-1).view(np.uint32)
    bits = draw.common(-(-words.size // 8), stream=stream)
    for start in range(0, words.size, PIECE):
        piece = words[start : start + PIECE]
        drawn = np.unpackbits(bits[start // 8 : (start + PIECE) // 8], count=piece.size, bitorder="little")
        piece ^= drawn.astype(np.uint32) << np.uint32(31)


def _mix(part: Array) -> None:
    """H / sqrt(length) times each column, in place. It is its own inverse."""
    scale = np.float32(1 / part.shape[0] ** 0.5)  # before the sums, so that none is longer than the whole
    for start in range(0, part.shape[1], WIDTH):
        some = part[:, start : start + WIDTH]
        some[...] = transformed(some * scale)


def transformed(x: Array) -> Array:
    """The Walsh-Hadamard transform of each column of x (a power of two, columns), which is overwritten."""
    other, half = np.empty_like(x), 1
    while half < x.shape[0]:
        before, after = (pairs.reshape(-1, 2, half * x.shape[1]) for pairs in (x, other))
        np.add(before[:, 0], before[:, 1], out=after[:, 0])
        np.subtract(before[:, 0], before[:, 1], out=after[:, 1])
        x, other, half = other, x, 2 * half
    return x
