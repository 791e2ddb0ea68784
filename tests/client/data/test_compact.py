"""Compact examples are the examples that they were made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.compact import CompactExamples, compact
from client.data.examples import Example, Labelled, single
from client.data.packing import pack

TEXTS = st.lists(
    st.lists(st.tuples(st.integers(0, 200_000), st.booleans()), min_size=1, max_size=6).map(
        lambda text: single([token for token, _ in text], [learnt for _, learnt in text])
    ),
    max_size=8,
)


@given(TEXTS)
def test_each_example_comes_back_as_it_was(texts: list[Example]) -> None:
    examples = pack(texts, 8)
    held = CompactExamples(examples)
    assert list(held) == examples
    assert len(held) == len(examples)
    assert held[::2] == examples[::2]
    assert [held[-1 - i] for i in range(len(held))] == examples[::-1]


def test_beyond_the_end() -> None:
    with pytest.raises(IndexError):
        CompactExamples([single([1, 2], [True, True])])[1]


def test_labelled_texts_and_nothing_stay_as_they_are() -> None:
    assert compact((Labelled((1,), 0),)) == (Labelled((1,), 0),)
    assert compact(()) == ()
