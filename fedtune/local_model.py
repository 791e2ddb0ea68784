"""What the client half of a strategy sees: one client's data, the resident base model, and what moves on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from fedtune.adapter import Adapter
from fedtune.recipe import Part, Recipe

if TYPE_CHECKING:
    from fedtune.directions import Directions
    from fedtune.trainable import Trainable
    from fedtune.zeroth import Estimate

Penalty = Callable[[Adapter], Tensor]  # of the adapter in training to a scalar that is added to the loss of each step


class Ranked:
    """Whoever trains most modules with one `rank` and `scale`, and those that the job pins with their own."""

    rank: int
    scale: float  # alpha/r or alpha/sqrt(r)
    pinned: Mapping[str, tuple[int, float]]  # path -> (rank, scale)

    def rank_of(self, path: str) -> int:
        return self.pinned.get(path, (self.rank, self.scale))[0]

    def scale_of(self, path: str) -> float:
        return self.pinned.get(path, (self.rank, self.scale))[1]


class Ranks(Protocol):
    """Whoever knows what a client trains: the client itself, or the server of a client."""

    def rank_of(self, path: str) -> int:
        """The rank of one module: `rank`, save where the job pins another."""

    def scale_of(self, path: str) -> float:
        """The scale of one module: `scale`, save where the job pins another rank or alpha."""


class Movable(Protocol):
    """Named tensors that move along seeded directions: a client's whole model, or the adapter in its slot."""

    lr: float  # the job's train.lr

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of each tensor, by name."""

    def rebuild(self, recipe: Recipe) -> None:
        """The tensors become those that they began with, the base model's or the loaded adapter's, and what the recipe adds."""

    def schedule(self) -> Sequence[float]:
        """The learning rate of each local step of this round, as a share of `lr`."""

    def slopes(self, directions: Directions, seeds: Sequence[int], estimate: Estimate) -> list[float]:
        """Of the loss on the next batch, along z(seed) for each seed, all at the tensors as they are now. Changes nothing."""

    def move(self, change: Part, scale: float) -> None:
        """Add `scale` times `change` to the tensors, in place."""

    def fit(self) -> Mapping[str, float]:
        """Train these tensors by gradients, as the job says, from a fresh optimiser; returns what `LocalModel.fit` does."""

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Name and change of each tensor since `rebuild`, float32, one at a time."""

    def metrics(self) -> Mapping[str, float]:
        """Of all `slopes` so far: the mean `loss`, and `steps`, `examples` and `lr_sum`, as `LocalModel.fit` has them."""


class LocalModel(Ranks, Protocol):
    """What the client half sees: one client's data and the resident base model, with an adapter attached to it."""

    examples: int  # training examples of this client
    rank: int  # of the adapter that this client trains
    scale: float  # alpha/r or alpha/sqrt(r) of that adapter

    def load(
        self,
        adapter: Adapter,
        merged: Adapter | None = None,
        frozen: Sequence[str] = (),
        cores: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put `adapter` (of this client's rank, or less) into the trainable slot and `merged` (of any rank) into the base.

        `frozen` names parts that do not train: "A", "B" or "dense". A module with a core R (r, r) computes `s B R A`, and R
        trains.
        """

    def adapter(self) -> Adapter:
        """A copy of what is in the trainable slot now."""

    def cores(self) -> Mapping[str, Tensor]:
        """A copy of the cores, (r, r) each, as they are now."""

    def fit(self, penalty: Penalty | None = None) -> Mapping[str, float]:
        """Train as the job says, from a fresh optimiser; `penalty` is added to the loss of every step.

        Returns `loss` (without the penalty), `steps`, `examples` seen, and `lr_sum`, the learning rates of all steps added.
        """

    def gradient(self, batches: int = 1) -> Adapter:
        """The gradient of the mean loss over so many batches, by each factor and whole parameter that is not frozen. Changes
        nothing; the same batches in every call of a round."""

    def movable(self, where: Literal["whole", "adapter"]) -> Movable:
        """The whole model, with no adapter in the way, or the adapter that was loaded, for methods that work by seeds."""

    def trainable(self, where: Literal["whole", "adapter"]) -> Trainable:
        """The model's own weights, with no adapter in the way, or the adapter that was loaded, for methods that train parts."""

    def own_seed(self, *names: object) -> int:
        """A 63-bit seed for a draw of this client in this round; the same when it is asked again."""

    def evaluate(self) -> Mapping[str, float]:
        """`loss` (nats per token) and what else the task knows, on this client's held-out examples; empty without any."""
