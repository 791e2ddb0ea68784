"""The gate at work, through one round: it lets answers in, keeps what it refuses, and notes who sent it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedtune.base import Blueprint
from fedtune.envelope import Envelope
from fedtune.errors import Refused
from fedtune.job import Job
from fedtune.strategy import Answer, Ask, ClientInfo, Fold, Strategy
from server.conduct import Conduct
from server.gate import Diverged, Schema, admit, misfits, schema_of
from server.limits import require_small
from server.norms import norm_of, remembered, require_norm, too_far
from server.quarantine import Quarantine

Decode = Callable[[Envelope], Answer]


@dataclass(frozen=True)
class GateMemory:
    """What the gate knows from the rounds before; it lies in the checkpoint."""

    conduct: Conduct = field(default_factory=Conduct)
    norms: Mapping[str, Sequence[float]] = field(default_factory=dict)  # kind of ask -> those of answers that were let in

    def as_json(self) -> dict[str, Any]:
        return {"conduct": self.conduct.as_json(), "norms": {kind: list(norms) for kind, norms in self.norms.items()}}

    @classmethod
    def from_json(cls, given: Mapping[str, Any] | None) -> GateMemory:
        if given is None:
            return cls()
        norms = {kind: tuple(norms) for kind, norms in given["norms"].items()}
        return cls(Conduct.from_json(given["conduct"]), norms)


class Gatekeeper:
    """Of one round. `refused` and `accepted` are its clients so far, whatever was asked of them."""

    def __init__(self, job: Job, strategy: Strategy, plan: Blueprint, memory: GateMemory, quarantine: Path) -> None:
        self._job, self._strategy, self._plan, self._memory = job, strategy, plan, memory
        self._quarantine = Quarantine(quarantine, job.gate.quarantine)
        self.refused, self.accepted = set[str](), set[str]()
        self._ask, self._id = Ask(""), ""
        self._norms, self._schemas = dict[str, float](), dict[str, Schema]()  # of the answers to the open ask

    def open(self, ask: Ask, ask_id: str) -> None:
        """From now on answers are to this one."""
        self._ask, self._id, self._norms, self._schemas = ask, ask_id, {}, {}

    def let_in(self, envelope: Envelope, client: ClientInfo, decode: Decode, counts: bool = False) -> Answer:
        """The answer, if it may enter. Raises Refused, or ClientFailed with the client's own reason. One that `counts` by the
        journal is not held against a limit of the job, which may have been another then."""
        ask, plan, most = self._ask, self._plan, self._job.rounds.max_weight
        require_small(envelope, ask, client, plan)
        lower_rank = ask.fold is Fold.EACH and self._strategy.mixed_ranks
        answer = admit(envelope, self._id, client, plan.adapter, most, lower_rank, ask, plan.shapes, decode)
        norm = self._norm(answer, client)
        if not counts:
            require_norm(norm, self._job.gate.max_norm)
        self._norms[client.id], self._schemas[client.id] = norm, schema_of(answer, ask.fold)
        return answer

    def _norm(self, answer: Answer, client: ClientInfo) -> float:
        if not answer.payload.tensors:
            return 0.0
        sent = replace(self._ask, payload=self._ask.payload_for(client.id), per_client={})
        return norm_of(answer.payload, self._strategy.began(sent, client), self._ask)

    def left_out(self) -> dict[str, str]:
        """When all have come: those that were let in and do not fit the others, each with the reason."""
        odd = {} if self._ask.tensors else misfits(self._schemas)
        fitting = {client: norm for client, norm in self._norms.items() if client not in odd}
        return odd | too_far(fitting, self._memory.norms.get(self._ask.kind, ()), self._job.gate.max_ratio)

    def counted(self, clients: Collection[str]) -> None:
        """These answers to the open ask count."""
        self.accepted |= set(clients)
        kind, norms = self._ask.kind, {client: self._norms[client] for client in clients if client in self._norms}
        known = {**self._memory.norms, kind: remembered(self._memory.norms.get(kind, ()), norms)}
        self._memory = replace(self._memory, norms={kind: norms for kind, norms in known.items() if norms})

    def refuse(self, client: str, envelope: Envelope, round: int, reason: str) -> str | None:
        """Its file in quarantine, if it is kept."""
        self.refused.add(client)
        return self._quarantine.put(envelope, round, self._id, client, reason)

    def blames(self, reason: Refused) -> bool:
        """Not for a model that does harm to the client's held-out examples."""
        return not (isinstance(reason, Diverged) and self._ask.kind == "evaluate")

    def after(self, round: int) -> GateMemory:
        """What the next rounds need to know."""
        conduct = self._memory.conduct.after(round, self.refused, self.accepted, self._job.gate)
        return replace(self._memory, conduct=conduct)
