"""Slopes of a loss along seeded directions, from forward passes alone.

    two-sided    (L(w + eps z) - L(w - eps z)) / 2 eps       2 P passes for P directions     MeZO, arXiv 2305.17333
    one-sided    (L(w + eps z) - L(w)) / eps                 P + 1 passes                    DeComFL, arXiv 2405.15861
    forward      <grad L(w), z>, exactly                     P passes in forward mode, twice the memory

With E[z z^T] = 1, the mean of `slope z` over directions is an unbiased estimate of the gradient; two-sided up to O(eps^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from fedtune.directions import Combination, Directions
from fedtune.errors import StrategyError

Loss = Callable[[], float]


@dataclass(frozen=True)
class Estimate:
    """How a slope is measured. A slope beyond `clip` is cut to it; one that is not finite counts as 0."""

    difference: Literal["two_sided", "one_sided", "forward"] = "two_sided"
    epsilon: float = 1e-3
    clip: float = 1000.0

    def __post_init__(self) -> None:
        for setting in ("epsilon", "clip"):
            if not 0 < getattr(self, setting) < math.inf:
                raise StrategyError(f"{setting} must be above 0 and finite, given {getattr(self, setting)}")

    def clipped(self, slope: float) -> float:
        return max(-self.clip, min(self.clip, slope)) if math.isfinite(slope) else 0.0


class Place(Protocol):
    """The tensors that move: a whole model, or an adapter."""

    def shifted(self, change: Combination, scale: float) -> AbstractContextManager[None]:
        """While it is open the tensors are `w + scale * change`; afterwards they are bit for bit what they were."""

    def derivative(self, change: Combination) -> float:
        """Of the loss along `change`, by forward-mode differentiation."""


def slopes(place: Place, loss: Loss, directions: Directions, seeds: Sequence[int], estimate: Estimate) -> list[float]:
    """The slope of `loss` along z(seed) for each seed, all at the place's present tensors."""
    along = (directions.sum({seed: 1.0}) for seed in seeds)  # one at a time: a job may ask for any number
    if estimate.difference == "forward":
        found = [place.derivative(z) for z in along]
    elif estimate.difference == "one_sided":
        here, eps = loss(), estimate.epsilon
        found = [(_loss_at(place, loss, z, eps) - here) / eps for z in along]
    else:
        eps = estimate.epsilon
        found = [(_loss_at(place, loss, z, eps) - _loss_at(place, loss, z, -eps)) / (2 * eps) for z in along]
    return [estimate.clipped(slope) for slope in found]


def _loss_at(place: Place, loss: Loss, change: Combination, scale: float) -> float:
    with place.shifted(change, scale):
        return loss()


def step(directions: Directions, slopes: Mapping[int, float], share: float = 1.0) -> dict[int, float]:
    """The pull of each direction in a step: the slopes' mean is the estimate of the gradient or, where a direction moves one
    of n blocks only, n times it; `share` is the step's part of the learning rate. `w -= lr * sum_j pull_j z_j`."""
    return {seed: share * slope * pull_of_one(directions, len(slopes)) for seed, slope in slopes.items()}


def pull_of_one(directions: Directions, seeds: int) -> float:
    """Of a direction with slope 1 among so many in a step: the largest that a pull is, over the largest slope."""
    return max(directions.blocks, 1) / seeds
