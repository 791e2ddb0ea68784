"""A payload as one row of bytes: its schema, and the streams of all tensors that its codecs make.

    1 byte    version
    1 byte    layout: a schema follows; or it is the known one, and all tensors travel in the same way
    4 bytes   length of the schema, and the schema
    then for each stream 4 bytes of length, and the stream

Streams of the same name of all tensors are one: a table of frequencies serves them all. The decoder checks every size before
it takes memory.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import MalformedMessage
from fedtune.payload import Payload, Role
from fedtune.wire.change import decoded, difference, encoded, is_far
from fedtune.wire.codec import Codec
from fedtune.wire.raw import DTYPES
from fedtune.wire.schema import BASED, CODED, LOSSY, Line, Mode, Schema, as_text, codable, known_schema, schema_of
from fedtune.wire.stage import Array, Form
from fedtune.wire.streams import read, written

VERSION = 1
HEAD = struct.Struct("<BBI")
GIVEN = 0  # layouts
USUAL = {1: Mode.CHANGE, 2: Mode.SAME, 3: Mode.FRESH}
NOTHING = Payload()
Errors = MutableMapping[str, Tensor]


@dataclass(frozen=True)
class Codecs:
    """Of one direction."""

    change: Codec  # of differences
    first: Codec  # of tensors that the receiver has nothing like

    def of(self, mode: Mode) -> Codec:
        return self.change if mode is Mode.CHANGE else self.first


@dataclass(frozen=True)
class Packed:
    data: bytes
    received: Payload  # what the receiver makes of it


def pack(
    payload: Payload,
    codecs: Codecs,
    key: int,
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
    parts = {
        name: _Part(Mode.SAME, {}, known.tensors[name])
        if name in same
        else _part(name, payload, codecs, key, known, fresh, errors)
        for name in payload.tensors
    }
    schema = schema_of(payload, {name: part.mode for name, part in parts.items()})
    layout, about = _layout(schema, known)
    rows = [HEAD.pack(VERSION, layout, len(about)), about]
    for name, codec, form in _streams(schema, codecs):
        values = [parts[line.name].streams[name[1:]] for line in _lines(schema, name)]
        data = written(np.concatenate(values), form, codec.entropy)
        rows += [struct.pack("<I", len(data)), data]
    raw = b"".join(_bytes(payload.tensors[line.name]) for line in schema.lines if line.mode is Mode.RAW)
    received = Payload({name: part.received for name, part in parts.items()}, payload.roles, payload.scalars)
    return Packed(b"".join([*rows, raw]), received)


def overhead(data: bytes) -> int:
    """Bytes before the first stream: layout and schema."""
    if len(data) < HEAD.size:
        return len(data)
    return min(HEAD.size + int(HEAD.unpack_from(data)[2]), len(data))


def unpack(data: bytes, codecs: Codecs, key: int, known: Payload = NOTHING, most: int = 2**62) -> Payload:
    """What `pack` calls `received`; at most `most` numbers in all. Raises MalformedMessage."""
    rest = _Reader(data)
    version, layout, size = HEAD.unpack(rest.take(HEAD.size))
    if version != VERSION:
        raise MalformedMessage(
            f"tensors packed in version {version} came, wanted {VERSION}: install the same fedtune on both sides"
        )
    schema = _schema(layout, rest.take(size), known)
    _require_possible(schema, known, most)
    streams: dict[str, dict[str, Array]] = {line.name: {} for line in schema.lines}
    for name, codec, form in _streams(schema, codecs):
        (size,) = struct.unpack("<I", rest.take(4))
        joined, start = read(rest.take(size), form, codec.entropy), 0
        for line in _lines(schema, name):
            own = codec.forms(line.shape)[name[1:]]
            streams[line.name][name[1:]] = _within(joined[start : start + own.count], own)
            start += own.count
    tensors = {}
    for line in schema.lines:
        raw = rest.take(line.count * DTYPES[line.dtype].itemsize) if line.mode is Mode.RAW else b""
        tensors[line.name] = _tensor(line, streams[line.name], raw, codecs, key, known)
    rest.require_empty()
    return Payload(tensors, {line.name: line.role for line in schema.lines}, schema.scalars)


@dataclass(frozen=True)
class _Part:
    """One tensor on its way."""

    mode: Mode
    streams: Mapping[str, Array]
    received: Tensor


def _part(name: str, payload: Payload, codecs: Codecs, key: int, known: Payload, fresh: bool, errors: Errors | None) -> _Part:
    tensor, base = payload.tensors[name], _base(known, payload, name)
    if not codable(payload, name):
        return _Part(Mode.RAW, {}, tensor)
    if base is not None and is_far(tensor, base):
        base = None
    mode = Mode.FIRST if base is None else Mode.FRESH if fresh else Mode.CHANGE
    codec = codecs.of(mode)
    x = difference(tensor, base, codec)
    error = errors.get(name) if errors is not None and not codec.exact else None
    if error is not None and error.shape == tensor.shape:
        x = x + error.numpy()
    if not np.isfinite(x).all():
        return _Part(Mode.RAW, {}, tensor)
    streams = encoded(x, base, codec, key, name)
    received = tensor if codec.exact else torch.from_numpy(decoded(streams, base, x.shape, codec, key, name))
    if errors is not None and base is not None:
        errors[name] = torch.from_numpy(x) - (received - base.float())
    return _Part(mode, streams, received.to(tensor.dtype))


def _tensor(line: Line, streams: Mapping[str, Array], raw: bytes, codecs: Codecs, key: int, known: Payload) -> Tensor:
    dtype, base = DTYPES[line.dtype], known.tensors.get(line.name)
    if line.mode is Mode.RAW:
        return (
            torch.frombuffer(bytearray(raw), dtype=dtype).reshape(line.shape) if raw else torch.empty(line.shape, dtype=dtype)
        )
    if line.mode is Mode.SAME:
        assert base is not None
        return base
    plain = decoded(streams, base if line.mode in BASED else None, line.shape, codecs.of(line.mode), key, line.name)
    return torch.from_numpy(plain).to(dtype)


def _base(known: Payload, payload: Payload, name: str) -> Tensor | None:
    """What the receiver has of this tensor, if it can be a difference to it."""
    base, tensor = known.tensors.get(name), payload.tensors[name]
    fits = base is not None and _fits(base, known.roles[name], tuple(tensor.shape), payload.roles[name])
    return base if fits else None


def _fits(base: Tensor, role: Role, shape: tuple[int, ...], wanted: Role) -> bool:
    return role is wanted and tuple(base.shape) == shape and as_text(base.dtype) in LOSSY


def _layout(schema: Schema, known: Payload) -> tuple[int, bytes]:
    usual = known_schema(known)
    layouts = (layout for layout in USUAL if schema == usual.travelling(USUAL[layout]))
    layout = next(layouts, GIVEN)
    return layout, schema.as_bytes() if layout == GIVEN else b""


def _schema(layout: int, about: bytes, known: Payload) -> Schema:
    if layout == GIVEN:
        return Schema.from_bytes(about)
    if about or layout not in USUAL:
        raise MalformedMessage(
            f"a message came of layout {layout} with a schema of {len(about)} bytes, wanted 0 to {max(USUAL)}"
        )
    return known_schema(known).travelling(USUAL[layout])


def _require_possible(schema: Schema, known: Payload, most: int) -> None:
    """Before any memory is taken for it."""
    total = sum(line.count for line in schema.lines)
    if total > most:
        raise MalformedMessage(f"a message of {total} numbers came, wanted at most {most}")
    if len({line.name for line in schema.lines}) != len(schema.lines):
        raise MalformedMessage("a message came that names a tensor twice")
    for line in schema.lines:
        base = known.tensors.get(line.name)
        fits = base is not None and _fits(base, known.roles[line.name], line.shape, line.role)
        there = base is not None and (tuple(base.shape), base.dtype) == (line.shape, DTYPES[line.dtype])
        if (line.mode in BASED and not fits) or (line.mode is Mode.SAME and not there):
            raise MalformedMessage(f"'{line.name}' came as a difference to what is not known here")
        if line.mode in CODED and (line.dtype not in LOSSY or line.count == 0):
            raise MalformedMessage(f"'{line.name}' came as {line.dtype} of shape {line.shape} through a codec")


def _streams(schema: Schema, codecs: Codecs) -> Iterator[tuple[str, Codec, Form]]:
    """The name of each joined stream, which begins with its mode; its codec; its form."""
    for mode in CODED:
        forms: dict[str, list[Form]] = {}
        for line in schema.lines:
            if line.mode is mode:
                for stream, form in codecs.of(mode).forms(line.shape).items():
                    forms.setdefault(mode + stream, []).append(form)
        for name, own in forms.items():
            low, high, count = min(f.low for f in own), max(f.high for f in own), sum(f.count for f in own)
            yield name, codecs.of(mode), replace(own[0], shape=(count,), low=low, high=high)


def _lines(schema: Schema, stream: str) -> Iterator[Line]:
    """The tensors that have a part of a joined stream, in order."""
    return (line for line in schema.lines if line.mode == stream[0])


def _within(values: Array, form: Form) -> Array:
    if values.size and (values.min() < form.low or values.max() > form.high):
        raise MalformedMessage(f"a number is not from {form.low} to {form.high}")
    return values.astype(form.dtype, copy=False)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class _Reader:
    """Bytes from the front to the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise MalformedMessage(f"a message ends {count - (len(self._data) - self._at)} bytes too early")
        self._at += count
        return bytes(self._data[self._at - count : self._at])

    def require_empty(self) -> None:
        if self._at != len(self._data):
            raise MalformedMessage(f"{len(self._data) - self._at} bytes came behind the end of a message")
