"""Every method over every preset of the wire: what it publishes is what it publishes over a plain one, or nearly so.

Clients drift: their training adds the same random steps to whatever they start from. So what differs at the end is what the
wire has lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedtune.errors import JobError
from fedtune.folding import FoldedAnswers
from fedtune.job import Job
from fedtune.memory import Memory
from fedtune.payload import payload_of
from fedtune.registry import known, strategy_from
from fedtune.strategy import Ask, ServerState, Strategy
from fedtune.testing import changes
from fedtune.wire.ends import ClientEnd, ServerEnd
from fedtune.wire.presets import PRESETS, wire_of
from tests.strategies.oracle import Drifter, adapter
from tests.strategies.rounds import introduced

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "selective_layers": {"layers": 3},
    "selective_layers-adapter": {"layers": 3, "trains": "adapter"},
    "ferret-adapter": {"trains": "adapter", "K": 32},
    "ferret": {"K": 32},
    "flora-cold": {"start_from": "cold"},
    "mezo-scalars": {"sends": "scalars"},
}
VARIANTS = [*known(), *(name for name in SETTINGS if "-" in name)]
# |published - plain| / |plain|: of int4-like steps, and of steps so wide that a quarter of an update waits for the next round.
WITHIN = {"lossless": 0.0, "balanced": 0.1, "tiny": 0.6}
ROUNDS = 4


def made(variant: str) -> Strategy:
    return strategy_from(variant.partition("-")[0], SETTINGS.get(variant, {}))


@dataclass
class Federation:
    """Three clients, and both ends of a wire between them and a strategy."""

    strategy: Strategy
    preset: str
    bytes: int = 0
    clients: dict[str, Drifter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.job = Job.model_validate({"wire": self.preset, "strategy": self.strategy.name})
        self.memories = {id: Memory() for id in "abc"}
        self.clients = {id: Drifter(examples=n, rank=2, scale=1.5, drift=0.05, lr=1e-3) for n, id in enumerate("abc", 1)}
        start = payload_of(adapter())
        self.server = ServerEnd(wire_of(self.job, self.strategy), self.strategy, start)
        self.ends = {
            id: ClientEnd(wire_of(self.job, self.strategy), self.strategy, self.memories[id], id, lambda: start, 10**6)
            for id in "abc"
        }

    def played(self, rounds: int) -> ServerState:
        state = self.strategy.start(adapter())
        for number in range(1, rounds + 1):
            for i, client in enumerate(self.clients.values()):
                client.seed = 100 * number + i
            state = self._evaluated(self._trained(state, number), number)
        return state

    def _trained(self, state: ServerState, number: int) -> ServerState:
        conversation, step = self.strategy.round(state, [introduced(id, client) for id, client in self.clients.items()]), 0
        try:
            ask = next(conversation)
            while True:
                answers = self._answers(ask, number, f"{number}.{step}")
                ask, step = conversation.send(answers), step + 1
        except StopIteration as end:
            return end.value

    def _answers(self, ask: Ask, number: int, ask_id: str) -> FoldedAnswers:
        given = {}
        for id, client in self.clients.items():
            asked = self.server.ask(ask, id, {"ask": ask_id, "round": number})
            received = self.ends[id].ask(asked)
            half = self.strategy.evaluate if ask.kind == "evaluate" else self.strategy.answer
            answer = half(received, client, self.memories[id])
            answered = self.ends[id].answer(answer, received, client, {"ask": ask_id, "round": number, "client": id})
            assert not self.server.arrived(id, answered)
            given[id] = self.server.answer(answered, introduced(id, client), 10**6)
            self.bytes += sum(len(tensor.data) for one in (asked, answered) for tensor in one.tensors)
        self.server.settle()
        return FoldedAnswers({id: one.weight for id, one in given.items()}, ask.fold, given.__getitem__)

    def _evaluated(self, state: ServerState, number: int) -> ServerState:
        self._answers(self.strategy.evaluation(state, list(self.clients)), number, f"{number}.evaluate")
        return self.strategy.evaluated(state, list(self.clients), list(self.clients))


@pytest.mark.parametrize("variant", VARIANTS)
def test_over_every_preset(variant: str) -> None:
    plain = changes(made(variant).published(Federation(made(variant), "plain").played(ROUNDS)))
    for preset, within in WITHIN.items():
        lossy = changes(made(variant).published(Federation(made(variant), preset).played(ROUNDS)))
        missed = sum((lossy[name] - plain[name]).square().sum() for name in plain)
        whole = sum(tensor.square().sum() for tensor in plain.values())
        assert missed <= within**2 * whole, f"{preset}: {(missed / whole).sqrt():.3f}"


@pytest.mark.parametrize(
    ("strategy", "codec", "reason"),
    [
        ({"name": "selective_layers"}, {"up": "int8"}, "the server has none to add a difference to"),
        ({"name": "selective_layers"}, {"down": "int8"}, "their hashes are checked"),
        ({"name": "fed_sb"}, {"down": "bf16"}, "every client must hold the same A and B"),
        ({"name": "ferret", "trains": "adapter"}, {"down": "bf16"}, "its hash is checked"),
    ],
)
def test_a_codec_that_a_method_cannot_work_with_is_refused(
    strategy: dict[str, str], codec: dict[str, str], reason: str
) -> None:
    job = Job.model_validate({"strategy": strategy, "wire": codec})
    way, text = next(iter(codec.items()))
    with pytest.raises(
        JobError, match=f"wire.{way} = '{text}' loses bits, and '{strategy['name']}' needs all of them: .*{reason}"
    ):
        job.make_wire()


def test_presets_give_such_a_method_every_bit_instead() -> None:
    wire = Job.model_validate({"strategy": "selective_layers", "wire": "tiny"}).make_wire()
    assert wire.up.change.text == wire.down.change.text == PRESETS["lossless"].up
    wire = Job.model_validate({"strategy": {"name": "selective_layers", "trains": "adapter"}, "wire": "tiny"}).make_wire()
    assert (wire.up.change.text, wire.down.change.text) == (PRESETS["tiny"].up, PRESETS["lossless"].up)


def test_an_evaluation_after_training_sends_nothing_again() -> None:
    """Three broadcasts in a row: the first brings what has changed, the others not one stream."""
    federation = Federation(strategy_from("fedavg", {}), "balanced")
    state = federation.played(1)
    before = federation.bytes
    federation._evaluated(state, 2)
    assert federation.bytes - before <= 3 * 8  # how it is laid out: nothing else
    assert torch.equal(federation.memories["a"]["wire.kept.head.weight"], federation.memories["b"]["wire.kept.head.weight"])
