"""LocalModel for real: one client's examples on the resident base model, in one round of one job."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from client.allowance import counted
from client.data.batches import batches
from client.data.examples import ClientData, Example
from client.fit import cosine, evaluate, fit, gradient
from client.model import ResidentModel
from client.seeded import SeededModel
from client.slot import Slot
from client.slot_tensors import SlotTensors
from client.trainable import TrainableModel
from fedtune.adapter import Adapter
from fedtune.base import pinned
from fedtune.job import Job, Train
from fedtune.seeds import seed_of
from fedtune.strategy import Penalty, Ranked

EVALUATION_TOKENS = 4096  # in memory at a time


class Local(Ranked):
    """What the client half of a strategy sees. Every draw is seeded by (seed, round, client, purpose)."""

    def __init__(self, resident: ResidentModel, data: ClientData, job: Job, client: str, round: int) -> None:
        self.examples = len(data.train)
        self.rank, self.scale = job.rank_of(client), job.scale_of(client)
        self.pinned = pinned(job, resident.lora, self.rank, self.scale)
        self._resident, self._data, self._job, self._client, self._round = resident, data, job, client, round

    def load(
        self,
        adapter: Adapter,
        merged: Adapter | None = None,
        frozen: Sequence[str] = (),
        cores: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._resident.load(adapter, merged or Adapter(), frozenset(frozen), cores)

    def adapter(self) -> Adapter:
        return self._resident.adapter()

    def cores(self) -> Mapping[str, Tensor]:
        return self._resident.cores()

    def fit(self, penalty: Penalty | None = None) -> Mapping[str, float]:
        train = self._job.train
        with _dropout_seed(*self._names, "dropout"):
            return fit(self._resident, self._batches(), train, self.steps(), self.peak_lr(), penalty)

    def gradient(self, batches: int = 1) -> Adapter:
        with _dropout_seed(*self._names, "dropout"):
            return gradient(self._resident, islice(self._batches(), batches), self._job.train.micro_batch)

    def movable(self, where: Literal["whole", "adapter"]) -> SeededModel:
        job, train = self._job, self._job.train
        place = self._resident.whole() if where == "whole" else Slot(self._resident)
        place.autocast = self._resident.autocast and train.precision == "bf16"
        draw = torch.Generator(self._resident.device).manual_seed(self.own_seed("rounding"))
        return SeededModel(place, self._batches(), job.train, self.steps(), self.peak_lr(), draw, self.fit)

    def trainable(self, where: Literal["whole", "adapter"]) -> TrainableModel:
        place = self._resident.weights() if where == "whole" else SlotTensors(self._resident)
        seeded = partial(_dropout_seed, *self._names, "dropout")
        memory = self._job.limits_of(self._client).get("memory", math.inf)
        job = self._job
        return TrainableModel(place, self._batches, job.train, self.steps(), self.peak_lr(), seeded, job.data, memory)

    def own_seed(self, *names: object) -> int:
        return seed_of(*self._names, *names)

    def evaluate(self) -> Mapping[str, float]:
        size = max(1, EVALUATION_TOKENS // self._job.data.max_length)
        figures = evaluate(self._resident, self._data.held_out, size)
        return figures and {**figures, **self._resident.whole_figures()}

    @property
    def _names(self) -> tuple[object, ...]:
        return self._job.seed, self._round, self._client

    def _batches(self) -> Iterator[Sequence[Example]]:
        return counted(batches(self._data.train, self._job.train.batch, *self._names, "batches"))

    def steps(self) -> int:
        """Gradient steps of one round: as given, or from epochs, rounded up."""
        return local_steps(self._job.train, self.examples)

    def peak_lr(self) -> float:
        train, rounds = self._job.train, self._job.rounds.count
        if train.round_schedule == "constant":
            return train.lr
        return train.lr * cosine((self._round - 1) / max(rounds - 1, 1), train.min_lr)


def local_steps(train: Train, examples: int) -> int:
    return train.steps_for(examples)


@contextmanager
def _dropout_seed(*names: object) -> Iterator[None]:
    """Dropout draws from torch's global generator: seed it, and leave it afterwards as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(*names) & 0xFFFFFFFF)
        yield
