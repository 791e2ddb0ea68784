"""Serials of asks: the clock, and never less than before, over restarts of the coordinator and runs too.

A client takes no ask whose serial is not above the last that it heard, so a clock that was set back would shut everybody out.
The next minute's serials are taken, on the disk, before the first of them is used: a restart begins above all that were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedtune import durable

log = logging.getLogger("fedtune.serverapp")
NAME = "serial"  # in the folder of the keys, as clients know a coordinator by them
AHEAD = 60 * 10**9  # nanoseconds; clients refuse what is more than a day ahead of their own clock


class Serials:
    def __init__(self, file: Path | None = None, clock: Callable[[], int] = time.time_ns) -> None:
        """Without a file they last as long as the process."""
        self._file, self._clock = file, clock
        self._last = self._taken = _kept(file) if file else 0

    def next(self) -> int:
        self._last = max(self._last + 1, self._clock())
        if self._last > self._taken:
            self._taken = self._last + AHEAD
            self._keep()
        return self._last

    def _keep(self) -> None:
        """Where it cannot be written, the clock must do; as it does while nobody sets it back."""
        try:
            if self._file:
                durable.write(self._file, [str(self._taken).encode()])
        except OSError as error:
            log.warning("%s cannot be written (%s): set the clock of this machine back at no time", self._file, error.strerror)


def _kept(file: Path) -> int:
    with suppress(OSError, ValueError):
        return int(file.read_text(encoding="utf-8"))
    return 0
