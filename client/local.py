"""LocalModel for real: one client's examples on the resident base model, in one round of one job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from client.data.batches import batches
from client.data.examples import ClientData
from client.fit import Penalty, cosine, evaluate, fit
from client.model import ResidentModel
from fedtune.adapter import Adapter
from fedtune.job import Job, Train
from fedtune.seeds import seed_of

EVALUATION_TOKENS = 4096  # in memory at a time


class Local:
    """What the client half of a strategy sees. Every draw is seeded by (seed, round, client, purpose)."""

    def __init__(self, resident: ResidentModel, data: ClientData, job: Job, client: str, round: int) -> None:
        self.examples = len(data.train)
        self.rank, self.scale = job.rank_of(client), job.scale_of(client)
        self._resident, self._data, self._job, self._client, self._round = resident, data, job, client, round

    def load(self, adapter: Adapter, merged: Adapter | None = None, frozen: Sequence[str] = ()) -> None:
        self._resident.load(adapter, merged or Adapter(), frozenset(frozen))

    def adapter(self) -> Adapter:
        return self._resident.adapter()

    def fit(self, penalty: Penalty | None = None) -> Mapping[str, float]:
        train, names = self._job.train, (self._job.seed, self._round, self._client)
        drawn = batches(self._data.train, train.batch, *names, "batches")
        with _dropout_seed(*names, "dropout"):
            return fit(self._resident, drawn, train, self.steps(), self.peak_lr(), penalty)

    def evaluate(self) -> Mapping[str, float]:
        size = max(1, EVALUATION_TOKENS // self._job.data.max_length)
        return evaluate(self._resident, self._data.held_out, size)

    def steps(self) -> int:
        """Gradient steps of one round: as given, or from epochs, rounded up."""
        return local_steps(self._job.train, self.examples)

    def peak_lr(self) -> float:
        train, rounds = self._job.train, self._job.rounds.count
        if train.round_schedule == "constant":
            return train.lr
        return train.lr * cosine((self._round - 1) / max(rounds - 1, 1), train.min_lr)


def local_steps(train: Train, examples: int) -> int:
    return train.steps or max(1, round(train.epochs * examples / train.batch + 0.499999))


@contextmanager
def _dropout_seed(*names: object) -> Iterator[None]:
    """Dropout draws from torch's global generator: seed it, and leave it afterwards as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(*names) & 0xFFFFFFFF)
        yield
