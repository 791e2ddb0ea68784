"""`fedtune doctor` on both sides: every fault has a line that says what to do, and no text of the data is printed."""

from __future__ import annotations

import json
import re
import socket
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from client import doctor as client_side
from client.costs import measured_costs
from client.doctor import Examined
from client.trainer import Trainer
from fedtune import checks
from fedtune.base import base_hash
from fedtune.checks import Finding, clock, looked
from fedtune.errors import KeysError, UserError
from fedtune.job import Job
from fedtune.needs import RUNTIME, Needs
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle
from fedtune.security.probe import Probe
from server.doctor import Examined as Coordinator
from simulations.doctor import add_to

MakeJob = Callable[..., Job]
SECRET = "the patient in bed four"


@pytest.fixture
def doctor() -> Callable[..., tuple[int, list[dict[str, str]]]]:
    """doctor("--dir", …): exit code and findings of `fedtune doctor --json`."""
    app = typer.Typer()
    add_to(app)

    def run(*words: object) -> tuple[int, list[dict[str, str]]]:
        ended = CliRunner().invoke(app, [*map(str, words), "--json"])
        if isinstance(ended.exception, UserError):
            raise ended.exception
        return ended.exit_code, json.loads(ended.stdout)

    return run


Doctor = Callable[..., tuple[int, list[dict[str, str]]]]


@pytest.fixture
def keys(tmp_path: Path) -> CoordinatorKeys:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return CoordinatorKeys.init(tmp_path / "srv" / "keys", [], f"127.0.0.1:{port}")


def of(findings: list[dict[str, str]], check: str) -> list[dict[str, str]]:
    return [finding for finding in findings if finding["check"] == check]


def only(findings: Any, check: str) -> Finding:
    [found] = [finding for finding in findings if finding.check == check]
    return found


def test_a_coordinator_in_order(doctor: Doctor, keys: CoordinatorKeys, job_file: Path, tiny_model: Path) -> None:
    for name in ("ann", "bob"):
        make_bundle(keys, name)
    code, findings = doctor(job_file, "--dir", keys.folder.parent, "--set", "clients.count=2")
    assert {finding["check"] for finding in findings} == {"versions", "keys", "clients", "port", "base", "memory", "disk"}
    assert [finding for finding in findings if finding["result"] == "fail"] == []
    assert code == 0
    assert of(findings, "base")[0]["found"].startswith(base_hash(tiny_model))
    assert "2 registered (ann, bob)" in of(findings, "clients")[0]["found"]


def test_a_coordinator_with_too_few_clients(doctor: Doctor, keys: CoordinatorKeys, job_file: Path) -> None:
    make_bundle(keys, "ann")
    make_bundle(keys, "bob")
    keys.registry.revoke("bob")
    code, findings = doctor(job_file, "--keys", keys.folder, "--set", "clients.count=2")
    [found] = of(findings, "clients")
    assert (code, found["result"]) == (1, "fail")
    assert found["found"] == "1 registered (ann), 1 revoked, the job wants 2"
    assert "fedtune keys client" in found["todo"]


@pytest.mark.parametrize(
    ("names", "says"),
    [("nan", "'nan', which is not registered, did you mean 'ann'"), ("bob", "'bob', which is revoked"), ("ann", "")],
)
def test_clients_that_the_job_wants_by_name(
    names: str, says: str, doctor: Doctor, keys: CoordinatorKeys, job_file: Path
) -> None:
    make_bundle(keys, "ann")
    make_bundle(keys, "bob")
    keys.registry.revoke("bob")
    [found] = of(doctor(job_file, "--keys", keys.folder, "--set", f"clients.names=['{names}']")[1], "clients")
    assert (found["result"], says in found["todo"]) == ("fail" if says else "ok", True)


def test_an_address_to_listen_on(doctor: Doctor, keys: CoordinatorKeys) -> None:
    """192.0.2.7 is in no certificate here and of no machine at all."""
    findings = doctor("--keys", keys.folder, "--host", "192.0.2.7")[1]
    assert "not for 192.0.2.7" in of(findings, "keys")[-1]["found"]
    assert of(findings, "port")[0]["found"] == "192.0.2.7 is no address of this machine"
    assert of(doctor("--keys", keys.folder, "--host", "::1")[1], "port")[0]["result"] == "ok"
    assert "--host srv is no IP address" in of(doctor("--keys", keys.folder, "--host", "srv")[1], "port")[0]["found"]


def test_a_port_that_is_taken(keys: CoordinatorKeys, tmp_path: Path) -> None:
    port = int(keys.address.rpartition(":")[2])
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        found = only(looked(Coordinator(tmp_path, keys.folder).checks()), "port")
    assert (found.result, found.found) == ("fail", f"{port} is taken by another program")
    assert only(looked(Coordinator(tmp_path, keys.folder).checks()), "port").found == f"{port} is free"


def test_keys_that_others_can_read(doctor: Doctor, keys: CoordinatorKeys) -> None:
    (keys.folder / "signing.key").chmod(0o644)
    code, findings = doctor("--keys", keys.folder)
    assert code == 1
    assert any("chmod" in finding["found"] and finding["result"] == "fail" for finding in of(findings, "keys"))


@pytest.mark.parametrize("left", [-1, 29, 31])
def test_the_days_of_a_certificate(left: int, keys: CoordinatorKeys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("server.doctor.days_left", lambda pem: left)
    found = [one for one in looked(Coordinator(tmp_path, keys.folder).checks()) if one.check == "keys"]
    assert found[1].result == {-1: "fail", 29: "warn", 31: "ok"}[left]
    assert ("fedtune keys rotate server" in found[1].todo) is (left < 30)
    assert len(found) == 2 + (left > 0)  # of one that has expired nothing more is said


def test_neither_side_is_named(doctor: Doctor) -> None:
    with pytest.raises(UserError, match="wanted --dir or --keys of a coordinator, or --bundle, --data and --model"):
        doctor()
    with pytest.raises(UserError, match="give those of one side"):
        doctor("--data", "x", "--keys", "y")


@pytest.mark.parametrize("seconds", [0, 29, -31, 299, -301])
def test_clocks(seconds: float) -> None:
    result = {0: "ok", 29: "ok", -31: "warn", 299: "warn", -301: "fail"}[seconds]
    assert clock(seconds, "the server's clock").result == result
    assert clock(None, "the server's clock").result == "warn"


def test_a_client_in_order(
    doctor: Doctor, keys: CoordinatorKeys, job_file: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(keys, "bob")
    monkeypatch.setattr(client_side, "probe", lambda address, ca: Probe(True, None, None, 2.0))
    policy = keys.folder / "policy.toml"
    policy.write_text("max_steps = 2\n")
    given = "--bundle", bundle, "--data", tiny_data / "bob.jsonl", "--model", tiny_model, "--policy", policy
    code, findings = doctor(job_file, *given)
    assert [finding for finding in findings if finding["result"] == "fail"] == []
    assert code == 0
    everything = {"versions", "guards", "keys", "server", "clock", "policy", "base", "data", "memory", "disk"}
    assert {finding["check"] for finding in findings} == everything
    assert "8 rows, 6 examples to train on, 2 held out; columns text" in of(findings, "data")[0]["found"]
    assert of(findings, "base")[0]["found"].startswith(base_hash(tiny_model))


def test_a_server_that_is_not_there(keys: CoordinatorKeys) -> None:
    """Really asked: nothing listens on that port. That is as it should be before the server is started."""
    found = only(looked(Examined(make_bundle(keys, "bob")).checks()), "server")
    assert found.result == "warn"
    assert "nothing listens" in found.found


def test_a_bundle_that_is_not_there_is_said_once(tmp_path: Path, tiny_data: Path, tiny_model: Path, make_job: MakeJob) -> None:
    examined = Examined(tmp_path / "none", str(tiny_data), str(tiny_model), job=make_job())
    assert [found.check for found in looked(examined.checks()) if found.result == "fail"] == ["keys"]


def test_what_the_policy_forbids(make_job: MakeJob, tiny_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Two steps are more than one; by epochs it is known when the data has been read: 6 examples in batches of 2."""
    (policy := tmp_path / "policy.toml").write_text("max_steps = 1\n")
    given = {"data": str(tiny_data / "bob.jsonl"), "model": str(tiny_model), "policy": policy}
    found = list(looked(Examined(**given, job=make_job()).checks()))
    assert any(one.check == "policy" and one.result == "fail" and "policy.max_steps: given 2" in one.found for one in found)
    found = list(looked(Examined(**given, job=make_job("train.steps=0")).checks()))
    assert any(one.check == "data" and one.result == "fail" and "policy.max_steps: given 3" in one.found for one in found)
    policy.write_text(f"bases = ['{'0' * 32}']\n")
    assert "policy.bases" in only(looked(Examined(**given).checks()), "base").found
    policy.write_text("max_stepz = 1\n")
    assert "did you mean 'max_steps'" in only(looked(Examined(**given).checks()), "policy").found


def test_a_policy_that_others_can_write(tmp_path: Path) -> None:
    (policy := tmp_path / "policy.toml").write_text("")
    policy.chmod(0o666)
    findings = list(looked(Examined(policy=policy).checks()))
    assert any(one.result == "warn" and one.todo == f"chmod go-w {policy}" for one in findings)


def test_another_model_than_the_job_s(make_job: MakeJob, tiny_model: Path, tmp_path: Path) -> None:
    """One byte differs."""
    other = tmp_path / "model"
    other.mkdir()
    for file in tiny_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    found = [one for one in looked(Examined(model=str(other), job=make_job()).checks()) if one.check == "base"]
    assert [one.result for one in found] == ["ok", "fail"]
    assert base_hash(tiny_model) in found[1].found


def write(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_labels_are_counted(make_job: MakeJob, tmp_path: Path) -> None:
    """1.0 and "1" are one label."""
    data = write(tmp_path, *({"text": f"{SECRET} {i}", "label": label} for i, label in enumerate([0, 1.0, "1", 2, 2, 2])))
    found = list(looked(Examined(data=data, job=make_job("model.task=classification")).checks()))
    assert any("3 labels, the rarest has 1 examples and the most frequent 3" in one.found for one in found)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": SECRET}, {"text": [SECRET]}], "row 2: 'text' is a list of 1"),
        ([{SECRET: "x"}], "wanted one of"),
        ([{"prompt": SECRET, "completion": ""}], "nothing is left to learn from|examples"),
        ([], "is empty"),
    ],
)
def test_no_text_is_printed(rows: list[dict[str, Any]], says: str, make_job: MakeJob, tmp_path: Path) -> None:
    found = [one for one in looked(Examined(data=write(tmp_path, *rows), job=make_job()).checks()) if one.check == "data"]
    assert re.search(says, found[0].found)
    assert "patient" not in " ".join(map(str, found))


def test_tokens_are_counted_before_texts_are_packed(make_job: MakeJob, tiny_data: Path) -> None:
    """Bob's texts have some twenty tokens each; packed, two would share an example of 48."""
    given = {"data": str(tiny_data / "bob.jsonl")}
    plain, packed = (
        [one.found for one in looked(Examined(**given, job=make_job(f"data.packing={on}")).checks()) if one.check == "data"]
        for on in ("false", "true")
    )
    assert plain == packed
    assert "tokens an example" in plain[1]


def test_disk_and_memory_against_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    results = [checks.disk(tmp_path / "not" / "yet", needed, "the run").result for needed in (800, 801, 1000, 1001)]
    assert results == ["ok", "warn", "warn", "fail"]


def test_a_check_that_cannot_be_made_has_failed_and_the_others_are_made() -> None:
    def broken() -> Any:
        raise KeysError("mend it")

    found = list(looked({"a": broken, "b": lambda: [Finding("b", "ok", "good")]}))
    assert [(one.check, one.result, one.found) for one in found] == [("a", "fail", "mend it"), ("b", "ok", "good")]


def test_a_line() -> None:
    assert str(Finding("port", "fail", "8000 is\ntaken", "end it")) == "fail  port        8000 is taken; end it"


def test_what_a_step_takes_is_estimated_on_the_safe_side(make_job: MakeJob) -> None:
    """Against what the training of all weights is measured to take on this CPU: no less, and not ten times as much."""
    job = make_job("strategy=selective_layers", "train.batch=8", "data.packing=true")
    trainer = Trainer.for_simulation(job)
    model = trainer.local("bob", 1).trainable("whole")
    names = list(model.shapes)
    measured = measured_costs(model, [names])["memory"].of(
        1, sum(map(torch.Size.numel, map(torch.Size, model.shapes.values())))
    )
    estimated = Needs.of(job).training(gpu=False) - RUNTIME
    assert 1 < estimated / measured < 10


def test_guards_say_whether_they_would_be_on() -> None:
    """In a process of its own: this one keeps its network."""
    found = [one for one in looked(Examined().checks()) if one.check == "guards"]
    assert {one.found.partition(":")[0].removesuffix(" OFF").removesuffix(" on") for one in found} >= {"network", "privileges"}
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        socket.create_connection(listening.getsockname()).close()
