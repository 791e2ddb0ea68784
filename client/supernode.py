"""Flower's own SuperNode with shorter waits, and with a word to its supervisor of what the server answers.

    python -m client.supernode [--link FILE] <options of flower-supernode>

Stock, it looks for a message every 3 s and for the reply every 0.5 s. Here it looks again soon after a message, and more
seldom the longer none comes, up to the stock 3 s.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from client.told import Link
from client.waits import Waits

log = logging.getLogger("flwr")
LOOP = "flwr.supernode.start_client_internal"
IDLE, REPLY = 3, 0.5  # seconds: the two waits in Flower's loop, by which they are told apart
SHORTEST = 0.2  # seconds between two looks for a message: each asks the server
FOR_REPLY = 0.05  # seconds between two looks for the reply: only a dictionary in this process is read
SELDOM = 1.0  # seconds between two writings of the link's file while nothing changes


class ShorterWaits:
    """Stands where the loop's module has `time`; it uses nothing of it but `sleep`."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic) -> None:
        self._sleep, self._waits = sleep, Waits(SHORTEST, IDLE, clock)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        if seconds == REPLY:
            self._waits.busy()
            self._sleep(FOR_REPLY)
        else:
            self._sleep(min(self._waits.next(), seconds))


def shorten_waits(loop: ModuleType) -> bool:
    """Whether the loop is as we know it; where Flower has changed it, it runs stock."""
    if getattr(loop, "time", None) is not time:
        log.warning("Flower's loop has changed: its own waits remain, up to 3.5 s more for each message")
        return False
    loop.time = ShorterWaits()  # type: ignore[attr-defined]
    return True


class Watch(logging.Handler):
    """Hears httpx's line about each request to the server, and writes the last one down."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._file, self._clock = file, clock
        self._last: Link | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _, url, _, status, _ = record.args  # type: ignore[misc]
            self._heard(urlsplit(str(url)).path, int(str(status)))
        except (TypeError, ValueError, OSError):
            return  # another line, or a full disk: the SuperNode works on

    def _heard(self, path: str, status: int) -> None:
        now, last = self._clock(), self._last
        well = now if status < 400 else last.well if last else 0.0
        link = Link(path, status, now, well)
        if last is None or last.status != status or now - last.at >= SELDOM:
            link.write(self._file)
            self._last = link


def watch(file: Path) -> None:
    file.unlink(missing_ok=True)
    requests = logging.getLogger("httpx")
    requests.setLevel(logging.INFO)
    requests.propagate = False  # otherwise each look would be a line in the log
    requests.addHandler(Watch(file))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m client.supernode", add_help=False, allow_abbrev=False)
    parser.add_argument("--link", type=Path)
    given, flower_s = parser.parse_known_args()
    sys.argv = ["flower-supernode", *flower_s]
    from flwr.supernode.cli.flower_supernode import flower_supernode

    shorten_waits(importlib.import_module(LOOP))
    if given.link:
        watch(given.link)
    flower_supernode()


if __name__ == "__main__":
    main()
