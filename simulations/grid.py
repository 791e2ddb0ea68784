"""A Flower Grid without a network: every node is a client of one trainer in this process, asked when its reply is pulled.

The messages are the same RecordDicts that would cross a network, so the coordinator and Flower's own strategies run on
it unchanged, and bytes are counted alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import count

from flwr.app import Message, Metadata, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from client.trainer import Trainer
from fedtune.messages import from_record, to_record


class InProcessGrid(Grid):
    """Node i is the i-th client of the trainer. A pull answers one message, so that at most one update is in memory."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._clients = dict(enumerate(trainer.clients, 1))
        self._waiting: dict[str, Message] = {}
        self._ids = count(1)
        self._run = Run.create_empty(run_id=1)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._message(content, message_type, 0, dst_node_id, "", group_id, ttl)

    def get_node_ids(self) -> list[int]:
        return list(self._clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = {message.metadata.message_id: message for message in messages}
        self._waiting |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        for message_id in message_ids:
            if message_id in self._waiting:
                return [self._answered(self._waiting.pop(message_id))]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        for message_id in self.push_messages(messages):
            yield from self.pull_messages([message_id])

    def _answered(self, message: Message) -> Message:
        asked = message.metadata
        answer = self._trainer.answer(from_record(message.content), self._clients[asked.dst_node_id])
        node, group = asked.dst_node_id, asked.group_id
        return self._message(to_record(answer), asked.message_type, node, 0, asked.message_id, group, asked.ttl)

    def _message(
        self, content: RecordDict, message_type: str, src: int, dst: int, reply_to: str, group: str, ttl: float | None
    ) -> Message:
        metadata = Metadata(
            run_id=self._run.run_id,
            message_id=str(next(self._ids)),
            src_node_id=src,
            dst_node_id=dst,
            reply_to_message_id=reply_to,
            group_id=group,
            created_at=time.time(),
            ttl=ttl or 3600.0,
            message_type=message_type,
        )
        return Message(metadata=metadata, content=content)
