"""Streams as bytes without an entropy coder: every entry takes the bits that its range needs. And how both ways are chosen."""

from __future__ import annotations

import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire import entropy
from fedtune.wire.stage import Array, Form


def written(values: Array, form: Form, coded: bool) -> bytes:
    """`values` (form.count,) of `form.dtype`."""
    return entropy.coded(values, form) if coded else packed(values, form)


def read(data: bytes, form: Form, coded: bool) -> Array:
    """Raises MalformedMessage unless the bytes are exactly such a stream, every entry in its range."""
    return entropy.decoded(data, form) if coded else unpacked(data, form)


def packed(values: Array, form: Form) -> bytes:
    """The first entry in the lowest bits."""
    offset = (values.astype(np.int64) - form.low).astype("<u4")
    if form.bits in (8, 16, 32):
        return offset.astype(f"<u{form.bits // 8}").tobytes()
    bits = np.unpackbits(offset.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")[:, : form.bits]
    return np.packbits(bits, bitorder="little").tobytes()


def unpacked(data: bytes, form: Form) -> Array:
    wanted = -(-form.count * form.bits // 8)
    if len(data) != wanted:
        raise MalformedMessage(f"{form.count} numbers of {form.bits} bits need {wanted} bytes, {len(data)} came")
    if form.bits in (8, 16, 32):
        offset = np.frombuffer(data, f"<u{form.bits // 8}").astype(np.int64)
    else:
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=form.count * form.bits, bitorder="little")
        offset = bits.reshape(-1, form.bits) @ (1 << np.arange(form.bits, dtype=np.int64))
    if offset.size and offset.max() > form.high - form.low:
        raise MalformedMessage(f"a number is {offset.max() + form.low}, wanted at most {form.high}")
    return (offset + form.low).astype(form.dtype)
