"""What a message says that it holds: there and back, and text that was made to cost memory or time."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import MalformedMessage
from fedtune.payload import Payload, Role
from fedtune.wire.raw import DTYPES
from fedtune.wire.schema import NAMES, TENSORS, Line, Mode, Schema, known_schema
from tests.fedtune.wire.payloads import names, payloads, scalars

quick = settings(max_examples=100, deadline=None, derandomize=True)
shapes = st.lists(st.integers(0, 1000), max_size=4).map(tuple)
lines = st.builds(Line, names, st.sampled_from(Role), st.sampled_from(sorted(DTYPES)), shapes, st.sampled_from(Mode))
GOOD = ["x", "dense", "float32", [2, 3], "f"]


def pressed(value: object) -> bytes:
    return text(json.dumps(value).encode())


def text(plain: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=True).compress(plain)


def unsized(plain: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(plain)


def claiming(size: int, data: bytes = b"") -> bytes:
    """A frame whose header says that it has so many bytes: magic, a descriptor (single segment, 8 bytes of size), the size."""
    return b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + size.to_bytes(8, "little") + data


@quick
@given(st.lists(lines, max_size=4), scalars)
def test_there_and_back(given: list[Line], named: dict[str, float]) -> None:
    schema = Schema(tuple(given), named)
    came = Schema.from_bytes(schema.as_bytes())
    assert came.lines == schema.lines
    assert {name: repr(value) for name, value in came.scalars.items()} == {name: repr(value) for name, value in named.items()}


@quick
@given(payloads())
def test_what_is_known_has_a_schema_that_travels(payload: Payload) -> None:
    schema = known_schema(payload)
    assert Schema.from_bytes(schema.as_bytes()).lines == schema.lines
    for mode in (Mode.CHANGE, Mode.FIRST):  # vectors, whole numbers and empty tensors go as they are
        assert {line.mode for line in schema.travelling(mode).lines} <= {mode, Mode.RAW}
    assert {line.mode for line in schema.travelling(Mode.SAME).lines} <= {Mode.SAME}


WRONG: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "no frame": lambda: b"hello, world",
    "a frame that ends early": lambda: pressed([[GOOD], {}])[:-3],
    "a frame and more": lambda: pressed([[GOOD], {}]) + b"\0",
    "two frames": lambda: pressed([[GOOD], {}]) * 2,
    "a frame to be skipped": lambda: b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
    "a frame of unknown size": lambda: unsized(json.dumps([[GOOD], {}]).encode()),
    "a frame of no bytes": lambda: text(b""),
    "a frame that says 2^60 bytes": lambda: claiming(2**60),
    "a frame that says 2^24 bytes": lambda: text(b" " * 2**24 + json.dumps([[GOOD], {}]).encode()),
    "a frame that says less than it has": lambda: claiming(3, b"\x21\0\0" + b"[[]]"),
    "no JSON": lambda: text(b"[[], {}"),
    "no text": lambda: text(b"\xff\xfe[[], {}]"),
    "brackets": lambda: text(b"[" * 100_000),
    "many lists": lambda: text(b"[" + b",".join([b"[]"] * 300_000) + b"]"),
    "a number of a million digits": lambda: text(b'[[],{"x":' + b"9" * 1_000_000 + b"}]"),
    "a number too large for a float": lambda: text(b'[[],{"x":' + b"9" * 400 + b"}]"),
    "an object": lambda: pressed({"a": 1, "b": 2}),
    "one part": lambda: pressed([[GOOD]]),
    "three parts": lambda: pressed([[GOOD], {}, {}]),
    "scalars in a list": lambda: pressed([[GOOD], []]),
    "a scalar that is text": lambda: pressed([[], {"x": "1"}]),
    "a scalar that is true": lambda: pressed([[], {"x": True}]),
    "a scalar that is a list": lambda: pressed([[], {"x": [1]}]),
    "a line too short": lambda: pressed([[GOOD[:4]], {}]),
    "a line too long": lambda: pressed([[[*GOOD, 1]], {}]),
    "a line that is text": lambda: pressed([["xdfsm"], {}]),
    "a line that is null": lambda: pressed([[None], {}]),
    "a name that is a number": lambda: pressed([[[7, *GOOD[1:]]], {}]),
    "a name that is a list": lambda: pressed([[[["x"], *GOOD[1:]]], {}]),
    "a name that nothing can encode": lambda: text(json.dumps([[["\ud800", *GOOD[1:]]], {}]).encode()),
    "a scalar's name that nothing can encode": lambda: text(json.dumps([[], {"\ud800": 1.0}]).encode()),
    "a name without end": lambda: pressed([[["x" * (NAMES + 1), *GOOD[1:]]], {}]),
    "an unknown role": lambda: pressed([[["x", "king", *GOOD[2:]]], {}]),
    "a role that is an object": lambda: pressed([[["x", {}, *GOOD[2:]]], {}]),
    "an unknown type": lambda: pressed([[[*GOOD[:2], "complex64", *GOOD[3:]]], {}]),
    "a type that is a list": lambda: pressed([[[*GOOD[:2], ["float32"], *GOOD[3:]]], {}]),
    "an unknown way": lambda: pressed([[[*GOOD[:4], "x"]], {}]),
    **{
        f"a shape of {shape!r:.30}": lambda shape=shape: pressed([[[*GOOD[:3], shape, "f"]], {}])  # type: ignore[misc]
        for shape in (
            3,
            "33",
            {"2": 3},
            [-1],
            [2.0],
            [True],
            ["2"],
            [None],
            [[2]],
            [1] * 16,
            [2**41],
            [0, 2**39, 2**39],
            [10**4000],
        )
    },
    "more tensors than anybody has": lambda: pressed([[["", "dense", "uint8", [0], "r"]] * (2 * TENSORS), {}]),
    "more scalars than anybody has": lambda: pressed([[], {f"{i:x}": 0 for i in range(16 * TENSORS)}]),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_read_is_refused_at_once(what: str) -> None:
    data = WRONG[what]()
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(MalformedMessage, match="a message came whose schema cannot be read") as refusal:
        Schema.from_bytes(data)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 8 * NAMES * TENSORS  # 8 MiB
    assert len(str(refusal.value)) < 300


def test_a_good_line_among_these_is_read() -> None:
    assert Schema.from_bytes(pressed([[GOOD], {"x": 1}])) == Schema(
        (Line("x", Role.DENSE, "float32", (2, 3), Mode.FIRST),), {"x": 1.0}
    )


def test_who_knows_more_tensors_may_be_sent_more() -> None:
    many = pressed([[[f"{i}", *GOOD[1:]] for i in range(3 * TENSORS)], {}])
    assert len(Schema.from_bytes(many, known=TENSORS).lines) == 3 * TENSORS
    with pytest.raises(MalformedMessage, match=f"more than {TENSORS} tensors"):
        Schema.from_bytes(many)


@quick
@given(st.binary(max_size=40), st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists))
def test_anything_else_is_refused_or_a_schema(data: bytes, value: object) -> None:
    for sent in (data, pressed(value), pressed([value, {}]), pressed([[value], {}]), pressed([[[value, *GOOD[1:]]], {}])):
        try:
            Schema.from_bytes(sent)
        except MalformedMessage:
            continue
