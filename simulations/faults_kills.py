"""Faults of one kind: SIGKILL to a simulation, at every line of its journal and at every call that reaches the disk."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

from simulations.faults_lives import Moment, Prepare, Simulated, file_calls, killed_at_file_call, killed_at_line
from simulations.faults_seen import Seen

MOMENTS: tuple[Moment, ...] = ("before", "within", "after")
Trial = Callable[[], Seen | None]


def trials(simulated: Simulated, chance: random.Random, full: bool) -> list[Trial]:
    made = [
        *at_lines(simulated, chance),
        *at_file_calls(simulated, chance, 12),
        *twice(simulated, chance, 5),
        *resuming(simulated, chance, 5),
    ]
    return made if full else chance.sample(made, 2)


def at_lines(simulated: Simulated, chance: random.Random) -> Iterator[Trial]:
    """Before and after each, and in the midst of every third or so."""
    for number, entry in enumerate(simulated.whole.entries):
        for moment in MOMENTS if chance.random() < 1 / 3 else MOMENTS[::2]:
            where = f"{moment} line {number}, {entry.what}"
            words = {"before": "before", "within": "in the midst of", "after": "after"}[moment]
            yield _trial(simulated, f"SIGKILL {words} a line of the journal", [killed_at_line(number, moment)], where)


def at_file_calls(simulated: Simulated, chance: random.Random, times: int) -> Iterator[Trial]:
    calls = file_calls(lambda: _played(simulated))
    for number in sorted(chance.sample(range(calls), min(times, calls))):
        fault = "SIGKILL before a sync, rename, link or removal of a file"
        yield _trial(simulated, fault, [killed_at_file_call(number)], f"before call {number} of {calls}")


def twice(simulated: Simulated, chance: random.Random, times: int) -> Iterator[Trial]:
    """The second time as many lines later as chance will have it."""
    lines = len(simulated.whole.entries)
    for _ in range(times):
        first = chance.randrange(lines)
        second = chance.randrange(lines - first + 1)
        points: list[tuple[int, Moment]] = [(first, chance.choice(MOMENTS)), (second, chance.choice(MOMENTS))]
        kills = [killed_at_line(number, moment) for number, moment in points]
        yield _trial(simulated, "SIGKILL twice in one run", kills, str(points))


def resuming(simulated: Simulated, chance: random.Random, times: int) -> Iterator[Trial]:
    """In the first steps after it was taken up, again and again: line 0 of such a life says that it was."""
    lines = len(simulated.whole.entries)
    for _ in range(times):
        kills = [killed_at_line(chance.randrange(2, lines), "after")]
        calls = [chance.randrange(12) for _ in range(2)]
        again = [killed_at_file_call(calls[0]), killed_at_line(0, chance.choice(MOMENTS)), killed_at_file_call(calls[1])]
        yield _trial(simulated, "SIGKILL while it is taken up again, three times in a row", [*kills, *again], str(calls))


def _trial(simulated: Simulated, fault: str, kills: list[Prepare], where: str) -> Trial:
    return partial(simulated.seen, fault, kills, f"{simulated.name}: {where}")


def _played(simulated: Simulated) -> None:
    with simulated.run() as run:
        simulated.play(run)
