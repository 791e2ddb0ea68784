"""One client in one round: what is drawn depends on (seed, round, client) and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from client.local import local_steps
from client.trainer import Trainer
from fedtune.adapter import Adapter
from fedtune.base import blueprint
from fedtune.job import Job, Train

MakeJob = Callable[..., Job]


@pytest.mark.parametrize(
    ("train", "examples", "steps"),
    [
        ({"steps": 7, "epochs": 3}, 100, 7),  # steps win
        ({"steps": 0, "epochs": 1, "batch": 4}, 8, 2),
        ({"steps": 0, "epochs": 1, "batch": 4}, 9, 3),  # the last batch is not full
        ({"steps": 0, "epochs": 2.5, "batch": 5}, 10, 5),
        ({"steps": 0, "epochs": 0.1, "batch": 4}, 3, 1),  # never none
        ({"steps": 0, "epochs": 3, "batch": 10}, 1, 1),
    ],
)
def test_steps_of_a_round(train: Mapping[str, float], examples: int, steps: int) -> None:
    assert local_steps(Train(**train), examples) == steps


def test_epochs_reach_the_training_loop(make_job: MakeJob) -> None:
    """bob has 8 texts; a fifth, rounded to 2, is held out. Two passes in batches of 4 over 6 are 3 steps."""
    trainer = Trainer.for_simulation(make_job("train.steps=0", "train.epochs=2", "train.batch=4"))
    local = trainer.local("bob", 1)
    local.load(blueprint(trainer.job).adapter)
    assert local.examples == 6
    figures = local.fit()
    assert (figures["steps"], figures["examples"]) == (3, 12)


def trained(job: Job, client: str = "bob", round: int = 1) -> Adapter:
    trainer = Trainer.for_simulation(job)
    local = trainer.local(client, round)
    local.load(blueprint(job).adapter)
    local.fit()
    return local.adapter()


def same(one: Adapter, other: Adapter) -> bool:
    return all(
        torch.equal(pair.A, other.lora[path].A) and torch.equal(pair.B, other.lora[path].B) for path, pair in one.lora.items()
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_names_give_the_same_bits(dropout: float, make_job: MakeJob) -> None:
    job = make_job(f"adapter.dropout={dropout}")
    torch.manual_seed(1)
    first = trained(job)
    torch.manual_seed(2)
    assert same(trained(job), first)


def test_dropout_drops(make_job: MakeJob) -> None:
    assert not same(trained(make_job("adapter.dropout=0.3")), trained(make_job("adapter.dropout=0.0")))


def test_another_round_draws_other_batches(make_job: MakeJob) -> None:
    assert not same(trained(make_job(), round=1), trained(make_job(), round=2))


def test_another_seed_draws_other_batches(make_job: MakeJob) -> None:
    """The start is the same: only what is drawn while training differs."""
    trainers = [Trainer.for_simulation(make_job(f"seed={seed}", "data.held_out=0")) for seed in (0, 1)]
    start, adapters = blueprint(make_job()).adapter, []
    for trainer in trainers:
        local = trainer.local("bob", 1)
        local.load(start)
        local.fit()
        adapters.append(local.adapter())
    assert not same(*adapters)


def test_another_client_with_the_same_texts_draws_other_batches(make_job: MakeJob, tiny_data, tmp_path) -> None:
    for client in ("one", "two"):
        (tmp_path / f"{client}.jsonl").write_bytes((tiny_data / "cy.jsonl").read_bytes())
    job = make_job(f"data.path={tmp_path}", "data.held_out=0")
    assert not same(trained(job, "one"), trained(job, "two"))


def test_what_a_client_drew_does_not_depend_on_who_trained_before_it(make_job: MakeJob) -> None:
    job = make_job("adapter.dropout=0.3")
    alone, trainer = trained(job, "cy"), Trainer.for_simulation(job)
    for client in ("ann", "bob", "cy"):
        local = trainer.local(client, 1)
        local.load(blueprint(job).adapter)
        local.fit()
    assert same(trainer.local("cy", 1).adapter(), alone)


def test_the_global_generator_is_left_as_it_was(make_job: MakeJob) -> None:
    trainer = Trainer.for_simulation(make_job("adapter.dropout=0.3"))
    local = trainer.local("ann", 1)
    local.load(blueprint(trainer.job).adapter)
    before = torch.get_rng_state()
    local.fit()
    local.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_peak_of_the_rate_falls_over_the_rounds(make_job: MakeJob) -> None:
    """From lr in the first round to min_lr * lr in the last, half-way in the middle."""
    keys = ("train.lr=0.1", "train.round_schedule=cosine", "train.min_lr=0.2", "rounds.count=5")
    trainer = Trainer.for_simulation(make_job(*keys))
    assert [trainer.local("ann", n).peak_lr() for n in (1, 3, 5)] == pytest.approx([0.1, 0.06, 0.02])


def test_a_constant_peak_stays(make_job: MakeJob) -> None:
    trainer = Trainer.for_simulation(make_job("train.lr=0.1"))
    assert trainer.local("ann", 2).peak_lr() == 0.1


def test_rank_and_scale_are_the_client_s_own(make_job: MakeJob) -> None:
    trainer = Trainer.for_simulation(make_job("clients.ranks.bob=2", "clients.alphas.cy=12"))
    told = {client: (trainer.local(client, 1).rank, trainer.local(client, 1).scale) for client in trainer.clients}
    assert told == {"ann": (4, 6 / 4), "bob": (2, 6 / 2), "cy": (4, 12 / 4)}
