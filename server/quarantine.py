"""Refused answers, kept for whoever wants to know what came: `quarantine` in the run's folder.

    0007-3f1c9a02b7d4e856-12.answer   the answer as it came, as in the spool: `Envelope.read`
    0007-3f1c9a02b7d4e856-12.json     whose it is, to which ask, why it was refused, its size and its hash

Named by round, a hash of the client's name, and a number that goes up: those with the lowest go first. That it cannot be
written is no reason to end a run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedtune import durable
from fedtune.envelope import Envelope

log = logging.getLogger("fedtune.serverapp")
MOST_BYTES = 10**9  # of all together
ABOUT = 2**12  # bytes that the note beside one may take
SUFFIXES = (".answer", ".json")


class Quarantine:
    """At most `most` answers, and so many bytes."""

    def __init__(self, folder: Path, most: int, most_bytes: int = MOST_BYTES, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._most, self._bytes, self._clock = folder, most, most_bytes, clock

    def put(self, envelope: Envelope, round: int, ask: str, client: str, reason: str) -> str | None:
        """Its file's name; None where it is not kept."""
        try:
            return self._put(envelope, round, ask, client, reason) if self._most else None
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be written
            log.warning("a refused answer of %s cannot be kept in %s: %s", client, self._folder, error)
            return None

    def _put(self, envelope: Envelope, round: int, ask: str, client: str, reason: str) -> str | None:
        size = sum(map(len, envelope.pieces()))
        if size + ABOUT > self._bytes:
            log.warning("a refused answer of %s is too large to be kept: %d bytes", client, size)
            return None
        self._folder.mkdir(exist_ok=True)
        self._make_room(size + ABOUT)
        number = max((_number(name) for name in self._kept()), default=-1) + 1
        name = f"{round:04d}-{hashlib.sha256(client.encode()).hexdigest()[:16]}-{number}"
        digest = hashlib.sha256()
        about: dict[str, Any] = {"round": round, "ask": ask, "client": client, "reason": reason, "size": size}
        durable.write(self._folder / f"{name}.answer", _hashed(envelope, digest.update), name=False)
        about |= {"sha256": digest.hexdigest(), "time": self._clock()}
        durable.write(self._folder / f"{name}.json", [json.dumps(about, indent=2).encode() + b"\n"], name=False)
        return f"{name}.answer"

    def _make_room(self, size: int) -> None:
        """For one more of this size."""
        for half_written in self._folder.glob(".*.writing"):
            half_written.unlink(missing_ok=True)
        kept = self._kept()
        sizes = {name: sum(file.stat().st_size for file in self._files(name)) for name in kept}
        while kept and (len(kept) >= self._most or sum(sizes[name] for name in kept) + size > self._bytes):
            for file in self._files(kept.pop(0)):
                file.unlink(missing_ok=True)

    def _kept(self) -> list[str]:
        """Without suffix, the oldest first; also where a crash has left one half of the two."""
        names = {file.stem for file in self._folder.iterdir() if file.suffix in SUFFIXES and _number(file.stem) >= 0}
        return sorted(names, key=_number)

    def _files(self, name: str) -> list[Path]:
        return [file for suffix in SUFFIXES if (file := self._folder / f"{name}{suffix}").exists()]


def _number(name: str) -> int:
    """-1 of a file that is none of these."""
    last = name.rpartition("-")[2]
    return int(last) if last.isascii() and last.isdigit() else -1


def _hashed(envelope: Envelope, update: Callable[[bytes], object]) -> Iterator[bytes]:
    for piece in envelope.pieces():
        update(piece)
        yield piece
