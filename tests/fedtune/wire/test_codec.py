"""Codecs: how they are written, what is refused, and that every row of stages keeps the forms it announces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import JobError, MalformedMessage
from fedtune.wire.codec import CARRIER, Codec, codec_from
from fedtune.wire.floats import Bf16, Fp32
from fedtune.wire.integers import Int8
from fedtune.wire.powersgd import PowerSGD
from fedtune.wire.rotate import Rotate
from fedtune.wire.stage import Array, Draw, Form, Kind, Stage
from fedtune.wire.stages import BUILT_IN
from fedtune.wire.topk import TopK

SHAPES = [(), (0,), (1,), (7,), (300,), (0, 4), (1, 9), (16, 60), (33, 20), (3, 5, 7)]
FLOATS = ["topk(0.1)", "randk(0.5)", "rotate", "powersgd(1)"]  # what another stage may follow
LAST = [name for name in BUILT_IN if name not in ("topk", "randk", "rotate", "powersgd")]
ROWS = [
    *BUILT_IN,
    *(f"{one} | {other}" for one in FLOATS for other in [*FLOATS, *LAST]),
    "powersgd(2) | rotate | topk(0.2) | int4",
]


def normal(shape: tuple[int, ...]) -> Array:
    return np.asarray(np.random.default_rng(0).normal(size=shape), np.float32)


def test_the_stages_stand_in_their_order_with_their_settings() -> None:
    codec = codec_from("topk(0.1) | int8 | entropy")
    assert codec == Codec("topk(0.1) | int8 | entropy", (TopK(0.1), Int8()), entropy=True)
    assert codec_from(" powersgd( 4 , iterations = 2 )|rotate|bf16 ").stages == (PowerSGD(4, 2), Rotate(), Bf16())
    assert not codec_from("int8").entropy


@pytest.mark.parametrize("text", ["topk(0.1)", "rotate | randk", "entropy"])
def test_numbers_that_no_stage_wrote_down_are_written_as_they_are(text: str) -> None:
    assert codec_from(text).stages[-1] == Fp32()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "int8 | topk(0.1)",
            "codec 'int8 | topk(0.1)': what comes before 'topk' leaves whole numbers, and only entropy may follow",
        ),
        ("entropy | int8", "'entropy' was given, wanted stages as in 'topk(0.1) | int8 | entropy', entropy last"),
        ("", "'' was given, wanted stages as in 'topk(0.1) | int8 | entropy', entropy last"),
        ("int8 | | entropy", "'' was given, wanted stages"),
        ("topk(0.1", "'topk(0.1' was given, wanted stages"),
        ("topk)0.1(", "'topk)0.1(' was given, wanted stages"),
        ("topk(0.1)(2)", "'topk(0.1)(2)' was given, wanted stages"),
        ("topc(0.1)", "unknown stage 'topc', did you mean 'topk'?; known are bf16,"),
        ("topk(0)", "stage 'topk', setting 'density': Input should be greater than 0, given '0'"),
        ("randk(1.5)", "stage 'randk', setting 'density': Input should be less than or equal to 1, given '1.5'"),
        ("topk(nan)", "stage 'topk', setting 'density'"),
        ("powersgd(0)", "stage 'powersgd', setting 'rank': Input should be greater than or equal to 1, given '0'"),
        ("powersgd(2.5)", "stage 'powersgd', setting 'rank': Input should be a valid integer"),
        ("delta_come(-1)", "stage 'delta_come', setting 'first': Input should be greater than or equal to 0, given '-1'"),
        ("topk(0.1, 0.2)", "stage 'topk' was given ' 0.2'; its settings are, in order: density"),
        ("topk(0.1, density=0.2)", "stage 'topk' was given ' density=0.2'; its settings are, in order: density"),
        ("topk(size=1)", "stage 'topk' was given 'size=1'; its settings are, in order: density"),
        ("rotate(1)", "stage 'rotate' was given '1'; its settings are, in order: none"),
        (
            "json:JSONDecoder",
            "'json:JSONDecoder' was given, but 'JSONDecoder' in it is no subclass of fedtune.wire.stage.Stage",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text: str, wanted: str) -> None:
    with pytest.raises(JobError) as refused:
        codec_from(text)
    assert wanted in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ROWS)
def test_what_encode_yields_is_what_was_announced_and_comes_back_in_shape(text: str) -> None:
    codec = codec_from(text)
    for shape in SHAPES:
        streams, forms = codec.encode(normal(shape), 5, "layer"), codec.forms(shape)
        assert streams.keys() == forms.keys()
        for name, form in forms.items():
            assert form.kind is not Kind.FLOATS
            assert (streams[name].shape, streams[name].dtype) == ((form.count,), form.dtype)
            assert form.low <= streams[name].min(initial=form.high)
            assert streams[name].max(initial=form.low) <= form.high
        back = codec.decode(streams, shape, 5, "layer")
        assert (back.shape, back.dtype) == (shape, np.float32)


def test_each_stage_takes_what_the_one_before_left() -> None:
    """topk(0.1) keeps 12 of 120 numbers, with as many gaps up to 119; int8 has one scale for all 12."""
    assert codec_from("topk(0.1) | int8").forms((10, 12)) == {
        "0.gaps": Form((12,), Kind.GAPS, 0, 119),
        "1.scales": Form((1,), Kind.WORDS, 0, 2**16 - 1),
        CARRIER: Form((12,), Kind.SYMBOLS, -127, 127),
    }


def test_their_order_matters() -> None:
    """powersgd takes a matrix; behind rotate it finds a row of numbers and lets them pass: 2 (10 + 12) numbers, or 120."""
    assert codec_from("powersgd(2) | rotate").forms((10, 12))[CARRIER].count == 44
    assert codec_from("rotate | powersgd(2)").forms((10, 12))[CARRIER].count == 120


def test_two_stages_of_one_kind_draw_differently() -> None:
    """Of 256 numbers each rotates a 1 at the start into signs: with the same ones, the second would make 16 at the start."""
    x = np.zeros(256, np.float32)
    x[0] = 16
    twice = codec_from("rotate | rotate").encode(x, 5, "layer")[CARRIER].view(np.float32)
    assert np.linalg.norm(twice) == 16
    assert np.abs(twice).max() < 8


@pytest.mark.parametrize(
    ("text", "exact", "unbiased"),
    [
        ("fp32", True, True),
        ("entropy", True, True),
        ("topk(0.1)", False, False),
        ("rotate | int8 | entropy", False, True),
        ("randk(0.1) | int4", False, True),
        ("topk(0.1) | int8", False, False),
        ("rotate | bf16", False, False),
    ],
)
def test_a_row_promises_what_all_its_stages_promise(text: str, exact: bool, unbiased: bool) -> None:
    codec = codec_from(text)
    assert (codec.exact, codec.unbiased) == (exact, unbiased)


@pytest.mark.parametrize("text", ["fp32", "fp32 | entropy"])
def test_what_is_exact_comes_back_bit_for_bit(text: str) -> None:
    x = np.array([[0.0, -0.0, 1e-45], [3.4e38, -1.5, 1 / 3]], np.float32)
    codec = codec_from(text)
    assert codec.decode(codec.encode(x, 1, "a"), (2, 3), 1, "a").tobytes() == x.tobytes()


@given(st.integers(0, 2**63), st.text(max_size=5))
def test_what_is_drawn_follows_from_the_message_and_the_tensor(key: int, name: str) -> None:
    """Both sides, at any time: nothing else is remembered."""
    codec, x = codec_from("randk(0.5) | rotate | fp32"), normal((6, 5))
    streams = codec.encode(x, key, name)
    kept = codec.decode(streams, (6, 5), key, name)
    assert np.count_nonzero(kept) == 15
    np.testing.assert_allclose(kept[kept != 0], 2 * x[kept != 0], rtol=0, atol=1e-5)


def test_what_a_stage_of_ones_own_did_not_think_of_is_a_malformed_message() -> None:
    @dataclass(frozen=True)
    class Careless(Stage):
        name: ClassVar[str] = "careless"

        def carrier(self, given: Form) -> Form:
            return given

        def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
            return x, {}

        def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
            raise IndexError("no such place")

    codec = Codec("careless", (Careless(), Fp32()), entropy=False)
    with pytest.raises(MalformedMessage, match="'t' cannot be decoded: IndexError: no such place"):
        codec.decode(codec.encode(np.ones(3, np.float32), 0, "t"), (3,), 0, "t")
