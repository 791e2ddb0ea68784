"""Round 1 of a method whose clients train different tensors, with the real clients, up to where they would train."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from client.costs import probe_peak
from client.trainer import Trainer
from fedtune.base import Blueprint
from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, RoundFailed
from fedtune.folding import FoldedAnswers
from fedtune.payload import Payload, joined, payload_of, role_of, vectors
from fedtune.strategy import Answer, Ask, ClientInfo, ServerState, Strategy
from fedtune.trainable import Costs
from fedtune.wire.ends import ClientEnd, ServerEnd
from fedtune.wire.ledger import Cost, cost_of
from server.records import Watcher
from simulations.stand import FIGURES
from simulations.traffic import MOST, NOTHING
from strategies.layer_tensors import Parts

ENOUGH = 2**22  # numbers
Answering = Callable[[ClientInfo, Ask, str], Answer]


@dataclass(frozen=True)
class ClientPlan:
    """Of one client in round 1. What the method does not say of it, or what it does not take part in, is None."""

    client: str
    examples: int
    steps: int
    rank: int | None
    limits: Mapping[str, float] = field(default_factory=dict)
    down: int | None = None
    up: int | None = None
    layers: Mapping[int, float] | None = None  # number of a layer, from the input up -> share of it that trains
    numbers: int | None = None  # that train
    memory: float | None = None  # bytes at the peak of a step
    seconds: float | None = None  # a step
    probe: float | None = None  # bytes at the peak of a probe; who declares memory keeps no activations in it
    short: Mapping[str, float] = field(default_factory=dict)  # limits that no layer keeps -> what the least takes
    plain: int | None = None  # what `down` and `up` were together, were every number sent as it is
    evaluation: int | None = None  # bytes of an evaluation, both directions


def play(strategy: Strategy, state: ServerState, cohort: Sequence[ClientInfo], answer: Answering) -> Ask | None:
    """Round 1 up to the first ask that names what each client must send, which nobody answers; None where there is none."""
    conversation, step = strategy.round(state, cohort), 0
    try:
        ask = next(conversation)
        while not ask.tensors:
            given = {info.id: answer(info, ask, f"1.{step}") for info in cohort}
            weights = {client: one.weight for client, one in given.items()}
            ask, step = conversation.send(FoldedAnswers(weights, ask.fold, given.__getitem__)), step + 1
        return ask
    except StopIteration:
        return None


class SelectiveRound:
    """Of a method whose clients train different tensors: round 1 with the real ones, until they would train."""

    def __init__(self, trainer: Trainer, model: Blueprint, cohort: Sequence[ClientInfo], watcher: Watcher) -> None:
        self._trainer, self._model, self._watcher = trainer, model, watcher
        self._cohort = {info.id: info for info in cohort}
        self._down, self._up = dict.fromkeys(self._cohort, NOTHING), dict.fromkeys(self._cohort, NOTHING)
        self._kinds: set[str] = set()
        strategy, adapter = trainer.strategy, model.adapter
        self._wire, self._start = trainer.job.make_wire(), payload_of(adapter)
        self._server = ServerEnd(self._wire, strategy, self._start)
        self._sizes: dict[tuple[str, ...], Cost] = {}  # of answers, by the names of what trained
        whole = strategy.trains_whole
        own = {name: tuple(tensor.shape) for name, tensor in payload_of(adapter).tensors.items()}
        self._where, self._shapes = ("whole", model.shapes) if whole else ("adapter", own)
        pattern, always = getattr(strategy, "blocks", ""), getattr(strategy, "always", ())
        sizes = {name: math.prod(shape) for name, shape in self._shapes.items()}
        self.parts = Parts.of(sizes, pattern, always, adapter.dense)

    def planned(self, known: Mapping[str, ClientPlan]) -> dict[str, ClientPlan]:
        """And what the round tells of those who take part."""
        strategy, cohort = self._trainer.strategy, list(self._cohort.values())
        state, found = strategy.start(self._model.adapter), dict(known)
        ask = play(strategy, state, cohort, self._answered)
        assert ask is not None, "a client that knows shapes only came to it"
        for done, info in enumerate(cohort):
            self._watcher.doing("measuring steps", done, len(cohort))
            found[info.id] = self._planned(known[info.id], info, state, ask)
        return found

    def _answered(self, info: ClientInfo, ask: Ask, step: str) -> Answer:
        self._watcher.doing(ask.kind, list(self._cohort).index(info.id), len(self._cohort))
        self._kinds.add(ask.kind)
        asked = self._server.ask(ask, info.id, self._header(step))
        answered = self._trainer.answer(asked, info.id)
        self._server.arrived(info.id, answered)
        try:
            answer = self._server.answer(answered, info, MOST)
        except ClientFailed as reason:
            raise RoundFailed(f"client '{info.id}' could not answer the ask to {ask.kind}: {reason}") from reason
        self._down[info.id] += cost_of(asked, ask.payload_for(info.id))
        self._up[info.id] += cost_of(answered, answer.payload)
        return answer

    def _header(self, step: str) -> dict[str, Any]:
        run = f"{self._trainer.job.name}.{16 * '0'}"  # as long as the name of a run
        return {"ask": step, "run": run, "round": 1, "base": self._model.adapter.base}

    def _planned(self, known: ClientPlan, info: ClientInfo, state: ServerState, ask: Ask) -> ClientPlan:
        names, parts = ask.tensors[info.id], self.parts
        shares = parts.shares(names)
        layers = {number: shares[layer] for number, layer in enumerate(parts.layers) if layer in shares}
        numbers = sum(parts.sizes[name] for name in names)
        costs, probe = self._measured(info, state)
        down, up = self._training(info, ask, names)
        depth = self._depth(min(layers, default=len(parts.layers)))
        return replace(
            known,
            down=down.bytes,
            up=up.bytes,
            plain=down.plain + up.plain,
            layers=layers,
            numbers=numbers,
            memory=costs["memory"].of(depth, numbers) if names else None,
            seconds=costs["seconds"].of(depth, numbers) if names else None,
            probe=probe,
            short={} if layers else self._short(info, costs),
        )

    def _depth(self, lowest: int) -> int:
        return len(self.parts.layers) - (0 if self.parts.always_deep else lowest)

    def _short(self, info: ClientInfo, costs: Mapping[str, Costs]) -> dict[str, float]:
        least = {name: self._least(costs[name]) for name in costs.keys() & info.limits.keys()}
        return {name: needed for name, needed in sorted(least.items()) if needed > info.limits[name]}

    def _least(self, costs: Costs) -> float:
        """What a step takes on the layer that takes least."""
        parts = self.parts
        always = sum(parts.sizes[name] for name in parts.always)
        return min(costs.of(self._depth(layer), always + size) for layer, size in enumerate(parts.numbers))

    def _measured(self, info: ClientInfo, state: ServerState) -> tuple[Mapping[str, Costs], float | None]:
        """As the client itself would measure it, within the memory that it declares."""
        strategy, local = self._trainer.strategy, self._trainer.local(info.id, 1)
        strategy.use(strategy.broadcast(state), local, self._trainer.memory(info.id))
        model, layers = local.trainable(self._where), list(self.parts.tensors.values())
        names, signal = [name for layer in layers for name in layer], getattr(strategy, "rule", "") == "snr"
        kept = "probe" in self._kinds and "memory" not in info.limits
        return model.costs(layers), probe_peak(model, names, signal) if kept else None

    def _training(self, info: ClientInfo, ask: Ask, names: Collection[str]) -> tuple[Cost, Cost]:
        """Down and up of one client in this round, with the ask to train and an answer of random numbers."""
        asked = self._server.ask(ask, info.id, self._header("1.9"))
        down = self._down[info.id] + cost_of(asked, ask.payload_for(info.id))
        known = tuple(sorted(names))
        if known not in self._sizes:
            self._sizes[known] = self._answer_cost(info, ask, asked, sorted(names))
        return down, self._up[info.id] + self._sizes[known]

    def _answer_cost(self, info: ClientInfo, ask: Ask, asked: Envelope, names: Sequence[str]) -> Cost:
        """Of what is sent after training: as many whole tensors are encoded as are enough to know what a number takes."""
        strategy, memory = self._trainer.strategy, self._trainer.memory(info.id)
        end = ClientEnd(self._wire, strategy, memory, info.id, lambda: self._start, MOST)
        came = end.ask(asked)
        encoded = _enough(names, self.parts.sizes)
        tensors = {name: torch.randn(self._shapes[name]) for name in encoded}
        beside = vectors({name: torch.zeros(limits.longest) for name, limits in ask.vectors.items()})
        payload = joined(Payload(tensors, {name: role_of(name) for name in tensors}), beside)
        header = {**self._header("1.9"), "client": info.id, "seconds": 0.123456789012345}
        answered = end.answer(Answer(payload, info.examples, FIGURES if names else {}), came, info, header)
        cost, one = cost_of(answered, payload), sum(self.parts.sizes[name] for name in encoded)
        rest = sum(self.parts.sizes[name] for name in names) - one
        return replace(
            cost, bytes=cost.bytes + round((cost.bytes - cost.header) * rest / max(one, 1)), plain=cost.plain + 4 * rest
        )


def _enough(names: Sequence[str], sizes: Mapping[str, int]) -> list[str]:
    """The first of them that hold ENOUGH numbers, or all."""
    taken, numbers = list[str](), 0
    for name in names:
        if numbers < ENOUGH:
            taken, numbers = [*taken, name], numbers + sizes[name]
    return taken
