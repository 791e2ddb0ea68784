"""randk: what is drawn, that both sides draw it, and how far off the worst draw is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.wire.randk import PIECE, RandK, drawn_positions
from fedtune.wire.stage import Draw, Form

FEW = hnp.arrays(np.float32, st.integers(1, 6), elements=st.floats(-(2.0**100), 2.0**100, width=32))


@dataclass(frozen=True)
class Same(Draw):
    """Every byte is the same."""

    byte: int = 0

    def common(self, count: int, start: int = 0, stream: int = 0) -> np.ndarray:
        return np.full(count, self.byte, np.uint8)


def test_golden_positions() -> None:
    """They are part of the wire: what changes them needs a new version."""
    assert drawn_positions(8, 100, Draw(7, "layer")).tolist() == [14, 28, 29, 33, 42, 62, 74, 85]
    many = drawn_positions(1000, 100_000, Draw(7, "layer", 1))
    assert [*many[:4], *many[-2:], many.sum()] == [44, 188, 238, 244, 99539, 99712, 49448072]


@pytest.mark.parametrize(("count", "n"), [(1, 2), (3, 5), (1, PIECE + 1), (700, 1000), (2 * PIECE, 3 * PIECE - 1)])
def test_positions_are_those_of_the_smallest_words(count: int, n: int) -> None:
    draw = Draw(3, "a", 2)
    words = draw.common(8 * n).view("<u8").tolist()
    wanted = sorted(sorted(range(n), key=lambda i: (words[i], i))[:count])
    np.testing.assert_array_equal(drawn_positions(count, n, draw), wanted)


@pytest.mark.parametrize("byte", [0, 255])
def test_of_equal_words_the_first_win_and_unlikely_ones_are_found(byte: int) -> None:
    """With nothing but the largest word, none lies where the smallest almost surely lie."""
    np.testing.assert_array_equal(drawn_positions(20, PIECE + 5, Same(0, "a", 0, byte)), np.arange(20))


def test_every_pair_is_as_likely_as_any_other() -> None:
    """3,000 draws of 2 of 5: chi square of the 10 pairs, 9 degrees of freedom, is below 27.9 with probability 0.999."""
    drawn = [tuple(drawn_positions(2, 5, Draw(key, "a"))) for key in range(3000)]
    counts = np.array([drawn.count(pair) for pair in combinations(range(5), 2)])
    assert counts.sum() == 3000
    assert ((counts - 300) ** 2 / 300).sum() < 27.9


def test_each_message_tensor_and_stage_draws_its_own() -> None:
    draws = [Draw(1, "a"), Draw(2, "a"), Draw(1, "b"), Draw(1, "a", 1)]
    assert len({tuple(drawn_positions(10, 1000, draw)) for draw in draws}) == 4


def test_what_travels_is_as_it_was_and_the_receiver_multiplies() -> None:
    x, draw, stage = np.arange(1, 101, dtype=np.float32), Draw(7, "layer"), RandK(0.08)
    carrier, sides = stage.encode(x.reshape(10, 10), draw)
    np.testing.assert_array_equal(carrier, [15, 29, 30, 34, 43, 63, 75, 86])
    assert sides == {}
    back = stage.decode(carrier, {}, Form((10, 10)), draw)
    assert np.count_nonzero(back) == 8
    np.testing.assert_array_equal(back[[14, 85]], [15 * 12.5, 86 * 12.5])


def test_what_would_be_infinite_is_cut() -> None:
    x = np.full(10, -3e38, np.float32)
    back = RandK(0.1).decode(x[:1], {}, Form((10,)), Draw(0, "a"))
    assert back.min() == np.finfo(np.float32).min


@given(FEW, st.floats(0.01, 1))
def test_the_error_is_that_of_the_worst_draw(x: np.ndarray, density: float) -> None:
    stage, exact = RandK(density), x.astype(np.float64)
    count = stage.carrier(Form(x.shape)).count
    subsets = combinations(range(x.size), count)
    off = [exact * [x.size / count - 1 if i in some else -1 for i in range(x.size)] for some in subsets]
    worst, rounding = max(np.linalg.norm(one) for one in off), x.size * np.linalg.norm(exact) * 2.0**-23 + 2.0**-140
    assert worst <= stage.error(x) * (1 + 1e-12)
    assert stage.error(x) <= worst * (1 + 1e-12) + rounding


@given(FEW, st.floats(0.01, 1), st.integers(0, 2**32))
def test_no_draw_is_farther_off_than_the_error(x: np.ndarray, density: float, key: int) -> None:
    stage, draw = RandK(density), Draw(key, "a")
    back = stage.decode(stage.encode(x, draw)[0], {}, Form(x.shape), draw)
    assert np.linalg.norm(back.astype(np.float64) - x) <= stage.error(x) * (1 + 1e-12)
