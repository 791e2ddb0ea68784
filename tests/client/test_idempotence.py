"""The real trainer: asks that come again, other words under a known name, failures and restarts among them, and its answers are
those of a trainer to which nothing happened, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from client.doors import doors_of
from client.model import ResidentModel
from client.trainer import Trainer
from client.trainer_options import parser
from fedtune.envelope import Envelope
from fedtune.job import Job
from server.coordinator import run_job
from server.watchers import Quiet
from simulations.grid import InProcessGrid

MakeJob = Callable[..., Job]
JOBS = {
    "what the codec lost, and an adapter of its own": ["strategy.name=fedsa_lora", "wire.preset=balanced"],
    "control variates": ["strategy.name=scaffold", "train.optimizer=sgd", "train.clip=0"],
}


@dataclass(frozen=True)
class Run:
    """What bob was asked in two rounds, and answered."""

    job: Job
    asks: tuple[Envelope, ...]
    answers: tuple[Envelope, ...]

    @property
    def hello(self) -> Envelope:
        header = {**self.asks[0].header, "job": self.job.model_dump(mode="json")}
        return replace(self.asks[0], header=header)

    def pairs(self) -> Iterator[tuple[Envelope, Envelope]]:
        return zip(self.asks[1:], self.answers[1:], strict=True)


@pytest.fixture(scope="module", params=JOBS)
def run(request: pytest.FixtureRequest, make_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> Run:
    job = make_job(*JOBS[request.param], "train.steps=1", "rounds.count=2", "clients.names=['bob']")
    heard: list[tuple[Envelope, Envelope]] = []

    class Recorded(Trainer):
        def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
            heard.append((envelope, super().answer(envelope, client)))
            return heard[-1][1]

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run_job(job, InProcessGrid(Recorded.for_simulation(job)), folder, Quiet(), write_model=False)
    asks, answers = zip(*heard, strict=True)
    return Run(job, asks, answers)


@pytest.fixture
def doors(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Callable[[], Any]:
    """A new process of bob's trainer, on his folder."""
    own = ["--model", str(tiny_model), "--data", str(tiny_data / "bob.jsonl"), "--dir", str(tmp_path / "bob")]
    return lambda: doors_of(parser().parse_args(["--socket", "s.sock", "--insecure", "--client", "bob", *own]))


def said(answer: Envelope) -> tuple[Mapping[str, Any], Any]:
    """All of it but how long it took."""
    return {key: value for key, value in answer.header.items() if key != "seconds"}, answer.tensors


def in_other_words(ask: Envelope) -> Envelope:
    return replace(ask, header={**ask.header, "note": "another content"})


def of_another_base(ask: Envelope) -> Envelope:
    return replace(ask, header={**ask.header, "base": "another"})


def test_a_run_is_not_disturbed(run: Run, doors: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    door, stored = doors(), []
    assert "failed" not in door.answer(run.hello).header
    for number, (ask, answer) in enumerate(run.pairs()):
        assert "failed" in door.answer(of_another_base(ask)).header
        assert "failed" not in door.answer(in_other_words(ask)).header
        if number % 2:
            door = doors()  # it takes the run up again by itself
        given = door.answer(ask)
        assert said(given) == said(answer)
        assert door.answer(ask) == given
        door.answer(run.hello)  # the coordinator was killed, and goes on
        stored.append((ask, given))
    door = doors()
    monkeypatch.setattr(ResidentModel, "__init__", lambda *_: pytest.fail("no model is needed for what is stored"))
    last = [pair for pair in stored if pair[0].header["round"] >= 1]
    assert len(last) == 4
    for ask, given in last:
        assert door.answer(ask) == given


def test_a_lost_answer_is_made_again(run: Run, doors: Callable[[], Any], tmp_path: Path) -> None:
    """The last round is repeated by a coordinator that had to go back, to a client whose stored answers are damaged."""
    door = doors()
    door.answer(run.hello)
    for ask, _ in run.pairs():
        door.answer(ask)
    for file in tmp_path.rglob("*.answer"):
        file.write_bytes(b"damaged")
    for ask, answer in run.pairs():
        if ask.header["round"] >= 2:
            assert said(door.answer(ask)) == said(answer)


def test_a_simulation_goes_on_from_its_folder(run: Run, tmp_path: Path) -> None:
    """In another process for each ask; and with each ask again, as its answer may have been lost."""
    for ask, answer in run.pairs():
        trainer = Trainer.for_simulation(run.job, tmp_path)
        for _ in range(2):
            assert said(trainer.answer(ask, "bob")) == said(answer)
    assert list(tmp_path.rglob("*.answer")) == []
