"""What the records say in sum: gain over the base, bytes per client and round, who stands where in the comparison."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from server.records import ClientRecord, Comparison, RoundRecord
from server.report_units import known

Kind = Literal["base", "alone", "federated", "central"]


@dataclass(frozen=True)
class Standing:
    """One line of the comparison."""

    name: str
    loss: float
    kind: Kind
    note: str = ""  # which client it is, or that it trained alone


def summary(comparison: Comparison) -> list[Standing]:
    """Base, the clients alone in three lines, federated, central."""
    alone = comparison.alone
    middle: list[Standing] = []
    if alone:
        best, worst = min(alone, key=lambda c: alone[c]), max(alone, key=lambda c: alone[c])
        middle = [
            Standing("alone, mean", sum(alone.values()) / len(alone), "alone"),
            Standing("alone, best", alone[best], "alone", best),
            Standing("alone, worst", alone[worst], "alone", worst),
        ]
    return _between_base_and_central(comparison, middle)


def everybody(comparison: Comparison) -> list[Standing]:
    """Base, each client alone from worst to best, federated, central."""
    by_loss = sorted(comparison.alone.items(), key=lambda item: (-item[1], item[0]))
    return _between_base_and_central(comparison, [Standing(client, loss, "alone", "alone") for client, loss in by_loss])


def _between_base_and_central(comparison: Comparison, alone: list[Standing]) -> list[Standing]:
    return [
        Standing("base model", comparison.base, "base"),
        *alone,
        Standing("federated", comparison.federated, "federated"),
        Standing("central", comparison.central, "central"),
    ]


def bytes_per_client(rounds: Iterable[RoundRecord]) -> tuple[float, float] | None:
    """Mean bytes (down, up) of a client that answered in a training round; round 0 only evaluates."""
    answers = [c for r in rounds if r.round > 0 for c in r.clients.values() if c.failed is None]
    if not answers:
        return None
    return sum(c.bytes_down for c in answers) / len(answers), sum(c.bytes_up for c in answers) / len(answers)


@dataclass(frozen=True)
class Direction:
    """All messages of a run that went one way."""

    name: Literal["down", "up"]
    payload: int
    header: int
    transport: int  # estimated
    plain: int  # payload and header, were every number sent as it is

    @property
    def bytes(self) -> int:
        return self.payload + self.header

    @property
    def ratio(self) -> float | None:
        """To plain; None where that was not counted."""
        return self.plain / self.bytes if self.plain and self.bytes else None


def directions(rounds: Iterable[RoundRecord]) -> tuple[Direction, Direction]:
    """Down and up."""
    clients = [client for record in rounds for client in record.clients.values()]
    return _direction("down", clients), _direction("up", clients)


def _direction(way: Literal["down", "up"], clients: Sequence[ClientRecord]) -> Direction:
    names = ("bytes", "header", "transport", "plain")
    sent, header, transport, plain = (sum(getattr(client, f"{name}_{way}") for client in clients) for name in names)
    return Direction(way, sent - header, header, transport, plain)


def ratio(rounds: Iterable[RoundRecord]) -> float | None:
    """Of training rounds, both directions: how many times as large they were, were every number sent as it is."""
    down, up = directions(record for record in rounds if record.round > 0)
    return (down.plain + up.plain) / (down.bytes + up.bytes) if down.plain + up.plain and down.bytes + up.bytes else None


def compressed(rounds: Iterable[RoundRecord]) -> bool:
    """Whether any round is not what it were with plain numbers, as far as a ratio shows it."""
    return any(f"{times:.1f}" != "1.0" for times in (record.ratio for record in rounds) if times is not None)


def first_and_last(losses: Iterable[float | None]) -> tuple[float, float] | None:
    """Of those that were measured; None with fewer than two."""
    measured = [value for value in map(known, losses) if value is not None]
    return (measured[0], measured[-1]) if len(measured) > 1 else None


def last(losses: Iterable[float | None]) -> float | None:
    measured = [value for value in map(known, losses) if value is not None]
    return measured[-1] if measured else None


def changes(rounds: Sequence[RoundRecord]) -> list[float | None]:
    """The change of the loss to the round before that was measured; None where there is none."""
    before: float | None = None
    found: list[float | None] = []
    for record in rounds:
        now = known(record.loss)
        found.append(None if now is None or before is None else now - before)
        before = before if now is None else now
    return found


def failures(rounds: Iterable[RoundRecord]) -> list[tuple[int, str, str]]:
    """(round, client, reason), in order."""
    return [(r.round, name, c.failed) for r in rounds for name, c in r.clients.items() if c.failed is not None]


def notes(rounds: Iterable[RoundRecord]) -> list[tuple[int, str]]:
    """(round, what was out of the ordinary), in order."""
    return [(record.round, note) for record in rounds for note in record.notes]


def of_client(rounds: Iterable[RoundRecord], name: str) -> list[tuple[int, ClientRecord]]:
    return [(r.round, r.clients[name]) for r in rounds if name in r.clients]


def client_names(rounds: Iterable[RoundRecord]) -> list[str]:
    return in_order({name for record in rounds for name in record.clients})


def in_order(names: Iterable[str]) -> list[str]:
    """By name, and client-10 after client-9."""
    return sorted(names, key=_natural)


def _natural(name: str) -> list[tuple[str, int]]:
    parts = re.split(r"(\d+)", name)  # text and digits in turn
    return [(text, int(digits or 0)) for text, digits in zip_longest(parts[::2], parts[1::2])]
