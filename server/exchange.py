"""Asks out, answers in, over any Flower Grid: the network in deployment, a loop over clients in simulation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from itertools import chain
from types import MappingProxyType

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedtune.envelope import Envelope
from fedtune.errors import MALFORMED, ClientFailed, FedtuneError
from fedtune.messages import from_record, to_record
from server.patience import patiently
from server.post import OPEN, Post
from server.report_units import one_line
from server.tally import LONGEST_REASON

MESSAGE_TYPE = "query"
SHORTEST_WAIT, LONGEST_WAIT = 0.05, 0.5  # seconds between polls; it doubles while nothing comes
SLACK = 10.0  # seconds that the SuperLink's clock may differ from ours
AWAY = "its node is not connected"
TOO_LATE = "late: enough others had answered"
LOST = (  # the connection, or a process that was killed, is to blame, and not the client
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)
MOST_TIMES = 5  # that a node is asked the same
RETURN = 60.0  # seconds in which a node that has gone away is waited for: time enough to start a killed process again
OVERDUE, SLOWER = 30.0, 4.0  # seconds without an answer, and times the slowest so far, after which a node is asked again
UNKNOWN = 1 / 8  # of the timeout, while no answer has come yet


@dataclass(frozen=True)
class Reply:
    """What came back from one node: an envelope, or the reason why none came."""

    node: int
    envelope: Envelope | None
    failed: str = ""
    carried: Envelope | None = field(default=None, compare=False)  # as it came over the network
    to: str = field(default="", compare=False)  # the message that it answers, of an exchange before


@dataclass(frozen=True)
class Beside:
    """What an exchange has to do with those before it and after it."""

    over: Callable[[], bool] = lambda: False  # enough has come: nobody is waited for any more
    before: Mapping[str, int] = field(default_factory=dict)  # messages of before that may be answered still -> their nodes
    left: Callable[[Mapping[str, int]], None] = lambda messages: None  # told of those that nobody has answered at the end
    lasts: float = 0.0  # seconds after the deadline in which the asks are delivered, and answers to them


ALONE = Beside()


def exchange(
    grid: Grid,
    asks: Mapping[int, Envelope],
    timeout: float,
    post: Post = OPEN,
    sent: Callable[[int, Envelope], None] = lambda node, ask: None,
    enough: int = 0,
    beside: Beside = ALONE,
    gone: MutableMapping[int, float] | None = None,
) -> Iterator[Reply]:
    """One reply for each node that was asked, in the order in which they come; at the deadline, the missing ones.

    A node whose connection is lost is asked again when it is back: it is waited for as long as others are still at work, or
    fewer than `enough` have answered, or it has not been gone for long. `gone` says since when, from ask to ask; without it,
    that is no reason to wait. Asked again is also one whose answer is overdue, should an ask be lost that nobody saw: a client
    gives the answer that it has. `sent` is told of every message as it goes out.
    """
    deadline, wait, answers = time.monotonic() + timeout, SHORTEST_WAIT, 0
    open_asks = Asks(grid, post, beside.before, beside.lasts, gone)
    open_asks.add(asks, timeout, sent)
    while not beside.over() and (open_asks.waiting or (open_asks.away and answers < enough) or open_asks.may_return()):
        came = False
        for message in open_asks.pull():  # all, also beyond what is enough: they are nowhere else any more
            if reply := open_asks.reply(message):
                answers += reply.envelope is not None and not reply.to
                came = True
                yield reply
        if came:  # a simulation, which works while it is asked, has no deadline; messages of strangers put none off
            wait = SHORTEST_WAIT
        elif time.monotonic() > deadline:
            break
        else:
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
            open_asks.push(open_asks.overdue())
        open_asks.push(open_asks.back())
    beside.left(open_asks.messages)
    late = TOO_LATE if beside.over() else f"no answer within {timeout:g} s"
    yield from (Reply(node, None, late) for node in open_asks.waiting)
    yield from (Reply(node, None, AWAY) for node in open_asks.away)


class Again:
    """What can be gone through as often as one likes, and is not made before."""

    def __init__(self, make: Callable[[], Iterator[str]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[str]:
        return self._make()


class Asks:
    """Messages under way, and nodes that could not be reached. A node has one ask at a time."""

    def __init__(
        self,
        grid: Grid,
        post: Post,
        before: Mapping[str, int] = MappingProxyType({}),
        lasts: float = 0.0,
        gone: MutableMapping[int, float] | None = None,
    ) -> None:
        self._grid, self._post, self._before, self._lasts, self._gone = grid, post, dict(before), lasts, gone
        self.waiting: dict[int, float] = {}  # nodes that are at work -> when they were asked last
        self.away: list[int] = []
        self._asks: dict[int, Envelope] = {}
        self._sent: dict[int, Callable[[int, Envelope], None]] = {}
        self._until: dict[int, float] = {}  # node -> its deadline
        self._nodes: dict[str, int] = {}  # message -> node, until the node has answered one of its messages
        self._messages: dict[int, set[str]] = {}  # and the other way round
        self._times, self._unknown = Counter[int](), 0.0
        self._slowest: float | None = None  # seconds that an answer took

    def add(self, asks: Mapping[int, Envelope], timeout: float, sent: Callable[[int, Envelope], None]) -> None:
        for node in asks:
            self._sent[node], self._times[node], self._until[node] = sent, 0, time.monotonic() + timeout
        self._asks, self._unknown = {**self._asks, **asks}, UNKNOWN * timeout
        self.push(asks)

    @property
    def messages(self) -> Mapping[str, int]:
        """To those who are at work -> their nodes."""
        return dict(self._open())

    def _open(self, but: Collection[int] = ()) -> Iterator[tuple[str, int]]:
        return ((message, node) for message, node in self._nodes.items() if node in self.waiting and node not in but)

    def drop(self, node: int) -> None:
        """Nobody waits for it any more."""
        self.waiting.pop(node, None)
        self.away = [other for other in self.away if other != node]
        self._forget(node)

    def _forget(self, node: int) -> None:
        """Its messages."""
        for message in self._messages.pop(node, ()):
            del self._nodes[message]

    def expired(self) -> list[int]:
        """Whose deadline is over."""
        return [node for node in (*self.waiting, *self.away) if time.monotonic() > self._until[node]]

    def push(self, nodes: Iterable[int]) -> None:
        nodes = list(nodes)
        if not nodes:
            return
        envelopes = {node: self._out(node) for node in nodes}
        messages = [self._message(node, envelopes[node]) for node in nodes]
        for message, node in zip(patiently(lambda: self._grid.push_messages(messages)), nodes, strict=True):
            self._times[node] += 1
            if message:
                self._nodes[message], self.waiting[node] = node, time.monotonic()
                self._messages.setdefault(node, set()).add(message)
                self._sent[node](node, envelopes[node])
            else:  # the SuperLink does not take it: the node has just been revoked
                self.waiting.pop(node, None)
                self.away.append(node)

    def _leave(self, node: int) -> None:
        self.away.append(node)
        if self._gone is not None:
            self._gone.setdefault(node, time.monotonic())

    def may_return(self) -> bool:
        """Whether one has gone away a short time ago."""
        gone = self._gone or {}
        return any(time.monotonic() - gone.get(node, -RETURN) < RETURN for node in self.away)

    def _out(self, node: int) -> Envelope:
        ask, again = self._asks[node], self._times[node] > 0 or node in self._before.values()
        return self._post.out(node, ask, again=True) if again else self._post.out(node, ask)

    def _message(self, node: int, envelope: Envelope) -> Message:
        """Not delivered any more when nobody would take its answer: a client that comes back then would work for nothing."""
        left = max(self._until[node] - time.monotonic(), 0.0) + SLACK + self._lasts
        return self._grid.create_message(to_record(envelope), MESSAGE_TYPE, node, "", ttl=left)

    def back(self) -> list[int]:
        """Nodes that were away and are not any more."""
        back = self._connected([node for node in self.away if self._times[node] < MOST_TIMES])
        self.away = [node for node in self.away if node not in back]
        return back

    def overdue(self) -> list[int]:
        """Nodes that are connected, and slower than is to be expected; each time after twice as long."""
        patience = max(OVERDUE, self._unknown if self._slowest is None else SLOWER * self._slowest)
        now, times = time.monotonic(), self._times
        late = [node for node, asked in self.waiting.items() if now - asked >= patience * 2 ** (times[node] - 1)]
        return self._connected([node for node in late if times[node] < MOST_TIMES])

    def _connected(self, nodes: list[int]) -> list[int]:
        connected = set(patiently(self._grid.get_node_ids)) if nodes else set()
        return [node for node in nodes if node in connected]

    def pull(self, but: Collection[int] = ()) -> list[Message]:
        """Those of before come first: a simulation answers in this order, and looks at no more than it answers. Nothing of the
        nodes `but`."""
        if not self._before and next(self._open(but), None) is None:
            return []
        messages = Again(lambda: chain(self._before, (id for id, _ in self._open(but))))
        return list(patiently(lambda: self._grid.pull_messages(messages)))

    def reply(self, message: Message) -> Reply | None:
        """None of a message that nobody waits for, of a node that can be asked again, and of one that has answered another."""
        id = message.metadata.reply_to_message_id
        node = self._nodes.get(id)
        if id in self._before:
            return self._late(id, self._before.pop(id), message)
        if node is None or node not in self.waiting:
            return None
        if message.has_error() and message.error.code in LOST:
            return self._lost(id, node, message)
        asked = self.waiting.pop(node)
        if self._gone:
            self._gone.pop(node, None)
        self._forget(node)
        if message.has_error():
            return Reply(node, None, one_line(str(message.error.reason), LONGEST_REASON))
        self._slowest = max(self._slowest or 0.0, time.monotonic() - asked)
        return self._opened(node, message)

    def _late(self, id: str, node: int, message: Message) -> Reply:
        if message.has_error():
            return Reply(node, None, one_line(str(message.error.reason), LONGEST_REASON), to=id)
        return replace(self._opened(node, message), to=id)

    def _lost(self, id: str, node: int, message: Message) -> Reply | None:
        """A node that was only away may still answer what it had got; of a message that is lost nothing comes any more."""
        if message.error.code != ErrorCode.NODE_UNAVAILABLE:
            del self._nodes[id]
            self._messages[node].remove(id)
            if self._messages[node]:
                return None
        del self.waiting[node]
        if self._times[node] < MOST_TIMES:
            self._leave(node)
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
