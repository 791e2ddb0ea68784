"""What one round cost and brought, client by client, while it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

from fedtune.envelope import Envelope
from fedtune.payload import Payload
from fedtune.strategy import Answer
from fedtune.wire.ledger import Cost, cost_of, plain_bytes
from server.records import ClientRecord
from server.report_units import one_line

LONGEST = 1e7  # seconds of work in one round that are believed: four months
LONGEST_REASON = 600  # characters
NO_REASON = "it gave no reason"


class Tally:
    """Collects the ClientRecords of one round. Every message counts, also one that is sent again or refused."""

    def __init__(self, clients: Iterable[str]) -> None:
        self.clients = {client: ClientRecord() for client in sorted(clients)}
        self.evaluated: dict[str, Mapping[str, float]] = {}

    def sent(self, client: str, envelope: Envelope, payload: Payload | None) -> None:
        """`payload` is what it says; without it, plain it would be as large as it is."""
        self._add(client, _down(cost_of(envelope, payload)))

    def came(self, client: str, carried: Envelope, envelope: Envelope | None = None) -> Cost:
        """What it says is not known yet: sent plain, it would be as large as it is. `envelope` is what was sealed in it."""
        cost = cost_of(carried)
        self.came_before(client, cost, envelope or carried)
        return cost

    def came_before(self, client: str, cost: Cost, envelope: Envelope) -> None:
        """Of an answer that lay in the spool when the round was taken up again."""
        self._add(client, _up(cost), _seconds(envelope.header.get("seconds")))

    def read(self, client: str, envelope: Envelope, payload: Payload) -> None:
        """Of an answer that came, and was admitted."""
        record = self.clients[client]
        larger = plain_bytes(envelope, payload) - envelope.size()
        self.clients[client] = replace(record, plain_up=record.plain_up + larger)

    def joins(self, client: str) -> None:
        """One that was not asked in this round, and whose late answer counts in it."""
        self.clients = dict(sorted({client: ClientRecord(), **self.clients}.items()))

    def again(self, client: str) -> None:
        """It has failed, and is asked once more."""
        self.clients[client] = replace(self.clients[client], failed=None)

    def failed(self, client: str, reason: str) -> None:
        told = one_line(reason, LONGEST_REASON) or NO_REASON
        self.clients[client] = replace(self.clients[client], failed=told)

    def able(self, clients: Iterable[str]) -> list[str]:
        """Those of them that have not failed in this round."""
        return [client for client in clients if client not in self.clients or self.clients[client].failed is None]

    def trained(self, client: str, metrics: Mapping[str, float]) -> None:
        record = self.clients[client]
        examples, loss = metrics.get("examples", 0.0), metrics.get("loss", record.train_loss)
        micro = metrics.get("micro_batch", record.micro_batch)
        self.clients[client] = replace(record, examples=record.examples + examples, train_loss=loss, micro_batch=micro)

    def held_out(self, client: str, answer: Answer) -> None:
        if answer.metrics:
            self.evaluated[client] = answer.metrics
            self.clients[client] = replace(self.clients[client], loss=answer.metrics.get("loss"))

    @property
    def reasons(self) -> dict[str, str]:
        """Of those who have failed."""
        return {client: record.failed for client, record in self.clients.items() if record.failed}

    def figures(self) -> dict[str, float]:
        """The clients' held-out figures in one, weighted by the predictions that each made; `loss` among them."""
        told = [self.evaluated[client] for client in sorted(self.evaluated)]  # a sum depends on the order in its last bit
        total = sum(metrics.get("tokens", 0.0) for metrics in told)
        if not total:
            return {}
        names = sorted({name for metrics in told for name in metrics} - {"tokens", "perplexity"})
        return {name: sum(metrics.get("tokens", 0.0) * metrics.get(name, 0.0) for metrics in told) / total for name in names}

    def _add(self, client: str, cost: Mapping[str, int], seconds: float = 0.0) -> None:
        record = self.clients[client]
        counted = {name: getattr(record, name) + count for name, count in cost.items()}
        self.clients[client] = replace(record, seconds=record.seconds + seconds, **counted)


def _down(cost: Cost) -> dict[str, int]:
    return {f"{field.name}_down": getattr(cost, field.name) for field in fields(cost)}


def _up(cost: Cost) -> dict[str, int]:
    return {f"{field.name}_up": getattr(cost, field.name) for field in fields(cost)}


def _seconds(told: object) -> float:
    """What the client says that its work took; nothing, where that is no time."""
    if isinstance(told, int | float) and 0 <= told <= LONGEST:
        return float(told)
    return 0.0
