"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): stacking, the exact mean for any mix of ranks and alphas.

    M' = M + sum_i p_i (s_i B_i A_i - T_i)                                                            eq. (3), warm

M is the server's cumulative adapter, kept as its SVD, T_i the part of it that client i trained on from. With
`start_from = "cold"`, as published, T_i = 0: each round begins at B = 0 with all of M in the base. With "warm", the
default, T_i is the leading r_i directions of M, so a client goes on where all clients stopped; the rest of M lies in its
base (or in a correction adapter beside a quantised one). Both are exact: base + rest + T_i is base + M for every client.

M has at most `max_rank` directions, and of these as many as hold the share `energy` of its squared norm (FLoRIST,
arXiv 2506.09199). What a round discards so is its `aggregation_error`. The directions that no client trains on from
travel as a whole matrix where that is smaller than its factors. Dense tensors (heads) are averaged.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from fedtune import lora
from fedtune.adapter import Adapter, Factors
from fedtune.aggregation import aggregation_error
from fedtune.errors import StrategyError
from fedtune.memory import Memory
from fedtune.payload import Payload, Role, adapter_of, payload_of
from fedtune.seeds import lora_a
from fedtune.strategy import ADAPTER, Answer, Answers, Ask, ClientInfo, Fold, LocalModel, Ranks, ServerState, Strategy
from strategies import whole_matrix

ROW_NORM = 3**-0.5  # of A's rows as PEFT draws them: k entries of variance 1/(3k)


@dataclass(frozen=True)
class FLoRA(Strategy):
    """FLoRA: stacked adapters, exact for unequal ranks, with a cap on the rank that accumulates."""

    name: ClassVar[str] = "flora"
    paper: ClassVar[str] = "Wang et al., NeurIPS 2024, arXiv 2409.05976"
    up: ClassVar[str] = "r*(d + k) + h"
    down: ClassVar[str] = "min(R*(d + k), r*(d + k) + d*k) + h"
    exact: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True
    steady: ClassVar[bool] = False
    max_rank: int = 64  # of the cumulative adapter
    energy: float = 1.0  # share of its squared norm to keep
    start_from: Literal["warm", "cold"] = "warm"
    seed: int = 0  # of the A that a client starts from where M has too few directions

    def __post_init__(self) -> None:
        if self.max_rank < 1:
            raise StrategyError(f"strategy 'flora' needs max_rank of at least 1, given {self.max_rank}")
        if not 0 < self.energy <= 1:
            raise StrategyError(f"strategy 'flora' needs energy above 0 and at most 1, given {self.energy}")

    def start(self, adapter: Adapter) -> ServerState:
        return ServerState(replace(adapter, lora={path: lora.first(pair, 0) for path, pair in adapter.lora.items()}))

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        clients = {client.id: client for client in cohort}
        answers = yield Ask("train", self._sent(state.adapter, cohort), Fold.EACH, wants=ADAPTER)
        stacks = {p: lora.Stack(self._not_retrained(p, m, clients, answers.weights)) for p, m in state.adapter.lora.items()}
        for _, share, answer in answers:
            for path, pair in adapter_of(answer.payload).lora.items():
                stacks[path].add(pair, share)
        exact = {path: stack.pair() for path, stack in stacks.items()}
        capped = {path: lora.refactor(pair, self.max_rank, ROW_NORM, self.energy) for path, pair in exact.items()}
        kept = {path: pair for path, (pair, _) in capped.items()}
        dense = {**state.adapter.dense, **answers.mean([Role.DENSE]).tensors}
        lost = max(discarded for _, discarded in capped.values())
        metrics = {"discarded_energy": lost, **aggregation_error(exact, kept)}
        return replace(state, adapter=Adapter(kept, dense, state.adapter.base), metrics=metrics)

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        cumulative = self.received(ask.payload)
        others = {path: lora.rest(pair, self._trained(path, local)) for path, pair in cumulative.lora.items()}
        local.load(self._start(cumulative, local), merged=Adapter(others))
        metrics = local.fit()
        return Answer(payload_of(local.adapter()), local.examples, metrics)

    def began(self, ask: Ask, client: Ranks) -> Payload:
        return payload_of(self._start(self.received(ask.payload), client))

    def _start(self, cumulative: Adapter, client: Ranks) -> Adapter:
        """What a client trains on from."""
        first = {path: lora.first(pair, self._trained(path, client)) for path, pair in cumulative.lora.items()}
        return Adapter({path: self._slot(path, pair, client) for path, pair in first.items()}, cumulative.dense)

    def _trained(self, path: str, client: Ranks) -> int:
        """How many directions of M the client trains on from."""
        return client.rank_of(path) if self.start_from == "warm" else 0

    def broadcast(self, state: ServerState) -> Payload:
        return self._sent(state.adapter, ())

    def received(self, payload: Payload) -> Adapter:
        return whole_matrix.received(payload)

    def _sent(self, adapter: Adapter, cohort: Sequence[ClientInfo]) -> Payload:
        """M as factors; beyond the directions that somebody trains on from, as a whole matrix where that is smaller."""
        trained = cohort if self.start_from == "warm" else ()
        heads = {path: max((client.rank_of(path) for client in trained), default=0) for path in adapter.lora}
        return whole_matrix.sent(adapter, heads)

    def _not_retrained(
        self, path: str, pair: Factors, clients: Mapping[str, ClientInfo], shares: Mapping[str, float]
    ) -> Factors:
        """`M - sum_i p_i T_i`: direction j of M less the shares of the clients that trained on from it."""
        if self.start_from == "cold":
            return pair
        ranks = {id: clients[id].rank_of(path) for id in shares}
        retrained = [sum(share for id, share in shares.items() if ranks[id] > j) for j in range(pair.rank)]
        return replace(pair, B=pair.B.double() * (1 - torch.tensor(retrained, dtype=torch.float64)))

    def _slot(self, path: str, start: Factors, client: Ranks) -> Factors:
        """A pair of the client's own rank and scale for the product of `start`: fresh rows of A where it has fewer."""
        rank, scale = client.rank_of(path), client.scale_of(path)
        fresh = lora_a(self.seed, path, rank, start.shape[1])[start.rank :]  # (r_i - q, k)
        pair = lora.with_scale(start, scale)
        return Factors(torch.cat([pair.A, fresh]), lora.padded(pair, rank).B, scale)
