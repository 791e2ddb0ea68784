"""FedAvg on LoRA factors, known as FedIT (Zhang et al. 2024, arXiv 2305.05644): A and B are averaged separately.

    server: A = sum_i p_i A_i,  B = sum_i p_i B_i,  p_i = n_i / sum_j n_j over those who answered

The baseline: `s B A` is not the mean of the clients' products `s B_i A_i`. Dense tensors are averaged exactly. Every
client trains with the server's scale, so that factors of different alpha are never mixed. How far the product of the
means is from the mean of the products is the metric `aggregation_error`: with equal scales the covariance of the factors,
`|sum_i p_i s (B_i - B)(A_i - A)| / |sum_i p_i s B_i A_i|`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedtune.aggregation import measured_error
from fedtune.memory import Memory
from fedtune.payload import adapter_of, payload_of
from fedtune.strategy import ADAPTER, Answer, Answers, Ask, ClientInfo, Fold, LocalModel, ServerState, Strategy


@dataclass(frozen=True)
class FedAvg(Strategy):
    """FedIT: weighted mean of A and of B. Needs one rank for all clients."""

    name: ClassVar[str] = "fedavg"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv 2305.05644"
    up: ClassVar[str] = "r*(d + k) + h"
    down: ClassVar[str] = "r*(d + k) + h"
    secure_sum: ClassVar[bool] = True

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        answers = yield Ask("train", self.broadcast(state), Fold.SEEN, wants=ADAPTER)
        adapter = adapter_of(answers.mean(), like=state.adapter)
        metrics = measured_error(answers, adapter)
        return replace(state, adapter=adapter, metrics=metrics)

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        local.load(self.received(ask.payload))
        metrics = local.fit()
        return Answer(payload_of(local.adapter()), local.examples, metrics)
