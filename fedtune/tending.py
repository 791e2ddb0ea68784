"""Processes that are started again when they end, after waits that double: what a server or a client keeps alive."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedtune.processes import Processes

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a process is started again
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

    def as_json(self) -> Mapping[str, Mapping[str, Any]]:
        """For `State.processes`."""
        pids = self._processes.pids()
        return {name: {"pid": pids.get(name), "restarts": max(kept.restarts, 0)} for name, kept in self._kept.items()}
