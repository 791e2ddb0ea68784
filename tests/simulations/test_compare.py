"""The baselines: the right data, as many steps as the federation, and the same measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from client.data.batches import batches
from client.fit import evaluate, fit
from client.trainer import Trainer
from fedtune.adapter import Adapter
from fedtune.base import blueprint
from fedtune.job import Job
from server.records import ClientRecord, Comparison, RoundRecord
from server.watchers import Quiet
from simulations import compare as compare_module
from simulations.compare import steps_alone, steps_central
from simulations.engine import simulate

MakeJob = Callable[..., Job]


class Seen(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.comparison: Comparison | None = None

    def compared(self, comparison: Comparison) -> None:
        self.comparison = comparison


def record(**examples: float) -> RoundRecord:
    return RoundRecord(1, clients={client: ClientRecord(examples=count) for client, count in examples.items()})


def test_a_client_alone_takes_as_many_steps_as_in_the_federation(make_job: MakeJob) -> None:
    """ann learns from 5 texts, bob from 6, cy from 9: passes in batches of 2 are 3, 3 and 5 steps, four times."""
    by_steps = Trainer.for_simulation(make_job("rounds.count=4", "train.steps=7"))
    by_epochs = Trainer.for_simulation(make_job("rounds.count=4", "train.steps=0", "train.epochs=1"))
    assert [steps_alone(by_steps, client) for client in by_steps.clients] == [28, 28, 28]
    assert [steps_alone(by_epochs, client) for client in by_epochs.clients] == [12, 12, 20]


def test_central_training_sees_as_many_examples_as_all_clients_did(make_job: MakeJob) -> None:
    """(4 + 6) + (4 + 0) are 14 examples, 7 batches of 2: a client that was not asked, or failed, saw none."""
    trainer = Trainer.for_simulation(make_job())
    assert steps_central(trainer, [record(ann=0), record(ann=4, bob=6), record(ann=4, bob=0)]) == 7


def test_the_comparison_of_a_run(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of two steps of two: each alone 4 steps, central 3 * 4. Every baseline is trained here once more."""
    fits = []

    def counted(resident: Any, drawn: Any, train: Any, steps: int, lr: float) -> dict[str, float]:
        fits.append(steps)
        return fit(resident, drawn, train, steps, lr)

    monkeypatch.setattr(compare_module, "fit", counted)
    seen = Seen()
    result = simulate(make_job("compare=true"), tmp_path / "run", seen)
    comparison = seen.comparison
    assert comparison is not None
    assert fits == [4, 4, 4, 12]
    assert comparison.base == result.records[0].loss
    assert comparison.federated == result.records[-1].loss
    assert set(comparison.seconds) == {"base", "alone", "federated", "central"}
    written = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))
    assert written == asdict(comparison)
    trainer = Trainer.for_simulation(make_job())
    learnt = {client: trainer.data(client).train for client in trainer.clients}
    pooled = [example for examples in learnt.values() for example in examples]
    for client, loss in comparison.alone.items():
        assert loss == pytest.approx(trained_loss(trainer, learnt[client], 4, client), abs=1e-6)
    assert comparison.central == pytest.approx(trained_loss(trainer, pooled, 12, "central"), abs=1e-6)
    assert len({*comparison.alone.values(), comparison.central, comparison.base}) == 5


def trained_loss(trainer: Trainer, examples: Any, steps: int, who: str) -> float:
    """Of an adapter trained on these examples, on everybody's held-out ones in one list."""
    job, everybodys = trainer.job, [one for client in trainer.clients for one in trainer.data(client).held_out]
    trainer.resident.load(blueprint(job).adapter, Adapter(), frozenset())
    train = job.train.model_copy(update={"schedule": "cosine"})
    fit(trainer.resident, batches(examples, 2, job.seed, who, "comparison"), train, steps, train.lr)
    return evaluate(trainer.resident, everybodys, 4)["loss"]


def test_a_run_that_does_not_compare_trains_no_baseline(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "fit", lambda *_: pytest.fail("it was trained"))
    simulate(make_job("rounds.count=1", "train.steps=1"), tmp_path / "run", Quiet())
    assert not (tmp_path / "run" / "comparison.json").exists()
