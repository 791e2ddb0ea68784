"""Clients without model and data: they know shapes, and answer each ask as a client would that moved at random.

So thousands of them cost next to nothing, and what is measured is the coordinator. Their messages go through the job's codecs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from fedtune.base import Blueprint, blueprint, pinned
from fedtune.envelope import Envelope
from fedtune.errors import FedtuneError
from fedtune.job import Job
from fedtune.memory import Memory
from fedtune.payload import Payload, payload_of
from fedtune.seeds import generator
from fedtune.strategy import Answer, Ask
from fedtune.wire import pack_answer, pack_failure
from fedtune.wire.ends import ClientEnd
from simulations.stand import Stand
from simulations.traffic import EVALUATED, EXAMPLES, MOST


def names(count: int) -> list[str]:
    return [f"client-{number:05d}" for number in range(count)]


class ScriptedTrainer:
    """Stands where `client.trainer.Trainer` stands: for many clients in simulation, for one on a node."""

    def __init__(self, clients: Sequence[str], job: Job | None = None) -> None:
        """Without a job, it comes with the first hello."""
        self.clients, self._memories = tuple(clients), defaultdict[str, Memory](Memory)
        if job:
            self._job = job

    def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
        client = client or self.clients[0]
        header = {key: envelope.header.get(key) for key in ("ask", "run", "round")} | {"client": client}
        try:
            if envelope.header.get("kind") == "hello":
                return pack_answer(Answer(), header | self._hello(client, envelope))
            return self._answered(envelope, client, header | {"base": self._plan.adapter.base, "seconds": 0.0})
        except FedtuneError as error:
            return pack_failure(str(error), header)

    def _hello(self, client: str, envelope: Envelope) -> dict[str, Any]:
        if not hasattr(self, "_job"):
            self._job = Job.model_validate(envelope.header["job"])
        own = {"examples": EXAMPLES, "rank": self._job.rank_of(client), "scale": self._job.scale_of(client)}
        return own | {"base": self._plan.adapter.base, "limits": {}}

    def _answered(self, envelope: Envelope, client: str, header: dict[str, Any]) -> Envelope:
        memory, local = self._memories[client], self._stand(client, str(header["ask"]))
        end = ClientEnd(self._wire, self._strategy, memory, client, lambda: self._start, MOST, len(self._plan.shapes))
        ask = end.ask(envelope)
        return end.answer(self._half(ask, local, memory), ask, local, header)

    def _half(self, ask: Ask, local: Stand, memory: Memory) -> Answer:
        if ask.kind == "evaluate":
            return replace(self._strategy.evaluate(ask, local, memory), metrics=EVALUATED)
        return self._strategy.answer(ask, local, memory)

    def _stand(self, client: str, ask_id: str) -> Stand:
        job, rank, scale = self._job, self._job.rank_of(client), self._job.scale_of(client)
        pins, draw = pinned(job, self._plan.adapter.lora, rank, scale), generator(job.seed, client, ask_id)
        return Stand(EXAMPLES, rank, scale, draw, pins, job.train.steps_for(EXAMPLES), self._plan.shapes)

    @cached_property
    def _plan(self) -> Blueprint:
        return blueprint(self._job)

    @cached_property
    def _start(self) -> Payload:
        return payload_of(self._plan.adapter)

    @cached_property
    def _strategy(self) -> Any:
        return self._job.make_strategy()

    @cached_property
    def _wire(self) -> Any:
        return self._job.make_wire()
