"""How often the ServerApp of a run is started again, and when that is given up; read from the run's journal alone.

A crash after the run came a step further counts as the first: a run of days may see many.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.errors import FedtuneError, RoundFailed
from server.journal import Entry, read
from server.past import is_over
from server.run_folder import JOURNAL

MOST = 5  # crashes without a step forward
FIRST_WAIT = 1.0  # seconds, and twice as many before each further one
STEPS = ("closed", "state")  # what the run has come further with: nobody is asked for it again


class Attempts:
    """`after(crash)` for each; `going_on` says from where."""

    def __init__(self, run: Path, rounds: int) -> None:
        self._run, self._rounds = run, rounds
        self.all = self._in_a_row = 0
        self._steps = _steps(entries_of(run))

    def after(self, crash: FedtuneError) -> float:
        """Seconds to wait before the next. Raises RoundFailed where there is none."""
        steps = _steps(entries_of(self._run))
        self._in_a_row = 1 if steps > self._steps else self._in_a_row + 1
        self._steps, self.all = max(steps, self._steps), self.all + 1
        if self._in_a_row >= MOST:
            raise RoundFailed(f"{crash}; given up, as that was the {MOST}th time without a step forward{resumable(self._run)}")
        return FIRST_WAIT * float(2 ** (self._in_a_row - 1))

    @property
    def going_on(self) -> str:
        """Such as `the run goes on from round 3`."""
        return where(entries_of(self._run), self._rounds)


def entries_of(run: Path) -> list[Entry]:
    return read(run / JOURNAL)[0]


def where(entries: Sequence[Entry], rounds: int) -> str:
    whole = _rounds(entries)
    if not entries:
        return "the run begins again"
    if not whole:
        return "the run goes on from its first round"
    return f"the run goes on from round {whole[-1] + 1}" if whole[-1] < rounds else "the run goes on after its last round"


def is_finished(run: Path, rounds: int) -> bool:
    """Whether all these rounds are played: with more of them than it had, a run that is over goes on."""
    entries = entries_of(run)
    return is_over(entries) and max(_rounds(entries), default=rounds) >= rounds


def resumable(run: Path, command: str = "the same command") -> str:
    """What to say at the end of an error."""
    return f"; the run in {run} goes on with {command} and --resume" if run.is_dir() else ""


def _rounds(entries: Sequence[Entry]) -> list[int]:
    return [int(entry["round"]) for entry in entries if entry.what == "state"]


def _steps(entries: Sequence[Entry]) -> int:
    return sum(entry.what in STEPS for entry in entries)
