"""The task that the relay has open, in a file: where the relay is killed, the next one takes it up."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedtune.errors import MALFORMED

log = logging.getLogger("fedtune.relay")
OPEN = "open-task.json"


@dataclass(frozen=True)
class Left:
    """A task that is not answered yet. Who has its token could answer in our place."""

    token: str
    came: str = ""  # hex: the message as the SuperNode gave it, without its content; empty before it came
    brought: int = 0  # times that it was taken to the trainer


class Unanswered:
    """`keep` from the moment that a task is ours, `forget` when it is answered; `left` is what has not been."""

    def __init__(self, file: Path | None = None) -> None:
        self._file, self._now = file, _read(file) if file else None

    def keep(self, left: Left) -> None:
        """Not synced: a power cut takes the SuperNode with it, and what its token was worth."""
        self._now = left
        if self._file:
            temporary = self._file.with_name(f".{self._file.name}.writing")
            try:
                temporary.unlink(missing_ok=True)
                with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                    json.dump(asdict(left), file)
                os.replace(temporary, self._file)
            except OSError as error:
                log.warning("%s cannot be written: %s", self._file, error)  # the ask is answered all the same

    def brought(self, came: bytes = b"") -> None:
        """To the trainer, once more."""
        if self._now:
            self.keep(replace(self._now, came=came.hex() or self._now.came, brought=self._now.brought + 1))

    def forget(self) -> None:
        self._now = None
        if self._file:
            self._file.unlink(missing_ok=True)

    def left(self) -> Left | None:
        return self._now


def _read(file: Path) -> Left | None:
    """None where there is none, or none that can be read."""
    try:
        kept = json.loads(file.read_bytes())
        left = Left(str(kept["token"]), str(kept["came"]), int(kept["brought"]))
        bytes.fromhex(left.came)
        return left
    except (OSError, *MALFORMED):
        return None
