"""One client's data, ready for the trainer: read, encoded, split into training and held-out, dealt out, packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from client.data import stdlib
from client.data.classes import in_order, name_of
from client.data.examples import ClientData
from client.data.formats import Encoder, encode, format_of
from client.data.packing import pack
from client.data.readers import Row
from client.data.sources import Source, in_the_data, rows_of
from fedtune.errors import DataError
from fedtune.job import Data
from fedtune.seeds import generator


def load_client(
    source: Source, data: Data, task: str, tokenizer: Any, seed: int, labels: Sequence[str] | None = None
) -> ClientData:
    """Raises DataError where the rows cannot be read or nothing is left to learn from.

    Rows are split before they are packed, so no example holds a part of both sets. `labels` is what `labels_in` found.
    """
    settings = (data, task, tokenizer, seed, labels)
    own = source.pool.part(source.name, settings, split_rows) if source.pool else split_rows(source, *settings)
    train: list[Any] = list(own.train)
    held_out: list[Any] = list(own.held_out)
    if task == "causal" and data.packing:
        train, held_out = pack(train, data.max_length), pack(held_out, data.max_length)
    return ClientData(tuple(train), tuple(_spaced(held_out, data.max_held_out)))


def split_rows(source: Source, data: Data, task: str, tokenizer: Any, seed: int, labels: Sequence[str] | None) -> ClientData:
    """All examples of a client in the data, before any is packed or left out. Raises DataError."""
    rows = rows_of(source)
    format = format_of(rows[0], task, str(source.path))
    encoded = encode(rows, format, Encoder(tokenizer, data.max_length, labels), str(source.path))
    kept = [number for number, examples in enumerate(encoded) if examples]
    if not kept:
        raise DataError(
            f"{source.path}: nothing is left to learn from. The loss is on {format.learnt} ({' + '.join(format.columns)}), "
            f"and none of the {len(rows)} rows has any of it within data.max_length = {data.max_length} tokens; "
            f"mend the rows, or type --set data.max_length={2 * data.max_length}"
        )
    held_out = _held_out(source, {number: rows[number] for number in kept}, data.held_out, seed)
    train: list[Any] = [one for number in kept if number not in held_out for one in encoded[number]]
    test: list[Any] = [one for number in kept if number in held_out for one in encoded[number]]
    return ClientData(train, test)


def labels_in(sources: Mapping[str, Source], data: Data) -> list[str]:
    """The labels of all clients, in the order of their class numbers. Raises DataError for fewer than two."""
    found: set[str] = set()
    for source in in_the_data(sources):
        rows = rows_of(source)
        format_of(rows[0], "classification", str(source.path))
        found |= {name_of(row.get("label"), f"{source.path}, row {number}") for number, row in enumerate(rows, 1)}
    if len(found) < 2:
        raise DataError(f"data.path = '{data.path}' has the one label '{found.pop()}'; classification needs two or more")
    return in_order(found)


def _held_out(source: Source, rows: Mapping[int, Row], share: float, seed: int) -> set[int]:
    """Which rows are only evaluated: at least one where a share is asked for, and never all."""
    if source.kind == "stdlib":
        sizes = {row["file"]: len(row["text"].encode()) for row in rows.values()}
        files = stdlib.held_out_files(sizes, share)
        return {number for number, row in rows.items() if row["file"] in files}
    if share == 0 or len(rows) < 2:
        return set()
    size = min(max(round(share * len(rows)), 1), len(rows) - 1)
    order = torch.randperm(len(rows), generator=generator(seed, source.name, "held-out")).tolist()
    numbers = list(rows)
    return {numbers[place] for place in order[:size]}


def _spaced(examples: list[Any], most: int) -> list[Any]:
    """At most this many of them (0 is all), evenly spaced."""
    if not 0 < most < len(examples):
        return examples
    return [examples[place * len(examples) // most] for place in range(most)]
