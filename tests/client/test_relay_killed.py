"""A relay that is killed, at every step of an ask, and the next one that takes its task up."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from flwr.app import Message
from flwr.common.constant import ErrorCode, Status
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from client import relay as relay_module
from client import replies
from client.relay import GONE, MOST, Relay
from client.replies import SELDOM, Replies, send_whole_replies
from client.runtime import Runtime, Task
from client.service import serve
from client.told import Answers
from client.unanswered import Left, Unanswered
from fedtune.envelope import Envelope
from fedtune.messages import from_record, to_record
from fedtune.paths import app_root
from tests.client.supernode import ASK, SECRET, SuperNode


class Killed(BaseException):
    """Nothing of the relay's runs after this, as after SIGKILL."""


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
def asked(folder: Path) -> Iterator[list[Envelope]]:
    """What a trainer, which is there, was asked. Each answer has other bytes, as sealed ones have."""
    seen: list[Envelope] = []

    def answer(ask: Envelope) -> Envelope:
        seen.append(ask)
        return Envelope({"client": "a", "ask": ask.header["ask"], "sealed": len(seen)}, ask.tensors)

    server = serve(answer, folder / "t.sock")
    yield seen
    server.stop(grace=None).wait()


@pytest.fixture
def new_relay(node: SuperNode, folder: Path) -> Iterator[Callable[[], Relay]]:
    with Runtime(node.address, SECRET) as runtime:
        yield lambda: Relay(runtime, folder / "t.sock", Answers(None), Unanswered(folder / "open.json"))


def killed(monkeypatch: pytest.MonkeyPatch, where: object, step: str, when: str, relay: Relay) -> None:
    """Run it up to that step, and no further."""
    real = getattr(where, step)

    def deadly(*given: object, **named: object) -> None:
        if when == "after":
            real(*given, **named)
        raise Killed

    with monkeypatch.context() as once:
        once.setattr(where, step, deadly)
        with pytest.raises(Killed):
            relay.step()


def sent(node: SuperNode, waiting: Replies | None = None) -> Message:
    """What the SuperNode's loop sends on, which looks again and again."""
    waiting = waiting or Replies(node.state)
    for _ in range(SELDOM + 1):
        if found := waiting.get_messages_legacy(is_reply=True):
            [message] = found
            return node.inflated(message)
    raise AssertionError("nothing to send")


STEPS = [
    *[
        (Task, step, when)
        for step in ("PullTaskInput", "PullObject", "PushMessages", "PushObject")
        for when in ("before", "after")
    ],
    *[(Task, step, when) for step in ("ConfirmMessageReceived", "PushTaskOutput") for when in ("before", "after")],
    (Task, "PullMessages", "before"),
    (relay_module, "app", "before"),
    (relay_module, "app", "after"),
]


@pytest.mark.parametrize(("where", "step", "when"), STEPS)
def test_the_next_relay_answers(
    node: SuperNode,
    asked: list[Envelope],
    new_relay: Callable[[], Relay],
    monkeypatch: pytest.MonkeyPatch,
    where: type | ModuleType,
    step: str,
    when: str,
) -> None:
    node.put(to_record(ASK))
    killed(monkeypatch, where, step, when, new_relay())
    assert new_relay().step() == 0.0
    assert from_record(sent(node).content).header["ask"] == "r3-0"
    assert all(ask == ASK for ask in asked)

    node.state.delete_messages(message_ids=[node.tree.object_id])  # as Flower's loop does when it has sent the reply
    node.put(to_record(Envelope({**ASK.header, "ask": "r3-1"}, ASK.tensors)))
    new_relay().step()
    assert from_record(sent(node).content).header["ask"] == "r3-1"
    assert not node.folder.joinpath("open.json").exists()


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(("step", "when"), [("ConfirmMessageReceived", "before"), ("PushTaskOutput", "before")])
def test_what_was_sent_on_is_not_sent_again_in_place_of_the_next_answer(
    node: SuperNode, new_relay: Callable[[], Relay], monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    """The next relay answers again what the SuperNode has sent on already."""
    node.put(to_record(ASK))
    killed(monkeypatch, Task, step, when, new_relay())
    first = sent(node)
    ids = [first.metadata.message_id, first.metadata.reply_to_message_id]
    node.state.delete_messages(message_ids=ids)  # as Flower's loop does
    new_relay().step()
    node.put(to_record(Envelope({**ASK.header, "ask": "r3-1"}, ASK.tensors)))
    with pytest.raises(AssertionError, match="nothing to send"):
        sent(node)
    new_relay().step()
    assert from_record(sent(node).content).header["ask"] == "r3-1"


@pytest.mark.usefixtures("asked")
def test_a_message_that_was_given_and_never_kept_is_lost_and_the_server_hears_it_at_once(
    node: SuperNode, new_relay: Callable[[], Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    node.put(to_record(ASK))
    killed(monkeypatch, Task, "PullMessages", "after", new_relay())
    new_relay().step()
    reply = sent(node)
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert reply.metadata.reply_to_message_id == node.tree.object_id


@pytest.mark.usefixtures("asked")
def test_a_task_whose_token_was_never_kept_is_given_out_again_by_the_supernode(
    node: SuperNode, new_relay: Callable[[], Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 30 s without a heartbeat."""
    node.put(to_record(ASK))
    killed(monkeypatch, Unanswered, "keep", "before", new_relay())
    assert new_relay().step() > 0.0
    for record in node.state.task_token_store.values():
        record.active_until -= timedelta(seconds=31)
    node.state.get_messages_legacy(is_reply=True)  # its loop looks all the time
    assert new_relay().step() == 0.0
    assert from_record(sent(node).content).header["ask"] == "r3-0"


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("step", ["PullTaskInput", "PushMessages"])
def test_where_no_relay_comes_the_server_is_told_after_a_minute_whatever_is_there(
    node: SuperNode, new_relay: Callable[[], Relay], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    node.put(to_record(ASK))
    killed(monkeypatch, Task, step, "after", new_relay())
    waiting = Replies(node.state)
    with pytest.raises(AssertionError, match="nothing to send"):
        sent(node, waiting)
    for record in node.state.task_token_store.values():
        record.active_until -= timedelta(seconds=61)
    assert sent(node, waiting).error.code == ErrorCode.CLIENT_APP_CRASHED


@pytest.mark.usefixtures("asked")
def test_an_ask_over_which_relays_are_killed_is_given_up(
    node: SuperNode, new_relay: Callable[[], Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = node.put(to_record(ASK))
    for _ in range(MOST):
        killed(monkeypatch, relay_module, "app", "before", new_relay())
    new_relay().step()
    reply = sent(node)
    assert reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert f"{MOST} times a relay ended" in reply.error.reason
    assert node.status_of(task)[0] == Status.FINISHED


def test_while_the_supernode_does_not_answer_the_task_stays_ours(
    node: SuperNode, asked: list[Envelope], new_relay: Callable[[], Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> None:
        raise httpx.ReadTimeout("30 s")

    node.put(to_record(ASK))
    relay = new_relay()
    with monkeypatch.context() as once:
        once.setattr(Task, "PushObject", slow)
        assert relay.step() == GONE
    assert relay.step() == 0.0
    assert from_record(sent(node).content).header["ask"] == "r3-0"
    assert len(asked) == 2


@pytest.mark.usefixtures("asked")
def test_an_ask_that_was_answered_leaves_nothing_open(node: SuperNode, new_relay: Callable[[], Relay], folder: Path) -> None:
    node.put(to_record(ASK))
    new_relay().step()
    assert not (folder / "open.json").exists()
    assert node.tree.object_id not in node.state.object_store.store  # nor does the SuperNode keep what was asked


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    "left",
    ["", "{}", "[1]", '{"token": "t", "came": "zz", "brought": 1}', '{"token": "t", "came": "0a00", "brought": 1}', "[" * 9999],
)
def test_a_task_that_nobody_knows_any_more_does_not_keep_a_relay_from_the_next(
    node: SuperNode, new_relay: Callable[[], Relay], folder: Path, left: str
) -> None:
    (folder / "open.json").write_text(left)
    node.put(to_record(ASK))
    relay = new_relay()
    for _ in range(2):
        relay.step()
    assert from_record(sent(node).content).header["ask"] == "r3-0"


def test_what_is_kept_is_for_this_user_alone_and_a_full_disk_is_no_reason_to_stop(folder: Path) -> None:
    kept = Unanswered(folder / "open.json")
    kept.keep(Left("token"))
    kept.brought(b"came")
    assert Unanswered(folder / "open.json").left() == Left("token", b"came".hex(), 1)
    assert (folder / "open.json").stat().st_mode & 0o777 == 0o600
    (folder / "open.json").write_text('{"token": "token", "came": "", "brought": Infinity}')
    assert Unanswered(folder / "open.json").left() is None
    nowhere = Unanswered(folder / "no" / "open.json")
    nowhere.keep(Left("token"))
    assert nowhere.left() == Left("token")


def test_flower_s_loop_is_the_one_that_we_know(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from flwr.supernode import start_client_internal as loop

    seen = []
    monkeypatch.setattr(loop, "_push_messages", lambda **given: seen.append(given))
    assert send_whole_replies(loop)
    loop._push_messages(state="state", object_store="store", send="send", push_object="push")
    assert isinstance(seen[0].pop("state"), Replies)
    assert seen == [{"object_store": "store", "send": "send", "push_object": "push"}]
    assert all(hasattr(InMemoryNodeState, name) for name in replies.KNOWN)
    assert not send_whole_replies(ModuleType("changed"))
    assert "has changed" in caplog.text


def test_a_real_relay_that_is_killed_and_the_next_one(node: SuperNode, new_relay: Callable[[], Relay], folder: Path) -> None:
    came, go = threading.Event(), threading.Event()

    def answer(ask: Envelope) -> Envelope:
        came.set()
        go.wait(30)
        return Envelope({"ask": ask.header["ask"]})

    node.put(to_record(ASK))
    (folder / "secret").write_bytes(SECRET)
    files = ["--secret", str(folder / "secret"), "--unanswered", str(folder / "open.json")]
    command = [sys.executable, "-m", "client.relay", "--runtime", node.address, "--trainer", str(folder / "t.sock"), *files]
    server = serve(answer, folder / "t.sock")
    process = subprocess.Popen(command, cwd=app_root(), stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert came.wait(60)
    finally:
        process.kill()
        process.wait()
    go.set()
    new_relay().step()
    assert from_record(sent(node).content).header["ask"] == "r3-0"
    server.stop(grace=None).wait()
