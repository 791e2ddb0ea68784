"""`int8`, `int4`, `int2`: whole multiples of a step, one step a block.

s = max |x| in the block, rounded up to a bfloat16;  m = 2^(b-1) - 1;  x' = q s / m
    stochastic   q = floor(x m / s + u), u ~ U[0, 1): up or down at random, so that the mean is right
    nearest      q = round(x m / s): half the error; what was rounded away is lost, unless error feedback keeps it

The symbols are the same on every machine: whole numbers, single IEEE operations on each value, and a maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.errors import MalformedMessage
from fedtune.wire.stage import Array, Draw, Form, Kind, Stage

Block = Annotated[int, Field(ge=8, le=65536)]
CHUNK = 2**17  # values at a time: they stay in a core's own cache, or near it, from the first operation to the last
LARGEST = 0x7F7F  # of the finite bfloat16 words from 0 on; those above are negative, infinite or no numbers
LEAST = 0x0D80  # 2^-100, of the scales that are sent: what divides by a smaller one could overflow, and 0 needs no case


@dataclass(frozen=True)
class _Integers(Stage):
    bits: ClassVar[int]
    dither: ClassVar[int]  # bytes for each value
    block: Block = 256
    rounding: Literal["stochastic", "nearest"] = "stochastic"

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Up to half a unit of the dither, 2^-16 of the scale or less: a 512th of a step of int8, which 15,000 draws, each
        off by up to half a step, would just begin to show, and much less of the longer steps of int4 and int2."""
        return self.rounding == "stochastic"

    @property
    def amplifies(self) -> bool:  # type: ignore[override]
        """With three levels: on average the largest number of a block is far larger than the others."""
        return self.most == 1 and self.unbiased

    @property
    def most(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def carrier(self, given: Form) -> Form:
        return Form((given.count,), Kind.SYMBOLS, -self.most, self.most)

    def sides(self, given: Form) -> Mapping[str, Form]:
        return {"scales": Form((-(-given.count // self.block),), Kind.WORDS, 0, 2**16 - 1)}  # bfloat16

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        symbols = np.empty(flat.size, np.int8)
        scales = np.empty(-(-flat.size // self.block), np.uint16)
        # room to work in: fresh memory for each chunk would double the time
        room, fine = np.empty((self._chunk, self.block), np.float32), np.empty((self._chunk, self.block), self._fine)
        for values, blocks in self._chunks(flat.size):
            rows = _rows(flat[values], self.block)
            steps = room[: len(rows)]
            scales[blocks] = words = _scales(rows, steps.view(np.uint32))
            if words.max() == LARGEST:  # the next would be infinite: what lies between is cut
                rows = np.clip(rows, -_floats(words)[:, None], _floats(words)[:, None])
            np.multiply(rows, np.float32(self._units) / _floats(words)[:, None], out=steps)
            whole = self._rounded(np.rint(steps, out=steps), fine[: len(rows)], draw, values.start)
            symbols[values] = whole.reshape(-1)[: flat.size - values.start]
        return symbols, {"scales": scales}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        if (sides["scales"] > LARGEST).any():
            raise MalformedMessage("a scale is negative or not finite")
        steps = _floats(sides["scales"]) / np.float32(self.most)
        x = np.empty(given.count, np.float32)
        for values, blocks in self._chunks(given.count):
            rows = _rows(carrier[values], self.block) * steps[blocks, None]
            x[values] = rows.reshape(-1)[: x[values].size]
        return x

    def error(self, x: Array) -> float:
        """A step everywhere, or half of one; what is cut beyond the largest scale is less, and so is what float32 rounds."""
        rows = _rows(np.ascontiguousarray(x, np.float32).reshape(-1), self.block)
        scales = _floats(_scales(rows, np.empty(rows.shape, np.uint32))).astype(np.float64)
        counts = np.minimum(x.size - np.arange(len(rows)) * self.block, self.block)
        most = (1.0 if self.unbiased else 0.5) * (1 + 2**-10) / self.most
        return float(np.linalg.norm(np.sqrt(counts) * scales * most))

    @property
    def _units(self) -> int:
        """In a scale: what is added at random is a whole number of them."""
        return self.most * 256**self.dither if self.unbiased else self.most

    @property
    def _fine(self) -> type[np.signedinteger[Any]]:
        """Holds a scale and all but one unit of a step more."""
        return np.int16 if self.dither == 1 else np.int32

    def _rounded(self, units: Array, fine: Array, draw: Draw, start: int) -> Array:
        """Whole steps (blocks, block); `fine` is room for as many."""
        if not self.unbiased:
            return units
        np.copyto(fine, units, casting="unsafe")
        fine += draw.bytes(self.dither * fine.size, self.dither * start).view(f"<u{self.dither}").reshape(fine.shape)
        fine >>= 8 * self.dither
        return fine

    @property
    def _chunk(self) -> int:
        """Blocks at a time; their dither starts at a multiple of 32 bytes."""
        least = 32 // math.gcd(32, self.block)
        return max(CHUNK // self.block // least, 1) * least

    def _chunks(self, count: int) -> Iterator[tuple[slice, slice]]:
        """Values, and the blocks that hold them."""
        for start in range(0, -(-count // self.block), self._chunk):
            yield slice(start * self.block, (start + self._chunk) * self.block), slice(start, start + self._chunk)


@dataclass(frozen=True)
class Int8(_Integers):
    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    dither: ClassVar[int] = 1


@dataclass(frozen=True)
class Int4(_Integers):
    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    dither: ClassVar[int] = 2


@dataclass(frozen=True)
class Int2(_Integers):
    name: ClassVar[str] = "int2"
    bits: ClassVar[int] = 2
    dither: ClassVar[int] = 2


def _rows(flat: Array, block: int) -> Array:
    """(blocks, block); the last is filled up with zeros."""
    short = -flat.size % block
    whole: Array = np.pad(flat, (0, short)) if short else flat
    return whole.reshape(-1, block)


def _scales(rows: Array, room: Array) -> Array:
    """bfloat16 words (blocks,), each the largest size in a block rounded up; sizes of floats are ordered as their bits."""
    sizes = np.bitwise_and(rows.view(np.uint32), np.uint32(0x7FFFFFFF), out=room).max(axis=1)
    words: Array = np.minimum(np.maximum((sizes + np.uint32(0xFFFF)) >> np.uint32(16), LEAST), LARGEST).astype(np.uint16)
    return words


def _floats(words: Array) -> Array:
    plain: Array = (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return plain
