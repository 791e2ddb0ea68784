"""Streams of the same name of all tensors as one: a table of frequencies serves them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire.codec import Codec
from fedtune.wire.schema import CODED, Line, Mode
from fedtune.wire.stage import Array, Form
from fedtune.wire.streams import read, written


@dataclass(frozen=True)
class Codecs:
    """Of one direction."""

    change: Codec  # of differences
    first: Codec  # of tensors that the receiver has nothing like

    @property
    def exact(self) -> bool:
        """Whether all arrives as it was sent."""
        return self.change.exact and self.first.exact

    def of(self, mode: Mode) -> Codec:
        return self.change if mode is Mode.CHANGE else self.first


@dataclass(frozen=True)
class Joined:
    """One stream of a message: the parts of several tensors, one after the other."""

    name: str
    entropy: bool
    parts: Sequence[tuple[str, Form]]  # the name of a tensor, and the form of its part

    @property
    def form(self) -> Form:
        """Of all parts, in a range that holds every part's."""
        forms = [form for _, form in self.parts]
        low, high = min(form.low for form in forms), max(form.high for form in forms)
        return replace(forms[0], shape=(sum(form.count for form in forms),), low=low, high=high)

    def written(self, streams: Mapping[str, Mapping[str, Array]]) -> bytes:
        """`streams` of each tensor, by their names."""
        form = self.form
        values = np.concatenate([streams[tensor][self.name] for tensor, _ in self.parts], dtype=form.dtype, casting="unsafe")
        return written(values, form, self.entropy)

    def read(self, data: bytes | memoryview) -> Iterator[tuple[str, Array]]:
        """The part of each tensor, in its own range. Raises MalformedMessage."""
        values, start = read(data, self.form, self.entropy), 0
        for tensor, form in self.parts:
            yield tensor, _within(values[start : start + form.count], form)
            start += form.count


def joined(lines: Sequence[Line], codecs: Codecs) -> list[Joined]:
    """The streams of a message in their order; which they are follows from the schema alone."""
    return [row for mode in CODED for row in _of([x for x in lines if x.mode is mode], codecs.of(mode))]


def _of(lines: Sequence[Line], codec: Codec) -> list[Joined]:
    parts: dict[str, list[tuple[str, Form]]] = {}
    forms = {line.shape: codec.forms(line.shape) for line in lines}  # of modules alike they are worked out once
    for line in lines:
        for stream, form in forms[line.shape].items():
            parts.setdefault(stream, []).append((line.name, form))
    return [Joined(stream, codec.entropy, own) for stream, own in parts.items()]


def _within(values: Array, form: Form) -> Array:
    if values.size and (values.min() < form.low or values.max() > form.high):
        raise MalformedMessage(f"a number of a tensor is not from {form.low} to {form.high}")
    return values.astype(form.dtype, copy=False)
