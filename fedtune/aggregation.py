"""What several methods share: the exact sum to compare with, the error of an aggregation, and the mean over owners."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch

from fedtune import lora
from fedtune.adapter import Adapter, Factors
from fedtune.payload import adapter_of
from fedtune.strategy import Answers

METRIC = "aggregation_error"
MOST = 2**28  # numbers that are stacked only to measure: 2 GiB in float64


def exact_mean(answers: Answers, like: Adapter | None = None) -> dict[str, Factors]:
    """`sum_i p_i s_i B_i A_i` of each module as one pair; factors that did not travel are those of `like`."""
    stacks: dict[str, lora.Stack] = {}
    for _, share, answer in answers:
        for path, pair in adapter_of(answer.payload, like).lora.items():
            stacks.setdefault(path, lora.Stack()).add(pair, share)
    return {path: stack.pair() for path, stack in stacks.items()}


def measured_error(answers: Answers, published: Adapter) -> dict[str, float]:
    """`aggregation_error` of factors that were averaged. Nothing where no answer can be seen, or where the factors of all
    clients are too many to be held at once for no other purpose."""
    if not answers.visible or len(answers.weights) * published.parameters() > MOST:
        return {}
    return aggregation_error(exact_mean(answers), published.lora)


def aggregation_error(exact: Mapping[str, Factors], published: Mapping[str, Factors]) -> dict[str, float]:
    """How far the published products are from the exact ones, as metrics: of each module (`aggregation_error.<path>`)
    relative to the norm of its exact product, and of all together. From factors: O((d + k) r^2)."""
    missed = {path: lora.product_norm(lora.residual([pair], [1.0], published[path])) for path, pair in exact.items()}
    wanted = {path: lora.product_norm(pair) for path, pair in exact.items()}
    layers = {f"{METRIC}.{path}": _ratio(missed[path], wanted[path]) for path in exact}
    return {METRIC: _ratio(math.hypot(*missed.values()), math.hypot(*wanted.values())), **layers}


def split(metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The errors of single modules, by path, and all other metrics."""
    prefix = f"{METRIC}."
    layers = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return layers, {name: value for name, value in metrics.items() if not name.startswith(prefix)}


def _ratio(missed: float, wanted: float) -> float:
    return missed / wanted if wanted > 0 else missed


class OwnerMean:
    """The weighted mean of A and of B of unequal ranks, row by row of A and column by column of B. `rows` says what a pair
    counts with where it lacks a row (its rank is not above j):

        kept     the row of `start`, the pair that all were given parts of: who lacks a row leaves it as it was
        padded   zeros
        owned    nothing: weights are renormalised over the pairs that have the row

    A row that nobody has, or only with weight 0, is that of `start`, whose rank and scale the result has. Each pair's own
    scale is folded in, half into each factor."""

    def __init__(self, start: Factors, rows: Literal["kept", "padded", "owned"] = "kept") -> None:
        (d, k), r = start.shape, start.rank
        self._start, self._rows, self._whole = start, rows, 0.0
        self._A, self._B = torch.zeros(r, k, dtype=torch.float64), torch.zeros(d, r, dtype=torch.float64)
        self._owned = torch.zeros(r, dtype=torch.float64)  # weight of those who have row j

    def add(self, pair: Factors, weight: float) -> None:
        q, half = min(pair.rank, len(self._owned)), math.sqrt(pair.scale / self._start.scale)
        self._A[:q].add_(pair.A[:q].double(), alpha=weight * half)
        self._B[:, :q].add_(pair.B[:, :q].double(), alpha=weight * half)
        self._owned[:q] += weight
        self._whole += weight

    def pair(self) -> Factors:
        owned, start = self._owned > 0, self._start
        over = self._owned if self._rows == "owned" else torch.full_like(self._owned, self._whole)
        kept = (over - self._owned) * (self._rows == "kept")  # weight of `start` in row j
        A = (self._A + kept[:, None] * start.A.double()) / over.where(owned, 1.0)[:, None]
        B = (self._B + kept * start.B.double()) / over.where(owned, 1.0)
        A, B = A.where(owned[:, None], start.A.double()), B.where(owned, start.B.double())
        return Factors(A.float(), B.float(), start.scale)
