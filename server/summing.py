"""Whether a round of a method is one sum of weights: then answers of other rounds fit into it, as buffered rounds need."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress

from fedtune.adapter import Adapter
from fedtune.errors import FedtuneError, JobError, StrategyError
from fedtune.job import Job
from fedtune.payload import Payload, Role, joined, payload_of
from fedtune.registry import known, strategy_from
from fedtune.strategy import Answer, Answers, Ask, ClientInfo, Strategy
from server import quorum
from server.late import obstacle

UNREADY = (FedtuneError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def require_buffered(job: Job, strategy: Strategy, adapter: Adapter, clients: Sequence[ClientInfo]) -> None:
    """Raises StrategyError where the method needs all of its cohort, JobError where a buffer can never be full."""
    if job.rounds.mode != "buffered":
        return
    at_work = quorum.wanted(job, len(clients))
    if quorum.buffered(job, len(clients)) > at_work:
        raise JobError(
            f"rounds.buffer = {job.rounds.buffer}, and {at_work} clients work at the same time: a buffer holds one answer of "
            f"each; type --set rounds.buffer={max(at_work // 2, 1)}"
        )
    if why := why_not(strategy, adapter, clients):
        able = ", ".join(able_in(adapter, clients))
        raise StrategyError(f"strategy '{strategy.name}' cannot be buffered: {why}; these can: {able}")


def why_not(strategy: Strategy, adapter: Adapter, clients: Sequence[ClientInfo]) -> str:
    """Empty where it can; found out by playing a round whose answers are what was sent."""
    conversation = strategy.round(strategy.start(adapter), clients)
    ask = next(conversation)
    if why := obstacle(ask, strategy):
        return why
    try:
        conversation.send(_Echo(ask, adapter, clients))
        return "its rounds take several asks"
    except StopIteration as end:
        later = next(strategy.round(end.value, clients))
        return "" if (later.kind, later.wants) == (ask.kind, ask.wants) else "it asks for other things in other rounds"
    except UNREADY:  # an echo is no answer to everything
        return ""


def able_in(adapter: Adapter, clients: Sequence[ClientInfo]) -> list[str]:
    able = []
    for name in known():
        with suppress(*UNREADY, ImportError):
            if not why_not(strategy_from(name, {}), adapter, clients):
                able.append(name)
    return able


class _Echo(Answers):
    """As if every client had sent back what it was sent, and of what is wanted beside that the adapter's; unseen."""

    def __init__(self, ask: Ask, adapter: Adapter, clients: Sequence[ClientInfo]) -> None:
        self._ask, self._adapter, self._clients = ask, adapter, clients

    @property
    def weights(self) -> Mapping[str, float]:
        return {client.id: 1 / len(self._clients) for client in self._clients}

    def mean(self, roles: Collection[Role] | None = None) -> Payload:
        wanted = set(self._ask.wants or Role) & set(roles or Role)
        both = joined(payload_of(self._adapter), self._ask.payload)
        tensors = {name: tensor for name, tensor in both.tensors.items() if both.roles[name] in wanted}
        return Payload(tensors, {name: both.roles[name] for name in tensors}, both.scalars)

    @property
    def visible(self) -> bool:
        return False

    def __iter__(self) -> Iterator[tuple[str, float, Answer]]:
        raise TypeError("a sum is not read answer by answer")
