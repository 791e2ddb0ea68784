"""A client's own adapter: written on its node after each evaluation of a personal method, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.names import LONGEST_NAME, folder_name
from client.trainer import Trainer
from fedtune.base import blueprint
from fedtune.job import Job
from fedtune.payload import payload_of
from fedtune.peft_folder import read_adapter
from fedtune.strategy import Ask
from fedtune.wire import pack_ask, unpack_answer

MakeJob = Callable[..., Job]


def ask(trainer: Trainer, kind: str, round: int = 1) -> Any:
    state = trainer.strategy.start(blueprint(trainer.job).adapter)
    header = {"ask": f"{round}.{kind}", "run": "tiny", "round": round, "base": trainer.resident.base}
    return pack_ask(Ask(kind, trainer.strategy.broadcast(state)), "", header)


def node(job: Job, directory: Path | None) -> Trainer:
    return Trainer.for_node("bob", job, model=None, data=None, directory=directory)


def test_a_node_writes_its_own_adapter_when_it_evaluates(make_job: MakeJob, tmp_path: Path) -> None:
    trainer = node(make_job("strategy.name=fedsa_lora"), tmp_path / "bob")
    unpack_answer(trainer.answer(ask(trainer, "train")))
    trained = trainer.resident.adapter()
    assert not (tmp_path / "bob" / "adapter").exists()
    unpack_answer(trainer.answer(ask(trainer, "evaluate")))
    own, shared = read_adapter(tmp_path / "bob" / "adapter"), blueprint(trainer.job).adapter
    for path, pair in own.lora.items():
        assert torch.equal(pair.A, shared.lora[path].A)
        assert torch.equal(pair.B, trained.lora[path].B)
        assert pair.B.any()
        assert pair.scale == 1.5
    told = json.loads((tmp_path / "bob" / "adapter" / "fedtune.json").read_text(encoding="utf-8"))
    assert (told["client"], told["round"], told["base"]) == ("bob", 1, trainer.resident.base)
    assert told["strategy"]["name"] == "fedsa_lora"
    card = (tmp_path / "bob" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "It is client `bob`'s own; no other client has it." in card


def test_the_next_evaluation_replaces_it(make_job: MakeJob, tmp_path: Path) -> None:
    trainer = node(make_job("strategy.name=fedsa_lora"), tmp_path)
    for round in (1, 2):
        unpack_answer(trainer.answer(ask(trainer, "train", round)))
        unpack_answer(trainer.answer(ask(trainer, "evaluate", round)))
    assert json.loads((tmp_path / "adapter" / "fedtune.json").read_text(encoding="utf-8"))["round"] == 2
    kept = trainer.memory("bob")
    assert all(torch.equal(m.B, kept[f"{path}.lora_B"]) for path, m in read_adapter(tmp_path / "adapter").lora.items())


@pytest.mark.parametrize(("strategy", "has_directory"), [("fedavg", True), ("fedsa_lora", False)])
def test_nothing_is_written_without_a_personal_method_and_a_directory(
    strategy: str, has_directory: bool, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = node(make_job(f"strategy.name={strategy}"), tmp_path if has_directory else None)
    unpack_answer(trainer.answer(ask(trainer, "evaluate")))
    assert list(tmp_path.rglob("adapter")) == []


def test_memory_of_another_rank_is_none(make_job: MakeJob, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = node(make_job("strategy.name=fedsa_lora", "adapter.rank=2"), tmp_path)
    unpack_answer(first.answer(ask(first, "train")))
    second = node(make_job("strategy.name=fedsa_lora"), tmp_path)
    assert dict(second.memory("bob")) == {}
    assert "of another model, method or adapter" in caplog.text
    unpack_answer(second.answer(ask(second, "train", 2)))


@pytest.mark.parametrize("client", [".", "..", "../up", "a/b", "", "a\\b", "ü" * 200, "x" * 300, "ann", "two words"])
def test_no_name_leads_out_of_the_folder(client: str, tmp_path: Path) -> None:
    name = folder_name(client)
    assert 0 < len(name) <= LONGEST_NAME
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    (tmp_path / name).mkdir()


def test_no_two_clients_share_a_name() -> None:
    clients = ["a/b", "a%2Fb", "a%252Fb", ".", "%2E", "..", "", "%", "x" * 300, "x" * 301]
    assert len({folder_name(client) for client in clients}) == len(clients)
    assert (folder_name("ann"), folder_name("two words")) == ("ann", "two words")


def test_a_payload_of_the_shared_part_holds_no_b(make_job: MakeJob) -> None:
    trainer = node(make_job("strategy.name=fedsa_lora"), None)
    answer = unpack_answer(trainer.answer(ask(trainer, "train")))
    assert answer.payload.tensors.keys() == {f"{path}.lora_A" for path in blueprint(trainer.job).adapter.lora}
    assert payload_of(blueprint(trainer.job).adapter).tensors.keys() > answer.payload.tensors.keys()
