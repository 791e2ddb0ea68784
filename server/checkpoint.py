"""A checkpoint: all that the coordinator remembers between rounds, whole and checked, or not there.

state/0007/checkpoint.json   who, what, and which tensor is which
state/0007/tensors.safetensors

The last two are kept: where the newest is damaged, one round is played again, and clients send their stored answers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune import durable
from fedtune.adapter import Adapter, Factors
from fedtune.errors import MALFORMED, Damaged, RunFolderError
from fedtune.payload import Payload, Role
from fedtune.strategy import ServerState
from fedtune.wire.versions import Held, Known
from server import fields
from server.records import RoundRecord

KEPT = 2
FORMAT = 1
TEXT, TENSORS = "checkpoint.json", "tensors.safetensors"
COUNTS = fields.each(fields.whole)
GATE = fields.exactly(conduct=fields.exactly(refused=COUNTS, until=COUNTS), norms=fields.each(fields.some(fields.figure)))
NOTES = {"undone": fields.some(fields.whole), "gate": GATE}  # where they are there
STATE = {name: fields.each(fields.figure) for name in ("scalars", "metrics")}
STATE |= {"selected": fields.each(fields.each(fields.figure))}
KNOWN = {"since": COUNTS, "asked": fields.whole}


@dataclass(frozen=True)
class Checkpoint:
    """After a round; round 0 is before any training."""

    run: str
    round: int
    state: ServerState
    known: Known  # of the wire: which client has what
    record: RoundRecord | None = None  # of this round
    notes: Mapping[str, Any] = field(default_factory=dict)  # JSON: what the gate remembers of clients, rounds rolled back


class Checkpoints:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, checkpoint: Checkpoint) -> None:
        """Whole or not at all; then the oldest goes. Raises OSError."""
        target = self._folder / f"{checkpoint.round:04d}"
        temporary = self._folder / f".{target.name}.writing"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = _Tensors()
        text = _to_json(checkpoint, tensors)
        _save(tensors.by_name, temporary / TENSORS)
        text["sha256"] = _digest(temporary / TENSORS)
        body = json.dumps(text, separators=(",", ":"))
        durable.write(temporary / TEXT, [f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}".encode()])
        durable.sync_tree(temporary)
        shutil.rmtree(target, ignore_errors=True)  # of a time before, that was damaged
        os.replace(temporary, target)
        durable.sync(self._folder)
        kept = [checkpoint.round, *(round for round in self._rounds() if round < checkpoint.round)][:KEPT]
        for other in set(self._rounds()) - set(kept):  # also a later one: it was damaged, else the run had gone on from there
            shutil.rmtree(self._path(other), ignore_errors=True)

    def last(self, damaged: Callable[[str], None] = lambda reason: None) -> Checkpoint | None:
        """The newest that is whole; each that is not is told to `damaged`."""
        for round in self._rounds():
            try:
                return read(self._path(round))
            except Damaged as reason:
                damaged(str(reason))
        return None

    def _rounds(self) -> list[int]:
        """The newest first."""
        return sorted((int(found.name) for found in self._folder.glob("[0-9]*") if found.name.isdigit()), reverse=True)

    def _path(self, round: int) -> Path:
        return self._folder / f"{round:04d}"


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    try:
        save_file(dict(tensors), file)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error), str(file)) from error


def read(folder: Path) -> Checkpoint:
    """Raises Damaged; or RunFolderError where it is well, and not for us to read."""
    try:
        digest, _, body = (folder / TEXT).read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(body.encode()).hexdigest() != digest:
            raise Damaged(f"{folder / TEXT} is not what was written")
        text = json.loads(body)
        if text["format"] != FORMAT:
            raise RunFolderError(
                f"{folder} was written by another version of fedtune (format {text['format']!r}): go on with that"
            )
        if _digest(folder / TENSORS) != text["sha256"]:
            raise Damaged(f"{folder / TENSORS} is not what was written")
        if not _is_sound(text):
            raise Damaged(f"{folder / TEXT} says what no checkpoint says")
        return _from_json(text, load_file(folder / TENSORS))
    except PermissionError as error:
        raise RunFolderError(f"{folder} may not be read: {error}; go on as the user that began the run") from error
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise Damaged(f"{folder} cannot be read: {type(error).__name__}: {error}") from error


def _is_sound(text: Mapping[str, Any]) -> bool:
    """As far as whoever goes on by it takes it for what it should be."""
    return (
        fields.holds(text, {"run": fields.text, "round": fields.whole})
        and fields.holds(text["state"], STATE)
        and fields.holds(text["known"], KNOWN)
        and fields.holds(text["notes"], {}, NOTES)
    )


class _Tensors:
    """Each tensor once, however often it is named, under a number."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._given: list[Tensor] = []  # kept, as its id is another's when it is gone

    def put(self, tensor: Tensor) -> str:
        if id(tensor) not in self._names:
            self._names[id(tensor)] = str(len(self._names))
            self._given.append(tensor)
            self.by_name[self._names[id(tensor)]] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return self._names[id(tensor)]

    def all(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        return {name: self.put(tensor) for name, tensor in tensors.items()}


def _to_json(checkpoint: Checkpoint, tensors: _Tensors) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "run": checkpoint.run,
        "round": checkpoint.round,
        "state": _state_to_json(checkpoint.state, tensors),
        "known": _known_to_json(checkpoint.known, tensors),
        "record": checkpoint.record and checkpoint.record.as_json(),
        "notes": dict(checkpoint.notes),
    }


def _from_json(text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    state, known = _state_from_json(text["state"], tensors), _known_from_json(text["known"], tensors)
    record = RoundRecord.from_json(text["record"]) if text["record"] else None
    return Checkpoint(text["run"], text["round"], state, known, record, text["notes"])


def _state_to_json(state: ServerState, tensors: _Tensors) -> dict[str, Any]:
    adapter = state.adapter
    return {
        "base": adapter.base,
        "lora": {path: [tensors.put(pair.A), tensors.put(pair.B), pair.scale] for path, pair in adapter.lora.items()},
        "dense": tensors.all(adapter.dense),
        "tensors": tensors.all(state.tensors),
        "scalars": dict(state.scalars),
        "metrics": dict(state.metrics),
        "selected": {client: dict(layers) for client, layers in state.selected.items()},
    }


def _state_from_json(text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ServerState:
    lora = {path: Factors(tensors[A], tensors[B], scale) for path, (A, B, scale) in text["lora"].items()}
    adapter = Adapter(lora, _named(text["dense"], tensors), text["base"])
    return ServerState(adapter, _named(text["tensors"], tensors), text["scalars"], text["metrics"], text["selected"])


def _known_to_json(known: Known, tensors: _Tensors) -> dict[str, Any]:
    versions = {held.version: held for held in known.held.values()}
    return {
        "versions": {version: _held_to_json(held, tensors) for version, held in versions.items()},
        "clients": {client: held.version for client, held in known.held.items()},
        "since": dict(known.since),
        "asked": known.asked,
    }


def _known_from_json(text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Known:
    versions = {version: _held_from_json(version, held, tensors) for version, held in text["versions"].items()}
    return Known({client: versions[version] for client, version in text["clients"].items()}, text["since"], text["asked"])


def _held_to_json(held: Held, tensors: _Tensors) -> dict[str, Any]:
    return {
        "tensors": tensors.all(held.payload.tensors),
        "roles": dict(held.payload.roles),
        "scalars": dict(held.payload.scalars),
        "sources": {name: digest.hex() for name, digest in held.sources.items()},
    }


def _held_from_json(version: str, text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Held:
    roles = {name: Role(role) for name, role in text["roles"].items()}
    payload = Payload(_named(text["tensors"], tensors), roles, text["scalars"])
    return Held(version, payload, {name: bytes.fromhex(digest) for name, digest in text["sources"].items()})


def _named(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[number] for name, number in names.items()}


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
