"""Jobs and asks that try to get around a node's policy, with a real trainer behind it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from client.admission import Own
from client.doors import builder
from client.obedient import Admitting, Obedient
from client.policy import Policy
from client.resident import Resident
from client.trainer import Trainer
from client.trainer_options import parser
from fedtune.base import base_hash, blueprint
from fedtune.envelope import Envelope
from fedtune.errors import UserError
from fedtune.job import Job, checked_job
from fedtune.payload import Payload, payload_of
from fedtune.strategy import Answer, Ask
from fedtune.wire import pack_ask, unpack_answer
from strategies.decomfl import DeComFL
from strategies.fedavg import FedAvg

MakeJob = Callable[..., Job]
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Node:
    """Bob's, with eight texts of which six are learnt. `told` is why the last ask was not answered, or nothing."""

    def __init__(self, policy: Policy, model: Path, data: Path, directory: Path | None = None, ticks: Any = None) -> None:
        def build(job: dict[str, Any]) -> Trainer:
            own = {"model": str(model), "data": str(data), "directory": directory}
            return Trainer.for_node("bob", checked_job(job, "the job"), **own)

        self.base, self.told = base_hash(model), ""
        more = {"ticks": ticks} if ticks else {}
        self.admitting = Admitting(build, policy, Own("bob", True, True))
        self.door = Obedient(Resident(self.admitting, directory), policy, directory, lambda: NOW, **more)

    def hello(self, job: Job, **changed: Any) -> Envelope:
        return self.ask("hello", job=job.model_dump(mode="json") | changed)

    def ask(self, kind: str, payload: Payload | None = None, **header: Any) -> Envelope:
        about = {"ask": "1.0", "run": "tiny", "round": 1, "base": self.base}
        answer = self.door.answer(pack_ask(Ask(kind, payload or Payload()), "", about | header))
        self.told = str(answer.header.get("failed", ""))
        return answer

    def train(self, job: Job, **header: Any) -> Envelope:
        return self.ask("train", payload_of(blueprint(job).adapter), **header)


@pytest.fixture
def node(tiny_model: Path, tiny_data: Path) -> Callable[..., Node]:
    return lambda policy=None, directory=None, ticks=None, data=None: Node(
        policy or Policy(), tiny_model, data or tiny_data / "bob.jsonl", directory, ticks
    )


MakeNode = Callable[..., Node]


def test_what_is_allowed_is_done(node: MakeNode, make_job: MakeJob, tmp_path: Path) -> None:
    policy = Policy(strategies=("fedavg",), columns=("text",), max_steps=2, max_seconds=600, max_rank=4, rounds_per_day=1)
    bob, job = node(policy, tmp_path), make_job()
    assert bob.hello(job).header["examples"] == 6
    assert unpack_answer(bob.train(job)).metrics["steps"] == 2


def code_that_runs(folder: Path) -> tuple[Path, Path]:
    """A file that leaves a trace when it is imported."""
    trace, file = folder / "trace", folder / "evil.py"
    file.write_text(f"open({str(trace)!r}, 'w').close()\n")
    return trace, file


def apart(file: Path, folder: str) -> Path:
    """A copy in a folder of such a name."""
    (copy := file.parent / folder / file.name).parent.mkdir()
    copy.write_text(file.read_text())
    return copy


@pytest.mark.parametrize(
    "changed",
    [
        lambda file: {"strategy": {"name": f"{file}:Evil"}},
        lambda file: {"strategy": f"{file}:Evil"},
        lambda file: {"strategy": {"name": "evil:Evil"}},
        lambda file: {"strategy": {"name": "flower", "wraps": f"{file}:Evil"}},
        lambda file: {"strategy": {"name": "flower", "wraps": "evil:Evil"}},
        lambda file: {"strategy": {"name": "flower", "wraps": f"{file.with_suffix('')}:Evil"}},
        lambda file: {"strategy": {"name": "flower", "wraps": f"{apart(file, 'a b')}:Evil"}},
        lambda file: {"strategy": {"name": "flower", "wraps": f"{apart(file, 'a(b)')}:Evil"}},
        lambda file: {"strategy": {"name": "flower", "wraps": f"{apart(file, 'a b').with_suffix('')}:Évil"}},
        lambda file: {"strategy": {"name": "flower", "wraps": "evil:Évil"}},
        lambda file: {"strategy": {"name": "flower", "wraps": "evil:"}},
        lambda file: {"strategy": {"name": "flower", "wraps": " evil:0"}},
        lambda file: {"strategy": {"name": "flower", "wraps": str(file)}},
        lambda file: {"strategy": {"name": "flower", "options": {"deep": [{"er": f"{file}:Evil"}]}}},
        lambda file: {"strategy": {"name": "flower", "options": {f"{file}:Evil": 1}}},
        lambda file: {"wire": {"up": f"{file}:Evil | entropy"}},
        lambda file: {"wire": {"down": f"int8 | {file}:Evil(3)"}},
        lambda file: {"wire": {"first": "evil:Evil"}},
        lambda file: {"wire": {"up": f"topk({file}:Evil)"}},
    ],
)
def test_a_job_brings_no_code(
    changed: Callable[[Path], dict[str, Any]],
    node: MakeNode,
    make_job: MakeJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without any policy file."""
    monkeypatch.syspath_prepend(tmp_path)
    trace, file = code_that_runs(tmp_path)
    bob = node()
    bob.hello(make_job(), **changed(file))
    assert bob.told.startswith(("policy.strategies: ", "policy.stages: "))
    assert not trace.exists()


@pytest.mark.parametrize(
    "strategy",
    [
        lambda file: f"{file}:Evil",
        lambda file: {"name": "flower", "wraps": f"{apart(file, 'a b')}:Evil"},
        lambda file: {"name": "flower", "wraps": "evil:Évil"},
    ],
)
def test_without_the_door_that_code_would_run(
    strategy: Callable[[Path], Any], make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above rests on."""
    monkeypatch.syspath_prepend(tmp_path)
    trace, file = code_that_runs(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    with pytest.raises(UserError):
        checked_job(make_job().model_dump(mode="json") | {"strategy": strategy(file)}, "the job")
    assert trace.exists()
    monkeypatch.delitem(sys.modules, "evil", raising=False)


def test_variants_of_a_job_are_never_imported(node: MakeNode, make_job: MakeJob, tmp_path: Path) -> None:
    trace, file = code_that_runs(tmp_path)
    bob = node()
    bob.hello(make_job(), variants={"worse": {"strategy": f"{file}:Evil", "wire": {"up": f"{file}:Evil"}}})
    assert bob.told == ""
    assert not trace.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "flower", "wraps": "FedAdam", "options": {"eta": 0.01}},
        {"name": "decomfl", "modules": ["q_proj", "v_proj"]},
        {"name": "selective_layers", "blocks": r"model\.layers\.\d+", "always": ["lm_head.weight"]},
    ],
)
def test_words_that_methods_take_are_no_code(settings: dict[str, Any], make_job: MakeJob) -> None:
    job = Job.model_validate(make_job().model_dump(mode="json") | {"strategy": settings})
    Policy().admit_job(job, Own("bob", True, True))


def test_code_that_the_operator_lists_is_taken(node: MakeNode, make_job: MakeJob, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("from strategies.fedavg import FedAvg\n\n\nclass Own(FedAvg):\n    name = 'own'\n")
    bob = node(Policy(strategies=(f"{file}:Own",)))
    bob.hello(make_job(), strategy=f"{file}:Own")
    assert bob.told == ""


@pytest.mark.parametrize("key", ["targets", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_never_ends_is_refused(key: str, node: MakeNode, make_job: MakeJob) -> None:
    """Before it is matched: else this test would."""
    endless = "(.|.)*!"
    bob = node()
    given = make_job().model_dump(mode="json")
    bob.hello(make_job(), adapter=given["adapter"] | {key: endless if key == "targets" else {endless: 2}})
    assert bob.told.startswith(f"policy.{key}: given adapter.{key} with '(.|.)*!', allowed names, or patterns of names")


def test_modules_by_name_and_by_pattern(node: MakeNode, make_job: MakeJob) -> None:
    bob = node()
    for targets in ("all-linear", ["q_proj", "up_proj"], r".*\.(q|up)_proj", "model.layers.1.mlp.up_proj"):
        given = make_job(r"adapter.rank_pattern={'layers\.\d\..*up_proj'=2}").model_dump(mode="json")
        bob.hello(make_job(), adapter=given["adapter"] | {"targets": targets})
        assert bob.told == ""


def test_a_job_takes_no_more_threads_than_there_are_cores(
    make_job: MakeJob, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    build = builder(parser().parse_args(["--insecure", "--client", "bob", "--socket", "s"]))
    for threads in (2, 1_000_000, 0):
        build(make_job(f"machine.threads={threads}").model_dump(mode="json"))
    assert counts == [2, 3]


@pytest.mark.parametrize("epochs", [4.0, 1e9])
def test_steps_by_epochs(epochs: float, node: MakeNode, make_job: MakeJob) -> None:
    """Six examples in batches of two are three steps an epoch: 3 x 4 = 12 of 11."""
    bob, job = node(Policy(max_steps=11)), make_job("train.steps=0", f"train.epochs={epochs}")
    bob.hello(job)
    assert bob.told.startswith(f"policy.max_steps: given {int(3 * epochs)} local steps a round, allowed 11")
    bob.train(job)
    assert "no job" in bob.told
    bob.hello(make_job("train.steps=0", "train.epochs=3.6"))  # 10.8: rounded up
    assert bob.told == ""


def test_a_round_has_its_steps_once_however_it_is_asked(node: MakeNode, make_job: MakeJob, tmp_path: Path) -> None:
    """Two steps of three, then again: the third is taken, the fourth is not. Not after a restart either."""
    job = make_job()
    bob = node(Policy(max_steps=3), tmp_path)
    bob.hello(job)
    bob.train(job)
    assert bob.told == ""
    for again in (bob, node(Policy(max_steps=3), tmp_path)):
        again.hello(job)
        again.train(job, ask="1.1")
        assert again.told.startswith("policy.max_steps: given a round that takes more batches")
    again.train(job, round=2)
    assert again.told == ""


def test_an_ask_that_comes_again_counts_once(node: MakeNode, make_job: MakeJob, tmp_path: Path) -> None:
    """After a lost connection the coordinator asks the same up to five times; all two steps of two are taken each time."""
    job, policy = make_job(), Policy(max_steps=2, rounds_per_day=1)
    before, told = node(policy, tmp_path), []
    before.hello(job)
    for _ in range(2):
        before.train(job)
        told.append(before.told)
    after = node(policy, tmp_path)  # a restart
    for _ in range(4):
        after.train(job)
        told.append(after.told)
    assert told[:5] == [""] * 5
    assert told[5].startswith("policy.asks: given the same ask '1.0' for the 6th time, allowed 5 times")


def test_what_is_said_of_an_ask_again_does_not_lessen_what_it_used(node: MakeNode, make_job: MakeJob) -> None:
    """Two steps of three under one name, then none under the same name: the other ask has one left, not three."""
    job = make_job()
    bob = node(Policy(max_steps=3))
    bob.hello(job)
    bob.train(job)
    bob.ask("evaluate", payload_of(blueprint(job).adapter))
    assert bob.told == ""
    bob.train(job, ask="1.1")
    assert bob.told.startswith("policy.max_steps: ")


def test_a_round_has_few_asks(node: MakeNode, make_job: MakeJob) -> None:
    """However they are called, and of whatever kind they are: else one round of the day would be as many as one likes."""
    job = make_job("train.steps=1")
    bob = node(Policy(max_steps=100))
    bob.hello(job)
    for number in range(16):
        bob.ask("evaluate" if number % 2 else "train", payload_of(blueprint(job).adapter), ask=f"1.{number}")
        assert bob.told == ""
    bob.ask("evaluate", ask="1.16")
    assert bob.told.startswith("policy.asks: given ask '1.16', the 17th of round 1, allowed 16 a round")
    bob.train(job, ask="1.0")
    assert bob.told == ""
    bob.train(job, ask="2.0", round=2)
    assert bob.told == ""


def test_without_limits_of_work_asks_are_not_counted(node: MakeNode, make_job: MakeJob) -> None:
    """Runs of one name, such as those of an unsigned trial, go on all day."""
    job = make_job("train.steps=1")
    bob = node()
    bob.hello(job)
    for _ in range(7):
        bob.train(job)
    assert bob.told == ""


@pytest.mark.parametrize(
    "settings",
    [
        ("strategy=decomfl", "strategy.seeds_per_step=1000000000000"),
        ("strategy=mezo", "strategy.seeds_per_step=1000000000000"),
        ("strategy=fedavg", "train.steps=99999"),
        ("strategy=fedavg", "train.batch=65536"),
    ],
)
def test_the_time_of_a_round_is_kept_whatever_the_settings(
    settings: tuple[str, ...], node: MakeNode, make_job: MakeJob
) -> None:
    """A clock that goes on by a tenth of a second at each look: no more than some hundred pieces of work fit into 10 s."""
    sgd = () if "strategy=fedavg" in settings else ("train.optimizer=sgd", "train.clip=0")
    job, looks = make_job(*sgd, *settings), count()
    bob = node(Policy(max_seconds=10), ticks=lambda: next(looks) / 10)
    bob.hello(job)
    assert bob.told == ""
    start = DeComFL().broadcast(_state()) if "strategy=decomfl" in settings else payload_of(blueprint(job).adapter)
    answer = bob.ask("train", start)
    assert bob.told.startswith("policy.max_seconds: given a round that takes longer, allowed 10 s of work; ask the coordinator")
    assert answer.tensors == ()
    assert next(looks) < 150


def _state() -> Any:
    from fedtune.adapter import Adapter
    from fedtune.strategy import ServerState

    return ServerState(Adapter())


def test_more_steps_than_any_machine_takes_in_the_time(node: MakeNode, make_job: MakeJob) -> None:
    bob = node(Policy(max_seconds=10))
    bob.hello(make_job("train.steps=1000000000000"))
    assert bob.told.startswith("policy.max_seconds: given 1000000000000 steps a round, allowed 10 s")


def test_what_took_too_long_does_not_leave(node: MakeNode, make_job: MakeJob) -> None:
    """The work is done at 5 s of 10; then the answer is packed, which by this clock takes an hour."""
    job, clock = make_job(), {"now": 0.0}
    bob = node(Policy(max_seconds=10), ticks=lambda: clock["now"])
    bob.hello(job)
    inner = bob.door._answers.answer
    bob.door._answers.answer = lambda ask: (inner(ask), clock.update(now=3600.0))[0]
    answer = bob.train(job)
    assert bob.told.startswith("policy.max_seconds: ")
    assert answer.tensors == ()


def test_evaluation_stays_here(node: MakeNode, make_job: MakeJob) -> None:
    bob, job = node(Policy(evaluation=False)), make_job()
    bob.hello(job)
    bob.ask("evaluate", payload_of(blueprint(job).adapter))
    assert bob.told.startswith("policy.evaluation: ")
    bob.train(job)
    assert bob.told == ""


def test_evaluation_stays_here_under_another_name_too(
    node: MakeNode, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that evaluates when it is asked to train."""
    monkeypatch.setattr(FedAvg, "answer", lambda self, ask, local, memory: Answer(metrics=local.evaluate()))
    job = make_job()
    for policy, wanted in ((Policy(), ""), (Policy(evaluation=False), "policy.evaluation: given an ask to evaluate")):
        bob = node(policy)
        bob.hello(job)
        bob.train(job)
        assert bob.told.startswith(wanted)
        assert bool(bob.told) is bool(wanted)


def test_nobody_is_met_outside_the_hours(node: MakeNode, make_job: MakeJob) -> None:
    """It is 12:00."""
    for hours, wanted in (("11:00-13:00", ""), ("13:00-11:00", "policy.hours: given an ask at 12:00")):
        bob = node(Policy(hours=(hours,)))
        bob.hello(make_job())
        assert bob.told.startswith(wanted)
        assert bool(bob.told) is bool(wanted)


def test_rounds_of_a_day_over_restarts(node: MakeNode, make_job: MakeJob, tmp_path: Path) -> None:
    job, policy = make_job(), Policy(rounds_per_day=2)
    for round, run in ((1, "a"), (1, "b")):
        bob = node(policy, tmp_path)
        bob.ask("hello", job=job.model_dump(mode="json"), run=run)
        bob.train(job, round=round, run=run)
        assert bob.told == ""
    bob.train(job, round=2, run="b")
    assert bob.told.startswith("policy.rounds_per_day: given round 3 of today")
    with pytest.raises(UserError, match="rounds_per_day counts over restarts, which takes a folder"):
        node(policy)


def test_another_base(node: MakeNode, make_job: MakeJob) -> None:
    bob = node(Policy(bases=("0" * 32,)))
    bob.hello(make_job())
    assert bob.told.startswith(f"policy.bases: given base model {bob.base}, allowed {'0' * 32}")


def test_after_a_refused_job_none_is_answered_for(node: MakeNode, make_job: MakeJob) -> None:
    bob, job = node(Policy(max_steps=2)), make_job()
    bob.hello(job)
    bob.hello(make_job("train.steps=3"))
    bob.train(job)
    assert "no job" in bob.told
    bob.hello(job)
    bob.train(job)
    assert bob.told == ""


@pytest.mark.parametrize("refused", [{"max_steps": 2}, {"bases": ("0" * 32,)}, {"max_rank": 3}])
def test_a_restart_brings_no_refused_job_back(
    refused: dict[str, Any], node: MakeNode, make_job: MakeJob, tmp_path: Path
) -> None:
    """A trainer takes up the job of the open run; neither one that was refused, nor one that the policy now forbids."""
    job, policy = make_job("train.steps=0", "train.epochs=1"), Policy(**refused)  # three steps
    node(policy, tmp_path).hello(job)
    (again := node(policy, tmp_path)).train(job)
    assert "no job" in again.told
    node(None, tmp_path).hello(job)
    (still := node(None, tmp_path)).train(job)
    assert still.told == ""
    (stricter := node(policy, tmp_path)).train(job, round=2)
    assert stricter.told.startswith(f"policy.{next(iter(refused))}: ")


def test_loading_takes_nothing_from_the_time_of_a_round(node: MakeNode, make_job: MakeJob, tmp_path: Path) -> None:
    """After a restart, an ask to train loads model and data first: an hour, by this clock."""
    job, clock = make_job(), {"now": 0.0}
    node(None, tmp_path).hello(job)
    bob = node(Policy(max_seconds=10), tmp_path, ticks=lambda: clock["now"])
    built = bob.admitting.build
    object.__setattr__(bob.admitting, "build", lambda job: (clock.update(now=3600.0), built(job))[1])
    bob.train(job)
    assert (bob.told, clock["now"]) == ("", 3600.0)


def test_no_ask_before_a_job(node: MakeNode) -> None:
    bob = node()
    bob.ask("train")
    assert "no job" in bob.told


@pytest.mark.parametrize("job", [{"seed": -1}, {"train": {"steps": "many"}}, {"zebra": 1}])
def test_a_job_that_is_none(job: Any, node: MakeNode) -> None:
    bob = node()
    bob.ask("hello", job=job)
    assert bob.told.startswith("a 'hello' came whose job cannot be read")


@pytest.mark.parametrize("round", [None, "two", [1], float("inf")])
def test_an_ask_without_its_round(round: object, node: MakeNode, make_job: MakeJob) -> None:
    bob, job = node(), make_job()
    bob.hello(job)
    bob.train(job, round=round)
    assert "without its round" in bob.told


SECRET = "the patient in bed four"


def rows(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_job_does_not_choose_by_which_column_rows_are_told_apart(node: MakeNode, make_job: MakeJob, tmp_path: Path) -> None:
    """Else the texts themselves would come back, as names of clients that are not this one."""
    bob = node(data=rows(tmp_path, {"text": SECRET}, {"text": "the cat sat on the mat"}))
    bob.hello(make_job("data.client_column=text"))
    assert bob.told.startswith("policy.client_column: given data.client_column = 'text', allowed none")


def test_columns_that_are_kept_back_are_not_read(node: MakeNode, make_job: MakeJob, tmp_path: Path) -> None:
    """Turns of a chat that are none would be told as an error. Data is read for a hello or, after a restart, at work."""
    own, job = rows(tmp_path, *[{"text": "the cat sat", "messages": SECRET}] * 2), make_job()
    open_to_all = node(data=own)
    open_to_all.hello(job)
    assert "messages" in open_to_all.told
    folder = tmp_path / "bob"
    folder.mkdir()
    for at_work in (False, True):
        bob = node(Policy(columns=("text",)), folder, data=own)
        bob.train(job) if at_work else bob.hello(job)
        assert bob.told == ""


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"text": [SECRET]}, ()),
        ({"messages": [SECRET]}, ()),
        ({"messages": SECRET}, ()),
        ({"text": "the cat", "label": SECRET}, ("model.task=classification", "model.labels=['a', 'b']")),
        ({"text": "the cat", "label": SECRET}, ("model.task=classification", "model.labels=2")),
        ({SECRET: "x", "other": "y"}, ()),
    ],
)
def test_an_error_about_data_does_not_quote_it(
    row: dict[str, Any], keys: tuple[str, ...], node: MakeNode, make_job: MakeJob, tmp_path: Path
) -> None:
    bob = node(data=rows(tmp_path, row, row))
    bob.hello(make_job(*keys))
    assert "not shown" in bob.told
    assert "patient" not in bob.told


def test_the_labels_of_a_job_do_not_find_out_which_one_the_data_has(node: MakeNode, make_job: MakeJob, tmp_path: Path) -> None:
    """A hint at the nearest of them would say so, a little nearer with each job."""
    bob = node(data=rows(tmp_path, *[{"text": "the cat", "label": "cancer"}] * 2))
    bob.hello(make_job("model.task=classification", "model.labels=['cancel', 'dog']"))
    assert "unknown label a str of 6 (not shown, as this may travel); known: cancel, dog" in bob.told
    assert "did you mean" not in bob.told


def test_what_is_refused_stands_in_this_side_s_log(node: MakeNode, make_job: MakeJob, caplog: pytest.LogCaptureFixture) -> None:
    node(Policy(max_steps=1)).hello(make_job())
    assert "did not answer: policy.max_steps: given 2 local steps a round, allowed 1" in caplog.text
