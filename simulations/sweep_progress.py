"""What a comparison shows while it goes on: a bar and the running cells, or, where nobody watches, a line for each cell."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from server import report_units as units
from simulations.sweep_cell import Outcome


class SweepProgress:
    """An Audience: `with SweepProgress(console, cells, skipped) as audience`."""

    def __init__(self, console: Console, cells: int, skipped: int) -> None:
        self._console, self._cells, self._ended = console, cells, skipped
        self._watched = console.is_terminal and not console.is_dumb_terminal
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not self._watched)
        self._all = self._bar.add_task("cells", total=cells, completed=skipped)
        self._running: dict[str, TaskID] = {}

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def doing(self, cell: str, what: str) -> None:
        if cell not in self._running:
            self._running[cell] = self._bar.add_task(cell, total=None)
        self._bar.update(self._running[cell], description=units.one_line(f"{cell}: {what}", 70))

    def ended(self, cell: str, outcome: Outcome) -> None:
        self._ended += 1
        if cell in self._running:
            self._bar.remove_task(self._running.pop(cell))
        self._bar.update(self._all, completed=self._ended)
        line = f"{self._ended} of {self._cells}: {cell}: {said(outcome)}"
        self._console.print(Text(line), soft_wrap=True)


def said(outcome: Outcome) -> str:
    """In a few words."""
    if outcome.figures is None:
        return f"{outcome.state}: {units.one_line(outcome.reason, 300)}"
    figures = outcome.figures
    return f"loss {units.loss(figures.loss)}, own files {units.loss(figures.own)}, {units.duration(figures.seconds)}"
