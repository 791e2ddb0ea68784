"""Whole runs in this process, on a tiny model: the same job gives the same bytes, and trouble of one client stays its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from client import model as model_module
from client import trainer as trainer_module
from fedtune.errors import DataError, JobError, ModelError, RunFolderError
from fedtune.job import Job
from server.coordinator import RunResult
from server.watchers import Quiet
from simulations.engine import simulate
from strategies.fedavg import FedAvg

MakeJob = Callable[..., Job]


def run(job: Job, folder: Path) -> RunResult:
    return simulate(job, folder, Quiet())


def digest(adapter: Path) -> str:
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def losses(result: RunResult) -> list[float | None]:
    return [record.loss for record in result.records]


@pytest.mark.parametrize(
    "keys",
    [
        ["strategy.name=fedavg"],
        ["strategy.name=ffa_lora", "adapter.dropout=0.2"],
        ["strategy.name=flora", "clients.ranks.bob=2", "clients.alphas.cy=3", "rounds.clients=2"],
    ],
)
def test_the_same_job_gives_the_same_bytes_whatever_was_drawn_before(
    keys: Sequence[str], make_job: MakeJob, tmp_path: Path
) -> None:
    results = []
    for name in ("one", "two"):
        torch.manual_seed(len(results))
        results.append(run(make_job(*keys), tmp_path / name))
    assert digest(results[0].adapter) == digest(results[1].adapter)
    assert losses(results[0]) == losses(results[1])


def test_another_seed_gives_other_bytes(make_job: MakeJob, tmp_path: Path) -> None:
    assert digest(run(make_job("seed=1"), tmp_path / "one").adapter) != digest(run(make_job(), tmp_path / "two").adapter)


def test_training_helps(make_job: MakeJob, tmp_path: Path) -> None:
    before, *_, after = losses(run(make_job("rounds.count=4", "train.steps=8"), tmp_path / "run"))
    assert after < before - 0.3


def test_stock_peft_computes_what_the_run_measured(make_job: MakeJob, tiny_model: Path, tmp_path: Path) -> None:
    """The held-out loss of the last record, once more: from the published adapter and the texts alone."""
    job = make_job("strategy.name=flora")
    result = run(job, tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(result.adapter)).eval()
    trainer = trainer_module.Trainer.for_simulation(job)
    total, count = 0.0, 0
    for client in trainer.clients:
        for example in trainer.data(client).held_out:
            learnt = len(example.input_ids) - 1
            with torch.no_grad():
                ids = torch.tensor([example.input_ids])
                total += peft(input_ids=ids, labels=ids).loss.item() * learnt
            count += learnt
    assert result.records[-1].loss == pytest.approx(total / count, rel=1e-4)


def test_the_base_model_and_each_client_s_data_are_read_once(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[str, int] = {}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counted[name] = counted.get(name, 0) + 1
            return function(*args)

        return call

    monkeypatch.setattr(model_module, "load_base", counting("model", model_module.load_base))
    monkeypatch.setattr(trainer_module, "load_client", counting("data", trainer_module.load_client))
    run(make_job("rounds.count=3"), tmp_path / "run")
    assert counted == {"model": 1, "data": 3}


def failing(monkeypatch: pytest.MonkeyPatch, client_examples: int, error: BaseException, after: int = 0) -> None:
    """FedAvg's client half raises for the client with so many examples, from its `after`-th call on."""
    calls = []
    whole = FedAvg.answer

    def answer(self: FedAvg, ask: Any, local: Any, memory: Any) -> Any:
        if local.examples == client_examples:
            calls.append(1)
            if len(calls) > after:
                raise error
        return whole(self, ask, local, memory)

    monkeypatch.setattr(FedAvg, "answer", answer)


def test_a_client_half_that_raises_is_a_failed_answer(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bob has 6 examples. Without him the weights are 5 of ann's and 9 of cy's."""
    failing(monkeypatch, 6, AttributeError("no such layer"))
    result = run(make_job(), tmp_path / "run")
    for record in result.records[1:]:
        assert record.clients["bob"].failed == "AttributeError: no such layer"
        assert record.answered == 2
    without_bob = run(make_job("clients.names=['ann', 'cy']"), tmp_path / "other")
    assert digest(result.adapter) == digest(without_bob.adapter)


def test_ctrl_c_in_a_round_leaves_the_one_before(
    make_job: MakeJob, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(make_job("rounds.count=1"), tmp_path / "whole")
    failing(monkeypatch, 9, KeyboardInterrupt(), after=1)  # cy, after ann and bob answered in round 2
    with pytest.raises(KeyboardInterrupt):
        run(make_job(), tmp_path / "run")
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("adapter", "job.toml", "journal.jsonl", "lock", "metrics.jsonl", "rounds", "spool", "state"),
    ]
    assert [path.name for path in (folder / "rounds").iterdir()] == ["0001"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    PeftModel.from_pretrained(base, str(folder / "adapter"))
    assert digest(folder / "adapter") == digest(whole.adapter)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        (["data.path=/nowhere/at/all"], DataError),
        (["clients.count=4"], DataError),
        (["adapter.rank=33"], ModelError),
        (["adapter.targets=q_prog"], ModelError),
        (["compare=true", "rounds.evaluate_every=2"], JobError),
        (["compare=true", "strategy.name=fedkseed", "train.optimizer=sgd", "train.clip=0"], JobError),
        (["compare=true", "data.held_out=0"], JobError),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    keys: Sequence[str], error: type[Exception], make_job: MakeJob, tmp_path: Path
) -> None:
    with pytest.raises(error):
        run(make_job(*keys), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_data_of_the_last_client_is_known_before_the_first_step(make_job: MakeJob, tiny_data: Path, tmp_path: Path) -> None:
    for file in tiny_data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "zoe.jsonl").write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"zoe.jsonl, line 2"):
        run(make_job(f"data.path={tmp_path}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_refused_before_the_model_is_loaded(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.toml").touch()
    monkeypatch.setattr(model_module, "load_base", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(RunFolderError, match="already holds a run"):
        run(make_job(), tmp_path)
