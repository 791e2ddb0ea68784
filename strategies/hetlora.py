"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): factors of unequal ranks are averaged row by row.

    server: A[j] = sum_i w_i A_i[j] over the clients whose rank is above j, and what `rows` says for the others; B likewise
            w_i = |s_i B_i A_i|_F / sum_l |s_l B_l A_l|_F, the norm taken over all modules of a client together
    client: takes the first r_i rows and columns, and trains them

Padding with zeros (`rows = "padded"`) shrinks the rows that few clients own, in every round. With `"kept"` who lacks a row
counts as having left it as it was. To divide a row by the weight of its owners (`"owned"`) gives the product of one client's
own directions the weight of all: with ranks 2 to 32 that diverged, and padding was best (docs/choosing-a-strategy.md).
Scales are folded in, half into each factor, so clients may differ in alpha. Heads are averaged by examples.

Self-pruning (`prune` above 0): `prune * sum |B[:, q:]| |A[q:, :]|`, q = floor(gamma r), is added to the loss; a client
whose tail has less of that after training than before goes on with its first q directions, and from then on sends and gets
only these. The server forgets what no client has any more.

A and B are averaged separately, with weights that need not be those of the examples: the distance of the result from
`sum_i p_i s_i B_i A_i`, p_i by examples, is the `aggregation_error`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedtune import lora
from fedtune.adapter import Adapter, Factors
from fedtune.aggregation import OwnerMean, measured_error
from fedtune.errors import StrategyError
from fedtune.memory import Memory
from fedtune.payload import Payload, Role, adapter_of, payload_of
from fedtune.strategy import ADAPTER, Answer, Answers, Ask, ClientInfo, Fold, LocalModel, Ranks, ServerState, Strategy
from strategies.nested import balanced, grown


@dataclass(frozen=True)
class HetLoRA(Strategy):
    """HetLoRA: factors of unequal ranks averaged row by row, larger updates weighing more; ranks can shrink."""

    name: ClassVar[str] = "hetlora"
    paper: ClassVar[str] = "Cho et al., EMNLP 2024, arXiv 2401.06432"
    up: ClassVar[str] = "r*(d + k) + h"
    down: ClassVar[str] = "r*(d + k) + h"
    mixed_ranks: ClassVar[bool] = True
    truncates: ClassVar[bool] = True
    rows: Literal["padded", "kept", "owned"] = "padded"  # what counts for those who lack a row
    weights: Literal["sparsity", "examples", "both"] = "sparsity"  # both: the product of the two
    prune: float = 0.0  # how strongly the tail is held down; 0 never prunes
    gamma: float = 0.85  # share of the rank that pruning leaves
    seed: int = 0  # of the rows of A that start

    def __post_init__(self) -> None:
        if not (math.isfinite(self.prune) and self.prune >= 0):
            raise StrategyError(f"strategy 'hetlora' needs prune of at least 0, given {self.prune}")
        if not 0 < self.gamma < 1:
            raise StrategyError(f"strategy 'hetlora' needs gamma between 0 and 1, given {self.gamma}")

    # server half

    def start(self, adapter: Adapter) -> ServerState:
        return ServerState(replace(adapter, lora={path: lora.first(pair, 0) for path, pair in adapter.lora.items()}))

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        ranks = {client.id: {path: rank_now(state, client, path) for path in state.adapter.lora} for client in cohort}
        padded = {path: self._padded(path, pair, ranks) for path, pair in state.adapter.lora.items()}
        sent = by_ranks(replace(state.adapter, lora=padded), ranks)
        answers = yield Ask("train", fold=Fold.EACH, per_client=sent, wants=ADAPTER)
        say, known = self._weights(answers), {**state.scalars, **ranks_of(answers)} if self.prune else {}
        means = {path: OwnerMean(pair, self.rows) for path, pair in padded.items()}
        for id, _, answer in answers:
            for path, pair in adapter_of(answer.payload).lora.items():
                means[path].add(pair, say[id])
        mean = {path: total.pair() for path, total in means.items()}
        owned = {path: lora.first(pair, largest(known, path, pair.rank)) for path, pair in mean.items()}
        dense = {**state.adapter.dense, **answers.mean([Role.DENSE]).tensors}
        metrics = measured_error(answers, replace(state.adapter, lora=owned))
        return ServerState(replace(state.adapter, lora=owned, dense=dense), scalars=known, metrics=metrics)

    def _padded(self, path: str, pair: Factors, ranks: Mapping[str, Mapping[str, int]]) -> Factors:
        """At the largest rank of the cohort, or its own."""
        return grown(pair, max((own[path] for own in ranks.values()), default=0), path, self.seed)

    def _weights(self, answers: Answers) -> Mapping[str, float]:
        """Each client's say, summing to 1; that of the examples where no client has learnt anything."""
        if self.weights == "examples":
            return answers.weights
        say = {id: update_norm(answer) * (share if self.weights == "both" else 1.0) for id, share, answer in answers}
        total = sum(say.values())
        return {id: value / total for id, value in say.items()} if total > 0 else answers.weights

    # client half

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        given = self.received(ask.payload)
        slots = {path: balanced(lora.first(m, _kept(memory, path, m)), local.scale_of(path)) for path, m in given.lora.items()}
        start = replace(given, lora=slots)
        local.load(start)
        metrics = local.fit(self._penalty if self.prune else None)
        trained = local.adapter()
        if self.prune and self.tail(trained) < self.tail(start):
            trained = self._pruned(trained, memory)
        return Answer(payload_of(trained), local.examples, metrics)

    def began(self, ask: Ask, client: Ranks) -> Payload:
        given = self.received(ask.payload)
        slots = {path: balanced(pair, client.scale_of(path)) for path, pair in given.lora.items()}
        return payload_of(replace(given, lora=slots))

    def tail(self, adapter: Adapter) -> Tensor:
        """`sum |B[:, q:]| |A[q:, :]|` over the modules."""
        rests = [lora.rest(pair, self._left(pair.rank)) for pair in adapter.lora.values()]
        return torch.stack([torch.linalg.vector_norm(rest.B) * torch.linalg.vector_norm(rest.A) for rest in rests]).sum()

    def _penalty(self, live: Adapter) -> Tensor:
        return self.prune * self.tail(live)

    def _left(self, rank: int) -> int:
        """q: what pruning leaves of a rank."""
        return max(1, math.floor(self.gamma * rank))

    def _pruned(self, trained: Adapter, memory: Memory) -> Adapter:
        for path, rank in trained.ranks.items():
            memory[f"{path}.rank"] = torch.tensor(self._left(rank))
        return replace(trained, lora={path: lora.first(m, self._left(m.rank)) for path, m in trained.lora.items()})


def _kept(memory: Memory, path: str, given: Factors) -> int:
    """The rank that this client has left, should the server not know of it yet."""
    return int(memory[f"{path}.rank"]) if f"{path}.rank" in memory else given.rank


def update_norm(answer: Answer) -> float:
    """`|s B A|_F` over all modules together."""
    return math.hypot(*map(lora.product_norm, adapter_of(answer.payload).lora.values()))


def by_ranks(adapter: Adapter, ranks: Mapping[str, Mapping[str, int]]) -> dict[str, Payload]:
    """What each client gets; one payload for all that have the same ranks."""
    made: dict[tuple[int, ...], Payload] = {}
    return {id: made.setdefault(tuple(own.values()), truncated(adapter, own)) for id, own in ranks.items()}


def truncated(adapter: Adapter, ranks: Mapping[str, int]) -> Payload:
    return payload_of(replace(adapter, lora={path: lora.first(m, ranks[path]) for path, m in adapter.lora.items()}))


# ranks that shrink: `<path>.rank.<client>` in the scalars of the state, as of each client's last answer


def ranks_of(answers: Answers) -> dict[str, float]:
    ranks = ((id, path, pair.rank) for id, _, answer in answers for path, pair in adapter_of(answer.payload).lora.items())
    return {f"{path}.rank.{id}": float(rank) for id, path, rank in ranks}


def rank_now(state: ServerState, client: ClientInfo, path: str) -> int:
    return int(state.scalars.get(f"{path}.rank.{client.id}", client.rank_of(path)))


def largest(known: Mapping[str, float], path: str, otherwise: int) -> int:
    return int(max((rank for name, rank in known.items() if name.startswith(f"{path}.rank.")), default=otherwise))
