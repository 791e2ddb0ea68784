"""Asks out and answers in, on a grid that the test plays and a clock that does not wait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.common.constant import ErrorCode

from fedtune.envelope import Envelope
from fedtune.messages import from_record, to_record
from server import exchange as exchange_module
from server.exchange import AWAY, LONGEST_WAIT, MOST_TIMES, SHORTEST_WAIT, SLACK, Reply, exchange
from server.tally import LONGEST_REASON

ASK = Envelope({"ask": "1.0"})


class Clock:
    """Time passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.naps = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


class PlayedGrid:
    """Answers of each node come at the seconds that the test says."""

    def __init__(self, clock: Clock, arrivals: Mapping[int, float], contents: Mapping[int, RecordDict | Error]) -> None:
        self.clock, self.arrivals, self.contents = clock, arrivals, contents
        self.sent: dict[str, Message] = {}
        self.ttls: list[float | None] = []

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        self.ttls.append(ttl)
        return Message(metadata=self._metadata(f"ask-{dst_node_id}", dst_node_id, ""), content=content)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.sent = {message.metadata.message_id: message for message in messages}
        return list(self.sent)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        asked = {self.sent[id].metadata.dst_node_id: id for id in message_ids}
        due = sorted((at, node) for node, at in self.arrivals.items() if node in asked and at <= self.clock.now)
        return [self._answer(node, asked[node]) for _, node in due]

    def _answer(self, node: int, id: str) -> Message:
        content, metadata = self.contents[node], self._metadata(f"answer-{node}", 0, id)
        if isinstance(content, Error):
            return Message(metadata=metadata, error=content)
        return Message(metadata=metadata, content=content)

    def _metadata(self, id: str, node: int, reply_to: str) -> Metadata:
        return Metadata(1, id, 0, node, reply_to, "", 0.0, 60.0, "query")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(exchange_module, "time", clock)
    return clock


def own(node: int) -> Envelope:
    return Envelope({"client": f"c{node}"})


def played(
    clock: Clock, arrivals: Mapping[int, float], odd: Mapping[int, RecordDict | Error] = {}, nodes: int = 3
) -> PlayedGrid:
    contents = {node: to_record(own(node)) for node in range(1, nodes + 1)}
    return PlayedGrid(clock, arrivals, {**contents, **odd})


def ask(grid: PlayedGrid, nodes: Iterable[int] = (1, 2, 3), timeout: float = 5.0) -> list[Reply]:
    return list(exchange(grid, dict.fromkeys(nodes, ASK), timeout))


def test_replies_come_in_the_order_of_their_arrival(clock: Clock) -> None:
    replies = ask(played(clock, {1: 2.0, 2: 0.0, 3: 1.0}))
    assert replies == [Reply(2, own(2)), Reply(3, own(3)), Reply(1, own(1))]


def test_each_node_gets_its_own_ask(clock: Clock) -> None:
    grid = played(clock, {1: 0.0, 2: 0.0})
    list(exchange(grid, {1: own(1), 2: own(2)}, 5.0))
    assert [from_record(message.content) for message in grid.sent.values()] == [own(1), own(2)]


def test_at_the_deadline_the_missing_are_named_and_the_others_kept(clock: Clock) -> None:
    replies = ask(played(clock, {1: 0.0, 2: 99.0}), timeout=5.0)
    late = "no answer within 5 s"
    assert replies == [Reply(1, own(1)), Reply(2, None, late), Reply(3, None, late)]
    assert 5.0 < clock.now <= 5.0 + LONGEST_WAIT


def test_an_answer_of_the_last_moment_still_counts(clock: Clock) -> None:
    assert ask(played(clock, {1: 5.0}, nodes=1), nodes=[1]) == [Reply(1, own(1))]


def test_waits_grow_while_nothing_comes_and_start_again_with_a_reply(clock: Clock) -> None:
    """0.05 + 0.1 + 0.2 + 0.4 are 0.75 s: the first answer is there, and the waits begin anew."""
    ask(played(clock, {1: 0.7, 2: 0.9}), nodes=[1, 2])
    assert clock.naps[:4] == [0.05, 0.1, 0.2, 0.4]
    assert clock.naps[4] == SHORTEST_WAIT
    clock.naps.clear()
    ask(played(clock, {}), nodes=[1], timeout=60.0)
    assert max(clock.naps) == LONGEST_WAIT


def test_an_error_of_flower_is_the_reason(clock: Clock) -> None:
    error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="The ClientApp raised")
    assert ask(played(clock, {1: 0.0}, {1: error}), nodes=[1]) == [Reply(1, None, "The ClientApp raised")]


class PatchyGrid(PlayedGrid):
    """The connection of node 1 is lost until `healed`: what is sent to it meanwhile comes back as an error at once."""

    def __init__(self, clock: Clock, healed: float, others: Mapping[int, float]) -> None:
        super().__init__(clock, {1: 0.0, **others}, {node: to_record(own(node)) for node in (1, *others)})
        self.healed, self.pushed = healed, list[tuple[float, int]]()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        self.pushed += [(self.clock.now, message.metadata.dst_node_id) for message in messages]
        self.lost = self.clock.now < self.healed
        self.sent |= {message.metadata.message_id: message for message in messages}
        return [message.metadata.message_id for message in messages]

    def get_node_ids(self) -> list[int]:
        return [node for node in self.arrivals if node != 1 or self.clock.now >= self.healed]

    def _answer(self, node: int, id: str) -> Message:
        if node == 1 and self.lost:
            self.contents = {**self.contents, 1: Error(code=ErrorCode.NODE_UNAVAILABLE, reason="no heartbeat")}
        elif node == 1:
            self.contents = {**self.contents, 1: to_record(own(1))}
        return super()._answer(node, id)


def test_a_node_that_comes_back_while_others_work_is_asked_again(clock: Clock) -> None:
    grid = PatchyGrid(clock, healed=2.0, others={2: 4.0})
    assert list(exchange(grid, dict.fromkeys([1, 2], ASK), 60.0)) == [Reply(1, own(1)), Reply(2, own(2))]
    assert [node for _, node in grid.pushed] == [1, 2, 1]
    assert 2.0 <= grid.pushed[2][0] <= 2.0 + LONGEST_WAIT


def test_nobody_waits_for_a_node_that_is_away_unless_too_few_answered(clock: Clock) -> None:
    grid = PatchyGrid(clock, healed=30.0, others={2: 1.0})
    assert list(exchange(grid, dict.fromkeys([1, 2], ASK), 60.0, enough=1)) == [Reply(2, own(2)), Reply(1, None, AWAY)]
    assert clock.now < 2.0
    grid = PatchyGrid(clock, healed=30.0, others={2: 1.0})
    assert list(exchange(grid, dict.fromkeys([1, 2], ASK), 60.0, enough=2)) == [Reply(2, own(2)), Reply(1, own(1))]
    assert 30.0 <= clock.now <= 30.0 + 2 * LONGEST_WAIT


def test_the_deadline_holds_for_nodes_that_are_away(clock: Clock) -> None:
    grid = PatchyGrid(clock, healed=99.0, others={})
    assert list(exchange(grid, {1: ASK}, 5.0, enough=1)) == [Reply(1, None, AWAY)]
    assert 5.0 < clock.now <= 5.0 + LONGEST_WAIT


def test_a_node_that_loses_every_message_is_given_up(clock: Clock) -> None:
    grid = PatchyGrid(clock, healed=99.0, others={})
    grid.get_node_ids = lambda: [1]  # connected, and yet nothing arrives
    assert list(exchange(grid, {1: ASK}, 60.0, enough=1)) == [Reply(1, None, "no heartbeat")]
    assert len(grid.pushed) == MOST_TIMES


def test_every_message_that_goes_out_is_told(clock: Clock) -> None:
    told = []
    grid = PatchyGrid(clock, healed=2.0, others={2: 4.0})
    list(exchange(grid, {1: own(1), 2: own(2)}, 60.0, sent=lambda node, envelope: told.append((node, envelope))))
    assert told == [(1, own(1)), (2, own(2)), (1, own(1))]


def test_a_message_that_is_not_ours_is_a_reason_too(clock: Clock) -> None:
    [reply] = ask(played(clock, {1: 0.0}, {1: RecordDict()}), nodes=[1])
    assert reply.envelope is None
    assert "without a fedtune header" in reply.failed


def test_nobody_asked_is_nothing_to_wait_for(clock: Clock) -> None:
    assert ask(played(clock, {}), nodes=[]) == []
    assert clock.naps == []


class Stumbling:
    """A post that meets what its author did not think of."""

    def out(self, node: int, ask: Envelope) -> Envelope:
        return ask

    def back(self, node: int, answer: Envelope) -> Envelope:
        raise OverflowError("cannot fit 'int'") if node == 1 else RecursionError


def test_no_answer_ends_the_exchange(clock: Clock) -> None:
    replies = list(exchange(played(clock, {1: 0.0, 2: 0.0}), dict.fromkeys([1, 2], ASK), 5.0, Stumbling()))
    assert [reply.failed for reply in replies] == [
        f"refused: it is malformed ({name})" for name in ("OverflowError", "RecursionError")
    ]


def test_a_reason_of_strangers_is_one_short_line(clock: Clock) -> None:
    error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="\x1b[2J\nall is well" + "x" * 10**6)
    [reply] = ask(played(clock, {1: 0.0}, {1: error}), nodes=[1])
    assert reply.failed.startswith("?[2J all is well")
    assert len(reply.failed) == LONGEST_REASON


def test_an_ask_is_not_delivered_after_its_deadline(clock: Clock) -> None:
    grid = PatchyGrid(clock, healed=2.0, others={2: 4.0})
    list(exchange(grid, dict.fromkeys([1, 2], ASK), 60.0))
    first, second, again = grid.ttls
    assert first == second == 60.0 + SLACK
    assert again == pytest.approx(60.0 - grid.pushed[2][0] + SLACK)
