"""A stack of whole numbers close to their entropy (asymmetric numeral systems, constriction): pushed last, popped first.

It grows by the information of what is pushed, so an empty one is no bytes, and one that was popped of all that was pushed is
empty again: bytes that were cut, changed or added to leave it otherwise, or give other numbers.
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire.stage import Array

Coder = constriction.stream.stack.AnsCoder
Uniform = constriction.stream.model.Uniform
PIECE = 16  # bits that go at once where all are as likely


class Stack:
    """Models are those of constriction; both sides must make them of the same integers."""

    def __init__(self, data: bytes = b"") -> None:
        """Raises MalformedMessage."""
        if data[-1:] == b"\0":
            raise MalformedMessage("a stream ends in a byte 0, which is never written")
        words = np.frombuffer(data + bytes(-len(data) % 4), "<u4").astype(np.uint32)
        self._coder = Coder(words) if words.size else Coder()

    def sealed(self) -> bytes:
        """Without the zeros at the end."""
        words = self._coder.get_compressed().astype("<u4")
        return bytes(words.tobytes().rstrip(b"\0")) if words.size else b""

    def require_empty(self) -> None:
        """Raises MalformedMessage where more, or other bytes, came than a coder leaves."""
        if not self._coder.is_empty():
            raise MalformedMessage("a stream is damaged: something is left when all its numbers are read")

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
            some = widths > shift
            sizes = _sizes(widths[some], shift)
            self._coder.encode_reverse(((values[some] >> shift) & (sizes - 1)).astype(np.int32), Uniform(), sizes)

    def pop_bits(self, widths: Array) -> Array:
        """int64, of the shape of `widths`."""
        values = np.zeros(widths.shape, np.int64)
        for shift in range(0, int(widths.max(initial=0)), PIECE):
            some = widths > shift
            values[some] |= self._coder.decode(Uniform(), _sizes(widths[some], shift)).astype(np.int64) << shift
        return values


def _sizes(widths: Array, shift: int) -> Array:
    sizes: Array = np.left_shift(1, np.minimum(widths - shift, PIECE)).astype(np.int32)
    return sizes
