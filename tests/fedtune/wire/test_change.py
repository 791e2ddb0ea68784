"""Differences: exact ones in whole numbers, others in floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.wire.change import decoded, difference, encoded, word_changes, words_of
from fedtune.wire.codec import Codec, codec_from
from fedtune.wire.slices import PIECE
from fedtune.wire.stage import Array, Draw, Form, Stage

quick = settings(max_examples=100, deadline=None, derandomize=True)
words = hnp.arrays(np.uint32, 5, elements=st.integers(0, 2**32 - 1))


@quick
@given(words, words)
def test_any_bit_pattern_comes_back_from_any_other(given: Array, base: Array) -> None:
    assert words_of(word_changes(given, base), base).tolist() == given.tolist()


def test_neighbours_differ_by_small_numbers() -> None:
    base = np.array([1.0, -2.0, 0.5], np.float32).view(np.uint32)
    assert word_changes(base, base).tolist() == [0, 0, 0]
    assert word_changes(base + np.uint32(1), base).tolist() == [2, 2, 2]  # twice the number, the sign in the lowest bit
    assert word_changes(base - np.uint32(1), base).tolist() == [1, 1, 1]


def test_long_ones_in_pieces() -> None:
    rng = np.random.default_rng(0)
    given, base = rng.integers(0, 2**32, (2, 2 * PIECE + 5), np.uint32)
    assert np.array_equal(words_of(word_changes(given, base), base), given)


@pytest.mark.parametrize("text", ["fp32", "fp32 | entropy", "bf16", "int8"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
def test_shapes_stay(text: str, shape: tuple[int, ...]) -> None:
    codec, tensor = codec_from(text), torch.full(shape, 1.5)
    for base in (None, torch.ones(shape), torch.ones(shape, dtype=torch.bfloat16)):
        x = difference(tensor, base, codec)
        back = decoded(encoded(x, base, codec, 0, "x"), base, shape, codec, 0, "x")
        assert (back.shape, back.dtype, back.tolist()) == (shape, np.float32, tensor.tolist())  # 1.5 and 0.5: exact in all


def test_a_difference_that_is_too_large_is_infinite_and_says_nothing() -> None:
    """pytest turns warnings into errors."""
    codec, largest = codec_from("fp16"), torch.tensor([3e38])
    assert np.isinf(difference(largest, -largest, codec)).all()
    sent = encoded(np.array([1e38], np.float32), None, codec_from("powersgd"), 0, "x")
    assert np.isinf(decoded(sent, largest, (1,), Codec("inexact", (Whole(),), False), 0, "x")).all()


@dataclass(frozen=True)
class Whole(Stage):
    """Gives its words as floats, and says nothing of being exact."""

    name: ClassVar[str] = "whole"

    def carrier(self, given: Form) -> Form:
        return given

    def encode(self, x: Array, draw: Draw) -> tuple[Array, dict[str, Array]]:
        return x, {}

    def decode(self, carrier: Array, sides: Any, given: Form, draw: Draw) -> Array:
        return carrier.view(np.float32)


@dataclass(frozen=True)
class Doubled(Stage):
    """Exact, but hands on twice as many numbers as it was given."""

    name: ClassVar[str] = "doubled"
    exact: ClassVar[bool] = True

    def carrier(self, given: Form) -> Form:
        return Form((2 * given.count,))

    def encode(self, x: Array, draw: Draw) -> tuple[Array, dict[str, Array]]:
        return np.concatenate([x.reshape(-1)] * 2), {}

    def decode(self, carrier: Array, sides: Any, given: Form, draw: Draw) -> Array:
        return carrier[: given.count]


def test_an_exact_codec_that_hands_on_something_else_sends_it_whole() -> None:
    codec = Codec("doubled | fp32", (Doubled(), *codec_from("fp32").stages), True)
    tensor, base = torch.tensor([1.0, -0.0]), torch.tensor([1.0, 2.0])
    streams = encoded(difference(tensor, base, codec), base, codec, 0, "x")
    assert decoded(streams, base, (2,), codec, 0, "x").view(np.uint32).tolist() == tensor.numpy().view(np.uint32).tolist()
