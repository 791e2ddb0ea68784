"""What a client has stored: its memory, and of each ask that it answered lately the answer, and the memory before it.

It belongs to one run and one schema. An ask is known by a digest of its content: the coordinator that goes on with a run asks
the same again, byte for byte, in other signatures.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from typing import Any

from fedtune.envelope import Envelope
from fedtune.errors import MALFORMED, Damaged

ROUNDS = 2  # whose answers are needed: a coordinator whose last state is damaged repeats one round, and the open one
MOST, LARGEST = 16, 2**30  # entries, and bytes beyond the newest; the oldest go first
NOTHING = ("", "")
NONE = (-1, "")
SIGNING = ("stamp", "signature")  # in a header, and another each time


@dataclass(frozen=True)
class Entry:
    """One ask that was answered. Files of 0 letters are not there."""

    key: str
    ask: str
    round: int
    before: tuple[str, str]  # the memory
    answer: str = ""


@dataclass(frozen=True)
class Manifest:
    """`memory` are two files: what many clients keep alike, and the client's own."""

    run: str = ""
    schema: str = ""
    memory: tuple[str, str] = NOTHING
    entries: tuple[Entry, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)  # of files, in bytes
    purged: tuple[int, str] = NONE  # round and name of the newest ask whose entry had to go, with the memory before it

    def files(self) -> Iterator[str]:
        """Each that must be there, once."""
        named = [*self.memory, *(file for entry in self.entries for file in _files(entry))]
        return iter(dict.fromkeys(file for file in named if file))

    def find(self, run: str, key: str) -> Entry | None:
        return next((entry for entry in self.entries if self.run == run and entry.key == key), None)

    def until(self, ask: str, round: int, undone: Collection[int] = ()) -> tuple[Entry, ...]:
        """The entries that are older than this ask. One under its name is another content's; one of a later round is of a time
        that the coordinator has gone back from; one of an `undone` round was rolled back. They and all that came after go."""
        gone = (
            number
            for number, entry in enumerate(self.entries)
            if entry.ask == ask or entry.round > round or entry.round in undone
        )
        return self.entries[: next(gone, len(self.entries))]

    def lacks(self, ask: str, round: int, undone: Collection[int] = ()) -> bool:
        """Whether the memory from before this ask is gone: its entry, or a later one, was purged."""
        gone, name = self.purged
        return _place(ask, round) <= _place(name, gone) or gone in undone

    def bounded(self) -> Manifest:
        """Without the entries that nobody can ask for any more, or for which there is no room."""
        rounds = sorted({entry.round for entry in self.entries})[-ROUNDS:]
        entries = [entry for entry in self.entries if entry.round in rounds][-MOST:]
        spared = {*self.memory, *(_files(entries[-1]) if entries else ())}
        while self._size(entries, spared) > LARGEST:
            del entries[0]
        gone = [(entry.round, entry.ask) for entry in self.entries if entry not in entries]
        purged = max([self.purged, *gone], key=lambda one: _place(one[1], one[0]))
        kept = replace(self, entries=tuple(entries), purged=purged)
        return replace(kept, sizes={file: self.sizes[file] for file in kept.files()})

    def _size(self, entries: Sequence[Entry], spared: set[str]) -> int:
        return sum(self.sizes[file] for file in {file for entry in entries for file in _files(entry)} - spared)

    def as_bytes(self) -> bytes:
        line = json.dumps(asdict(self), separators=(",", ":")).encode()
        return hashlib.sha256(line).hexdigest().encode() + b" " + line

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises Damaged."""
        digest, _, line = data.partition(b" ")
        if hashlib.sha256(line).hexdigest().encode() != digest:
            raise Damaged(f"{len(data)} bytes that are not what was written")
        try:
            return _manifest(json.loads(line))
        except MALFORMED as error:
            raise Damaged(f"of another version of fedtune ({type(error).__name__}: {error})") from error


def key_of(ask: Envelope) -> str:
    """A digest of what is asked: header and tensors, without the signature."""
    header = {key: value for key, value in ask.header.items() if key not in SIGNING}
    about = [[t.name, t.dtype, list(t.shape), t.stype, len(t.data)] for t in ask.tensors]
    return digest_of([Envelope(header).header_json().encode(), json.dumps(about).encode(), *(t.data for t in ask.tensors)])


def digest_of(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _place(ask: str, round: int) -> tuple[int, float]:
    """Of an ask among those of a run: an evaluation is the last of its round."""
    step = ask.partition(".")[2]
    return round, int(step) if step.isdecimal() and len(step) < 10 else math.inf


def _files(entry: Entry) -> tuple[str, ...]:
    return tuple(file for file in (*entry.before, entry.answer) if file)


def _manifest(stored: Any) -> Manifest:
    """Raises one of MALFORMED where anything in it is not what whoever goes on by it takes it for."""
    entries = tuple(_entry(**entry) for entry in stored["entries"])
    round, ask = stored.get("purged", NONE)
    sizes = {name: int(size) for name, size in stored["sizes"].items()}
    about = _text(stored["run"]), _text(stored["schema"]), _pair(stored["memory"])
    manifest = Manifest(*about, entries, sizes, (int(round), str(ask)))
    if lacking := set(manifest.files()) - sizes.keys():
        raise ValueError(f"no sizes of {sorted(lacking)}")
    return manifest


def _entry(key: Any, ask: Any, round: Any, before: Any, answer: Any = "") -> Entry:
    return Entry(_text(key), _text(ask), int(round), _pair(before), _file(answer))


def _pair(files: Any) -> tuple[str, str]:
    kept, own = files
    return _file(kept), _file(own)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _file(value: Any) -> str:
    """In the manifest's own folder, or none."""
    name = _text(value)
    if name and (PurePath(name).name != name or name == ".." or not name.isprintable()):
        raise ValueError(f"{name!r} is no file's name")
    return name
