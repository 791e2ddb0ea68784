"""Waiting for the clients that a job wants: which are there, which are missing, and when it is enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from fedtune.errors import RoundFailed, UserError, nearest
from fedtune.job import Job
from server import quorum
from server.enrolment import Standing
from server.report_units import duration, one_line

POLL = 0.5  # seconds
RETURN = 60.0  # seconds in which those who were there before can come back, before fewer will do
SHOWN = 8  # names in one line


@dataclass(frozen=True)
class Wanted:
    """`names`: these clients; else any `count` of them; else all that are registered. `least`: as many will do after RETURN."""

    names: tuple[str, ...] = ()
    count: int | None = None
    least: int | None = None

    def missing(self, clients: Mapping[str, Standing]) -> list[str]:
        """Who is waited for, by name; where any of them will do, all that are not there."""
        asked = self.names or [name for name, standing in clients.items() if standing != "revoked"]
        return [name for name in asked if clients.get(name) != "connected"]

    def there(self, clients: Mapping[str, Standing]) -> list[str]:
        return [name for name, standing in clients.items() if standing == "connected" and name in (self.names or clients)]

    def number(self, clients: Mapping[str, Standing]) -> int:
        return len(self.names) or self.count or sum(standing != "revoked" for standing in clients.values())

    def enough(self, clients: Mapping[str, Standing], after_a_while: bool = False) -> bool:
        number = self.least if after_a_while and self.least else self.number(clients)
        return 0 < number <= len(self.there(clients))


def wanted_of(job: Job, registered: Mapping[str, bool] | None) -> Wanted:
    """`registered`: name -> whether it is revoked; None where clients have no names before they come."""
    if registered is None:
        count = job.clients.count or len(job.clients.names or ())
        if not count:
            raise UserError("without keys nobody knows how many clients there are: type --set clients.count=N")
        return Wanted(count=count)
    welcome = [name for name, revoked in registered.items() if not revoked]
    wanted = Wanted(tuple(job.clients.names or ()), job.clients.count)
    for name in wanted.names:
        if registered.get(name, True):
            why = "is revoked" if name in registered else f"is not registered{nearest(name, welcome)}"
            raise UserError(f"the job wants the client '{name}', which {why}; `fedtune keys list` shows all")
    number = len(wanted.names) or wanted.count or 1
    if number > len(welcome):
        raise UserError(
            f"the job wants {number} clients and {len(welcome)} are registered; type `fedtune keys client NAME` for each, "
            "and hand its bundle over"
        )
    return wanted


def wanted_again(job: Job, registered: Mapping[str, bool] | None, started: Sequence[str]) -> Wanted:
    """By a run that goes on: all who began it and were not revoked since, or a quorum, as in any of its rounds."""
    buffered = job.rounds.mode == "buffered"
    least = quorum.quorum(job, (quorum.buffered if buffered else quorum.wanted)(job, len(started)))
    if registered is None:
        return Wanted(count=len(started), least=least)
    welcome = tuple(name for name in started if not registered.get(name, True))
    if len(welcome) < least:
        raise UserError(
            f"the run cannot go on: it needs {least} of its {len(started)} clients (rounds.quorum), and {len(welcome)} are "
            "registered and not revoked; `fedtune keys rotate client NAME` gives one new keys, `fedtune keys list` shows all"
        )
    return Wanted(welcome, least=least)


def wait_for(
    wanted: Wanted, look: Callable[[], Mapping[str, Standing] | None], console: Console, patience: float | None
) -> Mapping[str, Standing]:
    """The clients once they are enough. `look` returns None while nobody can say. Raises RoundFailed after `patience`."""
    began, clients = time.monotonic(), dict[str, Standing]()
    a_while = RETURN if patience is None else min(RETURN, patience)
    with Line(console) as line:
        while True:
            if (now := look()) is not None:
                clients = dict(now)
                if wanted.enough(clients, time.monotonic() - began >= a_while):
                    return clients
            waited = time.monotonic() - began
            line.say(state_of(wanted, clients), waited)
            if patience is not None and waited > patience:
                raise RoundFailed(f"waited {duration(patience)} (--wait): {state_of(wanted, clients)}")
            time.sleep(POLL)


def state_of(wanted: Wanted, clients: Mapping[str, Standing]) -> str:
    there, missing, number = wanted.there(clients), wanted.missing(clients), wanted.number(clients)
    words = [f"{len(there)} of {number or '?'} clients connected"]
    words += [f"here: {names(there)}"] if there else []
    if missing:
        lacking = number - len(there)
        words.append(f"any {lacking} of: {names(missing)}" if lacking < len(missing) else f"missing: {names(missing)}")
    return one_line("; ".join(words), 1000)


def names(given: list[str]) -> str:
    more = [f"and {len(given) - SHOWN} more"] if len(given) > SHOWN else []
    return ", ".join([*given[:SHOWN], *more])


class Line:
    """One line that changes; where nobody can watch, one whenever what it says has changed."""

    def __init__(self, console: Console) -> None:
        self._console, self._said = console, ""
        self._spinner = Spinner("dots")
        watched = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(self._spinner, console=console, transient=True) if watched else None

    def __enter__(self) -> Line:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, words: str, waited: float) -> None:
        if self._live is not None:
            self._spinner.update(text=Text(f"{words}  ({duration(waited)})", no_wrap=True, overflow="ellipsis"))
        elif words != self._said:
            self._console.print(f"waiting: {words}", markup=False, highlight=False, soft_wrap=True)
        self._said = words
