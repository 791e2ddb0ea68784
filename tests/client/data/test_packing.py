from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.examples import IGNORED, Example, single
from client.data.packing import pack


def texts_of(example: Example) -> list[tuple[int, ...]]:
    """Take a packed example apart where the positions restart."""
    starts = [i for i, position in enumerate(example.positions) if position == 0]
    ends = [*starts[1:], len(example.positions)]
    return [example.input_ids[start:end] for start, end in zip(starts, ends, strict=True)]


def text(*ids: int) -> Example:
    return single(ids, [True] * len(ids))


def test_a_text_never_learns_its_first_token():
    example = single([7, 8, 9], [True, False, True])
    assert example == Example((7, 8, 9), (IGNORED, IGNORED, 9), (0, 1, 2))
    assert example.learnt == 1


def test_two_texts_in_one_example():
    [example] = pack([text(5, 6), text(7, 8, 9)], 5)
    assert example.input_ids == (5, 6, 7, 8, 9)
    assert example.positions == (0, 1, 0, 1, 2)
    assert example.labels == (IGNORED, 6, IGNORED, 8, 9)  # 7 is not predicted from 6


def test_best_fit():
    """Into examples of 10: 7 and 3, 6 and 4, 5; taking them as they come would need four."""
    packed = pack([text(*[length] * length) for length in (3, 6, 4, 5, 7)], 10)
    assert [sorted({*example.input_ids}) for example in packed] == [[3, 7], [4, 6], [5]]


@pytest.mark.parametrize("lengths", [[4], [4, 4], [9, 4]])
def test_what_does_not_fit_together_stays_alone(lengths):
    texts = [text(*range(length)) for length in lengths]
    assert pack(texts, 4) == texts


def test_nothing_packs_to_nothing():
    assert pack([], 8) == []


lengths = st.lists(st.integers(1, 12), max_size=40)


@given(lengths, st.integers(12, 30))
def test_packing_loses_and_duplicates_no_token(lengths, max_length):
    numbers = iter(range(1000))  # every token is another one
    texts = [text(*(next(numbers) for _ in range(length))) for length in lengths]
    packed = pack(texts, max_length)
    assert sorted(part for example in packed for part in texts_of(example)) == [one.input_ids for one in texts]
    assert sum(example.learnt for example in packed) == sum(length - 1 for length in lengths)
    assert all(len(example.input_ids) <= max_length for example in packed)


@given(lengths, st.integers(12, 30))
def test_no_two_examples_could_be_one_where_half_is_free(lengths, max_length):
    """Best fit opens an example only when no open one has room: so at most one is half empty or emptier."""
    packed = pack([text(*range(length)) for length in lengths], max_length)
    assert sum(len(example.input_ids) <= max_length // 2 for example in packed) <= 1
