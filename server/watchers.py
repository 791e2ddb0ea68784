"""Watchers that show nothing by themselves: `Quiet` looks away, `Several` tells many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedtune.job import Job
from server.records import Comparison, RoundRecord, Watcher


class Quiet:
    """Does nothing."""

    def started(self, job: Job, clients: Mapping[str, int]) -> None: ...

    def doing(self, what: str, done: int, total: int) -> None: ...

    def round_ended(self, record: RoundRecord) -> None: ...

    def compared(self, comparison: Comparison) -> None: ...


class Several:
    """Tells each of its watchers, in their order."""

    def __init__(self, watchers: Iterable[Watcher]):
        self._watchers = tuple(watchers)

    def started(self, job: Job, clients: Mapping[str, int]) -> None:
        for watcher in self._watchers:
            watcher.started(job, clients)

    def doing(self, what: str, done: int, total: int) -> None:
        for watcher in self._watchers:
            watcher.doing(what, done, total)

    def round_ended(self, record: RoundRecord) -> None:
        for watcher in self._watchers:
            watcher.round_ended(record)

    def compared(self, comparison: Comparison) -> None:
        for watcher in self._watchers:
            watcher.compared(comparison)
