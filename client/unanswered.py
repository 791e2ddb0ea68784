"""The task that the relay has open, in a file: where the relay is killed, the next one says so, and nobody waits in vain."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from fedtune.errors import KeysError
from fedtune.security.keyfiles import write_private

log = logging.getLogger("fedtune.relay")
OPEN = "open-task.json"


class Unanswered:
    """`keep` when a message has come, `forget` when it was answered, `left` by a relay that ended between the two."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file

    def keep(self, token: str, came: bytes) -> None:
        """`came`: the message as Flower writes it, without its content. Who has the token could answer in our place."""
        if self._file:
            try:
                write_private(self._file, json.dumps({"token": token, "came": came.hex()}).encode())
            except KeysError as error:
                log.warning("%s", error)  # a full disk: the ask is answered all the same

    def forget(self) -> None:
        if self._file:
            self._file.unlink(missing_ok=True)

    def left(self) -> tuple[str, bytes] | None:
        try:
            kept = json.loads(self._file.read_bytes()) if self._file else None
            return (str(kept["token"]), bytes.fromhex(kept["came"])) if kept else None
        except (OSError, ValueError, TypeError, KeyError):
            return None
