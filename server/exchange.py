"""Asks out, answers in, over any Flower Grid: the network in deployment, a loop over clients in simulation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, MalformedMessage
from fedtune.messages import from_record, to_record

MESSAGE_TYPE = "query"
SHORTEST_WAIT, LONGEST_WAIT = 0.05, 0.5  # seconds between polls; it doubles while nothing comes


@dataclass(frozen=True)
class Reply:
    """What came back from one node: an envelope, or the reason why none came."""

    node: int
    envelope: Envelope | None
    failed: str = ""


def exchange(grid: Grid, asks: Mapping[int, Envelope], timeout: float) -> Iterator[Reply]:
    """One reply for each node that was asked, in the order in which they come; at the deadline, the missing ones."""
    nodes = list(asks)
    messages = [grid.create_message(to_record(asks[node]), MESSAGE_TYPE, node, "") for node in nodes]
    waiting = dict(zip(grid.push_messages(messages), nodes, strict=True))
    deadline, wait = time.monotonic() + timeout, SHORTEST_WAIT
    while waiting:
        replies = list(grid.pull_messages(list(waiting)))
        for message in replies:
            node = waiting.pop(message.metadata.reply_to_message_id, None)
            if node is not None:
                yield _reply(node, message)
        if replies:
            wait = SHORTEST_WAIT
        elif time.monotonic() > deadline:
            yield from (Reply(node, None, f"no answer within {timeout:g} s") for node in waiting.values())
            return
        else:
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)


def _reply(node: int, message: Message) -> Reply:
    if message.has_error():
        return Reply(node, None, str(message.error.reason))
    try:
        return Reply(node, from_record(message.content))
    except (MalformedMessage, ClientFailed) as error:
        return Reply(node, None, str(error))
