"""The relay, which carries what it does not know: messages from the SuperNode, answers from the trainer, and its small files.

Whatever comes, the task is answered or given back as failed, and the relay goes on. And a client's own files, damaged while it
was not there: it begins without what is damaged, or says in one line what is to be done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordProto
from google.protobuf.message import DecodeError

from client import trainer_pb2, transport
from client.relay import Relay
from client.told import Answers, Link, understood
from client.transport import from_proto, to_proto
from client.unanswered import Left, Unanswered
from fedtune.envelope import Envelope
from fedtune.errors import MALFORMED
from fedtune.messages import from_record, to_record
from tests.fuzz.mutations import damaged, mutated, rewritten
from tests.fuzz.postbox import Postbox, odd
from tests.fuzz.recorded import Recorded
from tests.fuzz.watch import Broken

OPEN = "open-task.json"


class Task:
    """What the relay has to answer, as the SuperNode gives it."""

    keep: Any = None

    def __init__(self, message: Message) -> None:
        self._message, self.replies, self.reasons = message, list[Message](), list[str]()

    def pull(self, again: bool = False) -> Message:
        return self._message

    def came_before(self, came: bytes) -> None: ...

    def reply(self, message: Message) -> None:
        self.replies.append(message)

    def fail(self, reason: str, code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION) -> None:
        self.reasons.append(reason)


class Runtime:
    """Gives one task."""

    def __init__(self, task: Task) -> None:
        self._task, self._tokens = task, ["token"]

    def acquire(self) -> str:
        return self._tokens.pop() if self._tokens else ""

    @contextmanager
    def task(self, token: str) -> Iterator[Task]:
        yield self._task


class AtRelay:
    def __init__(self, runs: Sequence[Recorded], folder: Path) -> None:
        self._messages = [message for run in runs for message in run.messages]
        self._folder, self._grid = folder, Postbox()
        folder.mkdir(parents=True)

    def asks(self, draw: Random) -> str:
        """From the network, and to the trainer as bytes."""
        ask, answer = self._drawn(draw)
        record = _record(draw, mutated(draw, ask))
        return "refused by Flower" if record is None else self._relayed(draw, record, to_proto(answer))

    def answers(self, draw: Random) -> str:
        """From the trainer, which a stranger may have taken over."""
        ask, answer = self._drawn(draw)
        try:
            message = to_proto(mutated(draw, answer))
            if draw.random() < 0.4:
                message = trainer_pb2.Envelope.FromString(damaged(draw, message.SerializeToString()))
        except (DecodeError, TypeError, ValueError):
            return "refused by protobuf"
        return self._relayed(draw, to_record(ask), message)

    def files(self, draw: Random) -> str:
        """What relay and supernode leave for each other, and for the supervisor."""
        left = Left("token", "00ff" * draw.randrange(40), draw.randrange(4))
        link = Link("/v1/fleet/activate-node", 200, 1.8e9, 1.8e9)
        file = self._folder / OPEN
        given = json.dumps(vars(draw.choice((left, link)))).encode()
        data = damaged(draw, given) if draw.random() < 0.5 else json.dumps(rewritten(draw, json.loads(given))).encode()
        file.write_bytes(data)
        try:
            found, read, told = Unanswered(file).left(), Link.read(file), understood(data)
        finally:
            file.unlink()
        for text in (*(str(value) for value in told.values()), read.path if read else ""):
            if not text.isprintable():
                raise Broken(f"it is shown in a terminal: {text!r}")
        return ", ".join(name for name, value in (("task", found), ("link", read), ("line", told)) if value) or "nothing"

    def _drawn(self, draw: Random) -> tuple[Envelope, Envelope]:
        message = draw.choice(self._messages)
        return message.ask, message.answer

    def _relayed(self, draw: Random, record: RecordDict, answer: trainer_pb2.Envelope) -> str:
        task = Task(self._grid.message(record, 0, 1, ""))
        left, told = Unanswered(self._folder / OPEN), Answers(self._folder / "told")
        brought = {"_brought": lambda message, socket: from_proto(_through(message, answer))}
        with patch.multiple(transport, await_listener=lambda socket, patience: None, **brought):
            Relay(Runtime(task), self._folder / "t.sock", told, left).step()  # type: ignore[arg-type]
        if len(task.replies) + len(task.reasons) != 1 or (self._folder / OPEN).exists():
            raise Broken(f"{len(task.replies)} replies and {len(task.reasons)} failures for one task")
        if task.reasons:
            return f"given back: {task.reasons[0]}"
        header = from_record(task.replies[0].content).header
        return f"failed: {header['failed']}" if "failed" in header else "carried"


def _through(message: trainer_pb2.Envelope, answer: trainer_pb2.Envelope) -> trainer_pb2.Envelope:
    """As bytes, which what cannot be written does not survive."""
    trainer_pb2.Envelope.FromString(message.SerializeToString())
    return trainer_pb2.Envelope.FromString(answer.SerializeToString())


def _record(draw: Random, ask: Envelope) -> RecordDict | None:
    try:
        record = to_record(ask)
        if draw.random() < 0.1:
            return RecordDict(odd(draw, record))
        if draw.random() < 0.3:
            return recorddict_from_proto(RecordProto.FromString(damaged(draw, recorddict_to_proto(record).SerializeToString())))
    except (DecodeError, *MALFORMED):
        return None
    return record
