"""The journal of a run: what happened, in order, each line on the disk before what it says counts.

    8c1f0a3e {"what":"answered","ask":"7.0","client":"north","digest":"…"}

A line is the CRC of its text, a space, the text, a newline. A crash can leave the last line half written, a bad disk any of
them damaged: all before the first such line holds, the rest is cut off and happens again. Lines about answers wait for the
next other line, as a disk needs milliseconds to be sure; a power cut may take them, and then the clients are asked again.

    started    run, clients               they have introduced themselves
    round      number, cohort             drawn
    asked      ask, clients               an ask of the open round, before it goes out
    answered   ask, client, digest        the answer lies in the spool
    failed     ask, client, reason        it will not come in this round
    closed     ask, answered, failed      what counts is settled: the fold may begin
    folded     ask                        the strategy has them
    published  round                      its adapter is whole
    state      round                      so is the checkpoint; the spool may go
    ended                                 all rounds are played
    waiting, resumed, late, refused, sits_out, rolled_back, damaged   for who reads it
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedtune import durable
from server.journal_lines import fits

NAME = "journal.jsonl"
CHECK = 9  # the CRC and the space, before the text


@dataclass(frozen=True)
class Entry:
    what: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.about[name]


class Journal:
    """`write` returns when the line is on the disk with all before it; with `soon` it waits for the next. Whoever has it open
    must be the only one (server/lock.py)."""

    def __init__(
        self,
        file: Path,
        clock: Callable[[], float] = time.time,
        writing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Opens it at its sound end. Raises OSError, or what `writing` makes of it."""
        self._clock, self._writing, new = clock, writing, not file.exists()
        self.entries, sound = read(file)
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.cut = os.fstat(self._file).st_size - sound  # bytes that nobody could read any more
        if self.cut:
            os.ftruncate(self._file, sound)
            os.fsync(self._file)
        if new:
            durable.sync(file.parent)

    def write(self, what: str, soon: bool = False, **about: Any) -> None:
        """Where the disk is full, the line is not there, nor a part of it."""
        entry = Entry(what, about)
        with self._writing():
            self._append(line_of(entry, self._clock()), soon)
        self.entries.append(entry)

    def forget(self, round: int) -> None:
        """This round and those before are settled: nobody goes back to them in this process. The file keeps all."""
        begun = accumulate((entry["number"] if entry.what == "round" else -1 for entry in self.entries), max)
        told = zip(self.entries, begun, strict=True)
        self.entries = [entry for entry, number in told if number > round or entry.what == "started"]

    def _append(self, line: bytes, soon: bool) -> None:
        end = os.fstat(self._file).st_size
        try:
            _write_all(self._file, line)
            if not soon:
                os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, end)
            raise

    def close(self) -> None:
        os.close(self._file)


def line_of(entry: Entry, at: float) -> bytes:
    text = json.dumps({"what": entry.what, "at": round(at, 3), **entry.about}, separators=(",", ":")).encode()
    return b"%08x " % zlib.crc32(text) + text + b"\n"


def read(file: Path) -> tuple[list[Entry], int]:
    """The entries up to the first that is damaged, and how many bytes they take."""
    entries, sound = [], 0
    for line in _lines(file):
        if (entry := entry_of(line)) is None:
            break
        entries.append(entry)
        sound += len(line)
    return entries, sound


def entry_of(line: bytes) -> Entry | None:
    """None of a line that is not whole, or that nobody could go on by."""
    text = line[CHECK:-1]
    try:
        if not line.endswith(b"\n") or line[:CHECK] != b"%08x " % zlib.crc32(text):
            return None
        about = json.loads(text)
        what = str(about.pop("what"))
        return Entry(what, about) if fits(what, about) else None
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return None


def _lines(file: Path) -> Iterator[bytes]:
    if file.exists():
        with file.open("rb") as opened:
            yield from opened


def _write_all(file: int, data: bytes) -> None:
    """A disk that is nearly full takes a part without an error."""
    while data:
        data = data[os.write(file, data) :]
