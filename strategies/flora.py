"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): stacking, the exact mean for any mix of ranks and alphas.

    M' = M + sum_i p_i (s_i B_i A_i - T_i)                                                            eq. (3), warm

M is the server's cumulative adapter, kept as its SVD, T_i the part of it that client i trained on from. With
`start_from = "cold"`, as published, T_i = 0: each round begins at B = 0 with all of M in the base. With "warm", the
default, T_i is the leading r_i directions of M, so a client goes on where all clients stopped; the rest of M lies in its
base (or in a correction adapter beside a quantised one). Both are exact: base + rest + T_i is base + M for every client.

M has at most `max_rank` directions; the share of its squared norm that a round discards is the metric
`discarded_energy`. Dense tensors (heads) are averaged.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from fedtune import lora
from fedtune.adapter import Adapter, Factors
from fedtune.errors import StrategyError
from fedtune.memory import Memory
from fedtune.payload import Role, adapter_of, payload_of
from fedtune.seeds import lora_a
from fedtune.strategy import Answer, Answers, Ask, ClientInfo, Fold, LocalModel, ServerState, Strategy

ROW_NORM = 3**-0.5  # of A's rows as PEFT draws them: k entries of variance 1/(3k)


@dataclass(frozen=True)
class FLoRA(Strategy):
    """FLoRA: stacked adapters, exact for unequal ranks, with a rank cap on what accumulates."""

    name: ClassVar[str] = "flora"
    max_rank: int = 64  # of the cumulative adapter
    start_from: Literal["warm", "cold"] = "warm"
    seed: int = 0  # of the A that a client starts from where M has too few directions

    def __post_init__(self) -> None:
        if self.max_rank < 1:
            raise StrategyError(f"strategy 'flora' needs max_rank of at least 1, given {self.max_rank}")

    def start(self, adapter: Adapter) -> ServerState:
        return ServerState(replace(adapter, lora={path: lora.first(pair, 0) for path, pair in adapter.lora.items()}))

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        answers = yield Ask("train", self.broadcast(state), Fold.EACH)
        ranks = {client.id: client.rank for client in cohort}
        stacks = {path: self._not_retrained(pair, ranks, answers.weights) for path, pair in state.adapter.lora.items()}
        for _, share, answer in answers:
            for path, pair in adapter_of(answer.payload).lora.items():
                stacks[path] = _joined(stacks[path], pair, share)
        capped = {path: lora.refactor(stack, self.max_rank, ROW_NORM) for path, stack in stacks.items()}
        adapter = Adapter(
            lora={path: pair for path, (pair, _) in capped.items()},
            dense={**state.adapter.dense, **answers.mean([Role.DENSE]).tensors},
            base=state.adapter.base,
        )
        return replace(state, adapter=adapter, metrics={"discarded_energy": max(lost for _, lost in capped.values())})

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        cumulative = self.received(ask.payload)
        trained = 0 if self.start_from == "cold" else local.rank
        own = {path: self._slot(path, lora.first(pair, trained), local) for path, pair in cumulative.lora.items()}
        others = {path: lora.rest(pair, trained) for path, pair in cumulative.lora.items()}
        local.load(Adapter(own, cumulative.dense), merged=Adapter(others))
        metrics = local.fit()
        return Answer(payload_of(local.adapter()), local.examples, metrics)

    def _not_retrained(self, pair: Factors, ranks: Mapping[str, int], shares: Mapping[str, float]) -> Factors:
        """`M - sum_i p_i T_i`: direction j of M less the shares of the clients that trained on from it."""
        if self.start_from == "cold":
            return pair
        retrained = [sum(share for id, share in shares.items() if ranks[id] > j) for j in range(pair.rank)]
        return replace(pair, B=pair.B.double() * (1 - torch.tensor(retrained, dtype=torch.float64)))

    def _slot(self, path: str, start: Factors, local: LocalModel) -> Factors:
        """A pair of the client's own rank and scale for the product of `start`: fresh rows of A where it has fewer."""
        fresh = lora_a(self.seed, path, local.rank, start.shape[1])[start.rank :]  # (r_i - q, k)
        pair = lora.with_scale(start, local.scale)
        return Factors(torch.cat([pair.A, fresh]), lora.padded(pair, local.rank).B, local.scale)


def _joined(stack: Factors, pair: Factors, share: float) -> Factors:
    """`stack + share * pair`, never of more directions than the matrix has."""
    joined = lora.stack([stack, pair], [1.0, share])
    return joined if joined.rank <= min(joined.shape) else lora.compact(joined)
