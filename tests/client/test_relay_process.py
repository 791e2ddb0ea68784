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
import uvicorn
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.common.constant import Status, SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from client import transport
from client.relay import GONE, LONGEST, SHORTEST, Relay, main
from client.runtime import Runtime
from client.service import serve
from client.told import Answers
from client.unanswered import Unanswered
from fedtune.envelope import Envelope, WireTensor
from fedtune.messages import from_record, to_record
from fedtune.paths import app_root
from fedtune.processes import free_port

SECRET = b"known to the SuperNode and to the relay"
ASK = Envelope({"kind": "train", "run": "demo", "round": 3, "ask": "r3-0"}, (WireTensor("w", "uint8", (2,), "raw", b"\1\2"),))
NODE, SERIES = 5, 1


class SuperNode:
    """Its loopback API; `put` is what its loop does with a message from the server."""

    def __init__(self, folder: Path) -> None:
        factory = NodeStateFactory(ObjectStoreFactory())
        self.state, self.folder, self.address = factory.state(), folder, f"127.0.0.1:{free_port()}"
        self.state.set_node_id(NODE)
        app = create_app(factory, SECRET)
        config = uvicorn.Config(app, port=int(self.address.rpartition(":")[2]), log_level="warning", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> SuperNode:
        self._thread.start()
        while not self._server.started:
            threading.Event().wait(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def put(self, content: RecordDict, run_id: int = 1, fab: bytes = b"", task: str = TaskType.CLIENT_APP) -> int:
        run = Run.create_empty(run_id)
        run.fab_id, run.fab_version, run.fab_hash, run.series_id = "flwrlabs/evil", "1.0.0", sha256(fab).hexdigest(), SERIES
        self.state.store_run(run)
        self.state.store_fab(Fab(run.fab_hash, fab, {}))
        self.state.set_run_series_context(SERIES, Context(run_id, NODE, {}, RecordDict(), {}, series_id=SERIES))
        message = Message(metadata=Metadata(run_id, "", 0, NODE, "", "", 0.0, 60.0, "query"), content=content)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.tree = get_object_tree(message)
        store = self.state.object_store
        store.preregister(run_id, self.tree)
        with no_object_id_recompute():
            for id, part in get_all_nested_objects(message).items():
                store.put(id, part.deflate())
        self.state.store_message(message)
        found = self.state.create_task(task_type=task, run_id=run_id, fab_hash=run.fab_hash)
        assert found is not None
        return found

    def reply(self) -> Message:
        """The one that lies there, with its content as it would be sent to the server."""
        [message] = self.state.get_messages_legacy(is_reply=True)
        if message.has_error():
            return message
        store = self.state.object_store
        ids = [tree.object_id for tree in _all(store.get_object_tree(message.metadata.message_id))]
        return inflate_object_from_contents(message.metadata.message_id, {id: store.get(id) for id in ids})

    def status_of(self, task: int) -> tuple[str, str]:
        [found] = self.state.get_tasks(task_ids=[task])
        return found.status.status, found.status.sub_status


def _all(tree: object) -> Iterator[object]:
    yield tree
    for child in tree.children:  # type: ignore[attr-defined]
        yield from _all(child)


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
    app = (
        '[tool.flwr.app]\npublisher = "flwrlabs"\n[tool.flwr.app.components]\nserverapp = "evil:app"\nclientapp = "evil:app"\n'
    )
    project = (
        f'[project]\nname = "evil"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndescription = ""\n{app}[tool.flwr.app.config]\n'
    )
    code = f"open({str(trace)!r}, 'w').close()\n"
    files = {"pyproject.toml": project, "evil.py": code}
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
    assert "evil" not in sys.modules


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
    for tree in _all(node.tree):
        node.state.object_store.store[tree.object_id].content = b"garbage"
    relay.step()
    reply = node.reply()
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == node.tree.object_id
    assert node.status_of(task) == (Status.FINISHED, SubStatus.FAILED)

    node.put(to_record(Envelope({**ASK.header, "ask": "r3-1"}, ASK.tensors)), run_id=2)
    relay.step()
    assert from_record(node.reply().content).header["ask"] == "r3-1"


def test_an_ask_that_a_relay_was_killed_over_is_an_error_as_soon_as_the_next_relay_starts(
    node: SuperNode, folder: Path
) -> None:
    asked, go = threading.Event(), threading.Event()
    file = folder / "open.json"

    def answer(ask: Envelope) -> Envelope:
        asked.set()
        go.wait(30)
        return Envelope({})

    task = node.put(to_record(ASK))
    command = [sys.executable, "-m", "client.relay", "--runtime", node.address, "--trainer", str(folder / "t.sock")]
    (folder / "secret").write_bytes(SECRET)
    command += ["--secret", str(folder / "secret"), "--unanswered", str(file)]
    server = serve(answer, folder / "t.sock")
    killed = subprocess.Popen(command, cwd=app_root(), stderr=subprocess.DEVNULL)
    try:
        assert asked.wait(60)
    finally:
        killed.kill()
        killed.wait()
    assert file.stat().st_mode & 0o777 == 0o600
    assert node.status_of(task)[0] == Status.RUNNING

    with Runtime(node.address, SECRET) as runtime:
        Relay(runtime, folder / "t.sock", Answers(None), Unanswered(file)).give_up_what_was_left()
    reply = node.reply()
    assert reply.error.reason == "the relay was killed while the ask was answered"
    assert reply.metadata.reply_to_message_id == node.tree.object_id
    assert node.status_of(task) == (Status.FINISHED, SubStatus.FAILED)
    assert not file.exists()
    go.set()
    server.stop(grace=None).wait()


@pytest.mark.usefixtures("trainer")
def test_an_ask_that_was_answered_leaves_nothing_open(node: SuperNode, folder: Path) -> None:
    file, kept = folder / "open.json", []

    class Seen(Unanswered):
        def forget(self) -> None:
            kept.append(file.exists())
            super().forget()

    node.put(to_record(ASK))
    with Runtime(node.address, SECRET) as runtime:
        Relay(runtime, folder / "t.sock", Answers(None), Seen(file)).step()
    assert (kept, file.exists()) == ([True], False)


@pytest.mark.parametrize("left", ["", "{}", "[1]", '{"token": "t", "came": "zz"}', '{"token": "t", "came": "0a00"}'])
def test_a_task_that_nobody_knows_any_more_does_not_keep_a_relay_from_starting(
    node: SuperNode, folder: Path, left: str
) -> None:
    file = folder / "open.json"
    file.write_text(left)
    node.put(to_record(ASK))
    with Runtime(node.address, SECRET) as runtime:
        relay = Relay(runtime, folder / "t.sock", Answers(None), Unanswered(file))
        relay.give_up_what_was_left()
        assert runtime.acquire()


@pytest.mark.usefixtures("trainer")
def test_a_task_that_is_there_before_all_of_its_message_is_answered_as_soon_as_it_is(node: SuperNode, relay: Relay) -> None:
    """Flower looks again after 1, 2, 4, ... s: a message that takes 5 s to come would wait 2 s more."""
    node.put(to_record(ASK))
    last = node.state.object_store.store[list(_all(node.tree))[-1].object_id]  # type: ignore[attr-defined]
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
