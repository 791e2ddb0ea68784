"""Ctrl-C, SIGTERM and a terminal that is closed: each ends a command the same way, with time to clean up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Handler = Callable[[int, FrameType | None], None]


class Stopped(KeyboardInterrupt):
    """Somebody asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stop:
    """That somebody asked this process to end, and how."""

    def __init__(self) -> None:
        self.event, self.number = threading.Event(), 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.event.set()


@contextmanager
def stoppable() -> Iterator[None]:
    """The first of these signals raises Stopped here; those after it are not heard, so that what was started can be ended."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _heard():
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    with _handled_by(stop):
        yield


@contextmanager
def until_stopped() -> Iterator[Stop]:
    """They set the event: what goes on is finished, and nothing is left running."""
    stop = Stop()
    with _handled_by(stop):
        yield stop


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _heard()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _heard() -> list[int]:
    """Not those that who started us wants ignored, as nohup does."""
    return [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
