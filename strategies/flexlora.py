"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): the SVD of the exact mean, cut to the rank of each client.

    M = sum_i p_i s_i B_i A_i = U S V^T            client i: B = U[:, :r_i] sqrt(S / s_i), A = sqrt(S / s_i) V[:, :r_i]^T

M is never formed: it is the SVD of the stacked factors. Public code puts all singular
values into B, which leaves A with rows of length 1 beside a large B; here both get half. The signs, which an SVD leaves open,
follow the last round's V, so that factors do not jump. The base stays untouched.

What lies beyond rank r_i is lost to client i in that round, and the next mean is taken over what the clients made of their
cuts, as published, without correction: `truncation.rank_<r>` is the share of the norm that clients of rank r miss. The
server keeps the largest rank that it has met, or `max_rank`: a client of larger rank that comes later gets that, and fresh
rows for the rest of its slot. What this discards is the `aggregation_error`. Dense tensors (heads) are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedtune import lora
from fedtune.adapter import Adapter, Factors
from fedtune.aggregation import aggregation_error, exact_mean
from fedtune.errors import StrategyError
from fedtune.memory import Memory
from fedtune.payload import Payload, Role, payload_of
from fedtune.strategy import ADAPTER, Answer, Answers, Ask, ClientInfo, Fold, LocalModel, Ranks, ServerState, Strategy
from strategies.nested import balanced, grown


@dataclass(frozen=True)
class FlexLoRA(Strategy):
    """FlexLoRA: SVD of the exact mean; each client gets the best approximation of its own rank."""

    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = "Bai et al., NeurIPS 2024, arXiv 2402.11505"
    up: ClassVar[str] = "r*(d + k) + h"
    down: ClassVar[str] = "min(r, d, k)*(d + k) + h"
    mixed_ranks: ClassVar[bool] = True
    steady: ClassVar[bool] = False
    truncates: ClassVar[bool] = True
    max_rank: int | None = None  # of what is kept and published; by default the largest rank of a client so far
    seed: int = 0  # of the rows of A that a client starts from where M has too few directions

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise StrategyError(f"strategy 'flexlora' needs max_rank of at least 1, given {self.max_rank}")

    def start(self, adapter: Adapter) -> ServerState:
        return ServerState(replace(adapter, lora={path: lora.first(pair, 0) for path, pair in adapter.lora.items()}))

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        sent = cuts(cohort, state.adapter)
        answers = yield Ask("train", fold=Fold.EACH, per_client=sent, wants=ADAPTER)
        ranks = {path: self._rank(path, state, cohort) for path in state.adapter.lora}
        exact = exact_mean(answers)
        best = {path: lora.refactor(pair, ranks[path])[0] for path, pair in exact.items()}
        kept = {path: aligned(pair, state.adapter.lora[path]) for path, pair in best.items()}
        dense = {**state.adapter.dense, **answers.mean([Role.DENSE]).tensors}
        metrics = {**aggregation_error(exact, kept), **truncation(exact, kept, cohort)}
        largest = {f"{path}.rank": float(rank) for path, rank in ranks.items()}
        return ServerState(replace(state.adapter, lora=kept, dense=dense), scalars=largest, metrics=metrics)

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        local.load(self._start(ask.payload, local))
        metrics = local.fit()
        return Answer(payload_of(local.adapter()), local.examples, metrics)

    def began(self, ask: Ask, client: Ranks) -> Payload:
        return payload_of(self._start(ask.payload, client))

    def _start(self, payload: Payload, client: Ranks) -> Adapter:
        cut = self.received(payload)
        return Adapter({path: self._slot(path, pair, client) for path, pair in cut.lora.items()}, cut.dense)

    def _rank(self, path: str, state: ServerState, cohort: Sequence[ClientInfo]) -> int:
        """Of M in this module: all that any client met so far can take."""
        met = int(state.scalars.get(f"{path}.rank", 0))
        return self.max_rank or max([met, *(client.rank_of(path) for client in cohort)])

    def _slot(self, path: str, cut: Factors, client: Ranks) -> Factors:
        """At the client's own rank and scale. A direction of length 0 has no gradient in either factor: it is drawn anew."""
        alive = max(cut.B.any(dim=0).nonzero().flatten().tolist(), default=-1) + 1
        start = balanced(lora.first(cut, alive), client.scale_of(path))
        return grown(start, client.rank_of(path), path, self.seed)


def cuts(cohort: Sequence[ClientInfo], adapter: Adapter) -> dict[str, Payload]:
    """What each client gets: one payload for all of the same ranks."""
    ranks = {client.id: tuple(map(client.rank_of, adapter.lora)) for client in cohort}
    made = {ranks[client.id]: cut_for(client, adapter) for client in cohort}
    return {client: made[own] for client, own in ranks.items()}


def cut_for(client: ClientInfo, adapter: Adapter) -> Payload:
    """The best approximation of the client's rank: the leading directions of the SVD."""
    cut = {path: lora.first(pair, client.rank_of(path)) for path, pair in adapter.lora.items()}
    return payload_of(replace(adapter, lora=cut))


def aligned(pair: Factors, last: Factors) -> Factors:
    """The same product, direction j with the sign that its row of A had in the last round."""
    both = min(pair.rank, last.rank)
    inner = (pair.A[:both] * last.A[:both]).sum(dim=1)
    signs = torch.ones(pair.rank)
    signs[:both] = torch.where(inner < 0, -1.0, 1.0)
    return Factors(pair.A * signs[:, None], pair.B * signs, pair.scale)


def truncation(exact: Mapping[str, Factors], kept: Mapping[str, Factors], cohort: Sequence[ClientInfo]) -> dict[str, float]:
    """`|M - cut of M| / |M|` over all modules, for each rank in the cohort; from the singular values of `kept`."""
    total = math.hypot(*(lora.product_norm(pair) for pair in exact.values()))
    values = {path: pair.A.double().norm(dim=1).square() for path, pair in kept.items()}  # B and A carry sqrt(S) each
    missed = {}
    for client in cohort:
        held = sum(S[: client.rank_of(path)].square().sum().item() for path, S in values.items())
        missed[f"truncation.rank_{client.rank}"] = math.sqrt(max(0.0, 1 - held / total**2)) if total > 0 else 0.0
    return missed
