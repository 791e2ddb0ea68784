"""Flower's own SuperNode with shorter waits, and with a word to its supervisor of what the server answers.

    python -m client.supernode [--link FILE] [--mark FILE] <options of flower-supernode>

Stock, it looks for a message every 3 s and for the reply every 0.5 s. Here it looks again soon after a message, and more
seldom the longer none comes, up to the stock 3 s.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from client.fleet import lose_no_ask
from client.pulled import forget_asks_of_ended_runs
from client.replies import send_whole_replies
from client.told import Link
from client.waits import Waits
from fedtune.logs import configure

log = logging.getLogger("flwr")
LOOP = "flwr.supernode.start_client_internal"
IDLE, REPLY = 3, 0.5  # seconds: the two waits in Flower's loop, by which they are told apart
SHORTEST = 0.2  # seconds between two looks for a message: each asks the server
FOR_REPLY = 0.05  # seconds between two looks for the reply: only a dictionary in this process is read
PARTS = {
    "initial_backoff": 0.05,
    "backoff_cap": 0.5,
}  # seconds between looks for a part that is still on its way; stock 1 to 10
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
    if pull := getattr(loop, "pull_objects", None):
        loop.pull_objects = partial(pull, **PARTS)  # type: ignore[attr-defined]
    return True


class Watch(logging.Handler):
    """Hears httpx's line about each request to the server, and Flower's warnings, and writes down when they were."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._file, self._clock = file, clock
        self._link = self._written = Link()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if record.name == "httpx":
                self._heard(record)
            elif record.levelno >= logging.WARNING:
                self._link = replace(self._link, warned=self._clock())
            self._write()
        except (TypeError, ValueError, OSError):
            return  # another kind of line, or a full disk: the SuperNode works on

    def _heard(self, record: logging.LogRecord) -> None:
        _, url, _, answered, _ = record.args  # type: ignore[misc]
        now, status = self._clock(), int(str(answered))
        well = now if status < 400 else self._link.well
        self._link = replace(self._link, path=urlsplit(str(url)).path, status=status, at=now, well=well)

    def _write(self) -> None:
        new, old = self._link, self._written
        if new.status != old.status or new.at - old.at >= SELDOM or new.warned - old.warned >= SELDOM:
            new.write(self._file)
            self._written = new


def watch(file: Path) -> None:
    handler = Watch(file)
    requests = logging.getLogger("httpx")
    requests.setLevel(logging.INFO)
    requests.propagate = False  # otherwise each look would be a line in the log
    requests.addHandler(handler)
    log.addHandler(handler)


def main() -> None:
    configure("supernode", format=None)
    parser = argparse.ArgumentParser(prog="python -m client.supernode", add_help=False, allow_abbrev=False)
    parser.add_argument("--link", type=Path)
    parser.add_argument("--mark", type=Path)
    given, flower_s = parser.parse_known_args()
    sys.argv = ["flower-supernode", *flower_s]
    from flwr.supernode.cli.flower_supernode import flower_supernode

    loop = importlib.import_module(LOOP)
    shorten_waits(loop)
    send_whole_replies(loop)
    forget_asks_of_ended_runs(loop)
    lose_no_ask(given.mark)
    if given.link:
        watch(given.link)
    flower_supernode()
    log.error("Flower's loop has ended: the SuperNode is started again")
    logging.shutdown()
    os._exit(1)  # its other threads would keep the process for ever, and nobody would start another


if __name__ == "__main__":
    main()
