"""What is said of a run while it goes on: the live table, TensorBoard, the round and the reason of a wait in `state.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from fedtune.daemon import Said
from fedtune.job import Job
from server.following import Progress, Waiting
from server.records import RoundRecord, Watcher
from server.report_units import one_line
from server.run_folder import JOURNAL, METRICS
from server.table import LiveTable
from server.tensorboard import TensorBoard
from server.watchers import Quiet, Several

LONGEST = 1000  # characters of why a run waits

Tell = Callable[[str, bool], None]  # words, and whether they are told again


class Showing:
    """`look()` now and then shows what has come into the run folder."""

    def __init__(self, run: Path, rounds: Rounds, watcher: Watcher) -> None:
        self._rounds = rounds
        self._progress, self._waiting = Progress(run / METRICS, watcher), Waiting(run / JOURNAL, rounds.waits)

    def look(self) -> None:
        self._progress.show()
        self._waiting.look()

    def crashed(self, how: str) -> None:
        self._rounds.waits(how, again=True)


@contextmanager
def shown(run: Path, job: Job, clients: Sequence[str], said: Said, console: Console, tell: Tell) -> Iterator[Showing]:
    with LiveTable(console) as table, TensorBoard(run) as events:
        rounds = Rounds(said, table, tell)
        watcher = Several([table, events, rounds])
        watcher.started(job, dict.fromkeys(clients, 0))
        yield Showing(run, rounds, watcher)


class Rounds(Quiet):
    """Writes the round that was reached into the state, and has the table say how far the run is, or that it waits."""

    def __init__(self, said: Said, table: Watcher, tell: Tell) -> None:
        self._said, self._table, self._tell = said, table, tell
        self._planned, self._reached = 0, 0

    def started(self, job: Job, clients: Mapping[str, int]) -> None:
        self._planned = job.rounds.count
        self._table.doing("rounds", 0, self._planned)

    def round_ended(self, record: RoundRecord) -> None:
        self._reached = record.round
        self._said.say(run={**self._said.state.run, "round": record.round})
        self._table.doing("rounds", record.round, self._planned)

    def waits(self, why: str, again: bool = False) -> None:
        """Empty: no longer. What is told already is told `again` only if asked to."""
        why = one_line(why, LONGEST)
        if why == self._said.state.why and not again:
            return
        self._said.say(why=why)
        self._table.doing("waiting" if why else "rounds", self._reached, self._planned)
        if why:
            self._tell(why, True)
