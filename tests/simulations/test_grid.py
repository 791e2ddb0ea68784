"""The grid without a network: Flower's interface, one answer at a time, each a reply to its ask."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from flwr.app import Message
from flwr.supercore.run import Run

from fedtune.envelope import Envelope
from fedtune.messages import from_record, to_record
from simulations.grid import InProcessGrid


class Echo:
    """A trainer that says who was asked what, and counts."""

    clients: Sequence[str] = ("ann", "bob", "cy")

    def __init__(self) -> None:
        self.answered = 0

    def answer(self, ask: Envelope, client: str) -> Envelope:
        self.answered += 1
        return Envelope({"client": client, "heard": ask.header["say"]})


@pytest.fixture
def trainer() -> Echo:
    return Echo()


@pytest.fixture
def grid(trainer: Echo) -> InProcessGrid:
    return InProcessGrid(trainer)


def ask(grid: InProcessGrid, node: int, say: str = "hi") -> Message:
    return grid.create_message(to_record(Envelope({"say": say})), "query", node, "group", ttl=7.0)


def test_every_client_is_a_node(grid: InProcessGrid) -> None:
    assert grid.get_node_ids() == [1, 2, 3]


def test_an_answer_is_a_reply_to_its_ask(grid: InProcessGrid) -> None:
    message = ask(grid, 2)
    [id] = grid.push_messages([message])
    [reply] = grid.pull_messages([id])
    told, asked = reply.metadata, message.metadata
    assert from_record(reply.content).header == {"client": "bob", "heard": "hi"}
    assert told.reply_to_message_id == asked.message_id == id
    assert (told.src_node_id, told.dst_node_id) == (asked.dst_node_id, asked.src_node_id) == (2, 0)
    assert (told.message_type, told.group_id, told.ttl, told.run_id) == ("query", "group", 7.0, asked.run_id)
    assert not reply.has_error()


def test_ids_are_never_given_twice(grid: InProcessGrid) -> None:
    ids = grid.push_messages([ask(grid, node) for node in (1, 2, 3, 1)])
    replies = list(grid.send_and_receive([ask(grid, 1)]))
    assert len({*ids, *(reply.metadata.message_id for reply in replies)}) == 5


def test_a_client_works_only_when_its_answer_is_fetched_and_one_at_a_time(grid: InProcessGrid, trainer: Echo) -> None:
    ids = grid.push_messages([ask(grid, node) for node in (1, 2, 3)])
    assert trainer.answered == 0
    for number in (1, 2, 3):
        assert len(grid.pull_messages(ids)) == 1
        assert trainer.answered == number
    assert grid.pull_messages(ids) == []


def test_only_what_was_asked_for_is_fetched(grid: InProcessGrid) -> None:
    first, second = grid.push_messages([ask(grid, 1), ask(grid, 2)])
    [reply] = grid.pull_messages([second])
    assert reply.metadata.reply_to_message_id == second
    assert grid.pull_messages(["unknown"]) == []
    assert len(grid.pull_messages([first])) == 1


def test_send_and_receive_answers_each(grid: InProcessGrid) -> None:
    messages = [ask(grid, node, say) for node, say in ((3, "a"), (1, "b"))]
    replies = list(grid.send_and_receive(messages))
    assert [from_record(reply.content).header for reply in replies] == [
        {"client": "cy", "heard": "a"},
        {"client": "ann", "heard": "b"},
    ]
    assert [reply.metadata.reply_to_message_id for reply in replies] == [m.metadata.message_id for m in messages]


def test_a_run_that_is_set_is_on_the_messages(grid: InProcessGrid) -> None:
    grid.set_run(Run.create_empty(run_id=42))
    assert grid.run.run_id == 42
    assert ask(grid, 1).metadata.run_id == 42
