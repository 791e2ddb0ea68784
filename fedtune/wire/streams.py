"""Streams as bytes. Without an entropy coder every entry takes the bits that its range needs; with one, a byte says whether
it was worth it.
"""

from __future__ import annotations

import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire import entropy
from fedtune.wire.slices import slices
from fedtune.wire.stage import Array, Form

PLAIN = b"\0"


def written(values: Array, form: Form, coded: bool) -> bytes:
    """`values` (form.count,) of `form.dtype`, each within the form's range."""
    if not coded:
        return packed(values, form)
    data = entropy.coded(values, form)
    return data if len(data) <= packed_size(form) else PLAIN + packed(values, form)


def read(data: bytes | memoryview, form: Form, coded: bool) -> Array:
    """Raises MalformedMessage unless the bytes are exactly such a stream, every entry in its range."""
    if not coded:
        return unpacked(data, form)
    return unpacked(data[1:], form) if form.count and data[:1] == PLAIN else entropy.decoded(data, form)


def packed_size(form: Form) -> int:
    """Bytes."""
    return -(-form.count * form.bits // 8)


def packed(values: Array, form: Form) -> bytes:
    """The first entry in the lowest bits."""
    rows = [_packed((values[piece].astype(np.int64) - form.low).astype(np.uint32), form.bits) for piece in slices(values.size)]
    return b"".join(rows)[: packed_size(form)]


def unpacked(data: bytes | memoryview, form: Form) -> Array:
    """Raises MalformedMessage."""
    if len(data) != packed_size(form):
        raise MalformedMessage(f"{form.count} numbers of {form.bits} bits need {packed_size(form)} bytes, {len(data)} came")
    if data and data[-1] >> ((form.count * form.bits - 1) % 8 + 1):
        raise MalformedMessage("bits are set behind the last number of a stream")
    values = np.empty(form.count, form.dtype)
    for piece in slices(form.count):
        start, stop = piece.start * form.bits // 8, -(-piece.stop * form.bits // 8)
        offset = _unpacked(data[start:stop], form.bits)[: piece.stop - piece.start]
        if (most := int(offset.max())) > form.high - form.low:
            raise MalformedMessage(f"a number is {most + form.low}, wanted at most {form.high}")
        values[piece] = offset.astype(np.int64) + form.low
    return values


def _packed(offset: Array, bits: int) -> bytes:
    """Of uint32. Eight entries fill as many bytes as an entry has bits, and each lies in five of them at most."""
    if bits in (8, 16, 32):
        return offset.astype(f"<u{bits // 8}").tobytes()
    if bits == 1:
        return np.packbits(offset.astype(np.uint8), bitorder="little").tobytes()
    eights = np.zeros((-(-offset.size // 8), 8), np.uint32)
    eights.reshape(-1)[: offset.size] = offset
    rows = np.zeros((len(eights), bits), np.uint8)
    for place, first, last, shift in _places(bits):
        moved = (eights[:, place].astype("<u8") << np.uint64(shift)).view(np.uint8).reshape(-1, 8)
        rows[:, first:last] |= moved[:, : last - first]
    return rows.tobytes()


def _unpacked(data: bytes | memoryview, bits: int) -> Array:
    """uint32, with some zeros behind the last entry."""
    if bits in (8, 16, 32):
        return np.frombuffer(data, f"<u{bits // 8}").astype(np.uint32)
    if bits == 1:
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype(np.uint32)
    rows = np.frombuffer(bytes(data) + bytes(-len(data) % bits), np.uint8).reshape(-1, bits)
    eights = np.empty((len(rows), 8), np.uint32)
    for place, first, last, shift in _places(bits):
        moved = np.zeros((len(rows), 8), np.uint8)
        moved[:, : last - first] = rows[:, first:last]
        eights[:, place] = (moved.view("<u8").reshape(-1) >> np.uint64(shift)) & np.uint64(2**bits - 1)
    return eights.reshape(-1)


def _places(bits: int) -> list[tuple[int, int, int, int]]:
    """Of each of eight entries: its number, the bytes from and to which it lies, and the bits below it in the first."""
    starts = [(place, place * bits) for place in range(8)]
    return [(place, start // 8, -(-(start + bits) // 8), start % 8) for place, start in starts]
