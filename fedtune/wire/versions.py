"""The broadcast as a difference to what each client has.

    server: remembers, of each client that answered last time, what it has (`Held`)
    client: keeps what it was sent; a message that builds on it names it by its version

Both know the adapter that the job starts from: of whom nothing else is known has that one, the version `START`.

A version is a hash of all messages that led to it, so two sides with the same version have the same numbers. A client that has
another one says so (`Outdated`), and is sent the difference to the start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import ClientFailed, MalformedMessage
from fedtune.memory import Memory
from fedtune.payload import Payload, joined
from fedtune.seeds import seed_of
from fedtune.wire.packed import NOTHING, Codecs, Packed, pack, unpack
from fedtune.wire.raw import UNREADABLE, as_it_lies
from fedtune.wire.schema import Line, Schema, as_text, known_schema

START, LENGTH = "start", 16  # of all other versions
KEEPS = 4  # times what came last, or the job starts from
KEPT, ABOUT = "wire.kept.", "wire.about"  # in a client's memory: before the name of a tensor; the version and its schema


class Outdated(ClientFailed):
    """A message builds on a version that the client does not have."""


@dataclass(frozen=True)
class Held:
    """What a client has."""

    version: str = START
    payload: Payload = NOTHING
    sources: Mapping[str, bytes] = field(default_factory=dict)  # of each tensor a hash of what was to be sent


@dataclass(frozen=True)
class Sent:
    """A broadcast on its way to those who have one version."""

    since: str
    packed: Packed
    held: Held  # what they have once it has come


def sent_to(held: Held, payload: Payload, codecs: Codecs, seed: int, ask_id: str, start: Payload = NOTHING) -> Sent:
    """`payload` for clients that have `held`."""
    sources = _sources(payload)
    same = {name for name, digest in sources.items() if held.sources.get(name) == digest}
    key = seed_of(seed, ask_id, "down", held.version)
    packed = pack(payload, codecs, key, held.payload, fresh=held.version == START, same=same)
    after = Held(_next(held.version, packed.data), _has(held.payload, packed.received, start), {**held.sources, **sources})
    return Sent(held.version, packed, after)


@dataclass(frozen=True)
class Known:
    """The server's notes as a checkpoint keeps them."""

    held: Mapping[str, Held] = field(default_factory=dict)  # by client; of one version all have the same
    since: Mapping[str, int] = field(default_factory=dict)  # version -> the ask that made it
    asked: int = 0


class Versions:
    """The server's notes: who has what. At most `most` versions; older ones are forgotten."""

    def __init__(self, start: Payload, most: int) -> None:
        self._start, self._most, self._asked = Held(START, start, _sources(start)), most, 0
        self._held: dict[str, Held] = {}
        self._since: dict[str, int] = {}  # version -> the ask that made it

    def of(self, client: str) -> Held:
        return self._held.get(client, self._start)

    def arrived(self, client: str, held: Held) -> None:
        self._held[client] = held

    def forget(self, client: str) -> None:
        """Nobody knows what it has now."""
        self._held.pop(client, None)

    def settle(self) -> None:
        """After an ask: the oldest versions go."""
        self._asked += 1
        self._since = {held.version: self._since.get(held.version, self._asked) for held in self._held.values()}
        young = sorted(self._since, key=lambda version: (-self._since[version], version))[: self._most]
        self._held = {client: held for client, held in self._held.items() if held.version in young}

    @property
    def known(self) -> Known:
        """Between asks: all that is needed to go on in another process."""
        return Known(dict(self._held), dict(self._since), self._asked)

    @known.setter
    def known(self, known: Known) -> None:
        self._held, self._since, self._asked = dict(known.held), dict(known.since), known.asked


# the client


def received(
    data: bytes,
    since: str,
    codecs: Codecs,
    seed: int,
    ask_id: str,
    memory: Memory,
    start: Payload,
    most: int,
    names: int = 0,
) -> Payload:
    """What came; the client has it from now on. Raises Outdated or MalformedMessage."""
    known = kept(memory, since, start)
    payload = unpack(data, codecs, seed_of(seed, ask_id, "down", since), known, most, names)
    _keep(memory, _next(since, data), _has(known, payload, start), None if since == START else payload.tensors)
    return payload


def kept(memory: Memory, version: str, start: Payload) -> Payload:
    """What a client has in this version. Raises Outdated where it has another, or a memory that is damaged."""
    if version == START:
        return start
    try:
        about = memory[ABOUT].numpy().tobytes() if ABOUT in memory else b""
        has = about[:LENGTH].decode("ascii") or START
        if has != version:
            raise Outdated(f"the ask builds on version {version[:20]} of the broadcast, this client has {has}")
        schema = Schema.from_bytes(about[LENGTH:], len(memory))
        return Payload(
            {line.name: _as_noted(memory[KEPT + line.name], line) for line in schema.lines},
            {line.name: line.role for line in schema.lines},
            schema.scalars,
        )
    except (*UNREADABLE, MalformedMessage) as error:
        raise Outdated(f"what this client kept of the broadcast is damaged: {str(error)[:200]}") from error


def _as_noted(tensor: Tensor, line: Line) -> Tensor:
    if (as_text(tensor.dtype), tuple(tensor.shape)) != (line.dtype, line.shape):
        raise ValueError(f"'{line.name}' is {tensor.dtype} {tuple(tensor.shape)}, noted as {line.dtype} {line.shape}")
    return tensor


def _has(known: Payload, came: Payload, start: Payload) -> Payload:
    """What a client has from now on: all that ever came, or the last alone where all has become much more than is ever sent."""
    both = joined(known, came)
    whole, last, first = (sum(tensor.numel() for tensor in one.tensors.values()) for one in (both, came, start))
    return both if whole <= KEEPS * max(last, first) else came


def _keep(memory: Memory, version: str, payload: Payload, changed: Collection[str] | None) -> None:
    """`changed` are the tensors that came; None is all, and what was there before goes. While it is under way, nothing is said
    to be there: a client that fails in the middle is sent everything."""
    memory.pop(ABOUT, None)
    for name in [name for name in memory if name.startswith(KEPT)]:
        if changed is None or name.removeprefix(KEPT) not in payload.tensors:
            del memory[name]
    for name in payload.tensors if changed is None else changed:
        memory.keep(KEPT + name, payload.tensors[name])
    about = version.encode() + known_schema(payload).as_bytes()
    memory[ABOUT] = torch.from_numpy(np.frombuffer(about, np.uint8).copy())


def _next(version: str, data: bytes) -> str:
    return hashlib.sha256(version.encode() + b"\x1f" + data).hexdigest()[:LENGTH]


def _sources(payload: Payload) -> dict[str, bytes]:
    return {name: _digest(tensor) for name, tensor in payload.tensors.items()}


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + as_it_lies(tensor)).digest()
