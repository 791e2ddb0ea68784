"""What a method would send: its own conversation, played with clients that know shapes only, and every message counted.

No model and no data are loaded. So a plug-in is counted as the built-ins are, and no formula has to be believed. Messages go
through the codecs of the wire; what clients train moves by normal numbers, so that coded sizes are those of such updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fedtune.base import Blueprint, pinned
from fedtune.folding import FoldedAnswers
from fedtune.job import Job
from fedtune.job_sections import Wire as WireSettings
from fedtune.local_model import LocalModel
from fedtune.memory import Memory
from fedtune.payload import Payload, payload_of
from fedtune.seeds import generator
from fedtune.strategy import Answer, Ask, ClientInfo, ServerState, Strategy
from fedtune.wire.ends import ClientEnd, ServerEnd
from fedtune.wire.ledger import Cost, cost_of
from fedtune.wire.presets import Wire, wire_of
from simulations.stand import Stand

ROUNDS = 3  # until ranks that accumulate over rounds have grown, and everybody has been met
CLIENTS = 8  # where the job does not say how many
EXAMPLES = 100  # of each client
MOST = 2**62  # numbers that a message may hold
EVALUATED = {"loss": 3.0123456789012345, "token_accuracy": 0.41234567890123456, "perplexity": 20.123456789012345, "tokens": 1e4}
NOTHING = Cost()

Half = Callable[[Ask, LocalModel, Memory], Answer]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one round of training, tensors and header; and of an evaluation, where it was played."""

    up: int
    down: int
    plain: int = 0  # of both, were every number sent as it is
    evaluation: Traffic | None = None


def traffic(strategy: Strategy, job: Job, plan: Blueprint, wire: Wire | None = None) -> Traffic:
    """Of the mean client, in the last of a few rounds. Without a `wire` numbers go as they are, and nobody evaluates. Raises
    StrategyError where the method cannot work with the job."""
    strategy.check_job(job)
    play = Play(strategy, job, plan, wire or plain_wire(job, strategy))
    strategy.check(play.cohort)
    every, state, evaluation = job.rounds.evaluate_every if wire else 0, strategy.start(plan.adapter), None
    if every:
        state = play.evaluate(state, 0)
    for number in range(1, ROUNDS + 1):
        state = play.train(state, number)
        sent = play.counted()
        if every and (number % every == 0 or number == ROUNDS):
            state = play.evaluate(state, number)
            evaluation = play.counted()
    return replace(sent, evaluation=evaluation)


def plain_wire(job: Job, strategy: Strategy) -> Wire:
    return wire_of(job.model_copy(update={"wire": WireSettings(preset="plain")}), strategy)


class Play:
    """A run without a model. What has been sent since it was last counted is in `down` and `up`."""

    def __init__(self, strategy: Strategy, job: Job, plan: Blueprint, wire: Wire) -> None:
        self._strategy, self._job, self._base = strategy, job, plan.adapter.base
        start = payload_of(plan.adapter)
        self._clients = _clients(job, plan)
        self._memories = {id: Memory() for id in self._clients}
        self.cohort = [_introduced(id, local, job, plan) for id, local in self._clients.items()]
        self._server = ServerEnd(wire, strategy, start)
        self._ends = {id: ClientEnd(wire, strategy, memory, id, lambda: start, MOST) for id, memory in self._memories.items()}
        self._down = self._up = NOTHING

    def train(self, state: ServerState, number: int) -> ServerState:
        self._down = self._up = NOTHING
        conversation, step = self._strategy.round(state, self.cohort), 0
        try:
            ask: Ask = next(conversation)
            while True:
                given = self._exchange(ask, number, f"{number}.{step}", self._strategy.answer)
                weights, step = {id: answer.weight for id, answer in given.items()}, step + 1
                ask = conversation.send(FoldedAnswers(weights, ask.fold, given.__getitem__))
        except StopIteration as end:
            after: ServerState = end.value
            return after

    def evaluate(self, state: ServerState, number: int) -> ServerState:
        self._down = self._up = NOTHING
        clients = [info.id for info in self.cohort]
        ask = self._strategy.evaluation(state, clients)
        self._exchange(ask, number, f"{number}.evaluate", self._evaluated)
        return self._strategy.evaluated(state, clients, clients)

    def counted(self) -> Traffic:
        """Since the last call of `train` or `evaluate`; of the mean client."""
        clients = len(self.cohort)
        plain = (self._up.plain + self._down.plain) // clients
        return Traffic(self._up.bytes // clients, self._down.bytes // clients, plain)

    def _evaluated(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        return replace(self._strategy.evaluate(ask, local, memory), metrics=EVALUATED)

    def _exchange(self, ask: Ask, number: int, ask_id: str, half: Half) -> dict[str, Answer]:
        header, given = {"ask": ask_id, "run": self._job.name, "round": number, "base": self._base}, {}
        for info in self.cohort:
            end, local = self._ends[info.id], self._clients[info.id]
            asked = self._server.ask(ask, info.id, header)
            came = end.ask(asked)
            answer = half(came, local, self._memories[info.id])
            answer = replace(answer, payload=_moved(answer.payload, self._strategy.began(came, local), local.draw))
            answered = end.answer(answer, came, local, {**header, "client": info.id, "seconds": 1.2345678901234567})
            self._down += cost_of(asked, ask.payload_for(info.id))
            self._up += cost_of(answered, answer.payload)
            self._server.arrived(info.id, answered)
            given[info.id] = self._server.answer(answered, info, MOST)
        self._server.settle()
        return given


def _moved(payload: Payload, began: Payload, draw: torch.Generator) -> Payload:
    """As it came out of training; where a client that knows no more than shapes has moved nothing, moved at random."""
    floats = {name for name, tensor in payload.tensors.items() if tensor.is_floating_point() and name in began.tensors}
    if not all(torch.equal(payload.tensors[name], began.tensors[name]) for name in floats):
        return payload
    moved = {name: payload.tensors[name] + torch.randn(payload.tensors[name].shape, generator=draw) for name in floats}
    return replace(payload, tensors={**payload.tensors, **moved})


def _clients(job: Job, plan: Blueprint) -> dict[str, Stand]:
    limited = [*job.clients.layers, *job.clients.memory, *job.clients.seconds]
    named = [*(job.clients.names or ()), *job.clients.ranks, *job.clients.budgets, *limited]
    count = job.rounds.clients or job.clients.count or max(len(set(named)), CLIENTS)
    ids = [*dict.fromkeys(named), *(f"client-{number:02d}" for number in range(count))][:count]
    return {
        id: Stand(
            EXAMPLES,
            job.rank_of(id),
            job.scale_of(id),
            generator(job.seed, id),
            pinned(job, plan.adapter.lora, job.rank_of(id), job.scale_of(id)),
            job.train.steps_for(EXAMPLES),
            plan.shapes,
        )
        for id in sorted(ids)
    }


def _introduced(id: str, local: Stand, job: Job, plan: Blueprint) -> ClientInfo:
    own = local.examples, local.rank, local.scale, local.pinned, local.steps
    return ClientInfo(id, *own, job.train.lr, plan.sizes, job.limits_of(id))
