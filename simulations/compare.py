"""What federation was worth: the base model, each client alone, and central training, measured as the run was.

All see everybody's held-out examples, with the job's own optimiser, learning rate and batch. A client alone takes as many
steps as it may take in the federation; central training sees as many examples, in the same batches, as all clients did.
Each of them keeps one optimiser from its first step to its last, and its rate falls along one cosine: a constant rate would
handicap them, since no averaging calms their steps (simulations/LOG.md has the figures).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

from client.data.batches import batches
from client.data.examples import Example
from client.fit import fit
from client.trainer import Trainer
from fedtune.adapter import Adapter
from fedtune.base import blueprint
from server.records import Comparison, RoundRecord, Watcher

T = TypeVar("T")


def compare(trainer: Trainer, records: Sequence[RoundRecord], watcher: Watcher) -> Comparison:
    """Train the baselines after a finished run, whose rounds, from round 0 on, were all evaluated."""
    clients = trainer.clients
    start = blueprint(trainer.job).adapter
    seconds = {"base": records[0].seconds, "federated": sum(record.seconds for record in records[1:])}

    def alone() -> Iterator[tuple[str, float]]:
        for number, client in enumerate(clients):
            watcher.doing("each client alone", number, len(clients))
            yield client, _trained_loss(trainer, start, trainer.data(client).train, steps_alone(trainer, client), client)

    losses_alone, seconds["alone"] = _timed(lambda: dict(alone()))
    watcher.doing("central training", 0, 1)
    pooled = list(chain.from_iterable(trainer.data(client).train for client in clients))
    steps = steps_central(trainer, records)
    central, seconds["central"] = _timed(lambda: _trained_loss(trainer, start, pooled, steps, "central"))
    comparison = Comparison(_loss(records, 0), losses_alone, _loss(records, -1), central, seconds)
    watcher.compared(comparison)
    return comparison


def steps_alone(trainer: Trainer, client: str) -> int:
    return trainer.job.rounds.count * trainer.local(client, 1).steps()


def steps_central(trainer: Trainer, records: Sequence[RoundRecord]) -> int:
    """As many steps of the job's batch as make up the examples that all clients saw."""
    examples = sum(client.examples for record in records for client in record.clients.values())
    return round(examples / trainer.job.train.batch)


def _trained_loss(trainer: Trainer, start: Adapter, examples: Sequence[Example], steps: int, who: str) -> float:
    """Train `start` on the examples; its loss on everybody's held-out examples."""
    job, resident = trainer.job, trainer.resident
    resident.load(start, Adapter(), frozenset())
    train = job.train.model_copy(update={"schedule": "cosine"})
    fit(resident, batches(examples, train.batch, job.seed, who, "comparison"), train, steps, train.lr)
    return everybodys_loss(trainer)


def everybodys_loss(trainer: Trainer) -> float:
    """Of what is loaded now: held-out loss over all clients, each prediction counted once."""
    figures = [trainer.local(client, 0).evaluate() for client in trainer.clients]
    figures = [figure for figure in figures if figure]
    return sum(f["loss"] * f["tokens"] for f in figures) / sum(f["tokens"] for f in figures)


def _loss(records: Sequence[RoundRecord], number: int) -> float:
    loss = records[number].loss
    assert loss is not None, "a comparison needs rounds that were evaluated"
    return loss


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    return work(), time.monotonic() - began
