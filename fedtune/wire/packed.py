"""A payload as one row of bytes: its schema, and the streams of all tensors that its codecs make.

    1 byte    version
    1 byte    layout: a schema follows; or it is the known one, and all tensors travel in the same way
    number    length of the schema, and the schema
    then for each stream a number, its length, and the stream; then tensors that travel as they are, byte by byte

A number takes a byte for each seven of its bits. The decoder faces the network: it takes memory for nothing that the schema
does not declare, the receiver does not allow and the message does not bring, and raises nothing but MalformedMessage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.errors import MalformedMessage
from fedtune.payload import Payload
from fedtune.wire.change import decoded
from fedtune.wire.joined import Codecs, joined
from fedtune.wire.parts import Errors, Packing
from fedtune.wire.raw import DTYPES, as_it_lies
from fedtune.wire.reader import Reader, as_bytes
from fedtune.wire.schema import BASED, Line, Mode, Schema, known_schema, require_possible, schema_of
from fedtune.wire.stage import Array, Key

__all__ = ["NOTHING", "Codecs", "Errors", "Packed", "overhead", "pack", "unpack"]

VERSION = 1
GIVEN = 0  # layouts
USUAL = {1: Mode.CHANGE, 2: Mode.SAME, 3: Mode.FRESH}
NOTHING = Payload()


@dataclass(frozen=True)
class Packed:
    data: bytes
    received: Payload  # what the receiver makes of it


def pack(
    payload: Payload,
    codecs: Codecs,
    key: Key,
    known: Payload = NOTHING,
    *,
    fresh: bool = False,
    errors: Errors | None = None,
    same: Collection[str] = (),
) -> Packed:
    """`known` is what the receiver has; where it is `fresh`, far from the payload, all tensors go by the codec for first ones.

    `errors` (error feedback) is what the codec lost of earlier differences: it is added, and what is lost now takes its place.
    Tensors named in `same` do not travel: the receiver keeps what `known` has.
    """
    packing = Packing(payload, codecs, key, known, fresh, errors, same)
    parts = {name: packing.part(name) for name in payload.tensors}
    schema = schema_of(payload, {name: part.mode for name, part in parts.items()})
    rows = [_head(schema, known)]
    streams = {name: part.streams for name, part in parts.items()}
    for stream in joined(schema.lines, codecs):
        data = stream.written(streams)
        rows += [as_bytes(len(data)), data]
    rows += [as_it_lies(payload.tensors[line.name]) for line in schema.lines if line.mode is Mode.RAW]
    received = {name: part.received for name, part in parts.items()}
    return Packed(b"".join(rows), Payload(received, payload.roles, dict(payload.scalars)))


def unpack(data: bytes, codecs: Codecs, key: Key, known: Payload = NOTHING, most: int = 2**62, names: int = 0) -> Payload:
    """What `pack` calls `received`; of at most `most` numbers, and some thousands of tensors beside those that are known, or
    `names`. Raises MalformedMessage."""
    rest = Reader(data)
    schema = _schema(rest, known, names)
    require_possible(schema, known, most)
    rows = [(stream, rest.take(rest.number())) for stream in joined(schema.lines, codecs)]
    raw = {line.name: rest.take(line.size) for line in schema.lines if line.mode is Mode.RAW}
    rest.require_empty()
    streams: dict[str, dict[str, Array]] = {line.name: {} for line in schema.lines}
    for stream, coded in rows:
        for name, values in stream.read(coded):
            streams[name][stream.name] = values
    tensors = {}
    for line in schema.lines:
        if line.mode is Mode.RAW:
            tensors[line.name] = _raw(line, raw[line.name])
        else:
            tensors[line.name] = _tensor(line, streams[line.name], codecs, key, known)
    return Payload(tensors, {line.name: line.role for line in schema.lines}, schema.scalars)


def overhead(data: bytes) -> int:
    """Bytes before the first stream: layout and schema."""
    rest = Reader(data)
    try:
        rest.take(2)
        rest.take(rest.number())
    except MalformedMessage:
        return len(data)
    return len(data) - rest.left


def _head(schema: Schema, known: Payload) -> bytes:
    """What is left out is compared as text: there 0.0 is not -0.0, and the order counts."""
    usual, text = known_schema(known), schema.as_text()
    layout = next((layout for layout, mode in USUAL.items() if text == usual.travelling(mode).as_text()), GIVEN)
    about = schema.as_bytes() if layout == GIVEN else b""
    return bytes([VERSION, layout]) + as_bytes(len(about)) + about


def _schema(rest: Reader, known: Payload, names: int) -> Schema:
    version, layout = rest.take(2)
    if version != VERSION:
        raise MalformedMessage(
            f"tensors packed in version {version} came, wanted {VERSION}: install the same fedtune on both sides"
        )
    about = bytes(rest.take(rest.number()))
    if layout == GIVEN:
        return Schema.from_bytes(about, max(len(known.tensors), names))
    if about or layout not in USUAL:
        raise MalformedMessage(
            f"a message came of layout {layout} with a schema of {len(about)} bytes, wanted 0 to {max(USUAL)}"
        )
    return known_schema(known).travelling(USUAL[layout])


def _raw(line: Line, data: memoryview) -> Tensor:
    dtype = DTYPES[line.dtype]
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(line.shape) if data else torch.empty(line.shape, dtype=dtype)


def _tensor(line: Line, streams: Mapping[str, Array], codecs: Codecs, key: Key, known: Payload) -> Tensor:
    """Its own in any case: whoever gets it may write to it."""
    if line.mode is Mode.SAME:
        return known.tensors[line.name].detach().clone()
    base = known.tensors[line.name] if line.mode in BASED else None
    plain = decoded(streams, base, line.shape, codecs.of(line.mode), key, line.name)
    return torch.from_numpy(plain).to(DTYPES[line.dtype])
