"""One stage of a codec: what it makes of an array, and what it leaves to the stage after it.

A codec is a row of stages. Each takes an array of float32 numbers, hands on a smaller or coarser one, the carrier, and may put
streams beside it (positions, scales). What the last one hands on travels with all that was put beside. The form of every array
follows from the shape of the tensor and the settings of the stages alone, so a decoder knows what must come before it reads
a byte, and takes no memory for anything else.

    class Halves(Stage):                                    # a stage of one's own: every second number, the others are 0
        name = "halves"

        def carrier(self, given):
            return Form((-(-given.count // 2),))

        def encode(self, x, draw):
            return x.reshape(-1)[::2], {}

        def decode(self, carrier, sides, given, draw):
            x = np.zeros(given.count, np.float32)
            x[::2] = carrier
            return x
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedtune.noise import Purpose, noise_bytes

Array = npt.NDArray[Any]
Key = int | tuple[int, int]  # of what is drawn for a message: its own, and the one that all answers to an ask share
STREAMS = 256  # of random bytes, for each stage of a codec


class Kind(StrEnum):
    """What an array holds."""

    FLOATS = "floats"  # float32 numbers, as a stage takes them
    SYMBOLS = "symbols"  # whole numbers of a small range, some far more frequent than others
    GAPS = "gaps"  # whole numbers from 0 on, mostly small
    WORDS = "words"  # bit patterns: floats in 32 or 16 bits


@dataclass(frozen=True)
class Form:
    """The form of an array, which both sides know before a byte is read: integers lie from `low` to `high`, both included."""

    shape: tuple[int, ...]
    kind: Kind = Kind.FLOATS
    low: int = 0
    high: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest that holds the range."""
        if self.kind is Kind.FLOATS:
            return np.dtype(np.float32)
        return np.min_scalar_type(min(self.low, -self.high - 1) if self.low < 0 else self.high)

    @property
    def bits(self) -> int:
        """That one entry takes where no entropy coder follows."""
        return 32 if self.kind is Kind.FLOATS else max((self.high - self.low).bit_length(), 1)


@dataclass(frozen=True)
class Draw:
    """Random bytes that both sides can draw: a function of (key of the message, tensor, stage, stream, position)."""

    key: int
    name: str
    stage: int = 0
    shared: int | None = None  # the key that all answers to an ask have in common; absent is `key`

    @classmethod
    def of(cls, key: Key, name: str, stage: int) -> Draw:
        own, shared = key if isinstance(key, tuple) else (key, key)
        return cls(own, name, stage, shared)

    def bytes(self, count: int, start: int = 0, stream: int = 0) -> npt.NDArray[np.uint8]:
        """Of this message alone, as dither must be. `start` is a multiple of 32."""
        return noise_bytes(self.key, self.name, Purpose.WIRE, self.stage * STREAMS + stream, start, count)

    def common(self, count: int, start: int = 0, stream: int = 0) -> npt.NDArray[np.uint8]:
        """Of all answers to the ask, so that sums of what they hand on mean something: which positions, which rotation."""
        key = self.key if self.shared is None else self.shared
        return noise_bytes(key, self.name, Purpose.WIRE, self.stage * STREAMS + stream, start, count)


class Stage(ABC):
    """Subclasses are frozen dataclasses; their fields are what stands in brackets behind the name, in order.

    `encode` never changes the array that it is given. `decode` faces the network: its arrays have the forms that `carrier` and
    `sides` promise, and every integer is in its range, but they can still be nonsense together; what cannot be is refused with
    MalformedMessage.
    """

    name: ClassVar[str]
    unbiased: ClassVar[bool] = False  # the mean of decode(encode(x)) over all draws is x
    exact: ClassVar[bool] = False  # decode(encode(x)) is x, bit for bit
    amplifies: ClassVar[bool] = False  # it can lose more than there is: error feedback would grow without end
    slow: ClassVar[bool] = False  # to decode: what a client must not be able to make the server do

    @abstractmethod
    def carrier(self, given: Form) -> Form:
        """Of what is handed on, where an array of form `given` (FLOATS) came."""

    def sides(self, given: Form) -> Mapping[str, Form]:
        """Of the streams beside it, by their names. None of kind FLOATS."""
        return {}

    @abstractmethod
    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        """The carrier and the streams beside it, of a finite array."""

    @abstractmethod
    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        """float32, of `given.count` numbers in any shape. Raises MalformedMessage."""

    def error(self, x: Array) -> float:
        """The most that `|decode(encode(x)) - x|` can be (Euclidean norm): what the stage promises, whatever is drawn."""
        return float(np.linalg.norm(x.astype(np.float64)))
