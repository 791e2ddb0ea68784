"""What every case must keep to: a second, and some memory. What comes of it is counted by its kind."""

from __future__ import annotations

import faulthandler
import re
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

SECONDS = 1.0  # of one case, of the processor and by the clock
HUNG = 20  # seconds by the clock after which it is interrupted
DEAD = 120  # and after which, where that helps nothing, the process ends
GROWTH = 400  # MB that all cases of a process may add, at the highest
LONGEST = 88  # characters of a kind


class Broken(AssertionError):
    """Something that must hold does not."""


class Hung(BaseException):
    """Raised in the midst of a case, by the alarm; nothing there takes it for an error that it knows."""


@dataclass
class Seen:
    """Of some cases: by target how many, by target and kind of outcome how many, and what is wrong."""

    cases: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[int, str, str]] = field(default_factory=list)
    slowest: tuple[float, int, str] = (0.0, -1, "")  # seconds of the processor
    longest: tuple[float, int, str] = (0.0, -1, "")  # and by the clock
    began: float = 0.0  # MB of memory, before the first case
    most: float = 0.0  # at the highest
    ended: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "cases": dict(self.cases), "kinds": dict(self.kinds)}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Seen:
        wrong = [(number, target, text) for number, target, text in given.pop("wrong")]
        slowest, longest = tuple(given.pop("slowest")), tuple(given.pop("longest"))
        cases, kinds = Counter(given.pop("cases")), Counter(given.pop("kinds"))
        return cls(cases, kinds, wrong, slowest, longest, **given)

    def __add__(self, other: Seen) -> Seen:
        """Of two processes: of memory, those of the larger."""
        larger = max(self, other, key=lambda seen: seen.most)
        return Seen(
            self.cases + other.cases,
            self.kinds + other.kinds,
            [*self.wrong, *other.wrong],
            max(self.slowest, other.slowest),
            max(self.longest, other.longest),
            *(larger.began, larger.most, larger.ended),
        )


class Watch:
    """`try_case` for each. What is slow by the clock alone is tried again: another process may have had the processor."""

    def __init__(self) -> None:
        self.seen = Seen(began=now_used(), most=most_used())
        signal.signal(signal.SIGALRM, _hung)

    def try_case(self, number: int, target: str, case: Callable[[], str]) -> None:
        seen, before = self.seen, most_used()
        outcome, spent, passed = self._timed(number, target, case)
        if passed > SECONDS >= spent:
            outcome, spent, passed = self._timed(number, target, case)
        seen.cases[target] += 1
        seen.kinds[f"{target}  {kind_of(outcome)}"] += 1
        seen.slowest, seen.longest = max(seen.slowest, (spent, number, target)), max(seen.longest, (passed, number, target))
        if max(spent, passed) > SECONDS:
            self._wrong(number, target, f"{spent:.2f} s of the processor, {passed:.2f} s by the clock")
        seen.most, seen.ended = most_used(), now_used()
        if seen.most > before and seen.most - seen.began > GROWTH:
            self._wrong(number, target, f"memory has grown from {seen.began:.0f} to {seen.most:.0f} MB")

    def _timed(self, number: int, target: str, case: Callable[[], str]) -> tuple[str, float, float]:
        began, spent = time.monotonic(), time.process_time()
        try:
            with _alarm():
                outcome = case()
        except (Exception, Hung) as error:
            outcome = f"WRONG: {type(error).__name__}: {error}"
            self._wrong(number, target, f"{outcome}\n{''.join(traceback.format_exception(error)[-8:])}")
        return outcome, time.process_time() - spent, time.monotonic() - began

    def _wrong(self, number: int, target: str, text: str) -> None:
        self.seen.wrong.append((number, target, text.encode(errors="replace").decode()))


def kind_of(outcome: str) -> str:
    """Without what names one client, number or tensor."""
    line = "".join(letter if letter.isprintable() else " " for letter in (outcome.splitlines() or [""])[0])
    line = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]", "'…'", line)
    line = re.sub(r"[-\w.,+]*\d[-\w.,+]*", "#", line)
    return " ".join(line.split())[:LONGEST]


def now_used() -> float:
    """MB of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def most_used() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@contextmanager
def _alarm() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, HUNG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def _hung(number: int, frame: FrameType | None) -> None:
    """What does not come back to Python even then is ended with the process."""
    faulthandler.dump_traceback_later(DEAD, exit=True, file=sys.__stderr__)
    raise Hung(f"more than {HUNG} s")
