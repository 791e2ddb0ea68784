"""What clients remember: in this process or, with a directory, on disk too. An ask changes all of it or nothing.

    work = memories.work(client, ask)          # on a copy of the memory, as it was before this ask
    ...                                        # whatever fails here changes nothing
    memories.commit(work, answer)              # the memory after it, and the answer, in one step

Where the coordinator goes back, the memory does too: an ask whose name was answered before, in other words, finds the memory
from before that.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

from torch import Tensor

from client.kept import PART, Kept, Makers, answer_file, part_file, sweep
from client.manifest import NONE, NOTHING, Entry, Manifest, key_of
from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, Damaged, RunFolderError
from fedtune.memory import Memory, Part

log = logging.getLogger("fedtune.trainer")


@dataclass(frozen=True)
class Known:
    """A client's memory, and what is stored of it; without a directory, only the run that it belongs to."""

    memory: Memory
    manifest: Manifest


@dataclass(frozen=True)
class Work:
    """On one ask. Of `manifest` the entries end where this ask begins."""

    client: str
    ask: Envelope
    memory: Memory
    manifest: Manifest


class Memories:
    def __init__(
        self, directory: Path | None, schema: Callable[[str], str], *, shared: bool = False, answers: bool = False
    ) -> None:
        """`schema` of a client: a digest of what its memory fits to. `answers` are stored too, to be given again."""
        self._directory, self._schema, self._is_shared, self._answers = directory, schema, shared, answers
        self._known: dict[str, Known] = {}
        self._alike: MutableMapping[bytes, Tensor] = WeakValueDictionary()  # what several clients remember
        if directory and shared:
            sweep(directory)

    def of(self, client: str) -> Memory:
        return self._of(client).memory

    def reread(self, client: str) -> None:
        """What is on disk counts, whatever this process knows."""
        self._known.pop(client, None)

    def begin(self, client: str, run: str) -> None:
        """Of any other run nothing is kept; of this one, all. Nothing is written where nothing was."""
        if self._of(client).manifest.run not in ("", run):
            if kept := self._kept(client):
                kept.forget()
            self._known[client] = Known(Memory(alike=self._alike), Manifest())

    def work(self, client: str, ask: Envelope) -> Work:
        run, name, round = str(ask.header.get("run")), str(ask.header.get("ask")), int(ask.header["round"])
        known = self._of(client)
        if known.manifest.run not in ("", run):
            return Work(client, ask, Memory(alike=self._alike), Manifest(run))
        manifest, undone = replace(known.manifest, run=run), ask.header.get("undone", ())
        if manifest.lacks(name, round, undone):
            log.warning("ask %s: what this client remembered by then is not kept any more: it goes on without", name)
            began = replace(manifest, memory=NOTHING, entries=(), purged=NONE)
            return Work(client, ask, Memory(alike=self._alike), began)
        older = manifest.until(name, round, undone)
        if older == manifest.entries:
            return Work(client, ask, known.memory.copy(), manifest)
        log.info("ask %s came before, or later ones did: memory goes back to what it was then", name)
        memory, files = self._read(client, manifest.entries[len(older)].before)
        return Work(client, ask, memory, replace(manifest, memory=files, entries=older))

    def commit(self, work: Work, answer: Envelope) -> None:
        """Raises ClientFailed where there is no room for it; in a simulation RunFolderError, which ends the run."""
        kept, client = self._kept(work.client), work.client
        if kept is None:
            self._known[client] = Known(work.memory, work.manifest)
            return
        try:
            before, (after, makers) = self._of(client).manifest, self._after(work, answer)
            if self._answers or _differs(before, work.manifest, after):
                kept.commit(before, after, makers)
            self._known[client] = Known(work.memory, after)
        except BaseException as error:
            self.reread(client)
            if isinstance(error, OSError) and self._is_shared:  # no client's trouble: the disk is the run's own
                where = f"what clients remember cannot be kept in {self._directory}"
                raise RunFolderError(f"{where} ({error.strerror}): make room there, and go on with --resume") from error
            if isinstance(error, OSError):
                raise ClientFailed(f"its answer could not be stored ({error.strerror}): make room on its disk") from error
            raise

    def _after(self, work: Work, answer: Envelope) -> tuple[Manifest, Makers]:
        parts, header, before = work.memory.parts(), work.ask.header, work.manifest
        file = answer_file(answer.pieces()) if self._answers else ""
        makers = {part_file(part.name): partial(_data, part) for part in parts} | {file: answer.pieces}
        sizes = {part_file(part.name): part.size() for part in parts} | {file: answer.size()}
        entry = Entry(key_of(work.ask), str(header.get("ask")), int(header["round"]), before.memory, file)
        memory = part_file(parts[0].name), part_file(parts[1].name)
        schema, entries, sizes = self._schema(work.client), (*before.entries, entry), {**before.sizes, **sizes}
        return Manifest(before.run, schema, memory, entries, sizes, before.purged).bounded(), makers

    def _of(self, client: str) -> Known:
        if client not in self._known:
            self._known[client] = self._opened(client)
        return self._known[client]

    def _opened(self, client: str) -> Known:
        manifest = kept.read() if (kept := self._kept(client)) else Manifest()
        if manifest.run and manifest.schema != self._schema(client):
            log.warning("what this client remembers is of another model, method or adapter: it goes on without")
            manifest = Manifest()
        memory, files = self._read(client, manifest.memory)
        return Known(memory, replace(manifest, memory=files))

    def _read(self, client: str, files: tuple[str, str]) -> tuple[Memory, tuple[str, str]]:
        """An empty one where it is damaged: half a memory is none."""
        kept = self._kept(client)
        if kept is None or files == NOTHING:
            return Memory(alike=self._alike), NOTHING
        parts = [_part(kept, file) for file in files]
        if parts[0] and parts[1]:
            return Memory.of(parts[0], parts[1], self._alike), files
        return Memory(alike=self._alike), NOTHING

    def _kept(self, client: str) -> Kept | None:
        return Kept(self._directory, client, shared=self._is_shared) if self._directory else None


def schema_of(*told: object) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _differs(before: Manifest, began: Manifest, after: Manifest) -> bool:
    """Whether an ask has left anything to be stored."""
    return after.memory != before.memory or began.entries != before.entries or before.run not in ("", after.run)


def _part(kept: Kept, file: str) -> Part | None:
    """None where it is damaged."""
    try:
        return Part.read(file.removesuffix(PART), kept.data(file)) if file else Part("", {})
    except (OSError, Damaged) as error:
        log.warning("what this client remembers is damaged, it goes on without: %s: %s", kept.folder / file, error)
        kept.discard(file)
        return None


def _data(part: Part) -> list[bytes]:
    return [part.data()]
