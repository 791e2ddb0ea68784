"""What a node says for itself that it can afford, in place of what the job says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from client.doors import builder
from client.trainer import Trainer
from client.trainer_options import parser
from fedtune.envelope import Envelope
from fedtune.job import Job

MakeJob = Callable[..., Job]
NEEDED = ["--insecure", "--client", "bob", "--socket", "s.sock"]


def limits(job: Job, *given: str) -> object:
    """As the server hears of them."""
    trainer = builder(parser().parse_args([*NEEDED, *given]))(job.model_dump(mode="json"))
    return trainer.answer(Envelope({"kind": "hello", "ask": "hello"}, ())).header["limits"]


def test_a_node_says_what_it_can_afford(make_job: MakeJob) -> None:
    given = "--memory", "1.5MB", "--seconds", "0.5", "--layers", "2"
    assert limits(make_job(), *given) == {"memory": 1_500_000.0, "seconds": 0.5, "layers": 2.0}
    assert limits(make_job(), "--memory", "2GiB") == {"memory": 2.0 * 2**30}
    assert limits(make_job()) == {}


def test_it_counts_more_than_what_the_job_says(make_job: MakeJob) -> None:
    job = make_job("clients.memory={bob='1GB', ann='3GB'}", "clients.layers={bob='all'}")
    assert limits(job, "--memory", "2MB") == {"memory": 2e6, "layers": 1e6}
    assert limits(job, "--layers", "1") == {"memory": 1e9, "layers": 1.0}


def test_a_node_may_train_all_layers(make_job: MakeJob) -> None:
    assert limits(make_job("clients.layers={bob=1}"), "--layers", "all") == {"layers": 1e6}


def test_others_keep_what_the_job_says_of_them(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("clients.seconds={ann=3.0}")
    node = Trainer.for_node("bob", job, model=None, data=None, directory=tmp_path, limits={"seconds": 0.25})
    assert node.job.clients.seconds == {"ann": 3.0, "bob": 0.25}
    assert job.clients.seconds == {"ann": 3.0}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--memory", "lots"], "lots was given, wanted bytes, such as 2GB"),
        (["--memory=-2GB"], "-2GB was given, wanted bytes"),
        (["--memory", "0"], "0 was given, wanted bytes"),
        (["--seconds", "nan"], "nan was given, wanted a number above 0"),
        (["--layers", "0"], "0 was given, wanted a number from 1, or all"),
        (["--layers", "two"], "two was given, wanted a number from 1, or all"),
    ],
)
def test_what_makes_no_sense_is_refused(given: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args([*NEEDED, *given])
    assert stopped.value.code == 2
    assert wanted in capsys.readouterr().err
