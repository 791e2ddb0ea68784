"""What the trainer learns from: examples of token ids, and a client's two sets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

IGNORED = -100  # the label of a token that is not learnt, as torch's cross entropy has it


@dataclass(frozen=True)
class Example:
    """One row of a batch for a causal model: a text, or several that are packed together.

    `labels[i]` is `input_ids[i]` or IGNORED (the model shifts them itself); `positions` restart at 0 with each text.
    The first token of a text is never a label, so nothing is predicted across the border of two texts.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def learnt(self) -> int:
        """How many tokens have a loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Labelled:
    """One text with its class, for sequence classification."""

    input_ids: tuple[int, ...]
    label: int

    @property
    def labels(self) -> tuple[int, ...]:
        return (self.label,)


@dataclass(frozen=True)
class ClientData:
    """What one client trains on, and what it only evaluates."""

    train: Sequence[Example] | Sequence[Labelled]
    held_out: Sequence[Example] | Sequence[Labelled] = ()


def single(ids: Sequence[int], learnt: Sequence[bool]) -> Example:
    """One text as an example; `learnt` says which of its tokens are labels."""
    ids = tuple(_shared(token) for token in ids)
    labels = [token if is_learnt else IGNORED for token, is_learnt in zip(ids, learnt, strict=True)]
    return Example(ids, (IGNORED, *labels[1:]), _positions(len(ids)))


# Millions of tokens share one int object for each id: a third of the memory of what a tokenizer returns.
_known: dict[int, int] = {}


def _shared(token: int) -> int:
    return _known.setdefault(token, token)


@lru_cache(maxsize=4096)
def _positions(length: int) -> tuple[int, ...]:
    return tuple(range(length))
