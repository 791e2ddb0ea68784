"""topk: which numbers are kept, how positions travel, and what the decoder refuses."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.errors import MalformedMessage
from fedtune.wire.stage import Draw, Form
from fedtune.wire.topk import TopK, gaps_of, kept, positions_of

DRAW = Draw(0, "a")
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
VECTORS = hnp.arrays(np.float32, st.integers(0, 60), elements=FLOATS | st.sampled_from([0.0, -0.0, 1.0, -1.0]))
DENSITIES = st.floats(0.001, 1)


@pytest.mark.parametrize(
    ("density", "count", "wanted"), [(0.07, 100, 7), (0.1, 30, 3), (0.1, 31, 4), (1e-9, 5, 1), (1, 5, 5), (0.5, 0, 0)]
)
def test_as_many_are_kept_as_was_typed(density: float, count: int, wanted: int) -> None:
    """In binary, 0.07 * 100 is a little more than 7."""
    assert kept(density, count) == wanted


@given(VECTORS, DENSITIES)
def test_the_largest_are_kept_and_of_equal_ones_the_first(x: np.ndarray, density: float) -> None:
    order = sorted(range(x.size), key=lambda i: (-abs(x[i]), i))[: kept(density, x.size)]
    wanted = [x[i] if i in order else 0.0 for i in range(x.size)]
    stage = TopK(density)
    carrier, sides = stage.encode(x, DRAW)
    np.testing.assert_array_equal(carrier, x[sorted(order)])
    np.testing.assert_array_equal(stage.decode(carrier, sides, Form(x.shape), DRAW), wanted)


@given(VECTORS, DENSITIES)
def test_the_error_is_what_was_left_out(x: np.ndarray, density: float) -> None:
    stage = TopK(density)
    carrier, sides = stage.encode(x, DRAW)
    away = np.linalg.norm(stage.decode(carrier, sides, Form(x.shape), DRAW).astype(np.float64) - x)
    assert stage.error(x) == pytest.approx(away, rel=1e-12)


def test_a_matrix_is_read_row_by_row() -> None:
    carrier, sides = TopK(0.5).encode(np.array([[1.0, -4.0], [3.0, 2.0]], np.float32), DRAW)
    np.testing.assert_array_equal(carrier, [-4, 3])
    np.testing.assert_array_equal(sides["gaps"], [1, 0])


def test_of_each_position_travels_how_many_are_skipped() -> None:
    np.testing.assert_array_equal(gaps_of(np.array([0, 1, 5, 9])), [0, 0, 3, 3])


@given(st.sets(st.integers(0, 999)))
def test_positions_come_back(positions: set[int]) -> None:
    wanted = np.array(sorted(positions), np.int64)
    np.testing.assert_array_equal(positions_of(gaps_of(wanted).astype(np.uint16), 1000), wanted)


def test_the_last_position_may_be_reached_but_not_passed() -> None:
    np.testing.assert_array_equal(positions_of(np.array([2, 6], np.uint8), 10), [2, 9])
    with pytest.raises(MalformedMessage, match="a position is 10, of 10 numbers"):
        positions_of(np.array([2, 7], np.uint8), 10)


def test_gaps_whose_sum_no_int64_holds_are_refused_at_once() -> None:
    """2^23 + 8 gaps of 2^40 - 1 end beyond 2^63, where whole numbers would begin again at -2^63."""
    gaps = np.broadcast_to(np.uint64(2**40 - 1), (2**23 + 8,))
    tracemalloc.start()
    with pytest.raises(MalformedMessage, match="a position is 9223"):
        positions_of(gaps, 2**40)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20, "refused before there are positions, which would take 64 MiB"
