"""A codec: stages in a row, written as in a job file: `topk(0.1) | int8 | entropy`.

`entropy` stands last and loses nothing; without it every stream takes the bits that its range needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedtune.errors import JobError, MalformedMessage
from fedtune.wire.stage import Array, Draw, Form, Key, Kind, Stage
from fedtune.wire.stages import stage_from

ENTROPY = "entropy"
OURS = "fedtune.wire."  # stages that are held to MalformedMessage by tests
STAGE = re.compile(r"\s*(?P<name>[^()|]+?)\s*(?:\((?P<given>[^()|]*)\))?\s*")
CARRIER = "carrier"  # the name of what the last stage hands on


@dataclass(frozen=True)
class Codec:
    """What it makes of one tensor: named streams, whose forms follow from the tensor's shape."""

    text: str
    stages: tuple[Stage, ...]
    entropy: bool

    @property
    def exact(self) -> bool:
        return all(stage.exact for stage in self.stages)

    @property
    def unbiased(self) -> bool:
        return all(stage.unbiased for stage in self.stages)

    @property
    def amplifies(self) -> bool:
        return any(stage.amplifies for stage in self.stages)

    @property
    def plain(self) -> bool:
        """Floats as they are: nothing to encode, and nothing to gain from a difference."""
        return self.exact and not self.entropy

    def forms(self, shape: tuple[int, ...]) -> dict[str, Form]:
        """Of all streams of a tensor of this shape, in their order."""
        forms: dict[str, Form] = {}
        for place, stage, given in self._given(shape):
            forms |= {f"{place}.{name}": form for name, form in stage.sides(given).items()}
        return {**forms, CARRIER: self._last(shape)}

    def encode(self, x: Array, key: Key, name: str) -> dict[str, Array]:
        """`x` is finite and float32."""
        streams: dict[str, Array] = {}
        forms = self.forms(x.shape)
        for place, stage in enumerate(self.stages):
            x, sides = stage.encode(x, Draw.of(key, name, place))
            streams |= {f"{place}.{side}": values for side, values in sides.items()}
        streams[CARRIER] = x
        return {stream: np.ascontiguousarray(values.reshape(-1), forms[stream].dtype) for stream, values in streams.items()}

    def decode(self, streams: Mapping[str, Array], shape: tuple[int, ...], key: Key, name: str) -> Array:
        """float32, of this shape. Raises MalformedMessage."""
        x = streams[CARRIER]
        for place, stage, given in reversed(list(self._given(shape))):
            sides = {side: streams[f"{place}.{side}"] for side in stage.sides(given)}
            x = _decoded(stage, x, sides, given, Draw.of(key, name, place))
        return x

    def _given(self, shape: tuple[int, ...]) -> Iterator[tuple[int, Stage, Form]]:
        """Each stage with its place and the form of what it is given."""
        form = Form(shape)
        for place, stage in enumerate(self.stages):
            yield place, stage, form
            form = stage.carrier(form)

    def _last(self, shape: tuple[int, ...]) -> Form:
        form = Form(shape)
        for stage in self.stages:
            form = stage.carrier(form)
        return form


def _decoded(stage: Stage, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
    """A plug-in's stage may not have thought of all that can come."""
    try:
        return stage.decode(carrier, sides, given, draw).reshape(given.shape)
    except Exception as error:
        if type(stage).__module__.startswith(OURS):
            raise
        raise MalformedMessage(f"'{draw.name}' cannot be decoded: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=64)
def codec_from(text: str) -> Codec:
    """Raises JobError where a stage is unknown, or stands where it cannot."""
    words = [word.strip() for word in text.split("|")]
    entropy = words[-1] == ENTROPY
    stages = [_stage(word, text) for word in (words[:-1] if entropy else words)]
    form = Form((64, 64))
    for stage in stages:
        if form.kind is not Kind.FLOATS:
            raise JobError(
                f"codec '{text}': what comes before '{stage.name}' leaves whole numbers, and only entropy may follow"
            )
        form = stage.carrier(form)
    if form.kind is Kind.FLOATS:
        stages.append(stage_from("fp32", ()))
    return Codec(text, tuple(stages), entropy)


def _stage(word: str, text: str) -> Stage:
    found = STAGE.fullmatch(word)
    if found is None or found["name"] == ENTROPY:
        raise JobError(f"codec '{text}': '{word}' was given, wanted stages as in 'topk(0.1) | int8 | entropy', entropy last")
    return stage_from(found["name"], [one for one in (found["given"] or "").split(",") if one.strip()])
