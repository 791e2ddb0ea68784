"""What is reported of a round: the lines of `metrics.jsonl`, the rows of the live table, the points of the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from fedtune.job import Job


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """One client in one round, of training and evaluation both. Bytes are tensors and header; of what is not known of older
    runs, 0."""

    bytes_down: int = 0  # coordinator to client
    bytes_up: int = 0
    seconds: float = 0.0  # of work, as the client measured it
    examples: float = 0.0  # trained on in this round
    train_loss: float | None = None  # mean over its local steps
    loss: float | None = None  # of the published adapter, as it came, on its held-out examples; nats per token
    failed: str | None = None  # the reason, where it did not answer or was refused
    header_down: int = 0  # of these bytes: all that is no tensor
    header_up: int = 0
    transport_down: int = 0  # estimated, beside them: what moves a message over a network (fedtune/wire/transport.py)
    transport_up: int = 0
    plain_down: int = 0  # the bytes, were every number sent as it is
    plain_up: int = 0
    micro_batch: float | None = None  # examples at a time, where memory was too short for as many as the job says


@dataclass(frozen=True)
class RoundRecord:
    """One round; round 0 is the base model before any training."""

    round: int
    loss: float | None = None  # held-out loss over all clients that evaluated, weighted by tokens
    metrics: Mapping[str, float] = field(default_factory=dict)  # perplexity, token_accuracy, and the method's own
    seconds: float = 0.0
    clients: Mapping[str, ClientRecord] = field(default_factory=dict)
    selected: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # client -> layer -> share of it that trained
    layer_errors: Mapping[str, float] = field(default_factory=dict)  # aggregation error of each module, by its path
    notes: tuple[str, ...] = ()  # what was out of the ordinary: taken up again, rolled back, late answers

    @property
    def bytes_down(self) -> int:
        return sum(client.bytes_down for client in self.clients.values())

    @property
    def bytes_up(self) -> int:
        return sum(client.bytes_up for client in self.clients.values())

    @property
    def ratio(self) -> float | None:
        """How many times as large both directions were, were every number sent as it is; None of runs that did not count it."""
        plain = sum(client.plain_down + client.plain_up for client in self.clients.values())
        sent = self.bytes_down + self.bytes_up
        return plain / sent if plain and sent else None

    @property
    def answered(self) -> int:
        return sum(client.failed is None for client in self.clients.values())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> RoundRecord:
        """Raises ValueError, TypeError, LookupError or AttributeError where it is none."""
        clients = {id: ClientRecord(**client) for id, client in given["clients"].items()}
        record = cls(**{**given, "clients": clients, "notes": tuple(given.get("notes", ()))})
        if not record._is_sound:
            raise ValueError("a round came whose figures are no numbers")
        return record

    @property
    def _is_sound(self) -> bool:
        """Whoever reads it adds up, compares, and sorts."""
        figures = [self.loss, self.seconds, *self.metrics.values(), *self.layer_errors.values()]
        figures += [share for layers in self.selected.values() for share in layers.values()]
        told = [asdict(client) for client in self.clients.values()]
        figures += [value for client in told for name, value in client.items() if name != "failed"]
        words = [*self.notes, *(client["failed"] for client in told if client["failed"] is not None)]
        return type(self.round) is int and all(map(_is_figure, figures)) and all(isinstance(word, str) for word in words)


def _is_figure(value: object) -> bool:
    return value is None or type(value) in (int, float)


@dataclass(frozen=True)
class Comparison:
    """Held-out losses on everybody's held-out examples, weighted by tokens, after the same number of examples."""

    base: float  # the base model, untrained
    alone: Mapping[str, float]  # client id -> its own adapter, trained on its own examples, on everybody's
    federated: float
    central: float  # one adapter, trained on the pooled examples
    seconds: Mapping[str, float] = field(default_factory=dict)  # base, alone, federated, central

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Watcher(Protocol):
    """Somebody who looks at a run while it goes on."""

    def started(self, job: Job, clients: Mapping[str, int]) -> None:
        """The clients are known: id -> training examples."""

    def doing(self, what: str, done: int, total: int) -> None:
        """Within a round or a comparison: 'training', 3 of 8 clients."""

    def round_ended(self, record: RoundRecord) -> None: ...

    def compared(self, comparison: Comparison) -> None: ...
