"""The trainer: every ask has an answer, if only the reason why there is none."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from client.allowance import Allowance, within
from client.kept import HOME, MANIFEST
from client.trainer import Trainer
from fedtune.base import base_hash, blueprint
from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, DataError, ModelError
from fedtune.job import Job
from fedtune.memory import Memory
from fedtune.payload import Payload, payload_of
from fedtune.strategy import Answer, Ask, LocalModel
from fedtune.wire import pack_ask, unpack_answer
from strategies.fedavg import FedAvg

MakeJob = Callable[..., Job]


@pytest.fixture
def trainer(make_job: MakeJob) -> Trainer:
    return Trainer.for_simulation(make_job())


def ask(trainer: Trainer, kind: str = "train", payload: Payload | None = None, **header: Any) -> Envelope:
    payload = payload_of(blueprint(trainer.job).adapter) if payload is None else payload
    own = {"ask": "1.0", "run": "tiny", "round": 1, "base": trainer.resident.base}
    return pack_ask(Ask(kind, payload), "", own | header)


def reason(envelope: Envelope) -> str:
    with pytest.raises(ClientFailed) as error:
        unpack_answer(envelope)
    return str(error.value)


def test_a_hello_says_who_the_client_is(trainer: Trainer, tiny_model: Path) -> None:
    hello = pack_ask(Ask("hello"), "", {"ask": "hello", "run": "tiny"})
    header = trainer.answer(hello, "bob").header
    told = {key: header[key] for key in ("ask", "run", "client", "examples", "rank", "scale", "base")}
    own = {"client": "bob", "examples": 6, "rank": 4, "scale": 1.5, "base": base_hash(tiny_model)}  # 6 of 8 are learnt
    assert told == {"ask": "hello", "run": "tiny"} | own


def test_a_hello_of_another_run_begins_with_nothing_and_one_of_the_same_goes_on(trainer: Trainer) -> None:
    raising(trainer, "ValueError").answer(ask(trainer, "count"), "bob")
    for run, remembered in (("tiny", ["count"]), ("another", [])):
        trainer.answer(pack_ask(Ask("hello"), "", {"ask": "hello", "run": run}), "bob")
        assert list(trainer.memory("bob")) == remembered


def test_training_through_messages_is_training(trainer: Trainer) -> None:
    envelope = trainer.answer(ask(trainer), "bob")
    answer, start = unpack_answer(envelope), blueprint(trainer.job).adapter
    assert answer.weight == 6
    assert answer.metrics["steps"] == 2
    assert answer.metrics["examples"] == 4
    assert {key: envelope.header[key] for key in ("ask", "round", "client")} == {"ask": "1.0", "round": 1, "client": "bob"}
    assert envelope.header["seconds"] > 0
    for path, pair in start.lora.items():
        assert not torch.equal(answer.payload.tensors[f"{path}.lora_B"], pair.B)


def test_evaluation_through_messages_is_evaluation(trainer: Trainer) -> None:
    """B = 0: the figures are those of the base model."""
    local = trainer.local("cy", 1)
    local.load(blueprint(trainer.job).adapter)
    wanted = local.evaluate()
    answer = unpack_answer(trainer.answer(ask(trainer, "evaluate"), "cy"))
    assert answer.metrics == wanted
    assert answer.payload == Payload()


def test_without_a_name_the_one_client_is_meant(make_job: MakeJob) -> None:
    trainer = Trainer.for_simulation(make_job("clients.names=['bob']"))
    assert trainer.answer(ask(trainer)).header["client"] == "bob"


def test_an_ask_for_another_base_is_answered_with_both_hashes(trainer: Trainer) -> None:
    said = reason(trainer.answer(ask(trainer, base="0ther"), "ann"))
    assert said == f"the ask is for base model 0ther, this client has {trainer.resident.base}: use the same model files"


def test_a_client_that_is_not_here(trainer: Trainer) -> None:
    assert reason(trainer.answer(ask(trainer), "dee")) == "client 'dee' was asked, this trainer has ann, bob, cy"


@pytest.mark.parametrize("broken", ["version", "roles", "round"])
def test_a_header_with_a_hole_is_answered(broken: str, trainer: Trainer) -> None:
    envelope = ask(trainer)
    header = {key: value for key, value in envelope.header.items() if key != broken}
    assert broken in reason(trainer.answer(Envelope(header, envelope.tensors), "ann"))


@pytest.mark.parametrize("round", [None, "two", [1]])
def test_a_round_that_is_no_number_is_answered(round: object, trainer: Trainer) -> None:
    assert reason(trainer.answer(ask(trainer, round=round), "ann"))


def test_an_adapter_of_other_shapes_is_answered_and_the_next_ask_is_served(trainer: Trainer) -> None:
    payload = payload_of(blueprint(trainer.job).adapter)
    name = next(iter(payload.tensors))
    bad = replace(payload, tensors={**payload.tensors, name: torch.zeros(3, 3)})
    before = unpack_answer(trainer.answer(ask(trainer), "ann"))
    assert reason(trainer.answer(ask(trainer, payload=bad), "ann"))
    after = unpack_answer(trainer.answer(ask(trainer), "ann"))
    assert all(torch.equal(tensor, before.payload.tensors[name]) for name, tensor in after.payload.tensors.items())


@dataclass(frozen=True)
class Raises(FedAvg):
    """Its client half raises what `error` names; of the kind "count" it counts how often it was asked."""

    name: ClassVar[str] = "raises"
    error: str = "ValueError"

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        if ask.kind == "count":
            memory["count"] = memory.get("count", torch.zeros(1)) + 1
            return Answer(metrics={"count": memory["count"].item()})
        memory["half"] = torch.ones(1)
        raise getattr(__import__("builtins"), self.error)("the half is broken")


def raising(trainer: Trainer, error: str) -> Trainer:
    trainer.strategy = Raises(error)
    return trainer


@pytest.mark.parametrize(
    "error", ["ValueError", "RuntimeError", "KeyError", "TypeError", "AttributeError", "ZeroDivisionError", "AssertionError"]
)
def test_a_client_half_that_raises_is_a_failed_answer_and_the_trainer_goes_on(error: str, trainer: Trainer) -> None:
    raising(trainer, error)
    assert reason(trainer.answer(ask(trainer), "ann")).startswith(f"{error}: ")
    assert unpack_answer(trainer.answer(ask(trainer, "count"), "ann")).metrics == {"count": 1}


def test_ctrl_c_is_no_failure_of_a_client(trainer: Trainer) -> None:
    with pytest.raises(KeyboardInterrupt):
        raising(trainer, "KeyboardInterrupt").answer(ask(trainer), "ann")


def test_each_client_has_its_own_memory_as_long_as_the_run_lasts(trainer: Trainer) -> None:
    raising(trainer, "ValueError")
    for client, count in (("ann", 1), ("ann", 2), ("bob", 1), ("ann", 3)):
        assert unpack_answer(trainer.answer(ask(trainer, "count"), client)).metrics == {"count": count}


@pytest.mark.parametrize("has_directory", [False, True])
def test_an_ask_that_fails_leaves_no_trace(has_directory: bool, make_job: MakeJob, tmp_path: Path) -> None:
    """Neither in the middle of its work nor at its end, when the policy's time is over."""
    trainer = raising(Trainer.for_simulation(make_job(), tmp_path if has_directory else None), "ValueError")
    trainer.answer(ask(trainer, "count"), "ann")
    trainer.answer(ask(trainer, ask="1.1"), "ann")
    with within(Allowance(max_seconds=5, clock=itertools.count(step=10).__next__)):
        assert "policy.max_seconds" in reason(trainer.answer(ask(trainer, "count", ask="1.2"), "ann"))
    assert {name: tensor.item() for name, tensor in trainer.memory("ann").items()} == {"count": 1}
    assert unpack_answer(trainer.answer(ask(trainer, "count", ask="1.3"), "ann")).metrics == {"count": 2}


def node(job: Job, data: Path, directory: Path | None = None, client: str = "bob", model: str | None = None) -> Trainer:
    return Trainer.for_node(client, job, model=model, data=str(data), directory=directory)


def test_a_node_s_memory_outlives_its_trainer(make_job: MakeJob, tiny_data: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        trainer = raising(node(make_job(), tiny_data / "bob.jsonl", tmp_path / "state"), "ValueError")
        assert unpack_answer(trainer.answer(ask(trainer, "count", ask=f"1.{count}"))).metrics == {"count": count}
    assert [path.name for path in (tmp_path / "state" / HOME).iterdir()] == ["bob"]


def test_a_name_that_is_no_file_name_costs_no_round(make_job: MakeJob, tiny_data: Path, tmp_path: Path) -> None:
    trainer = raising(node(make_job(), tiny_data / "bob.jsonl", tmp_path / "state", client="../ward/3"), "ValueError")
    assert unpack_answer(trainer.answer(ask(trainer, "count"))).metrics == {"count": 1}
    assert [path.parent.name for path in tmp_path.rglob(MANIFEST)] == ["%2E.%2Fward%2F3"]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_node_takes_its_own_model_and_data_and_the_rest_from_the_job(
    make_job: MakeJob, tiny_data: Path, tiny_model: Path
) -> None:
    trainer = node(
        make_job("train.steps=1", "data.path=/nowhere", "model.path=/no"), tiny_data / "cy.jsonl", None, "me", str(tiny_model)
    )
    assert trainer.clients == ("me",)  # data of one client needs not bear its name
    answer = unpack_answer(trainer.answer(ask(trainer)))
    assert (answer.weight, answer.metrics["steps"]) == (9, 1)  # 2 of cy's 11 texts are held out


def test_a_node_declares_its_own_budget(make_job: MakeJob, tiny_data: Path) -> None:
    """adapter.rank goes by it: 3 times the usual 4, and alpha likewise, so that the scale stays 6 / 4."""
    keys = ["adapter.rank={default=4, by='budget', max=16}", "adapter.alpha={default=6, by='budget', max=99}"]
    data = {"model": None, "data": str(tiny_data / "bob.jsonl"), "directory": None}
    trainer = Trainer.for_node("bob", make_job(*keys, "clients.budgets.bob=1"), **data, budget=3)
    local = trainer.local("bob", 1)
    assert (local.rank, local.scale) == (12, 1.5)
    assert trainer.local("bob", 1).rank_of("model.layers.0.self_attn.q_proj") == 12


def test_a_node_finds_its_client_in_a_folder_of_many(make_job: MakeJob, tiny_data: Path) -> None:
    assert unpack_answer((trainer := node(make_job(), tiny_data)).answer(ask(trainer))).weight == 6


def test_a_node_that_is_not_in_a_folder_of_many(make_job: MakeJob, tiny_data: Path) -> None:
    with pytest.raises(DataError, match=r"holds ann, bob, cy, but no client 'bop'; name one of them"):
        node(make_job(), tiny_data, client="bop")


def test_a_node_and_a_simulation_give_the_same_bits(make_job: MakeJob, tiny_data: Path, trainer: Trainer) -> None:
    trainer.answer(ask(trainer), "ann")
    simulated = unpack_answer(trainer.answer(ask(trainer), "bob"))
    alone = node(make_job(), tiny_data / "bob.jsonl")
    deployed = unpack_answer(alone.answer(ask(alone)))
    assert all(torch.equal(t, simulated.payload.tensors[name]) for name, t in deployed.payload.tensors.items())


def test_classes_are_those_of_all_clients_in_the_data(make_job: MakeJob, tmp_path: Path) -> None:
    for client, labels in {"ann": ["pet", "farm"], "bob": ["wild", "pet"]}.items():
        rows = [json.dumps({"text": "the cat", "label": label}) for label in labels]
        (tmp_path / f"{client}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    trainer = Trainer.for_simulation(make_job("model.task=classification", f"data.path={tmp_path}"))
    assert trainer.job.model.labels == ("farm", "pet", "wild")
    assert trainer.resident.dense["score.weight"].shape == (3, 32)


def test_a_device_that_is_not_here(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"no CUDA device; type --set machine\.device=auto"):
        Trainer.for_simulation(make_job("machine.device=cuda"))
