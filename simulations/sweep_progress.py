"""What a comparison shows while it goes on: a bar and the running cells, or, where nobody watches, a line for each cell."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from server import report_units as units
from simulations.sweep_cell import Outcome


class SweepProgress:
    """An Audience: `with SweepProgress(console, cells, skipped) as audience`."""

    def __init__(self, console: Console, cells: int, skipped: int) -> None:
        self._console, self._cells, self._ended = console, cells, skipped
        self._bar = Progress(TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
        self._all = self._bar.add_task("", total=cells, completed=skipped)
        self._running = Progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), console=console)
        self._tasks: dict[str, TaskID] = {}
        watched = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(Group(self._bar, self._running), console=console, transient=True) if watched else None

    def __enter__(self) -> SweepProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def doing(self, cell: str, what: str) -> None:
        if cell not in self._tasks:
            self._tasks[cell] = self._running.add_task("", total=None)
        self._running.update(self._tasks[cell], description=units.one_line(f"{cell}: {what}", 100))

    def ended(self, cell: str, outcome: Outcome) -> None:
        self._ended += 1
        if cell in self._tasks:
            self._running.remove_task(self._tasks.pop(cell))
        self._bar.update(self._all, completed=self._ended)
        # soft_wrap: a log file keeps one line a cell, however narrow rich believes it to be
        self._console.print(Text(f"{self._ended} of {self._cells}: {cell}: {said(outcome)}"), soft_wrap=True)


def said(outcome: Outcome) -> str:
    """In a few words."""
    if outcome.figures is None:
        return f"{outcome.state}: {units.one_line(outcome.reason, 300)}"
    figures = outcome.figures
    return f"loss {units.loss(figures.loss)}, own files {units.loss(figures.own)}, {units.duration(figures.seconds)}"
