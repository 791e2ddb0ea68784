"""Coded bytes from anywhere: an array in its range, or MalformedMessage, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import MalformedMessage
from fedtune.wire.ans import Stack
from fedtune.wire.entropy import PLANES, TOKENS, coded
from fedtune.wire.stage import Array, Form, Kind
from fedtune.wire.streams import read
from fedtune.wire.tables import DIFFERENCES, RATIOS, STEPS, popped
from fedtune.wire.tokens import NARROW

FORMS = [
    Form((300,), Kind.SYMBOLS, -7, 7),
    Form((300,), Kind.SYMBOLS, -127, 127),
    Form((300,), Kind.SYMBOLS, -5000, 5000),
    Form((300,), Kind.SYMBOLS, 300, 301),
    Form((300,), Kind.SYMBOLS, 4, 4),
    Form((300,), Kind.GAPS, 0, 1000),
    Form((300,), Kind.GAPS, 0, 2**32 - 1),
    Form((300,), Kind.WORDS, 0, 2**16 - 1),
    Form((300,), Kind.WORDS, 0, 2**32 - 1),
    Form((0,), Kind.GAPS, 0, 9),
]
many = settings(max_examples=400, deadline=None, derandomize=True)


def values_of(form: Form) -> Array:
    rng = np.random.default_rng(0)
    if form.kind is Kind.WORDS:
        return np.ascontiguousarray(rng.normal(size=form.count).astype(np.float32)).view(np.uint32) >> (32 - form.bits)
    return (form.low + rng.geometric(2 / (2 + form.high - form.low), form.count) - 1).clip(form.low, form.high)


def stream_of(form: Form) -> bytes:
    return coded(values_of(form).astype(form.dtype), form)


def read_or_refused(data: bytes, form: Form) -> bool:
    """Whether it was read; then it is what it should be."""
    try:
        values = read(data, form, coded=True)
    except MalformedMessage:
        return False
    assert (values.dtype, values.shape) == (form.dtype, form.shape)
    assert not values.size or form.low <= values.min() <= values.max() <= form.high
    return True


@many
@given(st.sampled_from(FORMS), st.integers(0, 12), st.binary(max_size=80))
def test_random_bytes(form: Form, way: int, data: bytes) -> None:
    read_or_refused(data, form)
    read_or_refused(bytes([way]) + data, form)


@many
@given(st.sampled_from(FORMS), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=3))
def test_flipped_bits(form: Form, flips: list[tuple[int, int]]) -> None:
    data = bytearray(stream_of(form))
    for place, bit in flips:
        if data:
            data[place % len(data)] ^= 1 << bit
    read_or_refused(bytes(data), form)


@pytest.mark.parametrize("form", FORMS)
def test_other_lengths(form: Form) -> None:
    data = stream_of(form)
    assert read_or_refused(data, form)
    assert not any(read_or_refused(data[:length], form) for length in range(len(data)))
    assert not any(read_or_refused(data + bytes([byte]) * more, form) for byte in range(256) for more in (1, 4, 5))


@pytest.mark.parametrize("form", [form for form in FORMS if form.count and form.low != form.high])
def test_fewer_numbers_than_were_written(form: Form) -> None:
    data = stream_of(form)
    for count in (0, 1, 299):
        assert not read_or_refused(data, Form((count,), form.kind, form.low, form.high))


def test_where_there_is_no_number_there_is_no_byte() -> None:
    nothing = Form((0,), Kind.SYMBOLS, -7, 7)
    assert read(b"", nothing, coded=True).size == 0
    table_alone = coded(np.zeros(1, np.int8), FORMS[0])  # a symbol that is always the same takes no more
    for data in (b"\0", table_alone, stream_of(FORMS[-2])):
        with pytest.raises(MalformedMessage, match="a stream of 0 symbols"):
            read(data, nothing, coded=True)


@pytest.mark.parametrize("kind", [Kind.GAPS, Kind.SYMBOLS, Kind.WORDS])
def test_planes_are_for_words(kind: Kind) -> None:
    words = stream_of(FORMS[-2])
    assert words[0] == PLANES
    with pytest.raises(MalformedMessage, match=f"a stream of 300 {kind}"):
        read(words, Form((300,), kind, 0, 2**32 - 2), coded=True)


def test_words_have_so_many_planes() -> None:
    words = stream_of(Form((300,), Kind.WORDS, 0, 2**16 - 1))
    assert words[:2] == bytes([PLANES, 0b10])
    with pytest.raises(MalformedMessage, match="300 words"):
        read(bytes([PLANES, 0b110]) + words[2:], Form((300,), Kind.WORDS, 0, 2**16 - 1), coded=True)


def test_a_number_beyond_the_range_is_refused() -> None:
    values = np.array([0, 1001, 2], np.uint32)
    data = coded(values, Form((3,), Kind.GAPS, 0, 1010))
    assert np.array_equal(read(data, Form((3,), Kind.GAPS, 0, 1001), coded=True), values)
    with pytest.raises(MalformedMessage, match="not from 0 to 1000"):
        read(data, Form((3,), Kind.GAPS, 0, 1000), coded=True)


def table(first: int, differences: list[int], step: int = 0, symbols: int | None = None) -> Callable[[Stack], None]:
    """What pushes a table of any content, true or not."""

    def push(stack: Stack) -> None:
        coded = [2 * one - 1 if one > 0 else -2 * one for one in differences]
        stack.push(np.array(coded), DIFFERENCES[3])
        for number, size in ((3, len(RATIOS)), (step, len(STEPS)), ((symbols or len(differences)) - 1, 15), (first, 15)):
            stack.push_number(number, size)

    return push


@pytest.mark.parametrize(
    ("first", "differences", "step"),
    [(0, [1], 0), (14, [1], 0), (0, [1, 0, -1, 4], 2), (12, [25, -24, 0], 4), (0, [385] + 14 * [0], 0)],
)
def test_a_table_that_can_be(first: int, differences: list[int], step: int) -> None:
    stack = Stack()
    table(first, differences, step)(stack)
    came = popped(stack, 15)
    assert (came.first, came.step, came.levels.tolist()) == (first, STEPS[step], np.cumsum(differences).tolist())
    stack.require_empty()


@pytest.mark.parametrize(
    ("first", "differences", "step", "match"),
    [
        (0, [0], 0, "damaged"),  # nothing is in use
        (0, [0, 1], 0, "damaged"),  # the first is not
        (0, [1, -1], 0, "damaged"),  # the last is not
        (0, [1, -2, 3], 0, "damaged"),  # less than not in use
        (0, [1, -2, 1], 0, "damaged"),
        (0, [385, 1, -1], 0, "damaged"),  # more than 24 octaves
        (0, [26, 0, -1], 4, "damaged"),
        (14, [1, 0], 0, "up to symbol 15, wanted below 15"),
        (1, 15 * [1], 0, "up to symbol 15"),
    ],
)
def test_a_table_that_cannot_be_is_refused(first: int, differences: list[int], step: int, match: str) -> None:
    stack = Stack()
    table(first, differences, step)(stack)
    with pytest.raises(MalformedMessage, match=match):
        read(bytes([TOKENS + NARROW]) + stack.sealed(), FORMS[0], coded=True)
