"""Asks out, answers in, over any Flower Grid: the network in deployment, a loop over clients in simulation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedtune.envelope import Envelope
from fedtune.errors import MALFORMED, ClientFailed, FedtuneError
from fedtune.messages import from_record, to_record
from server.post import OPEN, Post
from server.report_units import one_line
from server.tally import LONGEST_REASON

MESSAGE_TYPE = "query"
SHORTEST_WAIT, LONGEST_WAIT = 0.05, 0.5  # seconds between polls; it doubles while nothing comes
SLACK = 10.0  # seconds that the SuperLink's clock may differ from ours
AWAY = "its node is not connected"
LOST = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE)  # the connection, not the client, is to blame
MOST_TIMES = 5  # that a node is asked the same


@dataclass(frozen=True)
class Reply:
    """What came back from one node: an envelope, or the reason why none came."""

    node: int
    envelope: Envelope | None
    failed: str = ""
    carried: Envelope | None = field(default=None, compare=False)  # as it came over the network


def exchange(
    grid: Grid,
    asks: Mapping[int, Envelope],
    timeout: float,
    post: Post = OPEN,
    sent: Callable[[int, Envelope], None] = lambda node, ask: None,
    enough: int = 0,
) -> Iterator[Reply]:
    """One reply for each node that was asked, in the order in which they come; at the deadline, the missing ones.

    A node whose connection is lost is asked again when it is back, as long as others are still at work, or fewer than
    `enough` have answered. `sent` is told of every message as it goes out.
    """
    deadline, wait, answers = time.monotonic() + timeout, SHORTEST_WAIT, 0
    open_asks = _Asks(grid, asks, post, sent, deadline)
    open_asks.push(asks)
    while open_asks.waiting or (open_asks.away and answers < enough):
        messages = open_asks.pull()
        for message in messages:
            if reply := open_asks.reply(message):
                answers += reply.envelope is not None
                yield reply
        if messages:
            wait = SHORTEST_WAIT
        elif time.monotonic() > deadline:
            break
        else:
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        open_asks.push(open_asks.back())
    yield from (Reply(node, None, f"no answer within {timeout:g} s") for node in open_asks.waiting.values())
    yield from (Reply(node, None, AWAY) for node in open_asks.away)


class _Asks:
    """Messages under way, and nodes that could not be reached."""

    def __init__(
        self,
        grid: Grid,
        asks: Mapping[int, Envelope],
        post: Post,
        sent: Callable[[int, Envelope], None],
        deadline: float,
    ) -> None:
        self._grid, self._asks, self._post, self._sent, self._deadline = grid, asks, post, sent, deadline
        self.waiting: dict[str, int] = {}  # message -> node
        self.away: list[int] = []
        self._times = Counter[int]()

    def push(self, nodes: Iterable[int]) -> None:
        nodes = list(nodes)
        if not nodes:
            return
        envelopes = {node: self._post.out(node, self._asks[node]) for node in nodes}
        messages = [self._message(node, envelopes[node]) for node in nodes]
        self.waiting |= dict(zip(self._grid.push_messages(messages), nodes, strict=True))
        self._times.update(nodes)
        for node, envelope in envelopes.items():
            self._sent(node, envelope)

    def _message(self, node: int, envelope: Envelope) -> Message:
        """Not delivered any more when the deadline is over: a client that comes back then would work for nothing."""
        left = max(self._deadline - time.monotonic(), 0.0) + SLACK
        return self._grid.create_message(to_record(envelope), MESSAGE_TYPE, node, "", ttl=left)

    def back(self) -> list[int]:
        """Nodes that were away and are not any more."""
        connected = set(self._grid.get_node_ids()) if self.away else set()
        back = [node for node in self.away if node in connected]
        self.away = [node for node in self.away if node not in connected]
        return back

    def pull(self) -> list[Message]:
        return list(self._grid.pull_messages(list(self.waiting)))

    def reply(self, message: Message) -> Reply | None:
        """None of a message that nobody waits for, and of a node that can be asked again."""
        node = self.waiting.pop(message.metadata.reply_to_message_id, None)
        if node is None:
            return None
        if not message.has_error():
            return self._opened(node, message)
        if message.error.code in LOST and self._times[node] < MOST_TIMES:
            self.away.append(node)
            return None
        return Reply(node, None, one_line(str(message.error.reason), LONGEST_REASON))

    def _opened(self, node: int, message: Message) -> Reply:
        try:
            carried = from_record(message.content)
            return Reply(node, self._post.back(node, carried), carried=carried)
        except ClientFailed as reason:
            return Reply(node, None, one_line(str(reason), LONGEST_REASON))
        except FedtuneError as reason:
            return Reply(node, None, one_line(f"refused: {reason}", LONGEST_REASON))
        except MALFORMED as error:
            return Reply(node, None, f"refused: it is malformed ({type(error).__name__})")
