"""A client that has heard another run meanwhile, or lost its job, says so: it is told the job, and asked again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from client.trainer import Trainer
from fedtune.envelope import UNKNOWN_RUN, Envelope
from fedtune.job import Job
from server.coordinator import RunResult, run_job
from server.watchers import Quiet
from simulations.grid import InProcessGrid

MakeJob = Callable[..., Job]
JOB = ("clients.names=['ann', 'bob']", "train.steps=1", "rounds.count=2")


class Forgetful(Trainer):
    """ann knows no run any more when the ask `lost` comes, and learns it from a hello, if she learns at all."""

    lost, learns = "", True

    def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
        kind, ask = envelope.header["kind"], envelope.header["ask"]
        if client != "ann":
            return super().answer(envelope, client)
        self.heard.append(ask)
        if ask == self.lost and (not self.learns or "hello" not in self.heard[1:]):
            return Envelope({"client": "ann", "ask": ask, "failed": "this trainer has no job", UNKNOWN_RUN: True})
        given = super().answer(envelope, client)
        return replace(given, header={**given.header, "kind": kind})


def played(job: Job, folder: Path, lost: str, learns: bool = True) -> tuple[RunResult, list[str]]:
    trainer = Forgetful.for_simulation(job)
    trainer.lost, trainer.learns, trainer.heard = lost, learns, list[str]()
    return run_job(job, InProcessGrid(trainer), folder, Quiet(), write_model=False), trainer.heard


@pytest.mark.parametrize("wire", ["plain", "balanced"])
@pytest.mark.parametrize("lost", ["1.0", "1.evaluate"])
def test_it_takes_part_again(lost: str, wire: str, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(*JOB, f"wire.preset={wire}")
    result, heard = played(job, tmp_path / "run", lost)
    assert heard.count("hello") == 2
    assert heard[heard.index(lost) :][:3] == [lost, "hello", lost]
    assert [record.clients["ann"].failed for record in result.records] == [None] * len(result.records)


def test_in_buffered_rounds_too(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(*JOB, "rounds.mode=buffered", "rounds.buffer=2", "wire.preset=plain", "rounds.evaluate_every=0")
    result, heard = played(job, tmp_path / "run", "2.0")
    assert heard[heard.index("2.0") :][:3] == ["2.0", "hello", "2.0"]
    assert [record.clients["ann"].failed for record in result.records] == [None] * len(result.records)
    _, heard = played(job, tmp_path / "other", "1.0", learns=False)
    assert (heard.count("hello"), heard.count("1.0")) == (2, 2)


def test_once_for_each_ask_and_no_more(make_job: MakeJob, tmp_path: Path) -> None:
    result, heard = played(make_job(*JOB), tmp_path / "run", "1.0", learns=False)
    assert heard[heard.index("1.0") :][:3] == ["1.0", "hello", "1.0"]
    assert (heard.count("hello"), heard.count("1.0")) == (2, 2)
    [record] = [record for record in result.records if record.round == 1]
    assert record.clients["ann"].failed == "this trainer has no job"
