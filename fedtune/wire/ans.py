"""A stack of whole numbers close to their entropy (asymmetric numeral systems, constriction): pushed last, popped first.

It begins as one number, BOTTOM, and grows by the information of what is pushed. One that is popped of all that was pushed is
BOTTOM again; where bytes were cut off or added, it is not, but for a chance of 2^-16. The number costs nothing: the first
symbol takes 24 bits even of an empty stack, and leaves room in them.
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire.stage import Array

Coder = constriction.stream.stack.AnsCoder
Uniform = constriction.stream.model.Uniform
BOTTOM = 0xB077
EMPTY = np.array([BOTTOM], np.uint32)
PIECE = 16  # bits that go at once where all are as likely
SIZES = np.left_shift(1, np.arange(PIECE + 1, dtype=np.int32))  # of so many bits


class Stack:
    """Models are those of constriction; both sides must make them of the same integers."""

    def __init__(self, words: Array = EMPTY) -> None:
        """`words` uint32, the last of them not 0."""
        self._coder = Coder(words)

    @classmethod
    def opened(cls, data: bytes | memoryview) -> Stack:
        """Raises MalformedMessage."""
        if not data or not data[-1]:
            raise MalformedMessage("a stream is damaged: it ends in nothing, or in a byte 0")
        words = np.zeros(-(-len(data) // 4), "<u4")
        words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        return cls(words.astype(np.uint32, copy=False))

    def sealed(self) -> bytes:
        """Without the zeros at the end."""
        return bytes(self._coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0"))

    def require_empty(self) -> None:
        """Raises MalformedMessage where more, fewer or other bytes came than were written."""
        if self._coder.pos() != (0, BOTTOM):
            raise MalformedMessage("a stream is damaged: it does not end where its last number does")

    def push(self, symbols: Array, model: Any) -> None:
        self._coder.encode_reverse(symbols.astype(np.int32, copy=False), model)

    def pop(self, count: int, model: Any) -> Array:
        """int32, (count,)."""
        symbols: Array = self._coder.decode(model, count)
        return symbols

    def push_number(self, number: int, size: int) -> None:
        """Any number below `size` is as likely; `size` is below 2^24."""
        if size > 1:
            self._coder.encode_reverse(number, Uniform(size))

    def pop_number(self, size: int) -> int:
        return int(self._coder.decode(Uniform(size))) if size > 1 else 0

    def push_bits(self, values: Array, widths: Array) -> None:
        """Of each value as many bits as its width says."""
        for shift in reversed(range(0, int(widths.max(initial=0)), PIECE)):
            wide = np.flatnonzero(widths > shift)
            sizes = SIZES.take(widths[wide] - shift, mode="clip")
            self._coder.encode_reverse((values[wide] >> shift).astype(np.int32) & (sizes - 1), Uniform(), sizes)

    def pop_bits(self, widths: Array) -> Array:
        """int64, of the shape of `widths`."""
        values = np.zeros(widths.shape, np.int64)
        for shift in range(0, int(widths.max(initial=0)), PIECE):
            wide = np.flatnonzero(widths > shift)
            sizes = SIZES.take(widths[wide] - shift, mode="clip")
            values[wide] |= self._coder.decode(Uniform(), sizes).astype(np.int64) << shift
        return values
