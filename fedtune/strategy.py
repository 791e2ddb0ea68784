"""The one abstraction: a Strategy holds both halves of a federated method.

A method is a conversation. The server half (`round`) is a generator without I/O: it yields an `Ask`, gets back the
`Answers`, and returns the next `ServerState`. The client half (`answer`) sees one `Ask` and a `LocalModel`.

    def round(self, state, cohort):
        answers = yield Ask("train", payload_of(state.adapter))
        return replace(state, adapter=adapter_of(answers.mean(), like=state.adapter))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Protocol

from torch import Tensor

from fedtune.adapter import Adapter
from fedtune.errors import StrategyError
from fedtune.memory import Memory
from fedtune.payload import Payload, Role, adapter_of, payload_of


class Fold(StrEnum):
    """What a strategy needs of the answers."""

    SUM = "sum"  # only their weighted sum: secure aggregation may stand in between
    EACH = "each"  # every single one: stacking, median


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client before it asks: from the client's hello."""

    id: str
    examples: int
    rank: int
    scale: float = 1.0  # alpha/r or alpha/sqrt(r), as this client trains


@dataclass(frozen=True)
class Ask:
    """A question to the cohort: one payload for all, save the clients that `per_client` names.

    On the client `payload` is what was sent to it.
    """

    kind: str
    payload: Payload = field(default_factory=Payload)
    fold: Fold = Fold.SUM
    per_client: Mapping[str, Payload] = field(default_factory=dict)

    def payload_for(self, client: str) -> Payload:
        return self.per_client.get(client, self.payload)


@dataclass(frozen=True)
class Answer:
    """What a client sends back. `weight` is its say in the mean, usually its number of examples; `metrics` are plain
    figures of this client (loss, seconds)."""

    payload: Payload = field(default_factory=Payload)
    weight: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict)


class Answers(ABC):
    """The answers that came, in the order of client ids. At least one, and their weights sum to more than 0."""

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """Client id to its share: the weights of those who answered, summing to 1."""

    @abstractmethod
    def mean(self, roles: Collection[Role] | None = None) -> Payload:
        """`sum_i p_i payload_i` of the tensors with these roles (all, where None), folded in float64 one answer at a
        time, as float32; and the same of the scalars."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[str, float, Answer]]:
        """(client id, share, answer), read one at a time; only for an Ask with `Fold.EACH`."""


@dataclass(frozen=True)
class ServerState:
    """All that the server half remembers between rounds; a checkpoint is this and nothing else.

    `metrics` are figures of the last round that the method knows of itself (energy discarded, clients dropped).
    """

    adapter: Adapter
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class LocalModel(Protocol):
    """What the client half sees: one client's data and the resident base model, with an adapter attached to it."""

    examples: int  # training examples of this client
    rank: int  # of the adapter that this client trains
    scale: float  # alpha/r or alpha/sqrt(r) of that adapter

    def load(self, adapter: Adapter, merged: Adapter | None = None, frozen: Sequence[str] = ()) -> None:
        """Put `adapter` (of this client's rank) into the trainable slot and `merged` (of any rank) into the base.
        `frozen` names parts that do not train: "A", "B" or "dense"."""

    def adapter(self) -> Adapter:
        """A copy of what is in the trainable slot now."""

    def fit(self) -> Mapping[str, float]:
        """Train as the job says, from a fresh optimiser; returns `loss`, `steps` and `examples` seen."""

    def evaluate(self) -> Mapping[str, float]:
        """`loss` (nats per token) and what else the task knows, on this client's held-out examples; empty without any."""


class Strategy(ABC):
    """Both halves of one method. Subclasses are frozen dataclasses; their fields are the method's settings."""

    name: ClassVar[str]

    # server half: no I/O

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Raise StrategyError, before the first round, if the method cannot work with these clients."""

    def start(self, adapter: Adapter) -> ServerState:
        """The state before the first round, from the adapter that the job describes (B = 0)."""
        return ServerState(adapter)

    @abstractmethod
    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        """One round: yield asks, receive answers, return the next state."""

    def published(self, state: ServerState) -> Adapter:
        """The adapter that users load: stock PEFT must be able to read it."""
        return state.adapter

    # client half

    @abstractmethod
    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        """Answer one of the asks that `round` yields."""

    # the broadcast: how the published adapter travels down

    def broadcast(self, state: ServerState) -> Payload:
        return payload_of(self.published(state))

    def received(self, payload: Payload) -> Adapter:
        """On the client: the adapter that `broadcast` sent."""
        return adapter_of(payload)

    def evaluate(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        """Answer `Ask("evaluate", broadcast(state))`: the published adapter on this client's held-out examples."""
        adapter = self.received(ask.payload)
        if all(rank == local.rank for rank in adapter.ranks.values()):
            local.load(adapter)
        else:
            local.load(Adapter(dense=adapter.dense), merged=Adapter(adapter.lora))
        return Answer(metrics=local.evaluate())


def require_one_rank(strategy: Strategy, clients: Sequence[ClientInfo], instead: str = "flora") -> None:
    """For methods that average factors: all clients must train the same rank."""
    ranks = {client.id: client.rank for client in clients}
    if len(set(ranks.values())) > 1:
        raise StrategyError(
            f"strategy '{strategy.name}' averages factors and needs one rank for all clients, given {ranks}; "
            f"set the same rank for all, or type --set strategy.name={instead}"
        )
