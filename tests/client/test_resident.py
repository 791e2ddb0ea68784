"""The job that a trainer has, and of which run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client.resident import Resident
from fedtune.envelope import UNKNOWN_RUN, Envelope


class Told:
    """Answers with its job."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def answer(self, ask: Envelope) -> Envelope:
        return Envelope({"job": self.job})


def hello(run: str, lr: int) -> Envelope:
    return Envelope({"kind": "hello", "run": run, "job": {"lr": lr}})


def train(run: str) -> Envelope:
    return Envelope({"kind": "train", "run": run})


@pytest.mark.parametrize("is_kept", [True, False])
def test_no_run_is_answered_with_the_job_of_another(tmp_path: Path, is_kept: bool) -> None:
    trainer = Resident(Told, tmp_path if is_kept else None)
    trainer.answer(hello("A", 1))
    trainer.answer(hello("B", 2))
    refused = trainer.answer(train("A")).header
    assert (refused[UNKNOWN_RUN], "has the job of run B" in refused["failed"]) == (True, True)
    trainer.answer(hello("A", 1))
    assert trainer.answer(train("A")).header == {"job": {"lr": 1}}


def test_a_run_with_the_same_job_has_to_say_hello_too(tmp_path: Path) -> None:
    trainer = Resident(Told, tmp_path)
    trainer.answer(hello("A", 1))
    trainer.answer(hello("B", 1))
    assert trainer.answer(train("A")).header[UNKNOWN_RUN] is True
    assert trainer.answer(train("B")).header == {"job": {"lr": 1}}


@pytest.mark.parametrize("left", [None, "{"])
def test_who_has_lost_its_job_says_so(tmp_path: Path, left: str | None) -> None:
    Resident(Told, tmp_path).answer(hello("A", 1))
    assert Resident(Told, tmp_path).answer(train("A")).header == {"job": {"lr": 1}}
    (tmp_path / "job.json").unlink()
    if left:
        (tmp_path / "job.json").write_text(left)
    refused = Resident(Told, tmp_path).answer(train("A")).header
    assert (refused[UNKNOWN_RUN], "has no job" in refused["failed"]) == (True, True)
