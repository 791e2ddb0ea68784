"""Whole runs of a personal method, and of Fed-SB, on a tiny model: what is published, and what lies with each client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.data.sources import clients_in
from client.kept import HOME
from client.trainer import Trainer
from fedtune.base import blueprint
from fedtune.job import Job
from fedtune.peft_folder import read_adapter
from fedtune.strategy import Ask
from fedtune.wire import pack_ask, unpack_answer
from server.watchers import Quiet
from simulations.engine import simulate
from simulations.flower_client import Worker
from simulations.flower_engine import forget

MakeJob = Callable[..., Job]
CLIENTS = ("ann", "bob", "cy")


def test_every_client_has_the_adapter_that_it_was_measured_with(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("strategy.name=fedsa_lora")
    result = simulate(job, tmp_path / "run", Quiet())
    own = {client: read_adapter(tmp_path / "run" / "clients" / client / "adapter") for client in CLIENTS}
    fresh, last = Trainer.for_simulation(job), result.records[-1]
    for client in CLIENTS:
        local = fresh.local(client, 2)
        local.load(own[client])
        assert local.evaluate().get("loss") == pytest.approx(last.clients[client].loss, rel=1e-6)
    path = next(iter(own["ann"].lora))
    assert torch.equal(own["ann"].lora[path].A, own["bob"].lora[path].A)
    assert not torch.equal(own["ann"].lora[path].B, own["bob"].lora[path].B)


def test_what_is_published_says_that_it_is_the_shared_part(make_job: MakeJob, tmp_path: Path) -> None:
    result = simulate(make_job("strategy.name=fedsa_lora", "rounds.count=1"), tmp_path / "run", Quiet())
    assert not any(pair.B.any() for pair in read_adapter(result.adapter).lora.values())
    assert json.loads((result.adapter / "fedtune.json").read_text(encoding="utf-8"))["personal"] is True
    card = (result.adapter / "README.md").read_text(encoding="utf-8")
    assert "What is published here is the shared part; each client's own adapter lies with the client." in card


def test_a_shared_model_has_neither_the_sentence_nor_the_folders(make_job: MakeJob, tmp_path: Path) -> None:
    result = simulate(make_job("rounds.count=1"), tmp_path / "run", Quiet())
    assert json.loads((result.adapter / "fedtune.json").read_text(encoding="utf-8"))["personal"] is False
    assert "shared part" not in (result.adapter / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "run" / "clients").exists()


def test_a_client_that_was_never_drawn_has_the_shared_part(make_job: MakeJob, tmp_path: Path) -> None:
    keys = ("strategy.name=fedsa_lora", "rounds.count=1", "rounds.clients=1")
    result = simulate(make_job(*keys), tmp_path / "run", Quiet())
    trained = {c for c in CLIENTS if result.records[-1].clients[c].bytes_up > result.records[0].clients[c].bytes_up + 1000}
    assert len(trained) == 1
    for client in CLIENTS:
        own = read_adapter(tmp_path / "run" / "clients" / client / "adapter")
        assert any(pair.B.any() for pair in own.lora.values()) == (client in trained)


def test_a_worker_of_many_clients_writes_each_into_a_folder_of_its_own(make_job: MakeJob, tmp_path: Path) -> None:
    """The other engine: any worker answers for any client, and all share one directory."""
    job = make_job("strategy.name=fedsa_lora")
    worker = Worker(job, clients_in(job.data, job.clients), tmp_path)
    payload = worker.strategy.broadcast(worker.strategy.start(blueprint(job).adapter))
    for client in ("ann", "bob"):
        header = {"ask": "1.e", "run": "tiny", "round": 1, "base": worker.resident.base}
        unpack_answer(worker.answer(pack_ask(Ask("evaluate", payload), "", header), client))
    assert sorted(path.parent.name for path in tmp_path.rglob("adapter")) == ["ann", "bob"]


def test_forgetting_leaves_the_clients_own_adapters(tmp_path: Path) -> None:
    (tmp_path / "both" / "ann" / "adapter").mkdir(parents=True)
    for folder in ("both", "memory"):
        (tmp_path / folder / HOME / "ann").mkdir(parents=True)
        forget(tmp_path / folder)
    forget(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["both"]
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["ann"]


def test_fed_sb_learns_and_sends_little_after_the_first_round(make_job: MakeJob, tmp_path: Path) -> None:
    """Up in round 2: r^2 = 16 float32 numbers for each of the 14 modules, and what names them. Up in round 1, `r*(d + k)` more:
    d + k is 64, 48, 48 and 64 in attention and three times 80 in the MLP, in each of two layers."""
    keys = ("strategy.name=fed_sb", "train.steps=8", "train.lr=0.05", "rounds.count=3", "rounds.evaluate_every=1")
    records = simulate(make_job(*keys), tmp_path / "run", Quiet()).records
    assert records[-1].loss < records[0].loss - 0.1
    up = [record.clients["bob"].bytes_up for record in records]
    cores, calibration = 4 * 16 * 14, 4 * 4 * 2 * (64 + 48 + 48 + 64 + 3 * 80)
    assert cores < up[2] < up[1] - calibration
    assert up[2] == pytest.approx(up[3], rel=0.01)
