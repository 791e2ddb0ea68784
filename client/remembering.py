"""The trainer's door for asks that came before: what was answered is answered as before, and no work is done for it.

A coordinator that was killed goes on with its run and asks the same again; so does a relay whose trainer was killed. An ask
over which this process was killed twice, as by the kernel when memory ran out, is not begun a third time; after a restart of
the machine, or half a day, it is, as that may have been a power cut.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from client.kept import Kept
from client.manifest import key_of
from client.transport import failure
from fedtune import durable
from fedtune.envelope import Envelope
from fedtune.errors import MALFORMED, FedtuneError

log = logging.getLogger("fedtune.trainer")
BEGUN = "begun.json"  # the ask at work, and how often it was begun; not there when nothing is
TRIES = 2
FORGOTTEN = 12 * 3600.0  # seconds after the last of them
BOOT = Path("/proc/sys/kernel/random/boot_id")  # another after each start of the machine; not there but on Linux


class Answers(Protocol):
    def answer(self, ask: Envelope) -> Envelope: ...


class Remembering:
    def __init__(self, inner: Answers, directory: Path, client: str, may_leave: Callable[[Envelope], None]) -> None:
        """`may_leave` raises Forbidden where the policy has become stricter than it was when the answer was made."""
        self._inner, self._may_leave = inner, may_leave
        self._kept, self._begun = Kept(directory, client), Begun(directory / BEGUN)

    def answer(self, ask: Envelope) -> Envelope:
        key = key_of(ask)
        entry = self._kept.read().find(str(ask.header.get("run")), key)
        if entry and (stored := self._kept.answer(entry.answer)):
            return self._again(ask, stored)
        if self._begun.times(key) >= TRIES:
            reason = f"the trainer died twice over this ask (out of memory?), it is given up; delete {BEGUN} there to try again"
            log.error("%s", reason)
            return failure(reason, ask.header)
        return self._worked(ask, key)

    def _worked(self, ask: Envelope, key: str) -> Envelope:
        try:
            self._begun.note(key)
        except OSError as error:
            return failure(f"nothing can be written on its disk ({error.strerror}): make room there", ask.header)
        try:
            return self._inner.answer(ask)
        finally:
            self._begun.clear()

    def _again(self, ask: Envelope, stored: Envelope) -> Envelope:
        try:
            self._may_leave(ask)
        except FedtuneError as error:
            log.warning("did not answer: %s", error)
            return failure(str(error), ask.header)
        log.info("ask %s came again: answered as before", ask.header.get("ask"))
        return stored


class Begun:
    """What a process that is killed leaves to the next one."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def times(self, key: str) -> int:
        """That this ask was begun and not ended, since the machine started, and not long ago."""
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            holds = stored["ask"] == key and stored["boot"] == _boot() and 0 <= time.time() - stored["at"] < FORGOTTEN
            return int(stored["times"]) if holds else 0
        except (OSError, *MALFORMED):
            return 0

    def note(self, key: str) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        about = {"ask": key, "times": self.times(key) + 1, "boot": _boot(), "at": time.time()}
        durable.write(self._file, [json.dumps(about).encode()])

    def clear(self) -> None:
        self._file.unlink(missing_ok=True)


def _boot() -> str:
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        return ""
