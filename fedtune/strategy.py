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
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fedtune.adapter import Adapter
from fedtune.changed_weights import ChangedWeights
from fedtune.errors import StrategyError
from fedtune.local_model import LocalModel, Movable, Penalty, Ranked, Ranks
from fedtune.memory import Memory
from fedtune.payload import Payload, Role, adapter_of, payload_of
from fedtune.recipe import Recipe

if TYPE_CHECKING:
    from fedtune.job import Job

__all__ = ["ADAPTER", "Answer", "Answers", "Ask", "ClientInfo", "Fold", "Limits", "LocalModel", "Movable", "Penalty", "Ranked"]
__all__ += ["Ranks", "ServerState", "Strategy", "require_one_rank"]

ADAPTER = (Role.A, Role.B, Role.DENSE)  # what an answer with a whole adapter holds


class Fold(StrEnum):
    """What a strategy needs of the answers."""

    SUM = "sum"  # only their weighted sum: secure aggregation may stand in between
    SEEN = "seen"  # only their weighted sum; where each can be seen, the error of the aggregation is measured
    EACH = "each"  # every single one: stacking, median


@dataclass(frozen=True)
class ClientInfo(Ranked):
    """What the server knows of a client before it asks: from the client's hello."""

    id: str
    examples: int
    rank: int
    scale: float = 1.0  # alpha/r or alpha/sqrt(r), as this client trains
    pinned: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    steps: int = 1  # local steps of a round
    lr: float = 1.0  # the job's train.lr
    sizes: Mapping[str, int] = field(default_factory=dict)  # of each tensor of the whole model, as the server knows it
    limits: Mapping[str, float] = field(
        default_factory=dict
    )  # what it can afford: `layers`, bytes of `memory`, `seconds` a step


@dataclass(frozen=True)
class Limits:
    """What a vector in an answer may hold; beyond it the answer is refused, with the reason."""

    longest: int
    least: float
    most: float
    shortest: int = 0
    integers: bool = False
    beside: str = ""  # another vector of the answer, which must be as long


@dataclass(frozen=True)
class Ask:
    """A question to the cohort: one payload for all, save the clients that `per_client` names.

    An answer that lacks a tensor of one of the roles in `wants`, for any module or whole parameter, or the scale of a
    module whose factor is wanted, is refused. So is one whose vectors are not those that `vectors` names, within their
    limits; where it names none, they are the strategy's own business. Where vectors are named and nothing is in `wants`, an
    answer that holds anything else is refused too. `tensors` names, for clients that send unlike things, the tensors that each
    must send, beside vectors; no other client is believed. On the client `payload` is what was sent to it.
    """

    kind: str
    payload: Payload = field(default_factory=Payload)
    fold: Fold = Fold.SUM
    per_client: Mapping[str, Payload] = field(default_factory=dict)
    wants: Collection[Role] = ()
    vectors: Mapping[str, Limits] = field(default_factory=dict)
    tensors: Mapping[str, Collection[str]] = field(default_factory=dict)

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
        time, as float32; and the same of the scalars. Of a tensor that not all have sent, over those who have:
        `sum_i p_i t_i / sum_i p_i`."""

    @property
    @abstractmethod
    def visible(self) -> bool:
        """Whether each answer can be read: always for `Fold.EACH`, never for `Fold.SUM`."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[str, float, Answer]]:
        """(client id, share, answer), read one at a time; only where `visible`."""


@dataclass(frozen=True)
class ServerState:
    """All that the server half remembers between rounds; a checkpoint is this and nothing else.

    `metrics` are figures of the last round that the method knows of itself (energy discarded, clients dropped); `selected` is,
    where clients train different layers, what each trained: client id -> layer -> share of its numbers.
    """

    adapter: Adapter
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    selected: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Strategy(ABC):
    """Both halves of one method. Subclasses are frozen dataclasses; their fields are the method's settings.

    The formulas `up` and `down` are Python and count the numbers that cross per client and round: d and k are a module's, r is
    the client's rank, R that of what has accumulated. What vanishes with them is summed over the modules. All else counts
    once: h, the size of all whole parameters; n, how many tensors may train; L, how many layers there are; t, the local steps;
    missed, the rounds since the client last took part; and the strategy's settings by their names. `chosen` is 1 for a module
    in a layer that the client trains, `changed` for one that has changed since it last took part; 0 for others.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""  # who, when and where
    up: ClassVar[str] = ""  # such as "r*(d + k) + h"
    down: ClassVar[str] = ""  # of the ask to train
    exact: ClassVar[bool] = False  # what is published is the exact weighted mean, whatever the clients do
    mixed_ranks: ClassVar[bool] = False  # clients may train different ranks
    truncates: ClassVar[bool] = False  # a client of small rank loses what lies beyond it, even if nobody learns anything
    secure_sum: ClassVar[bool] = False  # only sums are asked for: works where no single answer can be seen
    personal: ClassVar[bool] = False  # each client ends with a model of its own
    steady: ClassVar[bool] = True  # a number of an answer means the same in every round: what a codec loses can follow later

    exact_down: ClassVar[str] = ""  # why asks must arrive bit for bit; empty where a codec may lose a little
    exact_up: ClassVar[str] = ""  # and answers

    @property
    def trains_whole(self) -> bool:
        """Whether the model's own weights are trained, and a recipe of them, or themselves, published."""
        return False

    # server half: no I/O

    def check_job(self, job: Job) -> None:
        """Raise StrategyError, before anything is loaded, if the method cannot work with this job."""

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Raise StrategyError, before the first round, if the method cannot work with these clients."""
        if not self.mixed_ranks:
            require_one_rank(self, clients)

    def start(self, adapter: Adapter) -> ServerState:
        """The state before the first round, from the adapter that the job describes (B = 0)."""
        return ServerState(adapter)

    @abstractmethod
    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        """One round: yield asks, receive answers, return the next state."""

    def published(self, state: ServerState) -> Adapter | Recipe | ChangedWeights:
        """The adapter that users load, which stock PEFT must be able to read; of methods that train the model's own weights,
        its recipe, or the weights that have changed."""
        return state.adapter

    # client half

    @abstractmethod
    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        """Answer one of the asks that `round` yields."""

    # both halves

    def began(self, ask: Ask, client: Ranks) -> Payload:
        """What the tensors of a client's answer began as, as far as both sides know it: the wire sends differences to that. By
        default what `ask`, as it came, has by the same names; where a client starts from something else, say from what."""
        return ask.payload

    # the broadcast: how the published adapter travels down

    def broadcast(self, state: ServerState) -> Payload:
        published = self.published(state)
        assert isinstance(published, Adapter), (
            "a method that publishes no adapter says how its model travels: override broadcast"
        )
        return payload_of(published)

    def evaluation(self, state: ServerState, clients: Sequence[str]) -> Ask:
        """The ask to evaluate what is published, for these clients."""
        return Ask("evaluate", self.broadcast(state))

    def evaluated(self, state: ServerState, asked: Collection[str], answered: Collection[str]) -> ServerState:
        """The state after that ask: what it sent those have who answered; of the others nobody knows."""
        return state

    def received(self, payload: Payload) -> Adapter:
        """On the client: the adapter that `broadcast` sent."""
        return adapter_of(payload)

    def use(self, payload: Payload, local: LocalModel, memory: Memory) -> None:
        """On the client: load what it works with after `broadcast(state)`, the published adapter or one of its own."""
        adapter = self.received(payload)
        if all(rank <= local.rank_of(path) for path, rank in adapter.ranks.items()):
            local.load(adapter)
        else:
            local.load(Adapter(dense=adapter.dense), merged=Adapter(adapter.lora))

    def evaluate(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        """Answer `Ask("evaluate", broadcast(state))`, on this client's held-out examples."""
        self.use(ask.payload, local, memory)
        return Answer(metrics=local.evaluate())


def require_one_rank(strategy: Strategy, clients: Sequence[ClientInfo]) -> None:
    """For methods that average factors: all clients must train the same rank."""
    from fedtune.registry import able

    ranks = {client.id: client.rank for client in clients}
    if len(set(ranks.values())) > 1:
        raise StrategyError(
            f"strategy '{strategy.name}' needs one rank for all clients, given {ranks}; set the same rank for all, "
            f"or a strategy that takes mixed ranks ({', '.join(able('mixed_ranks'))}): --set strategy.name=flora"
        )
