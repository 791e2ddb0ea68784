"""How long to wait before looking again: short while there is work, and growing with the time that nothing came."""

from __future__ import annotations

import time
from collections.abc import Callable

SHARE = 0.1  # of the time that nothing came: what comes then is found late by a tenth of it at most


class Waits:
    """`busy()` when something came, `next()` for the seconds to wait when nothing did."""

    def __init__(self, shortest: float, longest: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._shortest, self._longest, self._clock = shortest, longest, clock
        self.busy()

    def busy(self) -> None:
        self._since = self._clock()

    def next(self) -> float:
        return min(max(SHARE * (self._clock() - self._since), self._shortest), self._longest)
