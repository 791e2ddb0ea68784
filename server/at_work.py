"""Of buffered rounds: which clients are at work, on what, and what they have sent. It outlasts the rounds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping

from fedtune.envelope import Envelope
from server.exchange import AWAY, LONGEST_WAIT, SHORTEST_WAIT, Asks, Reply
from server.late import Awaited


class AtWork:
    """A client has one ask at a time. `drawn` counts all asks so far."""

    def __init__(self, asks: Asks, drawn: int = 0) -> None:
        self.on: dict[str, Awaited] = {}
        self.drawn = drawn
        self._asks, self._came, self._wait = asks, deque[Reply](), SHORTEST_WAIT

    def begin(
        self, ones: Collection[Awaited], asks: Mapping[int, Envelope], timeout: float, sent: Callable[[int, Envelope], None]
    ) -> None:
        self.on |= {one.client: one for one in ones}
        self._asks.add(asks, timeout, sent)

    @property
    def hands(self) -> int:
        """Clients that can be reached, and are at work."""
        return len(self.on) - len(self._asks.away)

    def others(self, held: Collection[str]) -> bool:
        """Whether something can come of other clients than these."""
        return bool(self.on.keys() - held)

    def look(self, held: Collection[str]) -> tuple[Awaited, Reply] | None:
        """What has come, one at a time, and not of clients whose answers are `held` back; after a short wait None."""
        nodes = {self.on[client].node for client in held if client in self.on}
        self._came += [reply for message in self._asks.pull(nodes) if (reply := self._asks.reply(message))]
        self._came += self._overdue(nodes)
        if found := next((reply for reply in self._came if reply.node not in nodes), None):
            self._came.remove(found)
            self._wait = SHORTEST_WAIT
            return self._ended(found.node), found
        time.sleep(self._wait)
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        self._asks.push(self._asks.overdue())
        self._asks.push(self._asks.back())
        return None

    def drop_away(self) -> None:
        """Who cannot be reached may be asked something newer when it is back."""
        for node in list(self._asks.away):
            self._asks.drop(node)
            self._ended(node)

    def _overdue(self, held: Collection[int]) -> list[Reply]:
        away, over = set(self._asks.away), [node for node in self._asks.expired() if node not in held]
        for node in over:
            self._asks.drop(node)
        return [Reply(node, None, AWAY if node in away else "no answer before its deadline") for node in over]

    def _ended(self, node: int) -> Awaited:
        [one] = [one for one in self.on.values() if one.node == node]
        return self.on.pop(one.client)
