"""rotate: columns are mixed as by the plain transform, lengths kept, outliers spread, and no number added."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.hadamard import transform_
from fedtune.wire.rotate import LONGEST, WIDTH, Rotate, transformed
from fedtune.wire.stage import Array, Draw, Form

DRAW = Draw(7, "layer")
VECTORS = hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(-(2.0**100), 2.0**100, width=32))
SIZES = [1, 2, 3, 6, 100, 4095, 4096, 4097, 5000, 2 * LONGEST, (WIDTH + 1) * LONGEST + 17]


def turned(x: Array) -> Array:
    return Rotate().encode(x, DRAW)[0]


def back(x: Array) -> Array:
    return Rotate().decode(x, {}, Form(x.shape), DRAW)


def normal(size: int) -> Array:
    return np.random.default_rng(size).normal(size=size).astype(np.float32)


def signs(size: int, stream: int, draw: Draw = DRAW) -> Array:
    bits = np.unpackbits(draw.common(-(-size // 8), stream=stream), count=size, bitorder="little")
    return (1 - 2 * bits.astype(np.float32)).astype(np.float32)


def test_golden_signs_and_rotation() -> None:
    """They are part of the wire: what changes them needs a new version."""
    assert signs(16, 0).tolist() == [-1, 1, 1, 1, 1, -1, 1, 1, 1, 1, -1, -1, -1, 1, 1, -1]
    assert turned(np.arange(6, dtype=np.float32)).tolist() == [3.0, -1.0, 5.5, 0.5, -3.5, 1.5]


@pytest.mark.parametrize("key", range(8))
def test_six_numbers_by_hand(key: int) -> None:
    """Four are mixed, then the last four, with signs of their own; H of 4, divided by 2, keeps lengths."""
    h = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    x, draw = np.arange(6.0), Draw(key, "a")
    x[:4] = h @ (signs(4, 0, draw) * x[:4])
    x[2:] = h @ (signs(4, 1, draw) * x[2:])
    np.testing.assert_array_equal(Rotate().encode(np.arange(6, dtype=np.float32), draw)[0], x)


@pytest.mark.parametrize("columns", [1, WIDTH - 1, WIDTH, 3 * WIDTH + 5])
def test_columns_are_mixed_as_by_the_plain_transform(columns: int) -> None:
    x = normal(LONGEST * columns)
    mixed = turned(x).reshape(LONGEST, columns)
    scaled = (x * signs(x.size, 0)).reshape(LONGEST, columns) / 64
    for column in {0, columns // 2, columns - 1}:
        wanted = transform_(torch.from_numpy(scaled[:, column].copy())).numpy()
        np.testing.assert_allclose(mixed[:, column], wanted, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(mixed, transformed(scaled), err_msg="in pieces as in one")


def test_the_transform_of_small_whole_numbers_is_exact() -> None:
    x = np.random.default_rng(0).integers(-9, 9, (64, 5)).astype(np.float32)
    wanted = [transform_(torch.from_numpy(column.copy())).numpy() for column in x.T]
    np.testing.assert_array_equal(transformed(x.copy()).T, wanted)


@pytest.mark.parametrize("size", SIZES)
def test_no_number_is_added_and_lengths_and_angles_are_kept(size: int) -> None:
    x, y = normal(size), normal(size)[::-1]
    assert turned(x).shape == (size,)
    assert np.linalg.norm(turned(x)) == pytest.approx(np.linalg.norm(x), rel=1e-5)
    assert turned(x) @ turned(y) == pytest.approx(x @ y, abs=1e-5 * size)
    np.testing.assert_allclose(back(turned(x)), x, rtol=0, atol=1e-5)


@given(VECTORS)
def test_what_comes_back_is_within_the_error(x: np.ndarray) -> None:
    away = np.linalg.norm(back(turned(x)).astype(np.float64) - x)
    assert away <= Rotate().error(x)
    assert Rotate().error(x) <= 4e-6 * np.linalg.norm(x.astype(np.float64)) + 1e-38


def test_one_large_number_is_spread_over_its_column() -> None:
    x = np.zeros(LONGEST, np.float32)
    x[5] = 64
    np.testing.assert_array_equal(np.abs(turned(x)), 1)


@pytest.mark.parametrize("position", [0, 4095, 4096, 4999])
def test_one_large_number_is_spread_wherever_it_lies(position: int) -> None:
    x = np.zeros(5000, np.float32)
    x[position] = 64
    assert np.abs(turned(x)).max() <= 5, "904 numbers of size 1 with random signs, over the root of 4,096, and again"


def test_each_message_tensor_and_stage_draws_its_own() -> None:
    draws = [Draw(1, "a"), Draw(2, "a"), Draw(1, "b"), Draw(1, "a", 1)]
    assert len({Rotate().encode(normal(64), draw)[0].tobytes() for draw in draws}) == 4


def test_infinite_numbers_from_the_network_are_left_to_the_gate() -> None:
    assert not np.isfinite(back(np.full(100, np.inf, np.float32))).any()
