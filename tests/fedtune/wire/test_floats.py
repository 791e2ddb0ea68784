"""Floats as bit patterns: `fp32` keeps every bit, `fp16` and `bf16` round to nearest, to even where two are as near."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.wire.floats import Bf16, Fp16, Fp32, Words
from fedtune.wire.stage import Array, Draw, Form
from fedtune.wire.stages import stage_from

DRAW = Draw(7, "a.lora_A")
HALVES = [Fp16(), Bf16()]
each_half = pytest.mark.parametrize("stage", HALVES, ids=lambda stage: stage.name)
finite = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50)


def words(stage: Words, numbers: list[float]) -> list[int]:
    carrier, sides = stage.encode(np.array(numbers, np.float32), DRAW)
    assert not sides
    assert carrier.dtype == stage.carrier(Form(carrier.shape)).dtype
    words: list[int] = carrier.tolist()
    return words


def back(stage: Words, x: Array) -> Array:
    carrier, sides = stage.encode(x, DRAW)
    return stage.decode(carrier, sides, Form(x.shape), DRAW)


def test_float32_words_are_the_numbers_as_they_lie() -> None:
    assert words(Fp32(), [0, -0.0, 1, -2, 1e-45]) == [0, 0x80000000, 0x3F800000, 0xC0000000, 1]


@given(bits=st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_float32_keeps_every_bit(bits: list[int]) -> None:
    """Also of numbers that are none: those of a decoder come from the network."""
    x = np.array(bits, np.uint32).view(np.float32)
    assert back(Fp32(), x).tobytes() == x.tobytes()
    assert Fp32().error(x) == 0


# 11 bits in float16 and 8 in bfloat16: the numbers between 1 and the next are 2^-10 and 2^-7 apart
ROUNDED = {
    "fp16": {1.0: 0x3C00, 1 + 2**-11: 0x3C00, 1 + 2**-11 + 2**-20: 0x3C01, 1 + 3 * 2**-11: 0x3C02, -2.0: 0xC000, 2**-24: 1},
    "bf16": {1.0: 0x3F80, 1 + 2**-8: 0x3F80, 1 + 2**-8 + 2**-20: 0x3F81, 1 + 3 * 2**-8: 0x3F82, -2.0: 0xC000, 2**-133: 1},
}


@each_half
def test_halves_round_to_nearest_and_then_to_even(stage: Words) -> None:
    assert words(stage, list(ROUNDED[stage.name])) == list(ROUNDED[stage.name].values())


@pytest.mark.parametrize(("stage", "least"), [(Fp16(), 2.0**-24), (Bf16(), 2.0**-133)])
def test_half_of_the_smallest_becomes_nothing(stage: Words, least: float) -> None:
    assert back(stage, np.array([least, 0.51 * least, 0.5 * least, -0.5 * least], np.float32)).tolist() == [least, least, 0, 0]


@pytest.mark.parametrize(("stage", "most"), [(Fp16(), 65504.0), (Bf16(), 255 * 2.0**120)])
def test_what_is_too_large_is_cut(stage: Words, most: float) -> None:
    """Infinity is no update."""
    largest = float(np.finfo(np.float32).max)
    assert back(stage, np.array([largest, -largest, most], np.float32)).tolist() == [most, -most, most]


@each_half
@given(numbers=finite)
def test_error_is_a_bound(stage: Words, numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    assert np.linalg.norm(back(stage, x).astype(np.float64) - x) <= stage.error(x) * (1 + 1e-12)


@pytest.mark.parametrize(("stage", "half"), [(Fp16(), 2.0**-11), (Bf16(), 2.0**-8)])
def test_the_bound_is_what_happens_at_worst(stage: Words, half: float) -> None:
    """Between 1 and the next number, half a step off: of 100 numbers 10 times as much. The bound is relative to the number,
    which is a little more than 1."""
    x = np.full(100, 1 + half, np.float32)
    assert np.linalg.norm(back(stage, x) - x) == pytest.approx(10 * half)
    assert stage.error(x) == pytest.approx(10 * half * (1 + half))


@each_half
@given(numbers=finite)
def test_a_second_time_nothing_is_lost(stage: Words, numbers: list[float]) -> None:
    once = back(stage, np.array(numbers, np.float32))
    assert back(stage, once).tobytes() == once.tobytes()


@each_half
def test_every_word_is_decoded(stage: Words) -> None:
    """All 65,536, the infinite ones and those that are none among them: what they become, a later check refuses."""
    x = stage.decode(np.arange(2**16, dtype=np.uint16), {}, Form((2**16,)), DRAW)
    assert x.dtype == np.float32
    exponents = {"fp16": 5, "bf16": 8}[stage.name]
    assert np.isfinite(x).sum() == 2**16 - 2 ** (16 - exponents)  # all exponents but one


@pytest.mark.parametrize("stage", [Fp32(), *HALVES], ids=lambda stage: stage.name)
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 5)])
def test_shapes(stage: Words, shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    assert stage.carrier(Form(shape)) == Form((math.prod(shape),), stage.carrier(Form(shape)).kind, 0, 2**stage.bits - 1)
    assert back(stage, x).reshape(shape).tolist() == x.tolist()


def test_names() -> None:
    assert [stage_from(name, []) for name in ("fp32", "fp16", "bf16")] == [Fp32(), Fp16(), Bf16()]
