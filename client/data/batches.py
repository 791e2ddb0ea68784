"""Batches: which examples a gradient step sees, and the tensors that they become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor

from client.allowance import check
from client.data.examples import IGNORED, Example, Labelled
from fedtune.seeds import generator

One = TypeVar("One", Example, Labelled)


def batches(examples: Sequence[One], size: int, *names: object) -> Iterator[list[One]]:
    """Endless batches of exactly `size`: each pass sees every example once, in an order seeded by `names` and the pass.

    A batch may hold the end of one pass and the start of the next.
    """
    if not examples:
        raise ValueError("there are no examples to make batches of")
    batch: list[One] = []
    for number in count():
        check()  # a batch may be many passes
        for index in torch.randperm(len(examples), generator=generator(*names, number)).tolist():
            batch.append(examples[index])
            if len(batch) == size:
                yield batch
                batch = []


def collate(examples: Sequence[Example] | Sequence[Labelled], pad: int) -> dict[str, Tensor]:
    """The arguments of the model's forward, padded on the right with the token `pad`."""
    if isinstance(examples[0], Labelled):
        return _classification(examples, pad)  # type: ignore[arg-type]
    return _causal(examples, pad)  # type: ignore[arg-type]


def _causal(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """input_ids, labels, position_ids, each (b, t). Call the model with `use_cache=False`.

    transformers finds the packed texts where `position_ids` restart, and keeps them apart, only when there is neither
    an attention mask nor a cache. Padding needs no mask: it stands behind all that looks back. Its positions go on
    counting, since a restart would make a batch of unpacked texts lose the causal kernel for a mask of (b, 1, t, t).
    """
    width = max(len(example.input_ids) for example in examples)
    rows = []
    for example in examples:
        length = len(example.input_ids)
        after = example.positions[-1] + 1
        positions = [*example.positions, *range(after, after + width - length)]
        rows.append((_padded(example.input_ids, width, pad), _padded(example.labels, width, IGNORED), positions))
    input_ids, labels, position_ids = (torch.tensor(column) for column in zip(*rows, strict=True))
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def _classification(examples: Sequence[Labelled], pad: int) -> dict[str, Tensor]:
    """input_ids and attention_mask (b, t), labels (b,)."""
    width = max(len(example.input_ids) for example in examples)
    return {
        "input_ids": torch.tensor([_padded(example.input_ids, width, pad) for example in examples]),
        "attention_mask": torch.tensor([_padded([1] * len(example.input_ids), width, 0) for example in examples]),
        "labels": torch.tensor([example.label for example in examples]),
    }


def _padded(values: Sequence[int], width: int, with_: int) -> list[int]:
    return [*values, *[with_] * (width - len(values))]
