"""Packing: several short texts in one example, so that a batch is text and not padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import chain

from client.data.examples import Example


def pack(texts: Sequence[Example], max_length: int) -> list[Example]:
    """All texts in few examples of at most `max_length` tokens (a longer text stays alone): best fit, longest first.

    Every text is kept whole and in one example; examples stand in the order of their first text.
    """
    bins: list[list[int]] = []  # indices of texts
    by_space: dict[int, list[int]] = {}  # tokens still free -> bins that have just so many
    spaces: list[int] = []  # the keys of by_space, sorted
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i].input_ids)):
        length = len(texts[index].input_ids)
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            number = by_space[space].pop()
            if not by_space[space]:
                del by_space[spaces.pop(at)]
            bins[number].append(index)
        else:
            space, number = max_length, len(bins)
            bins.append([index])
        left = space - length
        if left > 0:
            if left not in by_space:
                insort(spaces, left)
            by_space.setdefault(left, []).append(number)
    return [_joined(texts[i] for i in indices) for indices in sorted(sorted(indices) for indices in bins)]


def _joined(texts: Iterable[Example]) -> Example:
    texts = list(texts)
    if len(texts) == 1:
        return texts[0]
    return Example(
        tuple(chain.from_iterable(text.input_ids for text in texts)),
        tuple(chain.from_iterable(text.labels for text in texts)),
        tuple(chain.from_iterable(text.positions for text in texts)),
    )
