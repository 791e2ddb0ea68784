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
from torch import Tensor

from fedtune.errors import MalformedMessage
from fedtune.payload import Payload, Role
from fedtune.wire.raw import DTYPES, LARGEST, UNREADABLE

TENSORS = 2**11  # in a message, beside twice as many as the receiver knows; each costs time, even an empty one
COMMAS = 8  # in the text of a schema, for each tensor that there can be
NAMES = 512  # characters of the longest name
LEVEL = 9
SIZES = 15  # of the longest shape


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

    @property
    def size(self) -> int:
        """Bytes, as it is."""
        return self.count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Schema:
    """In the order of the payload."""

    lines: tuple[Line, ...]
    scalars: Mapping[str, float]

    def as_text(self) -> str:
        lines = [[line.name, line.role, line.dtype, line.shape, line.mode] for line in self.lines]
        return json.dumps([lines, dict(self.scalars)], separators=(",", ":"))

    def as_bytes(self) -> bytes:
        return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(self.as_text().encode())

    @classmethod
    def from_bytes(cls, data: bytes, known: int = 0) -> Schema:
        """Of a sender who may name twice as many tensors as are `known`, and some more. Raises MalformedMessage."""
        try:
            lines, scalars = json.loads(_text(data, TENSORS + 2 * known))
            return cls(tuple(_line(*line) for line in lines), {_name(name): _scalar(x) for name, x in scalars.items()})
        except (*UNREADABLE, RecursionError, zstandard.ZstdError) as error:
            raise MalformedMessage(f"a message came whose schema cannot be read: {str(error)[:200]}") from error

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
    modes = {name: Mode.CHANGE if codable(known.tensors[name], role) else Mode.RAW for name, role in known.roles.items()}
    return schema_of(known, modes)


def codable(tensor: Tensor, role: Role) -> bool:
    """Whether it goes through a codec, if it is finite."""
    return role is not Role.VECTOR and as_text(tensor.dtype) in LOSSY and tensor.numel() > 0


def fits(known: Payload, name: str, role: Role, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can be a difference to what is known by its name."""
    base = known.tensors.get(name)
    return base is not None and codable(base, role) and (known.roles[name], tuple(base.shape)) == (role, shape)


def is_there(known: Payload, name: str, role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a tensor can be the one that is known by its name."""
    base = known.tensors.get(name)
    return base is not None and (known.roles[name], tuple(base.shape), base.dtype) == (role, shape, dtype)


def require_possible(schema: Schema, known: Payload, most: int) -> None:
    """At most so many numbers, and of all that is said to be known here, it is. Raises MalformedMessage."""
    total = sum(line.count for line in schema.lines)
    if total > most:
        raise MalformedMessage(f"a message of {total} numbers came, wanted at most {most}")
    if len({line.name for line in schema.lines}) != len(schema.lines):
        raise MalformedMessage("a message came that names a tensor twice")
    for line in schema.lines:
        _require_known(line, known)
        if line.mode in CODED and (line.role is Role.VECTOR or line.dtype not in LOSSY or line.count == 0):
            raise MalformedMessage(f"'{line.name}', {line.role} of {line.dtype} {line.shape}, came through a codec")


def as_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_known(line: Line, known: Payload) -> None:
    as_base = line.mode in BASED and not fits(known, line.name, line.role, line.shape)
    as_it_is = line.mode is Mode.SAME and not is_there(known, line.name, line.role, line.shape, DTYPES[line.dtype])
    if as_base or as_it_is:
        raise MalformedMessage(f"'{line.name}' came as a difference to what is not known here")


def _text(data: bytes, tensors: int) -> bytes:
    """Of a size that the frame names, and no longer than that many tensors need: as Python objects it is larger."""
    size, largest = zstandard.get_frame_parameters(data).content_size, NAMES * tensors
    if not 0 < size <= largest:
        raise ValueError(f"it says that it has {size} bytes, wanted at most {largest}")
    text = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    if text.count(b",") > COMMAS * tensors:
        raise ValueError(f"it holds more than {tensors} tensors")
    return text


def _line(name: object, role: str, dtype: str, shape: object, mode: str) -> Line:
    if dtype not in DTYPES:
        raise ValueError(f"a tensor of type {dtype!r}")
    if not (isinstance(shape, list) and len(shape) <= SIZES and all(type(size) is int and size >= 0 for size in shape)):
        raise ValueError(f"a shape of {shape!r}")
    if math.prod(max(size, 1) for size in shape) > LARGEST:  # torch counts with the others even where one of them is 0
        raise ValueError(f"a shape of {shape!r}")
    return Line(_name(name), Role(role), dtype, tuple(shape), Mode(mode))


def _name(name: object) -> str:
    if not isinstance(name, str) or len(name) > NAMES:
        raise ValueError(f"a name of {name!r}")
    name.encode()  # what no encoding holds cannot name what is drawn, or lie in a file
    return name


def _scalar(value: object) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"a scalar of {value!r}")
    return float(value)  # type: ignore[arg-type]
