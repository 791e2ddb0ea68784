"""`int8`, `int4`, `int2`: whole multiples of a step, one step a block, rounded up or down at random so that the mean is right.

s = max |x| in the block,  m = 2^(b-1) - 1,  q = floor(x m / s + u),  u ~ U[0, 1),  x' = q s / m
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire.stage import Array, Draw, Form, Kind, Stage


class _Integers(Stage):
    unbiased: ClassVar[bool] = True
    bits: ClassVar[int]
    block: int

    @property
    def most(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def carrier(self, given: Form) -> Form:
        return Form((given.count,), Kind.SYMBOLS, -self.most, self.most)

    def sides(self, given: Form) -> Mapping[str, Form]:
        return {"scales": Form((-(-given.count // self.block),), Kind.WORDS, 0, 2**16 - 1)}  # bfloat16

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        blocks = np.zeros((-(-flat.size // self.block), self.block), np.float32)
        blocks.reshape(-1)[: flat.size] = flat
        scales = _rounded_up(np.abs(blocks).max(axis=1))  # bfloat16 words
        steps = _floats(scales) / np.float32(self.most)
        noise = draw.bytes(2 * blocks.size).view("<u2").astype(np.float32) * np.float32(2.0**-16)
        inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)
        symbols = np.floor(blocks * inverse[:, None] + noise.reshape(blocks.shape))
        symbols = np.clip(symbols, -self.most, self.most).astype(np.int8)
        return symbols.reshape(-1)[: flat.size], {"scales": scales}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        scales = _floats(sides["scales"])
        if not (np.isfinite(scales).all() and (scales >= 0).all()):
            raise MalformedMessage("a scale is negative or not finite")
        steps = scales / np.float32(self.most)
        return carrier.astype(np.float32) * np.repeat(steps, self.block)[: given.count]

    def error(self, x: Array) -> float:
        """Less than a step everywhere; bfloat16 scales are rounded up by at most a 128th."""
        flat = np.abs(np.ravel(x)).astype(np.float64)
        blocks = [flat[start : start + self.block] for start in range(0, flat.size, self.block)]
        return float(sum(len(b) * (b.max() * (1 + 2**-7) / self.most) ** 2 for b in blocks) ** 0.5) + 1e-38


@dataclass(frozen=True)
class Int8(_Integers):
    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    block: int = 256


@dataclass(frozen=True)
class Int4(_Integers):
    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    block: int = 256


@dataclass(frozen=True)
class Int2(_Integers):
    name: ClassVar[str] = "int2"
    bits: ClassVar[int] = 2
    block: int = 256


def _rounded_up(values: Array) -> Array:
    """The bfloat16 words of the next larger numbers, of floats from 0 on."""
    words = values.astype(np.float32).view(np.uint32)
    return ((words + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)


def _floats(words: Array) -> Array:
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
