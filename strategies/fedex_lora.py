"""FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): FedAvg on factors, made exact by what it leaves out.

    A = sum_i p_i A_i,  B = sum_i p_i B_i
    E' = E + s sum_i p_i B_i A_i - s B A = E + s sum_i p_i (B_i - B)(A_i - A)            the residual, a covariance

E is the residual of all rounds so far. A client has it in its base (or in a correction adapter beside a quantised one) and
trains on from (A, B), so base + E + s B A is the same for all, and after the round the exact mean of their weights. Since
sum_i p_i (B_i - B) = 0, any matrix may stand in for A in the second bracket: with that of one client, its term is 0 and the
covariance has at most (m - 1) r directions.

The state is one pair per module: its first r directions are (A, B), the others E, at most min(d, k) or `max_rank` of them.
What a cap cuts off is the `aggregation_error`, which is rounding without one. E goes down beside (A, B), as a whole matrix
where that is smaller. Public code transposes E before it adds it, which no shape betrays where d = k. All clients train at
the server's scale. Dense tensors (heads) are averaged.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedtune import lora
from fedtune.adapter import Adapter, Factors
from fedtune.aggregation import aggregation_error
from fedtune.errors import StrategyError
from fedtune.memory import Memory
from fedtune.payload import Payload, adapter_of, payload_of
from fedtune.strategy import ADAPTER, Answer, Answers, Ask, ClientInfo, Fold, LocalModel, Ranks, ServerState, Strategy
from strategies import whole_matrix


@dataclass(frozen=True)
class FedExLoRA(Strategy):
    """FedEx-LoRA: averaged factors, and their residual added to the base (exact). Needs one rank for all clients."""

    name: ClassVar[str] = "fedex_lora"
    paper: ClassVar[str] = "Singhal et al., ACL 2025, arXiv 2410.09432"
    up: ClassVar[str] = "r*(d + k) + h"
    down: ClassVar[str] = "min(R*(d + k), r*(d + k) + d*k) + h"  # R: r and the rank of E
    exact: ClassVar[bool] = True
    max_rank: int | None = None  # of the residual that accumulates; None keeps all of it

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise StrategyError(f"strategy 'fedex_lora' needs max_rank of at least 1, given {self.max_rank}")

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        ranks = {path: cohort[0].rank_of(path) for path in state.adapter.lora} if cohort else {}
        answers = yield Ask("train", whole_matrix.sent(state.adapter, ranks), Fold.EACH, wants=ADAPTER)
        mean = adapter_of(answers.mean())
        before = {path: lora.rest(pair, ranks[path]) for path, pair in state.adapter.lora.items()}
        slots = {path: replace(mean.lora[path], scale=pair.scale) for path, pair in before.items()}
        exact = _with_covariance(before, answers, slots)
        kept = {path: self._capped(pair) for path, pair in exact.items()}
        metrics = aggregation_error(_beside(exact, slots), _beside(kept, slots))
        whole = {path: lora.joined(pair, lora.with_scale(kept[path], pair.scale)) for path, pair in slots.items()}
        return ServerState(Adapter(whole, mean.dense, state.adapter.base), metrics=metrics)

    def _capped(self, pair: Factors) -> Factors:
        rank = min(pair.shape) if self.max_rank is None else self.max_rank
        kept = lora.refactor(pair, rank)[0]
        return kept if kept.B.any() else lora.first(kept, 0)

    def published(self, state: ServerState) -> Adapter:
        """(A, B) and E as one pair, of at most min(d, k) directions."""
        return replace(state.adapter, lora={path: _compact(pair) for path, pair in state.adapter.lora.items()})

    def broadcast(self, state: ServerState) -> Payload:
        return whole_matrix.sent(self.published(state), {})

    def received(self, payload: Payload) -> Adapter:
        return whole_matrix.received(payload)

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        given = self.received(ask.payload)
        residual = {path: lora.rest(pair, local.rank_of(path)) for path, pair in given.lora.items()}
        local.load(_slots(given, local), merged=Adapter(residual))
        metrics = local.fit()
        return Answer(payload_of(local.adapter()), local.examples, metrics)

    def began(self, ask: Ask, client: Ranks) -> Payload:
        return payload_of(_slots(self.received(ask.payload), client))


def _slots(given: Adapter, client: Ranks) -> Adapter:
    """A and B of what was sent, without E."""
    return Adapter({path: lora.first(pair, client.rank_of(path)) for path, pair in given.lora.items()}, given.dense)


def _compact(pair: Factors) -> Factors:
    return pair if pair.rank <= min(pair.shape) else lora.refactor(pair, min(pair.shape))[0]


def _with_covariance(before: Mapping[str, Factors], answers: Answers, mean: Mapping[str, Factors]) -> dict[str, Factors]:
    """`E + s sum_i p_i (B_i - B)(A_i - A_1)` of each module, in float64; the first client's term is 0 and is left out."""
    sums = {path: lora.Stack(pair) for path, pair in before.items()}
    first: Mapping[str, Factors] = {}
    for _, share, answer in answers:
        trained = adapter_of(answer.payload).lora
        for path, pair in trained.items() if first else ():
            away = Factors(pair.A.double() - first[path].A, pair.B.double() - mean[path].B, mean[path].scale)
            sums[path].add(away, share)
        first = first or trained
    return {path: total.pair() for path, total in sums.items()}


def _beside(residual: Mapping[str, Factors], slots: Mapping[str, Factors]) -> dict[str, Factors]:
    """`E + s B A` of each module."""
    return {path: lora.stack([residual[path], pair], [1.0, 1.0]) for path, pair in slots.items()}
