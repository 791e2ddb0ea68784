"""delta_come: how many bits each singular vector gets, what comes back of it, and what the decoder refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.errors import MalformedMessage
from fedtune.wire import grouped
from fedtune.wire.delta_come import DeltaCoMe
from fedtune.wire.grouped import dequantised, floats, quantised, rounded_up
from fedtune.wire.integers import Int8
from fedtune.wire.stage import Array, Draw, Form, Kind

DRAW = Draw(7, "layer")
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
MATRICES = hnp.arrays(np.float32, SIZES, elements=st.floats(-(2.0**60), 2.0**60, width=32))
NUMBERS = st.integers(0, 4)


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def cumulative(d: int, k: int) -> Array:
    """As updates add up: singular values fall like 1 / i."""
    u, _, v = np.linalg.svd(normal(d, k), full_matrices=False)
    return ((u / np.arange(1, min(d, k) + 1)) @ v).astype(np.float32)


def there_and_back(stage: DeltaCoMe, x: Array) -> Array:
    carrier, sides = stage.encode(x, DRAW)
    return stage.decode(carrier, sides, Form(x.shape), DRAW).reshape(x.shape)


def off(stage: DeltaCoMe, x: Array) -> float:
    return float(np.linalg.norm(there_and_back(stage, x) - x) / np.linalg.norm(x))


def test_forms_of_a_matrix() -> None:
    """Columns of U and V have 200 + 300 numbers; of 200 columns 2, 32 and 100 travel; each has 2 groups of U and 3 of V."""
    stage, given = DeltaCoMe(2, 32, 100), Form((200, 300))
    assert stage.sides(given) == {
        "first": Form((2 * 500,), Kind.SYMBOLS, -127, 127),
        "middle": Form((32 * 500,), Kind.SYMBOLS, -3, 3),
        "scales": Form((134 * (2 + 3),), Kind.WORDS, 0, 2**16 - 1),
    }
    assert stage.carrier(given) == Form((100 * 500,), Kind.SYMBOLS, -1, 1)


def test_of_few_columns_the_first_get_the_most_bits() -> None:
    stage, given = DeltaCoMe(2, 3, 9), Form((4, 300))
    assert [form.count for form in stage.sides(given).values()] == [2 * 304, 2 * 304, 4 * (1 + 3)]
    assert stage.carrier(given).count == 0


@pytest.mark.parametrize("shape", [(), (0,), (500,), (2, 2), (3, 3), (0, 5), (9, 8, 7)])
def test_what_is_no_matrix_or_would_not_shrink_travels_as_int8(shape: tuple[int, ...]) -> None:
    """Of (2, 2), both columns of U and V have 8 bits a number: twice as many as 8 bits for each of the matrix."""
    x, plain = normal(*shape), Int8(128, "nearest")
    symbols, sides = plain.encode(x, DRAW)
    np.testing.assert_array_equal(there_and_back(DeltaCoMe(), x).reshape(-1), plain.decode(symbols, sides, Form(shape), DRAW))
    assert DeltaCoMe().sides(Form(shape))["first"].count == x.size
    assert DeltaCoMe().error(x) == plain.error(x)


def test_columns_by_hand() -> None:
    """3 e1 e2^T + 1 e2 e1^T: sqrt(3) in both first columns, 1 in both second ones; scales: bfloat16 numbers from there on."""
    x = np.zeros((40, 50), np.float32)
    x[0, 1], x[1, 0] = 3, 1
    carrier, sides = DeltaCoMe(1, 1, 0).encode(x, DRAW)
    first, middle = sides["first"].reshape(90), sides["middle"].reshape(90)
    assert [*np.flatnonzero(first), *np.flatnonzero(middle)] == [0, 41, 1, 40]
    assert [*np.abs(first[[0, 41]]), *np.abs(middle[[1, 40]])] == [127, 127, 3, 3]
    np.testing.assert_array_equal(floats(sides["scales"]), [1.734375, 1.734375, 1, 1])
    assert carrier.size == 0
    back = there_and_back(DeltaCoMe(1, 1, 0), x)
    assert [back[0, 1], back[1, 0], np.abs(back).sum()] == [1.734375**2, 1, 1.734375**2 + 1]


def test_what_is_left_out_is_the_smallest() -> None:
    """Eight bits each for the first three: nearly the best matrix of rank 3."""
    x = cumulative(60, 70)
    best = np.linalg.norm(1 / np.arange(4, 61)) / np.linalg.norm(1 / np.arange(1, 61))
    assert best <= off(DeltaCoMe(3, 0, 0), x) <= best + 0.01


def test_more_bits_and_more_columns_are_closer() -> None:
    x = cumulative(60, 70)
    falling = [off(stage, x) for stage in (DeltaCoMe(1, 0, 0), DeltaCoMe(1, 4, 0), DeltaCoMe(1, 4, 20), DeltaCoMe(5, 4, 20))]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.5 * falling[0]


@given(MATRICES, NUMBERS, NUMBERS, NUMBERS)
def test_what_comes_back_is_within_the_error(x: np.ndarray, first: int, middle: int, last: int) -> None:
    stage = DeltaCoMe(first, middle, last)
    away = np.linalg.norm(there_and_back(stage, x).astype(np.float64) - x)
    assert away <= stage.error(x) + 1e-38


@pytest.mark.parametrize("word", [0x7F80, 0x7FC0, 0x8000, 0xBF80], ids=["infinite", "no number", "-0", "-1"])
@pytest.mark.parametrize("shape", [(60, 70), (100,)])
def test_a_scale_that_is_none_is_refused(word: int, shape: tuple[int, ...]) -> None:
    carrier, sides = DeltaCoMe().encode(normal(*shape), DRAW)
    sides["scales"][-1] = word  # type: ignore[index]
    with pytest.raises(MalformedMessage, match="a scale is negative or not finite"):
        DeltaCoMe().decode(carrier, sides, Form(shape), DRAW)


def test_scales_are_rounded_up_to_bfloat16() -> None:
    """Which has 8 significant bits: 1 + 2^-7 follows on 1."""
    sizes = np.array([0, 1, 1 + 2**-20, 1 + 2**-7, 3], np.float32)
    np.testing.assert_array_equal(floats(rounded_up(sizes)), [0, 1, 1 + 2**-7, 1 + 2**-7, 3])


def test_each_group_of_128_has_its_scale() -> None:
    """A short last group is filled up with zeros, which do not travel."""
    vectors = np.repeat([[1.0, 64.0, 0.0, 8.0]], [128, 128, 128, 1], axis=1).astype(np.float32)
    symbols, words = quantised(vectors, 127)
    np.testing.assert_array_equal(floats(words), [1, 64, 0, 8])
    assert symbols.size == 385
    np.testing.assert_array_equal(dequantised(symbols, words, vectors.shape, 127), vectors)


def test_with_three_levels_a_smaller_scale_loses_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of normal numbers, most are below half of the largest in 128, which alone would become 0."""

    def lost() -> float:
        x = normal(8, 1280)
        return float(np.square(dequantised(*quantised(x, 1), x.shape, 1) - x).mean())

    chosen = lost()
    monkeypatch.setattr(grouped, "SHARES", (1.0,))
    assert chosen < 0.25 < 0.5 < lost()
