"""A grid whose clients take the time that a test says, by a clock that does not wait; one ask after the other, as they come.
To the same ask they give the same answer again, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from flwr.app import Message, Metadata, RecordDict

from fedtune.base import blueprint
from fedtune.envelope import Envelope
from fedtune.job import Job
from fedtune.messages import from_record, to_record
from fedtune.strategy import Answer
from fedtune.wire import pack_answer, pack_failure, unpack_ask
from server import asking, at_work, buffered, exchange, late, latecomers, quorum

Seconds = Callable[[str, str], float]  # of a client, for an ask
MODULES = (asking, at_work, buffered, exchange, late, latecomers, quorum)


class Clock:
    """Time passes only while somebody sleeps."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in MODULES:
        if hasattr(module, "time"):
            monkeypatch.setattr(module, "time", clock)
    return clock


class Pulled:
    """Clients that move every number of what they are sent by a share of the way to their target: a step of gradient descent on
    `1/2 |x - target|^2`. `failing(client, ask id, how often it was asked that)` may say why one does not."""

    def __init__(
        self,
        job: Job,
        targets: Mapping[str, float],
        share: float = 1.0,
        examples: Mapping[str, int] | None = None,
        failing: Callable[[str, str, int], str] = lambda client, ask, times: "",
    ) -> None:
        self.job, self.targets, self.share, self.failing = job, targets, share, failing
        self.examples = examples or dict.fromkeys(targets, 1)
        self.base = blueprint(job).adapter.base
        self.asked: list[tuple[str, str]] = []  # (client, ask id), without hellos

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(self.targets)

    def answer(self, ask: Envelope, client: str) -> Envelope:
        header = {"ask": ask.header["ask"], "base": self.base, "client": client, "seconds": 0.5}
        if ask.header["kind"] == "hello":
            own = {"rank": self.job.rank_of(client), "scale": self.job.scale_of(client)}
            return pack_answer(Answer(), {**header, **own, "examples": self.examples[client]})
        self.asked.append((client, header["ask"]))
        if why := self.failing(client, header["ask"], self.asked.count((client, header["ask"]))):
            return pack_failure(why, header)
        if ask.header["kind"] == "evaluate":
            return pack_answer(Answer(metrics={"loss": 1.0, "tokens": 1.0}), header)
        sent = unpack_ask(ask).payload
        moved = {name: x + self.share * (self.targets[client] - x) for name, x in sent.tensors.items()}
        about: dict[str, Any] = {"loss": 1.0, "examples": 1.0}
        return pack_answer(Answer(type(sent)(moved, sent.roles, sent.scalars), float(self.examples[client]), about), header)


class TimedGrid:
    """Node i is the i-th client. An answer that nobody has pulled by its deadline is gone."""

    def __init__(self, clock: Clock, clients: Pulled, seconds: Seconds) -> None:
        self.clock, self.clients, self.seconds = clock, clients, seconds
        self.names = dict(enumerate(clients.clients, 1))
        self.free = dict.fromkeys(self.names, 0.0)  # node -> when it is done with all it was asked
        self.open: dict[
            str, tuple[float, float, Envelope, int]
        ] = {}  # message -> when it is answered, gone, with what, by whom
        self.stored: dict[tuple[int, bytes], Envelope] = {}  # what a client has answered to what
        self.pushed: list[tuple[str, str]] = []  # (client, ask id)
        self.ttls: list[float] = []
        self.busy: list[int] = []  # clients at work, at each pull
        self._count = 0

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float) -> Message:
        self._count += 1
        self.ttls.append(ttl)
        return Message(metadata=Metadata(1, str(self._count), 0, dst_node_id, "", "", 0.0, ttl, message_type), content=content)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node, ask = message.metadata.dst_node_id, from_record(message.content)
            name, now = self.names[node], self.clock.now
            content = node, b"".join(ask.pieces())
            again, hello = content in self.stored, ask.header["kind"] == "hello"
            self.free[node] = max(self.free[node], now) + (0.0 if again or hello else self.seconds(name, ask.header["ask"]))
            self.pushed.append((name, ask.header["ask"]))
            answer = self.stored[content] if again else self.clients.answer(ask, name)
            if "failed" not in answer.header:
                self.stored[content] = answer
            self.open[message.metadata.message_id] = self.free[node], now + message.metadata.ttl, answer, node
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        now = self.clock.now
        self.busy.append(sum(free > now for free in self.free.values()))
        due = sorted((self.open[id][0], id) for id in message_ids if id in self.open and self.open[id][0] <= now)
        return [self._answer(id, *self.open.pop(id)) for at, id in due if at <= self.open[id][1]]

    def _answer(self, id: str, at: float, gone: float, answer: Envelope, node: int) -> Message:
        return Message(metadata=Metadata(1, f"to {id}", node, 0, id, "", 0.0, 60.0, "query"), content=to_record(answer))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def get_node_ids(self) -> list[int]:
        return list(self.names)
