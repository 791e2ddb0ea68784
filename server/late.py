"""Answers that come after their round: what was asked before and may be answered still, and what such an answer is made into.

A late answer holds the change that its client made to what it was sent. That change counts in the round that is open when it
comes, as if it had been made to what is sent now, with a smaller weight:

    payload + (began(open ask) - began(its ask)),   weight / (1 + rounds that it is late)^rounds.staleness

Only where answers are summed and hold nothing but weights: what else a method sends may mean something else by then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedtune.envelope import Envelope
from fedtune.payload import Role
from fedtune.strategy import Answer, Ask, ClientInfo, Fold, Strategy
from fedtune.wire import pack_answer
from fedtune.wire.ends import Pending, ServerEnd


@dataclass(frozen=True)
class Awaited:
    """What a client was asked, and has not answered yet."""

    client: str
    node: int
    round: int
    ask_id: str
    ask: Ask
    pending: Pending
    until: float  # by the clock: nobody delivers an answer after that

    @property
    def step(self) -> str:
        """Within its round."""
        return step_of(self.ask_id)

    @property
    def asked(self) -> tuple[Ask, Ask]:
        """As meant, and as it came."""
        return replace(self.ask, payload=self.ask.payload_for(self.client), per_client={}), self.pending.came


class UnderWay:
    """Over a whole run: the messages to which an answer may come after their round, of the last `rounds` of them."""

    def __init__(self, rounds: int = 1) -> None:
        self._rounds = rounds
        self._messages: dict[str, Awaited] = {}

    def add(self, messages: Mapping[str, Awaited]) -> None:
        self._messages |= messages

    def begins(self, round: int) -> None:
        """Who has not answered by now is awaited no more."""
        now, rounds = time.monotonic(), range(round - self._rounds, round)  # one that is played again asks anew
        self._messages = {id: one for id, one in self._messages.items() if one.until > now and one.round in rounds}

    @property
    def busy(self) -> dict[str, str]:
        """Client -> the ask that it is at work on."""
        return {one.client: one.ask_id for one in self._messages.values()}

    def like(self, ask: Ask, ask_id: str) -> dict[str, int]:
        """Messages whose answers may count in this ask -> their nodes."""
        same = (ask.kind, step_of(ask_id))
        return {id: one.node for id, one in self._messages.items() if (one.ask.kind, one.step) == same}

    def taken(self, message: str) -> Awaited | None:
        """It was answered: whatever else was sent of the same ask is of no account. None where that has happened before."""
        one = self._messages.get(message)
        if one is not None:
            same = (one.client, one.ask_id)
            self._messages = {id: other for id, other in self._messages.items() if (other.client, other.ask_id) != same}
        return one

    def lost(self, message: str) -> None:
        """Nothing comes of it; of another with the same ask perhaps."""
        self._messages.pop(message, None)

    def again(self, ask_id: str) -> None:
        """Who has not answered this one is asked it again, by another message."""
        self._messages = {id: one for id, one in self._messages.items() if one.ask_id != ask_id}


def step_of(ask_id: str) -> str:
    return ask_id.partition(".")[2]


def obstacle(ask: Ask, strategy: Strategy) -> str:
    """Why an answer to this ask cannot count in another round; empty where it can."""
    if ask.fold is Fold.EACH:
        return "it reads every single answer, and late ones only fit into a sum"
    if ask.per_client:
        return "it sends clients unlike things"
    if ask.vectors or ask.tensors or Role.VECTOR in ask.payload.roles.values():
        return "more than weights is sent, which means something in its own round alone"
    return "" if strategy.steady else "a number of an answer means something else in every round"


def discounted(weight: float, late: int, staleness: float) -> float:
    """`weight / (1 + late)^staleness`."""
    return weight / math.pow(1 + late, staleness)


def as_answer_to(
    now: Ask, answer: Answer, one: Awaited, client: ClientInfo, wire: ServerEnd, weight: float, header: Mapping[str, object]
) -> Envelope:
    """What came, as it would have come had it been asked now: plain, so that it can be read without its own ask."""
    if one.ask is now:
        return pack_answer(replace(answer, weight=weight), header)
    sent = replace(now, payload=now.payload_for(client.id), per_client={})
    moved = wire.rebased(answer, client, one.asked[0], sent)
    scalars = _scalars(answer.payload.scalars, one.asked[0].payload.scalars, sent.payload.scalars)
    return pack_answer(replace(moved, payload=replace(moved.payload, scalars=scalars), weight=weight), header)


def _scalars(given: Mapping[str, float], was: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """A scale that the client has sent back as it came is the one that is sent now: a mean has moved it by a rounding error."""
    return {name: now.get(name, value) if was.get(name) == value else value for name, value in given.items()}
