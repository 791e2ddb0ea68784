"""Words of 16 or 32 bits as planes: the bytes of the same place together, each plane with a table, or as it is where a table
would save less than a hundredth.

The sign moves to the lowest bit first, so that the highest plane is the exponent of a bfloat16 or float32 and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire.ans import Stack
from fedtune.wire.slices import slices
from fedtune.wire.stage import Array, Form, Kind
from fedtune.wire.tables import BIT, Table, fitted, popped

BYTE = 256


@dataclass(frozen=True)
class Planes:
    """One way to write a stream."""

    tables: tuple[Table | None, ...]  # lowest plane first; None: as it is
    cost: int  # 1024ths of a bit

    @classmethod
    def fitted(cls, values: Array, form: Form) -> Planes:
        counts = _counts(values, form)  # (planes, 256)
        plain = 8 * BIT * values.size
        worth = plain * 99 // 100
        tables = [fitted(own) for own in counts]
        costs = [table.cost(own) for table, own in zip(tables, counts, strict=True)]
        kept = tuple(table if cost < worth else None for table, cost in zip(tables, costs, strict=True))
        return cls(kept, 8 * BIT + sum(cost if cost < worth else plain for cost in costs))

    def written(self, values: Array, form: Form) -> bytes:
        """Which planes have a table, planes without, the others."""
        stack = Stack()
        plain = np.empty((self.tables.count(None), values.size), np.uint8)
        for piece in reversed(slices(values.size)):
            planes = _bytes(values[piece], form)
            plain[:, piece] = planes[[table is None for table in self.tables]]
            for table, plane in reversed(list(zip(self.tables, planes, strict=True))):
                if table is not None:
                    table.push_symbols(stack, plane.astype(np.int32))
        for table in reversed(self.tables):
            if table is not None:
                table.push(stack, BYTE)
        mask = sum((table is not None) << place for place, table in enumerate(self.tables))
        return bytes([mask]) + plain.tobytes() + stack.sealed()


def fits(form: Form) -> bool:
    """Whether numbers of this form are words."""
    return form.kind is Kind.WORDS and form.low == 0 and form.high in (2**16 - 1, 2**32 - 1)


def read_planes(data: bytes | memoryview, form: Form) -> Array:
    """Raises MalformedMessage."""
    width = form.dtype.itemsize
    mask = data[0] if data else 2**width
    raw = [place for place in range(width) if not mask >> place & 1]
    start = 1 + len(raw) * form.count
    if mask >= 2**width or len(data) < start:
        raise MalformedMessage(f"a stream of {form.count} words came in {len(data)} bytes, planes {mask:b}, which cannot be")
    plain = np.frombuffer(data, np.uint8, start - 1, 1).reshape(len(raw), form.count)
    stack = Stack.opened(data[start:])
    tables = {place: popped(stack, BYTE) for place in range(width) if place not in raw}
    values = np.empty(form.count, form.dtype)
    for piece in slices(form.count):
        planes = np.empty((piece.stop - piece.start, width), np.uint8)
        planes[:, raw] = plain[:, piece].T
        for place, table in tables.items():
            planes[:, place] = table.pop_symbols(stack, len(planes))
        values[piece] = _words(planes, form)
    stack.require_empty()
    return values


def _counts(values: Array, form: Form) -> Array:
    counts = np.zeros((form.dtype.itemsize, BYTE), np.int64)
    for piece in slices(values.size):
        for place, plane in enumerate(_bytes(values[piece], form)):
            counts[place] += np.bincount(plane, minlength=BYTE)
    return counts


def _bytes(words: Array, form: Form) -> Array:
    """(planes, words), lowest first."""
    width = form.dtype.itemsize
    turned = (words << 1) | (words >> (8 * width - 1))
    return turned.astype(f"<u{width}").view(np.uint8).reshape(-1, width).T


def _words(planes: Array, form: Form) -> Array:
    """Of (words, planes)."""
    width = form.dtype.itemsize
    turned = planes.view(f"<u{width}").reshape(-1).astype(form.dtype)
    words: Array = (turned >> 1) | (turned << (8 * width - 1))
    return words
