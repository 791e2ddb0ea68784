"""Examples in nine bytes a token, so that many clients' data stay in memory beside one model."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import overload

from client.data.examples import IGNORED, Example, Labelled


class CompactExamples(Sequence[Example]):
    """A sequence of Examples that are made anew at each look."""

    def __init__(self, examples: Iterable[Example]) -> None:
        examples = list(examples)
        self._ends = array("q", accumulate(len(example.input_ids) for example in examples))
        self._ids, self._positions, self._learnt = array("i"), array("i"), bytearray()
        for example in examples:
            self._ids.extend(example.input_ids)
            self._positions.extend(example.positions)
            self._learnt.extend(label != IGNORED for label in example.labels)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones too; raises IndexError
        part = slice(self._ends[index - 1] if index else 0, self._ends[index])
        ids = tuple(self._ids[part])
        labels = tuple(token if learnt else IGNORED for token, learnt in zip(ids, self._learnt[part], strict=True))
        return Example(ids, labels, tuple(self._positions[part]))


def compact(examples: Sequence[Example] | Sequence[Labelled]) -> Sequence[Example] | Sequence[Labelled]:
    """The same examples; those of a causal model in little memory."""
    if examples and isinstance(examples[0], Example):
        return CompactExamples(examples)  # type: ignore[arg-type]
    return examples
