"""The relay's process against the real loopback API of a SuperNode, whose tasks are put there by hand."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from flwr.app import RecordDict
from flwr.common.constant import Status, SubStatus
from flwr.supercore.constant import TaskType

from client import transport
from client.relay import GONE, LONGEST, SHORTEST, Relay, main
from client.runtime import Runtime
from client.service import serve
from client.told import Answers
from fedtune.envelope import Envelope
from fedtune.messages import from_record, to_record
from fedtune.paths import app_root
from tests.client.supernode import ASK, SECRET, SuperNode, parts


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path may not be long."""
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        yield Path(folder)


@pytest.fixture
def node(folder: Path) -> Iterator[SuperNode]:
    with SuperNode(folder) as node:
        yield node


@pytest.fixture
def relay(node: SuperNode, folder: Path) -> Iterator[Relay]:
    with Runtime(node.address, SECRET) as runtime:
        yield Relay(runtime, folder / "t.sock", Answers(folder / "answers.jsonl"))


@pytest.fixture
def trainer(folder: Path) -> Iterator[None]:
    """Answers with what it was asked, tensors and all."""
    server = serve(lambda ask: Envelope({"client": "a", "ask": ask.header["ask"]}, ask.tensors), folder / "t.sock")
    yield
    server.stop(grace=None).wait()


@pytest.mark.usefixtures("trainer")
def test_a_task_is_answered_by_the_trainer_and_the_supervisor_is_told(node: SuperNode, relay: Relay, folder: Path) -> None:
    task = node.put(to_record(ASK))
    assert relay.step() == 0.0
    assert from_record(node.reply().content) == Envelope({"client": "a", "ask": "r3-0"}, ASK.tensors)
    assert node.status_of(task) == (Status.FINISHED, SubStatus.COMPLETED)
    told = json.loads((folder / "answers.jsonl").read_text())
    assert told | {"seconds": 0} == {"kind": "train", "run": "demo", "round": 3, "failed": "", "seconds": 0}


def test_nothing_to_do_is_asked_again_soon_and_then_more_seldom(relay: Relay) -> None:
    assert relay.step() == SHORTEST
    relay._waits._since -= 60  # nothing came for a minute
    assert relay.step() == LONGEST


def fab(trace: Path) -> bytes:
    """An app whose code, where it is ever imported, leaves a file."""
    components = '[tool.flwr.app.components]\nserverapp = "stowaway:app"\nclientapp = "stowaway:app"\n'
    app = f'[tool.flwr.app]\npublisher = "flwrlabs"\n{components}[tool.flwr.app.config]\n'
    project = f'[project]\nname = "stowaway"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndescription = ""\n{app}'
    code = f"open({str(trace)!r}, 'w').close()\n"
    files = {"pyproject.toml": project, "stowaway.py": code}
    content = "".join(f"{name},{sha256(text.encode()).hexdigest()},{8 * len(text)}\n" for name, text in files.items())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in {**files, ".info/CONTENT": content}.items():
            archive.writestr(name, text)
    return packed.getvalue()


@pytest.mark.usefixtures("trainer")
def test_code_that_came_with_the_run_is_never_executed(node: SuperNode, relay: Relay, folder: Path) -> None:
    trace = folder / "trace"
    node.put(to_record(ASK), fab=fab(trace))
    relay.step()
    assert not node.reply().has_error()
    assert not trace.exists()
    assert "stowaway" not in sys.modules


@pytest.mark.slow
def test_the_same_bundle_is_executed_by_flower_s_own_process(node: SuperNode, folder: Path) -> None:
    """So the test above can fail."""
    trace = folder / "trace"
    node.put(to_record(ASK), fab=fab(trace))
    with Runtime(node.address, SECRET) as runtime:
        token = runtime.acquire()
    command = ["flwr-clientapp", "--insecure", "--runtime-api-address", node.address, "--token", token]
    said = subprocess.run(
        command, env=_environment(folder), cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert trace.exists(), said.stdout + said.stderr


def _environment(folder: Path) -> dict[str, str]:
    from fedtune.processes import flower_environment

    return flower_environment(folder)


def test_without_a_trainer_the_answer_says_so_and_the_relay_goes_on(
    node: SuperNode, relay: Relay, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "PATIENCE", 0.05)
    node.put(to_record(ASK))
    relay.step()
    assert "no trainer answers" in from_record(node.reply().content).header["failed"]
    assert "no trainer answers" in json.loads((folder / "answers.jsonl").read_text())["failed"]
    assert relay.step() == pytest.approx(SHORTEST, abs=0.05)


@pytest.mark.usefixtures("trainer")
def test_a_message_that_is_not_ours_is_answered_with_the_reason(node: SuperNode, relay: Relay) -> None:
    node.put(RecordDict())
    relay.step()
    assert "without a fedtune header" in from_record(node.reply().content).header["failed"]


@pytest.mark.usefixtures("trainer")
def test_contents_that_cannot_be_read_become_an_error_at_once_and_the_next_is_answered(node: SuperNode, relay: Relay) -> None:
    """Left alone, the SuperNode would wait a minute for it; told only that the task failed, as Flower does, for ever."""
    task = node.put(to_record(ASK))
    for tree in parts(node.tree):
        node.state.object_store.store[tree.object_id].content = b"garbage"
    relay.step()
    reply = node.reply()
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == node.tree.object_id
    assert node.status_of(task) == (Status.FINISHED, SubStatus.FAILED)

    node.put(to_record(Envelope({**ASK.header, "ask": "r3-1"}, ASK.tensors)), run_id=2)
    relay.step()
    assert from_record(node.reply().content).header["ask"] == "r3-1"


@pytest.mark.usefixtures("trainer")
def test_a_task_that_is_there_before_all_of_its_message_is_answered_as_soon_as_it_is(node: SuperNode, relay: Relay) -> None:
    """Flower looks again after 1, 2, 4, ... s: a message that takes 5 s to come would wait 2 s more."""
    node.put(to_record(ASK))
    last = node.state.object_store.store[list(parts(node.tree))[-1].object_id]  # type: ignore[attr-defined]
    last.is_available, content = False, last.content
    last.content = b""

    def come() -> None:
        last.content, last.is_available = content, True

    arrival = threading.Timer(0.2, come)
    arrival.start()
    began = time.monotonic()
    relay.step()
    assert 0.2 <= time.monotonic() - began < 0.75
    assert from_record(node.reply().content).header["ask"] == "r3-0"
    arrival.join()


def test_tasks_of_other_types_are_left_alone(node: SuperNode, relay: Relay) -> None:
    task = node.put(to_record(ASK), task=TaskType.AGENT_APP)
    assert relay.step() > 0
    assert node.status_of(task)[0] == Status.PENDING


def test_without_the_secret_nobody_takes_a_task(node: SuperNode) -> None:
    task = node.put(to_record(ASK))
    for secret in (None, b"another"):
        with Runtime(node.address, secret) as runtime, pytest.raises(httpx.HTTPStatusError, match="401"):
            runtime.acquire()
    assert node.status_of(task)[0] == Status.PENDING


def test_a_supernode_that_is_gone_is_asked_again_and_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with SuperNode(folder) as node, Runtime(node.address, SECRET) as runtime:
        relay = Relay(runtime, folder / "t.sock", Answers(None))
        assert relay.step() == SHORTEST
        node.stop()
        with caplog.at_level(logging.WARNING, "fedtune.relay"):
            assert [relay.step(), relay.step()] == [GONE, GONE]
    assert len([record for record in caplog.records if "gives no tasks" in record.message]) == 1


def test_a_secret_that_is_not_there_is_the_user_s_to_mend(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = ["--runtime", "127.0.0.1:1", "--trainer", str(folder / "t.sock"), "--secret", str(folder / "none")]
    assert main(given) == 2
    assert "the file that the SuperNode was given" in caplog.text


def test_no_process_of_the_network_half_imports_torch_or_transformers() -> None:
    ours = "client.relay, client.supernode, client.supervisor, client.commands"
    code = f"import sys, {ours}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=app_root(), check=True, capture_output=True, text=True)
    assert "flwr" in loaded.stdout.split()
    assert not {"torch", "transformers", "peft", "datasets"} & set(loaded.stdout.split())
