"""What a packed message holds: of each tensor its name, role, type, shape and how it travels; and the scalars.

Where that is what the receiver knows already, nothing of it travels. Else it is JSON, compressed by zstandard: names of modules
repeat themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
import zstandard

from fedtune.errors import MalformedMessage
from fedtune.payload import Payload, Role
from fedtune.wire.raw import DTYPES, UNREADABLE

LARGEST = 2**24  # bytes of JSON
LEVEL = 9


class Mode(StrEnum):
    """How a tensor travels."""

    CHANGE = "c"  # its difference to what the receiver has under this name
    FRESH = "n"  # the same by the codec for first tensors: the receiver has only what the job starts from
    FIRST = "f"  # whole: the receiver has nothing like it
    SAME = "s"  # not at all: the receiver has it
    RAW = "r"  # byte by byte: vectors, whole numbers, what is not finite


CODED = (Mode.CHANGE, Mode.FRESH, Mode.FIRST)
BASED = (Mode.CHANGE, Mode.FRESH)  # on what the receiver has
LOSSY = ("float32", "float16", "bfloat16")  # types whose tensors go through codecs


@dataclass(frozen=True)
class Line:
    """One tensor."""

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    mode: Mode

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Schema:
    """In the order of the payload."""

    lines: tuple[Line, ...]
    scalars: Mapping[str, float]

    def as_bytes(self) -> bytes:
        lines = [[line.name, line.role, line.dtype, line.shape, line.mode] for line in self.lines]
        text = json.dumps([lines, dict(self.scalars)], separators=(",", ":"))
        return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(text.encode())

    @classmethod
    def from_bytes(cls, data: bytes) -> Schema:
        """Raises MalformedMessage."""
        try:
            lines, scalars = json.loads(_unpressed(data))
            return cls(tuple(_line(*line) for line in lines), {_text(name): float(value) for name, value in scalars.items()})
        except (*UNREADABLE, RecursionError, zstandard.ZstdError) as error:
            raise MalformedMessage(f"a message came whose schema cannot be read: {error}") from error

    def travelling(self, mode: Mode) -> Schema:
        """The same, where all tensors travel so; what goes through no codec goes raw, if it goes."""
        fixed = mode is not Mode.SAME
        lines = (line if fixed and line.mode is Mode.RAW else replace(line, mode=mode) for line in self.lines)
        return replace(self, lines=tuple(lines))


def schema_of(payload: Payload, modes: Mapping[str, Mode]) -> Schema:
    lines = (
        Line(name, payload.roles[name], as_text(tensor.dtype), tuple(tensor.shape), modes[name])
        for name, tensor in payload.tensors.items()
    )
    return Schema(tuple(lines), dict(payload.scalars))


def known_schema(known: Payload) -> Schema:
    """That of a payload like the one which the receiver has."""
    return schema_of(known, {name: Mode.CHANGE if codable(known, name) else Mode.RAW for name in known.tensors})


def codable(payload: Payload, name: str) -> bool:
    """Whether a tensor goes through a codec, if it is finite."""
    tensor = payload.tensors[name]
    dtype = as_text(tensor.dtype)
    return payload.roles[name] is not Role.VECTOR and dtype in LOSSY and tensor.numel() > 0


def as_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unpressed(data: bytes) -> bytes:
    """Of a size that the frame names, so that no more memory is taken."""
    size = zstandard.get_frame_parameters(data).content_size
    if not 0 < size <= LARGEST:
        raise ValueError(f"it says that it has {size} bytes, wanted at most {LARGEST}")
    return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)


def _line(name: object, role: str, dtype: str, shape: object, mode: str) -> Line:
    if dtype not in DTYPES:
        raise ValueError(f"a tensor of type {dtype!r}")
    if not (isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**40 for size in shape) and len(shape) < 16):
        raise ValueError(f"a shape of {shape!r}")
    return Line(_text(name), Role(role), dtype, tuple(shape), Mode(mode))


def _text(name: object) -> str:
    if not isinstance(name, str):
        raise ValueError(f"a name of {name!r}")
    return name
