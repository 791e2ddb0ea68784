"""Asks out and answers in, on a grid that the test plays and a clock that does not wait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.common.constant import ErrorCode

from fedtune.envelope import Envelope
from fedtune.messages import from_record, to_record
from server import exchange as exchange_module
from server.exchange import (
    AWAY,
    LONGEST_WAIT,
    MOST_TIMES,
    OVERDUE,
    RETURN,
    SHORTEST_WAIT,
    SLACK,
    SLOWER,
    UNKNOWN,
    Reply,
    exchange,
)
from server.post import OPEN
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

    def get_node_ids(self) -> list[int]:
        return []

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


def test_a_node_that_has_just_gone_is_waited_for_and_one_that_is_gone_for_long_is_not(clock: Clock) -> None:
    """A process that is started again takes a while to come back: the first ask waits until RETURN, the next ones
    only for what is left of that; who is back begins anew."""
    gone: dict[int, float] = {}
    grid = PatchyGrid(clock, healed=2 * RETURN, others={2: 1.0})
    asks = dict.fromkeys([1, 2], ASK)
    assert list(exchange(grid, asks, 1000.0, enough=1, gone=gone)) == [Reply(2, own(2)), Reply(1, None, AWAY)]
    assert RETURN <= clock.now <= RETURN + LONGEST_WAIT
    assert gone == {1: pytest.approx(0.0, abs=1.0)}
    clock.now = began = 1.5 * RETURN
    assert list(exchange(grid, {1: ASK}, 1000.0, gone=gone)) == [Reply(1, None, AWAY)]
    assert clock.now - began <= LONGEST_WAIT
    clock.now = 2.5 * RETURN
    assert list(exchange(grid, {1: ASK}, 1000.0, gone=gone)) == [Reply(1, own(1))]
    assert gone == {}


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


class LossyGrid:
    """Every message has a number of its own; `answers` says what comes to it: seconds after it was sent, and what it is."""

    def __init__(self, clock: Clock, answers: Mapping[str, tuple[float, RecordDict | Error]], nodes: Iterable[int]) -> None:
        self.clock, self.answers, self.nodes = clock, answers, list(nodes)
        self.sent: dict[str, float] = {}
        self.pulled: list[list[str]] = []

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float) -> Message:
        return Message(metadata=Metadata(1, "", 0, dst_node_id, "", "", 0.0, ttl, message_type), content=content)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            ids.append(f"{node}.{1 + sum(id.startswith(f'{node}.') for id in self.sent)}")
            self.sent[ids[-1]] = self.clock.now
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ids = list(message_ids)
        self.pulled.append(ids)
        due = [id for id in ids if id in self.answers and self.clock.now >= self.sent[id] + self.answers[id][0]]
        return [self._answer(id, self.answers[id][1]) for id in due]

    def _answer(self, id: str, content: RecordDict | Error) -> Message:
        metadata = Metadata(1, f"to {id}", 0, 0, id, "", 0.0, 60.0, "query")
        return Message(metadata=metadata, **{"error" if isinstance(content, Error) else "content": content})

    def get_node_ids(self) -> list[int]:
        return self.nodes


def answered(node: int, after: float) -> tuple[float, RecordDict]:
    return after, to_record(own(node))


def test_an_ask_that_was_lost_unseen_is_sent_again_when_it_is_overdue_by_what_others_took(clock: Clock) -> None:
    """The other took 10 s, so this one is overdue after SLOWER times that; its second message is answered in 1 s."""
    grid = LossyGrid(clock, {"1.1": answered(1, 10.0), "2.2": answered(2, 1.0)}, nodes=[1, 2])
    assert list(exchange(grid, dict.fromkeys([1, 2], ASK), 3600.0)) == [Reply(1, own(1)), Reply(2, own(2))]
    assert list(grid.sent) == ["1.1", "2.1", "2.2"]
    took = 10.0 + LONGEST_WAIT  # when the answer of the first was seen, at the latest
    assert SLOWER * 10.0 <= grid.sent["2.2"] <= SLOWER * took + LONGEST_WAIT


def test_nobody_is_asked_again_before_half_a_minute_or_while_nobody_knows_how_long_it_takes(clock: Clock) -> None:
    grid = LossyGrid(clock, {"1.1": answered(1, 0.0), "2.2": answered(2, 0.0)}, nodes=[1, 2])
    list(exchange(grid, dict.fromkeys([1, 2], ASK), 3600.0))
    assert OVERDUE <= grid.sent["2.2"] <= OVERDUE + LONGEST_WAIT

    clock.now = 0.0
    grid = LossyGrid(clock, {"1.2": answered(1, 0.0)}, nodes=[1])
    list(exchange(grid, {1: ASK}, 3600.0))
    assert UNKNOWN * 3600.0 <= grid.sent["1.2"] <= UNKNOWN * 3600.0 + LONGEST_WAIT


def test_each_time_it_takes_twice_as_long_and_at_some_time_it_is_enough(clock: Clock) -> None:
    """After 30, 60, 120 and 240 s: five times in all, and then the deadline decides."""
    grid = LossyGrid(clock, {"1.1": answered(1, 0.0)}, nodes=[1, 2])
    replies = list(exchange(grid, dict.fromkeys([1, 2], ASK), 3600.0))
    assert replies == [Reply(1, own(1)), Reply(2, None, "no answer within 3600 s")]
    times = [at for id, at in grid.sent.items() if id.startswith("2.")]
    assert len(times) == MOST_TIMES
    for late, wanted in zip(times, [0.0, 30.0, 90.0, 210.0, 450.0], strict=True):
        assert wanted <= late <= wanted + 4 * LONGEST_WAIT


def test_whichever_answer_comes_first_counts_and_the_other_is_nobody_s(clock: Clock) -> None:
    """The first message is answered after 40 s, the second, sent after 30 s, after 10 s more."""
    other = to_record(Envelope({"client": "c2", "late": True}))
    for first, second in ((to_record(own(2)), other), (other, to_record(own(2)))):
        clock.now = 0.0
        answers = {"1.1": answered(1, 0.0), "2.1": (40.0 + 5 * (first is other), first), "2.2": (12.0, second)}
        grid = LossyGrid(clock, answers, nodes=[1, 2])
        assert list(exchange(grid, dict.fromkeys([1, 2], ASK), 3600.0)) == [Reply(1, own(1)), Reply(2, own(2))]
        assert ["2.1", "2.2"] in grid.pulled


def test_a_node_that_is_overdue_and_away_is_not_asked(clock: Clock) -> None:
    grid = LossyGrid(clock, {"1.1": answered(1, 0.0)}, nodes=[1])
    list(exchange(grid, dict.fromkeys([1, 2], ASK), 600.0))
    assert list(grid.sent) == ["1.1", "2.1"]


@pytest.mark.parametrize("code", [ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED])
def test_an_ask_that_a_relay_gave_up_is_sent_again_at_once(clock: Clock, code: int) -> None:
    gone = Error(code=code, reason="a relay was killed over it")
    grid = LossyGrid(clock, {"1.1": (1.0, gone), "1.2": answered(1, 1.0)}, nodes=[1])
    assert list(exchange(grid, {1: ASK}, 60.0, enough=1)) == [Reply(1, own(1))]
    assert grid.sent["1.2"] <= 1.0 + 2 * LONGEST_WAIT


def test_a_message_that_is_lost_while_another_of_the_same_is_under_way_is_not_replaced(clock: Clock) -> None:
    """Sent again after 30 s; the first is given up after 35 s, the second answered after 20 s."""
    gone = Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason="given up")
    answers = {"1.1": answered(1, 0.0), "2.1": (35.0, gone), "2.2": answered(2, 20.0)}
    grid = LossyGrid(clock, answers, nodes=[1, 2])
    assert list(exchange(grid, dict.fromkeys([1, 2], ASK), 3600.0)) == [Reply(1, own(1)), Reply(2, own(2))]
    assert list(grid.sent) == ["1.1", "2.1", "2.2"]


def test_what_a_node_had_got_before_it_was_away_counts_when_it_is_back(clock: Clock) -> None:
    """Its heartbeats stay away, the SuperLink says so, and yet it works on: its answer to the first message comes after 9 s."""

    class Patchy(LossyGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            error = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="no heartbeat")
            return (
                super().pull_messages(message_ids) if self.get_node_ids() else [self._answer(id, error) for id in message_ids]
            )

        def get_node_ids(self) -> list[int]:
            return [] if 2.0 <= self.clock.now < 4.0 else [1]

    grid = Patchy(clock, {"1.1": answered(1, 9.0)}, nodes=[1])
    assert list(exchange(grid, {1: ASK}, 60.0, enough=1)) == [Reply(1, own(1))]
    assert list(grid.sent) == ["1.1", "1.2"]
    assert clock.now <= 9.0 + LONGEST_WAIT


def test_a_node_that_the_superlink_no_more_sends_to_is_away(clock: Clock) -> None:
    grid = LossyGrid(clock, {}, nodes=[1])
    grid.push_messages = lambda messages: [""] * len(list(messages))
    assert list(exchange(grid, {1: ASK}, 60.0)) == [Reply(1, None, AWAY)]
    assert list(exchange(grid, {1: ASK}, 60.0, enough=1)) == [Reply(1, None, AWAY)]


def test_the_post_is_told_that_it_is_the_same_ask_again(clock: Clock) -> None:
    told = []

    class Told(type(OPEN)):
        def out(self, node: int, ask: Envelope, again: bool = False) -> Envelope:
            told.append((node, again))
            return ask

    grid = LossyGrid(clock, {"1.1": answered(1, 0.0), "2.2": answered(2, 0.0)}, nodes=[1, 2])
    list(exchange(grid, dict.fromkeys([1, 2], ASK), 3600.0, Told()))
    assert told == [(1, False), (2, False), (2, True)]


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


def test_messages_that_nobody_waits_for_put_no_deadline_off(clock: Clock) -> None:
    class Chatty(LossyGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            found = super().pull_messages(message_ids)
            assert len(self.pulled) < 100
            return [*found, self._answer("nobody's", to_record(own(1)))]

    assert list(exchange(Chatty(clock, {}, nodes=[1]), {1: ASK}, 5.0)) == [Reply(1, None, "no answer within 5 s")]
    assert 5.0 < clock.now <= 5.0 + LONGEST_WAIT


def test_a_simulation_that_answers_one_at_a_time_has_no_deadline(clock: Clock) -> None:
    """Each look takes the 4 s that the client works."""

    class Working(LossyGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            self.clock.now += 4.0
            return super().pull_messages(message_ids)[:1]

    grid = Working(clock, {f"{node}.1": answered(node, 0.0) for node in (1, 2, 3)}, nodes=[1, 2, 3])
    assert list(exchange(grid, dict.fromkeys([1, 2, 3], ASK), 5.0)) == [Reply(node, own(node)) for node in (1, 2, 3)]
