"""FedAvg on LoRA factors, known as FedIT (Zhang et al. 2024, arXiv 2305.05644): A and B are averaged separately.

    server: A = sum_i p_i A_i,  B = sum_i p_i B_i,  p_i = n_i / sum_j n_j over those who answered

The baseline: `s B A` is not the mean of the clients' products `s B_i A_i`. Dense tensors are averaged exactly. Every
client trains with the server's scale, so that factors of different alpha are never mixed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedtune.memory import Memory
from fedtune.payload import adapter_of, payload_of
from fedtune.strategy import Answer, Answers, Ask, ClientInfo, LocalModel, ServerState, Strategy, require_one_rank


@dataclass(frozen=True)
class FedAvg(Strategy):
    """FedIT: weighted mean of A and of B. Needs one rank for all clients."""

    name: ClassVar[str] = "fedavg"

    def check(self, clients: Sequence[ClientInfo]) -> None:
        require_one_rank(self, clients)

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        answers = yield Ask("train", self.broadcast(state))
        return replace(state, adapter=adapter_of(answers.mean(), like=state.adapter))

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        local.load(self.received(ask.payload))
        metrics = local.fit()
        return Answer(payload_of(local.adapter()), local.examples, metrics)
