"""`uniform(step)`: whole multiples of a step that is a share of the tensor's root mean square, rounded to nearest.

    Delta = step * rms(x),  q = round(x / Delta),  x' = sign(q) (|q| - centre) Delta

`centre` is where the numbers of a step lie on average, closer to 0 than its middle: it makes the squared error least. With an
entropy coder behind it this comes close to what any coder can do at its error (Gish and Pierce 1968), also where the step is so
wide that most numbers become 0: at 2 rms a normal x takes 1.2 bits and loses a quarter of its energy, which error feedback
sends later. `dither = true` subtracts on both sides the same random part of a step: the mean is then right, for more error at
wide steps (Ziv 1985).

    q = round(x / Delta + u),  x' = (q - u) Delta,  u ~ U[-1/2, 1/2) drawn by both
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedtune.errors import MalformedMessage
from fedtune.wire.stage import Array, Draw, Form, Kind, Stage

MOST = 127  # where the largest number is farther out than so many steps, the step is wider


@dataclass(frozen=True)
class Uniform(Stage):
    name: ClassVar[str] = "uniform"
    step: Annotated[float, Field(gt=0, le=16)] = 1.0
    dither: bool = False

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.dither

    def carrier(self, given: Form) -> Form:
        return Form((given.count,), Kind.SYMBOLS, -MOST, MOST)

    def sides(self, given: Form) -> Mapping[str, Form]:
        return {"step": Form((2,), Kind.WORDS, 0, 2**32 - 1)}  # float32: the step, and the centre

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        delta = self._step(flat)
        if not delta:
            return np.zeros(flat.size, np.int8), {"step": np.zeros(2, np.uint32)}
        scaled = flat / delta
        if self.dither:
            scaled += _part_of_a_step(draw, flat.size)
        symbols = np.rint(scaled).astype(np.int8)
        centre = np.float32(0) if self.dither else _centre(scaled, symbols)
        return symbols, {"step": np.array([delta, centre], np.float32).view(np.uint32)}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        delta, centre = sides["step"].view(np.float32)
        if not (np.isfinite(delta) and 0 <= delta <= np.finfo(np.float32).max / (2 * MOST)):
            raise MalformedMessage(f"a step is {delta}, wanted a finite number from 0 on")
        if not 0 <= centre <= 0.5:
            raise MalformedMessage(f"a step's centre is {centre}, wanted 0 to 0.5")
        x: Array = carrier.astype(np.float32)
        x -= _part_of_a_step(draw, given.count) if self.dither else np.sign(x) * centre
        x *= delta
        return x

    def error(self, x: Array) -> float:
        """Half a step each, with dither and, over all, with a centre too. And what float32 rounds away."""
        flat = np.ravel(x)
        return float(0.51 * float(self._step(flat)) * flat.size**0.5) if flat.size else 0.0

    def _step(self, flat: Array) -> np.float32:
        """With 16 significant bits, so that the order in which machines add up squares cannot be seen."""
        if not flat.size:
            return np.float32(0)
        largest = float(np.abs(flat).max())
        rms = largest and float(np.sqrt(np.mean(np.square(flat / np.float32(largest), dtype=np.float64)))) * largest
        word = np.array([max(self.step * rms, largest / (MOST - 1))], np.float32).view(np.uint32)
        rounded = ((word + np.uint32(0x80)) & np.uint32(0xFFFFFF00)).view(np.float32)
        return np.float32(rounded[0])


def _centre(scaled: Array, symbols: Array) -> np.float32:
    """How much closer to 0 than the middles of their steps the numbers lie, of those that are not 0; in whole 256ths."""
    used = symbols != 0
    closer = np.abs(symbols[used]).astype(np.float64) - np.abs(scaled[used])
    return np.float32(np.clip(np.rint(closer.mean() * 256) / 256, 0, 0.5) if closer.size else 0.0)


def _part_of_a_step(draw: Draw, count: int) -> Array:
    return (draw.bytes(2 * count).view("<i2").astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-16)
