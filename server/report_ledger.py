"""Where the bytes of a run went, as the report shows it: payload, header and transport, by direction, round and client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from server import report_figures as figures
from server.records import RoundRecord
from server.report_clients import SHOWN
from server.report_figures import Direction

STAGES = ("payload", "header", "transport")


@dataclass(frozen=True)
class Piece:
    """Of a bar: one stage."""

    series: int
    x: float  # per cent of the longest bar
    width: float
    stage: str
    bytes: int


@dataclass(frozen=True)
class Bar:
    direction: Direction
    pieces: list[Piece]


@dataclass(frozen=True)
class Entry:
    """One line of a table: a round or a client."""

    name: str
    down: Direction
    up: Direction
    ratio: float | None


@dataclass(frozen=True)
class Ledger:
    bars: list[Bar]
    ratio: float | None  # of training rounds
    compressed: bool
    by_round: list[Entry]
    by_client: list[Entry]
    hidden: int  # clients that are not shown


def ledger(rounds: Sequence[RoundRecord]) -> Ledger | None:
    """None of runs that did not count it."""
    directions = figures.directions(rounds)
    if not any(direction.plain for direction in directions):
        return None
    longest = max(sum(_stages(direction)) for direction in directions)
    names = figures.client_names(rounds)
    return Ledger(
        bars=[Bar(direction, _pieces(direction, longest)) for direction in directions],
        ratio=figures.ratio(rounds),
        compressed=figures.compressed(rounds),
        by_round=[_entry(str(record.round), [record]) for record in rounds],
        by_client=[_entry(name, _alone(rounds, name)) for name in names[:SHOWN]],
        hidden=max(0, len(names) - SHOWN),
    )


def _stages(direction: Direction) -> tuple[int, int, int]:
    return direction.payload, direction.header, direction.transport


def _pieces(direction: Direction, longest: int) -> list[Piece]:
    pieces, x = list[Piece](), 0.0
    for series, (stage, count) in enumerate(zip(STAGES, _stages(direction), strict=True)):
        width = 100 * count / longest if longest else 0.0
        pieces.append(Piece(series, round(x, 3), round(width, 3), stage, count))
        x += width
    return pieces


def _entry(name: str, rounds: Sequence[RoundRecord]) -> Entry:
    down, up = figures.directions(rounds)
    plain, sent = down.plain + up.plain, down.bytes + up.bytes
    return Entry(name, down, up, plain / sent if plain and sent else None)


def _alone(rounds: Sequence[RoundRecord], name: str) -> list[RoundRecord]:
    return [replace(record, clients={name: record.clients[name]}) for record in rounds if name in record.clients]
