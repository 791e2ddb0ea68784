"""What the journal knows of a run that is taken up again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.journal import Entry

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """What has become of one ask."""

    answered: Mapping[str, Line] = field(default_factory=dict)  # client -> the line about its answer
    failed: Mapping[str, Line] = field(default_factory=dict)  # client -> the line with the reason
    closed: bool = False  # then all others are of no account

    def counts(self, client: str) -> bool:
        """Its answer was let in for good."""
        return self.closed and client in self.answered


NOTHING = Asked()


def asks_in(entries: Iterable[Entry]) -> dict[str, Asked]:
    """By ask id. Failures before the run was stopped are forgotten, unless their ask was closed: who failed may try again."""
    asks: dict[str, Asked] = {}
    for entry in entries:
        if entry.what == "stopped":
            asks = {name: ask if ask.closed else Asked(ask.answered) for name, ask in asks.items()}
        elif entry.what in ("answered", "failed", "closed"):
            asks[entry["ask"]] = _after(asks.get(entry["ask"], NOTHING), entry)
    return asks


def _after(ask: Asked, entry: Entry) -> Asked:
    about = entry.about
    if entry.what == "closed":
        answered = {client: ask.answered.get(client, {}) for client in about["answered"]}
        failed = {client: _settled(ask, client, line) for client, line in about["failed"].items()}
        return Asked(answered, failed, closed=True)
    if entry.what == "answered":
        failed = {client: line for client, line in ask.failed.items() if client != about["client"]}
        return Asked({**ask.answered, about["client"]: about}, failed, ask.closed)
    return Asked(ask.answered, {**ask.failed, about["client"]: about}, ask.closed)


def _settled(ask: Asked, client: str, line: Line) -> Line:
    """A failure when its ask was closed: one whose answer was let in, and left out at the end, has had the broadcast."""
    before = ask.failed.get(client, {})
    return {**before, **line, "has": client in ask.answered or bool(before.get("has"))}


def is_over(entries: Iterable[Entry]) -> bool:
    """Whether the last thing that happened was the run's end."""
    last = [entry.what for entry in entries if entry.what in ("ended", "round", "started")]
    return bool(last) and last[-1] == "ended"


def cohort_in(entries: Iterable[Entry], number: int) -> list[str]:
    """Of a round that has begun before; empty where it has not."""
    found = [entry["cohort"] for entry in entries if entry.what == "round" and entry["number"] == number]
    return list(found[-1]) if found else []


def refused_in(entries: Iterable[Entry], number: int) -> set[str]:
    """Clients of which the gate refused anything while this round was open, to whatever ask; a run that stopped forgives."""
    found, open = set[str](), -1
    for entry in entries:
        if entry.what == "round":
            open = entry["number"]
        elif entry.what == "stopped":
            found.clear()
        elif entry.what == "refused" and open == number:
            found.add(str(entry.about.get("client")))
    return found


def started_in(entries: Iterable[Entry]) -> Entry | None:
    return next((entry for entry in reversed(list(entries)) if entry.what == "started"), None)
