"""What a seed method sees of the resident model: one client's batches and learning rates on the tensors that move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from client.data.examples import Example
from client.fit import lr_factor
from client.place import Place
from client.room import lowered, within_memory
from fedtune.directions import Directions
from fedtune.errors import ClientFailed
from fedtune.job import Train
from fedtune.recipe import Part, Recipe
from fedtune.zeroth import Estimate, slopes


@dataclass
class SeededModel:
    """A Movable for one client in one round."""

    place: Place
    batches: Iterator[Sequence[Example]]
    train: Train
    steps: int
    peak_lr: float
    draw: torch.Generator  # of stochastic rounding
    first_order: Callable[[], Mapping[str, float]]
    losses: list[float] = field(default_factory=list)
    seen: int = 0

    def __post_init__(self) -> None:
        self.lr = self.train.lr

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.place.shapes

    def rebuild(self, recipe: Recipe) -> None:
        self.place.rebuild(recipe, self.lr)

    def schedule(self) -> Sequence[float]:
        peak = self.peak_lr / self.lr
        return [peak * lr_factor(step, self.steps, self.train) for step in range(self.steps)]

    def slopes(self, directions: Directions, seeds: Sequence[int], estimate: Estimate) -> list[float]:
        self._require_something(directions)
        self.place.batch = next(self.batches)
        self.seen += len(self.place.batch)
        wanted = self.train.micro_batch or len(self.place.batch)
        attempt = partial(self._slopes, directions, seeds, estimate)
        found, loss = within_memory(self.place.resident, "forward passes", wanted, attempt)
        self.losses.append(loss)
        return found

    def _slopes(self, directions: Directions, seeds: Sequence[int], estimate: Estimate, size: int) -> tuple[list[float], float]:
        """All with `size` examples at a time, since a slope is a difference of losses: and the passes' mean loss."""
        self.place.micro_batch = size
        passes: list[float] = []
        found = slopes(self.place, lambda: self._noted(passes), directions, seeds, estimate)
        return found, sum(passes) / len(passes) if passes else math.nan

    def move(self, change: Part, scale: float) -> None:
        self.place.move(change, scale, self.draw)

    def fit(self) -> Mapping[str, float]:
        return self.place.fitted(self.first_order)

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        return self.place.changes()

    def metrics(self) -> Mapping[str, float]:
        """`loss` is the mean over the passes, beside the weights and not at them: higher by the curvature of the loss."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        rates = self.schedule()[: len(self.losses)]
        figures = {"steps": float(len(self.losses)), "examples": float(self.seen), "lr_sum": self.lr * sum(rates)}
        figures |= lowered(self.place.resident)
        return figures | ({"loss": sum(finite) / len(finite)} if finite else {})

    def _require_something(self, directions: Directions) -> None:
        if not any(directions.touches(name) for name in self.shapes):
            known = sorted({part for name in self.shapes for part in name.split(".")[-2:-1]})
            raise ClientFailed(
                f"strategy.modules = {list(directions.modules)} names no module here; known are {', '.join(known)}"
            )

    def _noted(self, passes: list[float]) -> float:
        passes.append(self.place.loss())
        return passes[-1]
