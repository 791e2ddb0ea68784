"""FedProx on LoRA factors (Li et al., MLSys 2020, arXiv 1812.06127): FedAvg whose clients are held near what they got.

    client: minimise  loss(w) + mu/2 |w - w_t|^2                                                        Algorithm 2
    server: FedAvg

w are the factors A and B and the dense tensors, w_t is what came. The product `s B A` is not what is held: many pairs
have one product, and averaging factors wants the pairs near. The first step of a round begins at w_t and feels nothing,
so with one local step FedProx is FedAvg. A server half alone is no FedProx: the method is the term in the client's loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.adapter import Adapter
from fedtune.errors import StrategyError
from fedtune.memory import Memory
from fedtune.payload import payload_of
from fedtune.strategy import Answer, Ask, LocalModel, Penalty
from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedProx: FedAvg whose clients stay near what they were given. Needs one rank for all clients."""

    name: ClassVar[str] = "fedprox"
    paper: ClassVar[str] = "Li et al., MLSys 2020, arXiv 1812.06127"
    mu: float = 0.01  # how strongly a client is held; 0 is FedAvg

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mu) and self.mu >= 0):
            raise StrategyError(f"strategy 'fedprox' needs mu of at least 0, given {self.mu}")

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        start = self.received(ask.payload)
        local.load(start)
        metrics = local.fit(proximal(start, self.mu) if self.mu else None)
        return Answer(payload_of(local.adapter()), local.examples, metrics)


def proximal(start: Adapter, mu: float) -> Penalty:
    """`mu/2 |w - w_t|^2` of the adapter in training, w_t being `start`."""
    given = payload_of(start).tensors

    def penalty(live: Adapter) -> Tensor:
        moved = [(tensor - given[name].to(tensor)).square().sum() for name, tensor in payload_of(live).tensors.items()]
        return mu / 2 * torch.stack(moved).sum()

    return penalty
