"""What the report shows of each client: its panel among the small multiples and its row in the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server import report_charts as charts
from server import report_figures as figures
from server import report_units as units
from server.records import ClientRecord, RoundRecord

# Panels and rows of clients; a run with thousands of them must still open in a browser.
SHOWN = 48


@dataclass(frozen=True)
class ClientView:
    """One client: its panel among the small multiples and its row in the table."""

    name: str
    path: str
    crosses: list[charts.Dot]
    losses: list[float | None]  # one for each round of the run
    first: float | None
    last: float | None
    bytes_down: int
    bytes_up: int
    seconds: float
    examples: float
    failed: int
    rounds: int

    @property
    def change(self) -> float | None:
        return None if self.first is None or self.last is None else self.last - self.first


def clients_scale(rounds: Sequence[RoundRecord]) -> charts.Scale:
    """One scale for all panels, so that they can be compared."""
    losses = (units.known(c.loss) for r in rounds for c in r.clients.values())
    return charts.around([value for value in losses if value is not None])


def client_views(rounds: Sequence[RoundRecord]) -> list[ClientView]:
    scale, x = clients_scale(rounds), charts.Rounds.of(rounds)
    return [_client(name, rounds, scale, x) for name in figures.client_names(rounds)[:SHOWN]]


def _client(name: str, rounds: Sequence[RoundRecord], scale: charts.Scale, x: charts.Rounds) -> ClientView:
    records: dict[int, ClientRecord] = dict(figures.of_client(rounds, name))
    losses = {number: units.known(record.loss) for number, record in records.items()}
    found = [value for _, value in charts.measured(losses)]
    failed = {number: record.failed for number, record in records.items() if record.failed is not None}
    return ClientView(
        name=name,
        path=charts.line(x, scale, losses),
        crosses=[charts.Dot(x.x(number), 90, f"round {number}: {reason}") for number, reason in failed.items()],
        losses=[losses.get(r.round) for r in rounds],
        first=found[0] if found else None,
        last=found[-1] if found else None,
        bytes_down=sum(record.bytes_down for record in records.values()),
        bytes_up=sum(record.bytes_up for record in records.values()),
        seconds=sum(record.seconds for record in records.values()),
        examples=sum(record.examples for record in records.values()),
        failed=len(failed),
        rounds=len(records),
    )
