"""ternary: exactly so many numbers, their signs, and the size that leaves the least error."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import JobError, MalformedMessage
from fedtune.wire.stage import Array, Draw, Form
from fedtune.wire.stages import stage_from
from fedtune.wire.ternary import Ternary, _mean_of

DRAW = Draw(0, "t")
MOST = np.finfo(np.float32).max


def back(stage: Ternary, x: Array) -> Array:
    signs, sides = stage.encode(x, DRAW)
    return stage.decode(signs, sides, Form(x.shape), DRAW)


def normal(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Of any magnitude, with tails light or heavy."""
    x = normal(draw(st.integers(0, 600)), draw(st.integers(0, 99))) ** draw(st.sampled_from([1, 9]))
    return (x * 10.0 ** np.float64(draw(st.integers(-44, 38)))).clip(-MOST, MOST).astype(np.float32)


def test_by_hand() -> None:
    """Of ten numbers the three largest: their mean is (5 + 3 + 4) / 3 = 4."""
    x = np.array([0, 5, -1, -3, 2, 0, 1, 4, -2, 2.5], np.float32)
    signs, sides = Ternary(0.3).encode(x, DRAW)
    assert signs.tolist() == [0, 1, 0]
    assert sides["gaps"].tolist() == [1, 1, 3]  # one is skipped, another, three more
    assert sides["scale"].view(np.float32) == [4.0]
    assert back(Ternary(0.3), x).tolist() == [0, 4, 0, -4, 0, 0, 0, 4, 0, 0]


def test_the_same_bits_on_every_machine() -> None:
    x = np.ldexp((np.arange(3000) * 7919 % 65536 - 32768).astype(np.float32), -15)
    signs, sides = Ternary(0.004).encode(x, DRAW)
    assert signs.tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert sides["gaps"].tolist() == [0, 239, 239, 239, 239, 239, 239, 239, 570, 239, 239, 239]
    assert sides["scale"].tolist() == [0x3F7F7355]


@given(x=arrays(), density=st.sampled_from([0.001, 0.1, 0.37, 1.0]))
def test_error_is_a_bound_and_no_loose_one(x: Array, density: float) -> None:
    """What float32 rounds in the size is all that it adds, at most a millionth of x."""
    stage = Ternary(density)
    off, bound = np.linalg.norm(back(stage, x).astype(np.float64) - x), stage.error(x)
    assert off <= bound <= off + 1e-6 * np.linalg.norm(x.astype(np.float64)) + 1e-40


def test_no_other_size_leaves_less() -> None:
    x = normal(5000)
    there = back(Ternary(0.2), x).astype(np.float64)
    least = np.linalg.norm(there - x)
    assert all(np.linalg.norm(share * there - x) > least for share in (0.99, 1.01))


@pytest.mark.parametrize(("count", "density", "travel"), [(0, 0.1, 0), (1, 0.1, 1), (30, 0.1, 3), (31, 0.1, 4), (7, 1, 7)])
def test_how_many_travel(count: int, density: float, travel: int) -> None:
    """ceil(density n), whatever the numbers are."""
    for x in (normal(count), np.zeros(count, np.float32)):
        signs, sides = Ternary(density).encode(x, DRAW)
        assert signs.size == sides["gaps"].size == travel == Ternary(density).carrier(Form((count,))).count


def test_of_equal_numbers_the_first() -> None:
    x = np.array([1, -2, 2, 2, 1], np.float32)
    assert back(Ternary(0.4), x).tolist() == [0, -2, 2, 0, 0]


def test_zeros() -> None:
    assert back(Ternary(0.5), np.zeros(10, np.float32)).tolist() == [0] * 10


def test_the_mean_does_not_depend_on_the_order() -> None:
    """Sums of floats would."""
    sizes, rng = np.abs(normal(10_000)), np.random.default_rng(1)
    means = {_mean_of(rng.permutation(sizes)) for _ in range(20)}
    assert len(means) == 1
    assert means.pop() == pytest.approx(math.fsum(sizes) / sizes.size, rel=1e-6)


@pytest.mark.parametrize("scale", [-1.0, np.inf, -np.inf, np.nan])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    signs, sides = Ternary().encode(normal(100), DRAW)
    hostile = {**sides, "scale": np.array([scale], np.float32).view(np.uint32)}
    with pytest.raises(MalformedMessage, match=r"a scale is .*, wanted a finite number from 0 on"):
        Ternary().decode(signs, hostile, Form((100,)), DRAW)


def test_positions_beyond_the_end_are_refused() -> None:
    signs, sides = Ternary().encode(normal(100), DRAW)
    with pytest.raises(MalformedMessage, match="a position is 1000, of 100 numbers"):
        Ternary().decode(signs, {**sides, "gaps": np.full(10, 99) + np.eye(10, dtype=int)[0]}, Form((100,)), DRAW)


@pytest.mark.parametrize("given", ["0", "-0.1", "1.5", "nan", "many"])
def test_densities_that_cannot_be(given: str) -> None:
    with pytest.raises(JobError, match="stage 'ternary', setting 'density'"):
        stage_from("ternary", [given])
