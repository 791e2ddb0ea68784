"""The bundle as it lies on disk now: the operator may put a new one in its place while the client runs."""

from __future__ import annotations

import os
from pathlib import Path

from client.settings import Settings
from fedtune.errors import FedtuneError

FILES = ("client.toml", "network/ca.pem", "network/node.key", "trainer/client.key")


class Handed:
    """Read again when a file has changed. Raises KeysError at first; later, what cannot be read leaves the old one in use."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seen = self._stamps()
        self.bundle, self.problem = settings.handed(), ""

    def changed(self) -> bool:
        """Whether `bundle` or `problem` is another one now."""
        if (seen := self._stamps()) == self._seen:
            return False
        self._seen = seen
        try:
            self.bundle, self.problem = self._settings.handed(), ""
        except (FedtuneError, OSError) as error:
            self.problem = str(error)
        return True

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(self._settings.bundle / file) for file in FILES] if self._settings.bundle else []


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """None where the file is not there, or is of the other half."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size
