"""One message as plain bytes, between the codec (torch), Flower (server, relay) and gRPC (relay, trainer).

It needs neither torch nor flwr, so the relay can carry it without knowing what is inside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from fedtune.errors import MalformedMessage

WIRE_VERSION = 1
UNKNOWN_RUN = "unknown_run"  # in the header of a failure: the client takes part in another run, or in none, and wants a hello
LONGEST = 2**23  # characters of a header; as a row of empty lists it takes twenty times as much memory
DEEPEST = 32  # objects and lists within each other, in a header; a job has fewer than ten


@dataclass(frozen=True)
class WireTensor:
    """One encoded tensor: `stype` names the codec, `data` are its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


@dataclass(frozen=True)
class Envelope:
    """A header of JSON values and the encoded tensors, in the order of the payload."""

    header: Mapping[str, Any]
    tensors: tuple[WireTensor, ...] = field(default=())

    def header_json(self) -> str:
        return json.dumps(self.header, sort_keys=True, separators=(",", ":"))

    def header_size(self) -> int:
        return len(self.header_json().encode())

    def size(self) -> int:
        """Bytes that this message costs: tensors and header, without what the transport adds."""
        return self.header_size() + sum(len(tensor.data) for tensor in self.tensors)

    def pieces(self) -> Iterator[bytes]:
        """As one row of bytes: a line of JSON, and the tensors' data behind it."""
        tensors = [
            {"name": t.name, "dtype": t.dtype, "shape": t.shape, "stype": t.stype, "size": len(t.data)} for t in self.tensors
        ]
        yield json.dumps({"header": dict(self.header), "tensors": tensors}, separators=(",", ":")).encode() + b"\n"
        for tensor in self.tensors:
            yield tensor.data

    @classmethod
    def read(cls, file: BinaryIO) -> Envelope:
        """What `pieces` wrote. Raises MalformedMessage."""
        try:
            stored = json.loads(file.readline(2 * LONGEST))
            header = shallow(stored["header"])
            tensors = tuple(
                WireTensor(t["name"], t["dtype"], tuple(t["shape"]), t["stype"], _exactly(file, t["size"]))
                for t in stored["tensors"]
            )
            return cls(header, tensors)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise MalformedMessage(f"bytes that are no envelope: {error}") from error


def header_in(text: str) -> dict[str, Any]:
    """As it travels. Raises ValueError or RecursionError where it is no JSON, MalformedMessage where it is no header."""
    if len(text) > LONGEST:
        raise MalformedMessage(f"a header of {len(text):,} characters came, wanted at most {LONGEST:,}")
    return shallow(json.loads(text))


def shallow(header: Any) -> dict[str, Any]:
    """A header that came: an object, in which nothing lies so deep that to write it down again would fail. Raises
    MalformedMessage."""
    if not isinstance(header, dict):
        raise MalformedMessage(f"a header must be a JSON object, given {type(header).__name__}")
    layer: list[Any] = [header]
    for _ in range(DEEPEST):
        layer = [inner for one in layer for inner in _inside(one)]
        if not layer:
            return header
    raise MalformedMessage(f"a header must not be deeper than {DEEPEST}")


def _inside(value: Any) -> list[Any]:
    found = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in found if isinstance(inner, dict | list)]


def _exactly(file: BinaryIO, size: int) -> bytes:
    """Raises ValueError where so many are not there."""
    if len(data := file.read(size)) != size or size < 0:
        raise ValueError(f"{len(data)} bytes of a tensor, wanted {size}")
    return data
