"""The doors as the trainer's own options put them up: what a mistake in their order would leave open."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from client.doors import doors_of
from client.trainer_options import parser
from fedtune.base import base_hash, blueprint
from fedtune.envelope import Envelope
from fedtune.errors import UserError
from fedtune.job import Job
from fedtune.payload import payload_of
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle
from fedtune.security.sealing import is_sealed
from fedtune.security.signing import ASK, Stamp, signed
from fedtune.strategy import Ask
from fedtune.wire import pack_ask

MakeJob = Callable[..., Job]
Options = Callable[..., Any]
RUN = "run.1"


@pytest.fixture
def keys(tmp_path: Path) -> CoordinatorKeys:
    return CoordinatorKeys.init(tmp_path / "keys", ["127.0.0.1"], "127.0.0.1:1")


@pytest.fixture
def doors(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Options:
    """As the process puts them up, with bob's data and a policy of these lines."""

    def made(*given: str, policy: str = "") -> Any:
        (tmp_path / "policy.toml").write_text(policy, encoding="utf-8")
        own = ["--model", str(tiny_model), "--data", str(tiny_data / "bob.jsonl"), "--dir", str(tmp_path / "bob")]
        own += ["--policy", str(tmp_path / "policy.toml")] if policy else []
        return doors_of(parser().parse_args(["--socket", "s.sock", *own, *given]))

    return made


def hello(job: Job) -> Envelope:
    return pack_ask(Ask("hello"), "", {"ask": "hello", "run": job.name, "job": job.model_dump(mode="json")})


def train(job: Job, ask: str = "1.0") -> Envelope:
    base = base_hash(Path(job.model.path))
    header = {"ask": ask, "run": job.name, "round": 1, "base": base}
    return pack_ask(Ask("train", payload_of(blueprint(job).adapter)), "", header)


def told(answer: Envelope) -> str:
    return str(answer.header.get("failed", ""))


class Coordinator:
    """Signs, with a serial that grows."""

    def __init__(self, keys: CoordinatorKeys) -> None:
        self._keys, self._serials = keys, count(time.time_ns())

    def signed(self, ask: Envelope, *, seal: bool) -> Envelope:
        return signed(ask, Stamp(RUN, next(self._serials), "", seal), self._keys.signing, ASK)


INSECURE = ("--insecure", "--client", "bob")


def test_insecure_anybody_is_answered(doors: Options, make_job: MakeJob) -> None:
    door, job = doors(*INSECURE), make_job("wire=plain")
    assert door.answer(hello(job)).header["examples"] == 6
    assert len(door.answer(train(job)).tensors) > 0


def test_with_a_bundle_nobody_but_its_coordinator_is(doors: Options, make_job: MakeJob, keys: CoordinatorKeys) -> None:
    door, job = doors("--bundle", str(make_bundle(keys, "bob"))), make_job()
    for ask in (hello(job), train(job)):
        answer = door.answer(ask)
        assert "it is not signed" in told(answer)
        assert "examples" not in answer.header
        assert answer.tensors == ()
    coordinator = Coordinator(keys)
    assert door.answer(coordinator.signed(hello(job), seal=False)).header["examples"] == 6
    assert is_sealed(door.answer(coordinator.signed(train(job), seal=True)))


@pytest.mark.parametrize("secure", [True, False])
def test_the_policy_holds(secure: bool, doors: Options, make_job: MakeJob, keys: CoordinatorKeys) -> None:
    given, coordinator = (("--bundle", str(make_bundle(keys, "bob"))) if secure else INSECURE), Coordinator(keys)

    def asked(door: Any, ask: Envelope) -> str:
        return told(door.answer(coordinator.signed(ask, seal=False) if secure else ask))

    job = make_job()
    door = doors(*given, policy="max_steps = 2\nevaluation = false\n")
    assert asked(door, hello(make_job("train.steps=3"))).startswith("policy.max_steps: given 3 local steps")
    assert asked(door, hello(job)) == ""
    assert asked(door, pack_ask(Ask("evaluate"), "", {"ask": "0", "round": 0})).startswith("policy.evaluation: ")
    assert asked(door, train(job)) == ""
    assert asked(door, train(job, "1.1")).startswith("policy.max_steps: ")


def test_what_is_not_named_here_is_not_for_the_job_to_name(make_job: MakeJob, tiny_data: Path) -> None:
    data = ["--data", str(tiny_data / "bob.jsonl")]
    for given, wanted in (
        ([], "policy.model: "),
        (["--model", make_job().model.path], "policy.data: "),
        (data, "policy.model: "),
    ):
        door = doors_of(parser().parse_args(["--socket", "s.sock", *INSECURE, *given]))
        assert told(door.answer(hello(make_job()))).startswith(wanted)


def test_two_runs_of_one_name_are_two(doors: Options, make_job: MakeJob, keys: CoordinatorKeys) -> None:
    """What counts is the run that was signed: each run has its own, and none can take up another's."""
    door = doors("--bundle", str(make_bundle(keys, "bob")), policy="max_steps = 2\nrounds_per_day = 2\n")
    serials, job = count(time.time_ns()), make_job()
    for run, wanted in (("run.1", ""), ("run.2", ""), ("run.3", "policy.rounds_per_day: ")):
        for ask, said in ((hello(job), ""), (train(job), wanted)):
            stamp = Stamp(run, next(serials), "", False)
            assert told(door.answer(signed(ask, stamp, keys.signing, ASK))).startswith(said)


def test_what_must_be_sealed_is_not_answered_open(doors: Options, make_job: MakeJob, keys: CoordinatorKeys) -> None:
    """A job that says end_to_end, and asks whose stamp says otherwise: the stamp is what counts."""
    door = doors("--bundle", str(make_bundle(keys, "bob")), policy="end_to_end = true\n")
    coordinator, job = Coordinator(keys), make_job("security.end_to_end=true")
    assert "policy.end_to_end" in told(door.answer(coordinator.signed(hello(job), seal=False)))
    assert is_sealed(door.answer(coordinator.signed(hello(job), seal=True)))
    answer = door.answer(coordinator.signed(train(job), seal=False))
    assert "policy.end_to_end" in told(answer)
    assert answer.tensors == ()
    with pytest.raises(UserError, match=r"policy\.end_to_end .*needs --bundle"):
        doors(*INSECURE, policy="end_to_end = true\n")


def test_without_a_policy_no_code_comes_in(doors: Options, make_job: MakeJob, tmp_path: Path) -> None:
    file, trace = tmp_path / "evil.py", tmp_path / "trace"
    file.write_text(f"open({str(trace)!r}, 'w').close()\n")
    given = make_job().model_dump(mode="json") | {"strategy": {"name": "flower", "wraps": f"{file}:Évil"}}
    answer = doors(*INSECURE).answer(pack_ask(Ask("hello"), "", {"ask": "hello", "run": "r", "job": given}))
    assert told(answer).startswith("policy.strategies: ")
    assert not trace.exists()
