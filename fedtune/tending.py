"""Processes that are started again when they end, after waits that double: what a server or a client keeps alive."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.logs import as_text
from fedtune.processes import Processes, tail

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a process is started again
LAST = 16_000  # bytes of a log in which the reason of an end is looked for
PREFIX = re.compile(r"^(\d{4}-\d\d-\d\d [\d:,.]+ +)?((ERROR|CRITICAL) *:? *)?(python -m [\w.]+: error: )?")
SETTLED = 60.0  # seconds after which one that ran counts as well again


@dataclass
class Kept:
    """One process that should run."""

    command: Sequence[str]
    began: float = 0.0
    due: float = 0.0
    wait: float = FIRST_WAIT
    restarts: int = -1
    down: bool = True
    code: int | None = field(default=None)  # that it ended with last
    written: int = 0  # bytes of its log before it began: words of those that ran before it


class Tending:
    """`tend()` now and then: what has ended is started again when its wait is over."""

    def __init__(self, processes: Processes, clock: Callable[[], float] = time.monotonic) -> None:
        self._processes, self._clock = processes, clock
        self._kept: dict[str, Kept] = {}

    def keep(self, name: str, command: Sequence[str]) -> None:
        """Start it, and from then on keep it running."""
        self._kept[name] = Kept(command, due=self._clock())
        self.tend()

    def tend(self) -> list[str]:
        """Names of those that have ended since the last call."""
        ended = []
        for name, kept in self._kept.items():
            if not kept.down and (code := self._processes.ended(name)) is not None:
                self._fell(kept, code)
                ended.append(name)
            if kept.down and self._clock() >= kept.due:
                kept.written = _size(self._processes.log(name))
                self._processes.start(name, kept.command)
                kept.began, kept.down, kept.restarts = self._clock(), False, kept.restarts + 1
        return ended

    def _fell(self, kept: Kept, code: int) -> None:
        kept.code, kept.down = code, True
        kept.wait = FIRST_WAIT if self._clock() - kept.began >= SETTLED else kept.wait
        kept.due, kept.wait = self._clock() + kept.wait, min(2 * kept.wait, LONGEST_WAIT)

    def exit_code(self, name: str) -> int | None:
        """That it ended with last."""
        return self._kept[name].code

    def last_words(self, name: str) -> str:
        """Of the one that ended last, as its log has them; empty where it wrote none."""
        log = self._processes.log(name)
        return last_words(tail(log, min(LAST, max(_size(log) - self._kept[name].written, 0))))

    def how_it_ended(self, name: str) -> str:
        """Such as `ended with exit code 1: no such file (the log: …)`."""
        words, log = self.last_words(name), self._processes.log(name)
        return f"{ending(self._kept[name].code or 0)}{words and ': '}{words} (the log: {log})"

    def as_json(self) -> Mapping[str, Mapping[str, Any]]:
        """For `State.processes`."""
        pids = self._processes.pids()
        return {name: {"pid": pids.get(name), "restarts": max(kept.restarts, 0)} for name, kept in self._kept.items()}


def ending(code: int) -> str:
    """An exit code in words; a negative one is the signal that killed the process."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}{' (out of memory?)' if -code == signal.SIGKILL else ''}"


def last_words(text: str) -> str:
    """The line of a log, of text or of JSON, that tells why its process ended, without what the log puts before it."""
    told = "\n".join(map(as_text, text.split("\n")))
    lines = [line.rstrip() for line in told.splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if "ERROR" in line or "Exit Code" in line]
    if errors:
        found = lines[errors[-1] : errors[-1] + 2]  # Flower's exit codes have their words on the next line
        return PREFIX.sub("", ": ".join(found) if "Exit Code" in found[0] else found[0])
    others = [line for number, line in enumerate(lines) if not _beside_the_point(line, lines[number - 1] if number else "")]
    return PREFIX.sub("", others[-1].strip()) if others else ""


def _beside_the_point(line: str, before: str) -> bool:
    """What is told at all times, and the source line that Python prints after a warning."""
    return "INFO" in line or ("Warning:" in before and line.startswith("  "))


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
