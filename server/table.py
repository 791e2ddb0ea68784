"""The live table of a run: a row a round, what is being done now, failures with their reasons, at last the comparison.

Where nobody can watch (a pipe, a log file) it prints one plain line a round instead.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live

from fedtune.job import Job
from server import report_figures as figures
from server import table_parts as parts
from server.records import Comparison, RoundRecord

# Lines around the rows: title, two of air, header, rule, what is being done, and two for a title that wraps.
FRAME = 8


class LiveTable:
    """A Watcher: `with LiveTable(Console()) as table: run(..., table)`."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console()
        self._watched = self._console.is_terminal and not self._console.is_dumb_terminal
        self._words = parts.Words(self._console)
        self._title = "run"
        self._rounds: list[RoundRecord] = []
        self._planned = 0
        self._now: parts.Doing | None = None
        self._comparison: Comparison | None = None
        self._live: Live | None = None

    def __enter__(self) -> LiveTable:
        if self._watched:
            # Transient: a live display cannot be taller than the screen, so the whole table is printed at the end.
            self._live = Live(get_renderable=self._screen, console=self._console, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._live is None:
            return
        self._live.stop()
        self._live = None
        if self._rounds:
            self._console.print(self._final())

    def started(self, job: Job, clients: Mapping[str, int]) -> None:
        self._planned = job.rounds.count
        self._title = self._words.title(job, clients)
        if not self._watched:
            self._plain(self._title)

    def doing(self, what: str, done: int, total: int) -> None:
        if self._now is None or self._now.what != what:
            self._now = parts.Doing(what, done, total, since=time.monotonic())
        self._now = parts.Doing(what, done, total, self._now.since)

    def round_ended(self, record: RoundRecord) -> None:
        self._rounds.append(record)
        self._now = None
        if not self._watched:
            change = figures.changes(self._rounds)[-1]
            self._plain(self._words.line(record, change, self._planned))

    def compared(self, comparison: Comparison) -> None:
        self._comparison = comparison
        self._now = None
        if not self._watched:
            for line in self._words.comparison_lines(comparison, self._rounds):
                self._plain(line)

    def _plain(self, line: str) -> None:
        # soft_wrap: a log file keeps one line a round, however narrow rich believes it to be
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _screen(self) -> RenderableType:
        """As much as fits: the newest rows, the newest failures and notes."""
        failures, notes = figures.failures(self._rounds), figures.notes(self._rounds)
        below = min(len(failures), parts.FAILURES_SHOWN + 1) + min(len(notes), parts.NOTES_SHOWN)
        room = max(3, self._console.height - FRAME - below)
        shown: list[RenderableType] = [self._words.table(self._title, self._rounds, room)]
        if failures:
            shown.append(self._words.failures(failures, parts.FAILURES_SHOWN))
        if notes:
            shown.append(self._words.notes(notes, parts.NOTES_SHOWN))
        return Group(*shown, self._words.doing(self._now, len(self._rounds), self._planned))

    def _final(self) -> RenderableType:
        failures = figures.failures(self._rounds)
        shown: list[RenderableType] = [self._words.table(self._title, self._rounds, len(self._rounds))]
        if failures:
            shown += [self._words.failures(failures, limit=20, wrap=True), ""]
        if notes := figures.notes(self._rounds):
            shown += [self._words.notes(notes, limit=20, wrap=True), ""]
        if self._comparison is not None:
            shown.append(self._words.comparison(self._comparison, self._rounds))
        return Group(*shown)
