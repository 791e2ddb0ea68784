"""Streams as bytes: each entry takes the bits of its range, and what is not exactly such a stream is refused."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import MalformedMessage
from fedtune.wire.slices import PIECE
from fedtune.wire.stage import Array, Form, Kind
from fedtune.wire.streams import packed, packed_size, read, unpacked, written

quick = settings(max_examples=200, deadline=None, derandomize=True)


def form_of(count: int, bits: int, low: int = 0) -> Form:
    return Form((count,), Kind.SYMBOLS, low, low + 2**bits - 1)


def drawn(form: Form, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(form.low, form.high, form.count, endpoint=True).astype(form.dtype)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Form, Array]:
    """Of any kind and range of up to 32 bits, at the ends of it more often than chance would have it."""
    low = draw(st.sampled_from([0, 0, -1, -7, -127, -(2**15), -(2**31), 5, 300]))
    high = low + draw(st.one_of(st.sampled_from([0, 1, 2, 254, 255, 256, 2**16 - 1, 2**32 - 1]), st.integers(0, 2**32 - 1)))
    near = st.one_of(st.sampled_from([low, high]), st.integers(low, high), st.integers(low, min(high, low + 3)))
    values = draw(st.lists(near, max_size=60))
    kind = draw(st.sampled_from([Kind.SYMBOLS, Kind.GAPS, Kind.WORDS] if low == 0 else [Kind.SYMBOLS]))
    form = Form((len(values),), kind, low, high)
    return form, np.array(values, form.dtype)


@quick
@given(streams(), st.booleans())
def test_what_is_written_is_read(stream: tuple[Form, Array], coded: bool) -> None:
    form, values = stream
    data = written(values, form, coded)
    came = read(data, form, coded)
    assert (came.dtype, came.shape) == (form.dtype, form.shape)
    assert np.array_equal(came, values)
    assert len(data) <= packed_size(form) + (coded and form.count > 0)


@pytest.mark.parametrize("bits", range(1, 33))
def test_entries_follow_each_other_bit_by_bit(bits: int) -> None:
    form = form_of(PIECE + 13, bits, -3)
    values = drawn(form)
    packs = [packed(values[: 8 * k + 5], form_of(8 * k + 5, bits, -3)) for k in (0, 1, 9)]
    for data, count in zip(packs, (5, 13, 77), strict=True):
        number = sum((int(value) + 3) << (place * bits) for place, value in enumerate(values[:count]))
        assert data == number.to_bytes(-(-count * bits // 8), "little")
    assert np.array_equal(unpacked(packed(values, form), form), values)  # longer than a slice


def test_golden() -> None:
    three = Form((3,), Kind.SYMBOLS, -1, 3)  # 3 bits: 1 | 3 << 3 | 4 << 6 = 0x119
    assert packed(np.array([0, 2, 3], np.int8), three) == bytes.fromhex("1901")
    assert packed(np.array([1, 0, 1], np.uint8), Form((3,), Kind.SYMBOLS, 0, 1)) == b"\5"
    assert packed(np.array([1, -2], np.int16), Form((2,), Kind.SYMBOLS, -(2**15), 2**15 - 1)) == bytes.fromhex("0180fe7f")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8, 12, 16, 27, 32])
def test_a_stream_of_the_wrong_length_is_refused(bits: int) -> None:
    form = form_of(21, bits)
    data = packed(drawn(form), form)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(MalformedMessage, match=f"need {len(data)} bytes, {len(wrong)} came"):
            unpacked(wrong, form)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 12, 27])
def test_bits_behind_the_last_number_are_refused(bits: int) -> None:
    form = form_of(21, bits)
    data = bytearray(packed(np.zeros(21, form.dtype), form))
    unused = 8 * len(data) - 21 * bits
    for place in range(8 - unused, 8):
        data[-1] = 1 << place
        with pytest.raises(MalformedMessage, match="behind the last"):
            unpacked(bytes(data), form)
    data[-1] = 1 << (7 - unused)
    assert unpacked(bytes(data), form)[-1] == 2 ** (bits - 1)


@pytest.mark.parametrize("place", [0, PIECE, PIECE + 1])
def test_a_number_beyond_the_range_is_refused(place: int) -> None:
    form, wider = Form((PIECE + 2,), Kind.SYMBOLS, -7, 6), Form((PIECE + 2,), Kind.SYMBOLS, -7, 7)
    values = np.zeros(PIECE + 2, np.int8)
    values[place] = 7
    with pytest.raises(MalformedMessage, match="a number is 7, wanted at most 6"):
        unpacked(packed(values, wider), form)


def test_what_cannot_be_coded_goes_as_it_is() -> None:
    form = form_of(1000, 8)
    values = np.arange(1000).astype(np.uint8)  # all as frequent
    assert written(values, form, coded=True) == b"\0" + values.tobytes()
    assert written(values[:0], form_of(0, 8), coded=True) == b""


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("kind", [Kind.SYMBOLS, Kind.GAPS, Kind.WORDS])
def test_memory_is_a_small_multiple_of_the_stream(kind: Kind, coded: bool) -> None:
    low, high = (-127, 127) if kind is Kind.SYMBOLS else (0, 2**32 - 1)
    form = Form((2**20,), kind, low, high)
    values = np.random.default_rng(0).normal(0, 30, 2**20).clip(-127, 127).astype(np.float32)
    values = values.view(np.uint32) if kind is Kind.WORDS else np.abs(values).astype(form.dtype)
    data = written(values, form, coded)
    tracemalloc.start()
    try:
        written(values, form, coded)
        read(data, form, coded)
        assert tracemalloc.get_traced_memory()[1] < 3 * values.nbytes + 3_000_000  # slices
    finally:
        tracemalloc.stop()
