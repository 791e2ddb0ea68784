"""powersgd: matrices as thin products, and what passes as it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.wire import powersgd
from fedtune.wire.powersgd import PowerSGD, product
from fedtune.wire.stage import Array, Draw, Form

DRAW = Draw(7, "layer")
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
MATRICES = hnp.arrays(np.float32, SIZES, elements=st.floats(-(2.0**60), 2.0**60, width=32))


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def there_and_back(stage: PowerSGD, x: Array, draw: Draw = DRAW) -> Array:
    return stage.decode(stage.encode(x, draw)[0], {}, Form(x.shape), draw).reshape(x.shape)


def off(stage: PowerSGD, x: Array) -> float:
    return float(np.linalg.norm(there_and_back(stage, x) - x))


@pytest.mark.parametrize(
    ("shape", "wanted"), [((40, 30), 140), ((5, 3), 15), ((4, 4), 16), ((5, 4), 18), ((70,), 70), ((4, 5, 6), 120)]
)
def test_as_many_numbers_travel_as_both_factors_have_or_the_tensor(shape: tuple[int, ...], wanted: int) -> None:
    """Rank 2: 2 (40 + 30) = 140; of (4, 4) both factors together are as large as the matrix."""
    assert PowerSGD(2).carrier(Form(shape)).count == PowerSGD(2).encode(normal(*shape), DRAW)[0].size == wanted


@pytest.mark.parametrize("shape", [(), (0,), (70,), (4, 4), (4, 5, 6), (0, 9), (1, 900)])
def test_what_is_no_matrix_or_would_not_shrink_passes_as_it_is(shape: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(there_and_back(PowerSGD(2), normal(*shape)), normal(*shape))
    assert PowerSGD(2).error(normal(*shape)) == 0


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_matrix_of_that_rank_comes_back(rank: int) -> None:
    x = normal(40, rank) @ normal(rank, 31)
    assert off(PowerSGD(rank), x) <= 1e-4 * np.linalg.norm(x)


def test_first_comes_an_orthonormal_factor_column_by_column() -> None:
    x = normal(40, 30)
    carrier = PowerSGD(3).encode(x, DRAW)[0]
    p, q = carrier[:120].reshape(3, 40), carrier[120:].reshape(3, 30)
    np.testing.assert_allclose(p @ p.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(q, p @ x, atol=1e-5)


def test_further_iterations_come_close_to_the_best_there_is() -> None:
    """By Eckart and Young, no matrix of rank 2 is closer than the other singular values."""
    x = normal(60, 50)
    best = float(np.linalg.norm(np.linalg.svd(x, compute_uv=False)[2:]))
    once, often = off(PowerSGD(2), x), off(PowerSGD(2, iterations=30), x)
    assert best <= often <= 1.001 * best
    assert often < once < np.linalg.norm(x)


def test_each_message_tensor_and_stage_draws_its_own() -> None:
    draws = [Draw(1, "a"), Draw(2, "a"), Draw(1, "b"), Draw(1, "a", 1)]
    assert len({there_and_back(PowerSGD(1), normal(9, 8), draw).tobytes() for draw in draws}) == 4


@given(MATRICES, st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**32))
def test_what_comes_back_is_within_the_error(x: np.ndarray, rank: int, iterations: int, key: int) -> None:
    stage = PowerSGD(rank, iterations)
    away = np.linalg.norm(there_and_back(stage, x, Draw(key, "a")).astype(np.float64) - x)
    assert away <= stage.error(x)


@pytest.mark.parametrize("piece", [1, 7, 64, 2**14])
@pytest.mark.parametrize("sizes", [[1] * 8, [1e8, -1e8, 1]], ids=["alike", "1e16 - 1e16 + 1"])
def test_the_product_is_summed_from_the_first_to_the_last_in_pieces_of_any_size(
    piece: int, sizes: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: 1e16 - 1e16 + 1 is 1 in float64, and 0 from the last to the first."""
    r = len(sizes)
    left = np.outer(sizes, np.ones(50)).astype(np.float32) * (normal(r, 50) if r == 8 else 1)
    right = np.outer(np.abs(sizes), np.ones(90)).astype(np.float32) * (normal(r, 90) if r == 8 else 1)
    wanted = np.zeros((50, 90))
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        wanted += [[one * other for other in b] for one in a]
    monkeypatch.setattr(powersgd, "PIECE", piece)
    np.testing.assert_array_equal(product(left, right), wanted.astype(np.float32))


def test_infinite_numbers_from_the_network_are_left_to_the_gate() -> None:
    given = Form((40, 30))
    carrier = np.full(PowerSGD(2).carrier(given).count, np.inf, np.float32)
    assert not np.isfinite(PowerSGD(2).decode(carrier, {}, given, DRAW)).any()
