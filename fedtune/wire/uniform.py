"""`uniform(step)`: whole multiples of a step that is a share of the tensor's root mean square, rounded to nearest.

    Delta = step * rms(x),  q = round(x / Delta),  x' = sign(q) (|q| - centre) Delta

`centre` is where the numbers of a step lie on average, closer to 0 than its middle: it makes the squared error least. With an
entropy coder behind it this comes close to what any coder can do at its error (Gish and Pierce 1968), also where the step is so
wide that most numbers become 0: at 2 rms a normal x takes 1.2 bits and loses a quarter of its energy, which error feedback
sends later. `dither = true` subtracts on both sides the same random part of a step: the mean is then right, for more error at
wide steps (Ziv 1985).

    q = round(x / Delta + u),  x' = (q - u) Delta,  u ~ U[-1/2, 1/2) drawn by both

The streams are the same on every machine: each value is worked on by single IEEE operations, and what is added up are whole
multiples of a unit, few enough at a time that float64 holds every sum as it is, in whatever order it is made.
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

MOST = 127  # the largest symbol; where the largest number is farther out than 126 steps, the step is wider
PIECE = 2**16  # values at a time, which stay in a core's own cache from the first operation to the last
UNITS = 18  # bits of the largest number, where squares are added up: 2 * 18 each, and 16 more for a piece
FINE = 24  # bits below the point of float32 numbers from 1/2 on: what they differ from whole numbers has no more
LEAST = 2.0**-142  # of the steps: of shorter ones float32 has too few bits
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Uniform(Stage):
    name: ClassVar[str] = "uniform"
    step: Annotated[float, Field(gt=0, le=16)] = 1.0
    dither: bool = False

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.dither

    @property
    def amplifies(self) -> bool:  # type: ignore[override]
        """Dither adds step^2 / 12 of the energy."""
        return self.dither and self.step**2 >= 12

    def carrier(self, given: Form) -> Form:
        return Form((given.count,), Kind.SYMBOLS, -MOST, MOST)

    def sides(self, given: Form) -> Mapping[str, Form]:
        return {"step": Form((2,), Kind.WORDS, 0, 2**32 - 1)}  # float32: the step, and the centre

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        symbols, delta, closer = np.zeros(flat.size, np.int8), self._step(flat), 0
        for piece in _pieces(flat.size if delta else 0):
            steps = flat[piece] / delta
            if self.dither:
                steps += _part_of_a_step(draw, piece)
            whole = np.rint(steps)
            np.copyto(symbols[piece], whole, casting="unsafe")
            closer += 0 if self.dither else _closer(steps, whole)
        centre = round(closer / (max(int(np.count_nonzero(symbols)), 1) << FINE - 8))  # 256ths
        return symbols, {"step": np.array([delta, min(max(centre, 0), 128) / 256], np.float32).view(np.uint32)}

    @np.errstate(over="ignore")  # a number near the largest that there is can be decoded to a larger one
    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        delta, centre = sides["step"].view(np.float32)
        if not 0 <= delta <= LARGEST:
            raise MalformedMessage(f"a step is {delta}, wanted a finite number from 0 on")
        if not 0 <= centre <= 0.5:
            raise MalformedMessage(f"a step's centre is {centre}, wanted 0 to 0.5")
        x = np.zeros(given.count, np.float32)
        for piece in _pieces(given.count if delta else 0):
            some = x[piece]
            some += carrier[piece]
            some -= _part_of_a_step(draw, piece) if self.dither else np.clip(carrier[piece], -1, 1) * centre
            some *= delta
        return x if delta * (MOST + 1.0) <= LARGEST else x.clip(-LARGEST, LARGEST)

    def error(self, x: Array) -> float:
        """Half a step each, with dither and, over all, with a centre too. And what float32 rounds away."""
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        return 0.51 * float(self._step(flat)) * math.sqrt(flat.size)

    def _step(self, flat: Array) -> np.float32:
        largest = float(max(flat.max(initial=0), -flat.min(initial=0)))
        if not largest:
            return np.float32(0)
        exponent = UNITS - math.frexp(largest)[1]
        squares = sum(_squares(flat[piece], exponent) for piece in _pieces(flat.size))
        rms = math.ldexp(math.sqrt(squares / flat.size), -exponent)
        return np.float32(min(max(self.step * rms, largest / (MOST - 1), LEAST), LARGEST))


def _pieces(count: int) -> list[slice]:
    return [slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]


def _squares(some: Array, exponent: int) -> int:
    """The sum of squares of the numbers times 2^exponent, which are below 2^18, rounded to whole ones."""
    whole = np.multiply(some, math.ldexp(1, exponent), dtype=np.float64)
    np.square(np.rint(whole, out=whole), out=whole)
    return int(whole.sum())


def _closer(steps: Array, whole: Array) -> int:
    """How much closer to 0 than the middles of their steps the numbers lie in all, of those that are not 0; 2^-24ths."""
    signs = np.clip(whole, np.float32(-1), np.float32(1))
    signs *= np.subtract(whole, steps, out=steps)
    return int(math.ldexp(float(signs.sum(dtype=np.float64)), FINE))


def _part_of_a_step(draw: Draw, piece: slice) -> Array:
    """float32, exact: 16 bits."""
    drawn = draw.bytes(2 * (piece.stop - piece.start), 2 * piece.start).view("<i2").astype(np.float32)
    drawn += np.float32(0.5)
    drawn *= np.float32(2.0**-16)
    return drawn
