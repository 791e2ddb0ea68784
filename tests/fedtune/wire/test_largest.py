"""The largest numbers: exactly those that sorting would give, of equal ones the first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.wire import largest as module
from fedtune.wire.largest import largest
from fedtune.wire.stage import Array


def by_sorting(sizes: Array, count: int) -> list[int]:
    return sorted(np.argsort(-sizes, kind="stable")[:count].tolist())


@given(st.lists(st.sampled_from([0.0, 1e-45, 0.5, 1.0, 3e38]) | st.floats(0, 2, width=32), max_size=60), st.data())
def test_few_numbers(values: list[float], data: st.DataObject) -> None:
    sizes = np.array(values, np.float32)
    count = data.draw(st.integers(0, len(values)))
    assert largest(sizes, count).tolist() == by_sorting(sizes, count)


def hidden(n: int) -> Array:
    """0 wherever the sample looks, 1 elsewhere: the sample leads to a bound of 0."""
    sizes = np.ones(n, np.float32)
    sizes[:: n // module.SAMPLE | 1] = 0
    return sizes


MANY = 200_001
RANDOM = np.abs(np.random.default_rng(0).standard_normal(MANY)).astype(np.float32)
ROWS = {
    "as updates are": RANDOM,
    "heavy tails": RANDOM**9,
    "all equal": np.ones(MANY, np.float32),
    "mostly 0": np.where(RANDOM > 2.5, RANDOM, 0).astype(np.float32),
    "many equal": np.round(RANDOM, 1),
    "ascending": np.sort(RANDOM),
    "small where the sample looks": hidden(MANY),
    "large where the sample looks": 1 - hidden(MANY),
}


@pytest.mark.parametrize("count", [1, 200, 20_001, MANY // 2, MANY - 1])
@pytest.mark.parametrize("sizes", ROWS.values(), ids=ROWS)
def test_many_numbers_whatever_the_sample_shows(sizes: Array, count: int) -> None:
    assert largest(sizes, count).tolist() == by_sorting(sizes, count)


def test_the_sample_leaves_little_between_its_bounds() -> None:
    """Every 13th is a sample of 15,385, and the 20,001st largest has about rank 1,539 in it, give or take 39. The bounds are
    6 (39 + 6) = 270 ranks away on either side, so between them lie 2 * 270 of 15,385, give or take another tenth."""
    low, high = module._bounds(RANDOM, 20_001)
    assert low <= np.sort(RANDOM)[-20_001] <= high
    between = np.count_nonzero((low <= RANDOM) & (high >= RANDOM)) / MANY
    assert between == pytest.approx(2 * 270 / 15_385, rel=0.1)
