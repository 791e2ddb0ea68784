"""What is known of an ask when its round is taken up again."""

from __future__ import annotations

from server.journal import Entry
from server.past import asks_in, is_over, refused_in, started_in


def answered(client: str, ask: str = "1.0", digest: str = "d") -> Entry:
    return Entry("answered", {"ask": ask, "client": client, "digest": digest})


def failed(client: str, ask: str = "1.0", reason: str = "ill", has: bool = False) -> Entry:
    return Entry("failed", {"ask": ask, "client": client, "reason": reason, "has": has})


def closed(*clients: str, ask: str = "1.0", **reasons: str) -> Entry:
    return Entry("closed", {"ask": ask, "answered": clients, "failed": {c: {"reason": r} for c, r in reasons.items()}})


def test_each_ask_has_its_own_answers_and_failures() -> None:
    asks = asks_in([answered("ann"), answered("ann", "1.evaluate"), failed("bob"), Entry("state", {"round": 0})])
    assert (set(asks["1.0"].answered), set(asks["1.0"].failed), asks["1.0"].closed) == ({"ann"}, {"bob"}, False)
    assert (set(asks["1.evaluate"].answered), set(asks["1.evaluate"].failed)) == ({"ann"}, set())


def test_the_last_answer_counts_and_takes_a_failure_back() -> None:
    asks = asks_in([failed("ann"), answered("ann", digest="old"), answered("ann", digest="new")])
    assert asks["1.0"].answered["ann"]["digest"] == "new"
    assert asks["1.0"].failed == {}


def test_when_it_is_closed_nobody_else_counts() -> None:
    """cy's answer came and was left out at the end, so it has had the broadcast; dan's never came."""
    entries = [answered("ann"), answered("cy"), failed("bob", has=True), failed("dan"), answered("eve")]
    ask = asks_in([*entries, closed("ann", bob="ill", cy="odd", dan="ill")])["1.0"]
    assert ask.closed
    assert set(ask.answered) == {"ann"}
    assert {client: line["has"] for client, line in ask.failed.items()} == {"bob": True, "cy": True, "dan": False}


def test_a_run_that_stopped_forgives_failures_but_of_what_was_closed() -> None:
    stopped = Entry("stopped", {"reason": "quorum"})
    asks = asks_in([failed("bob"), answered("ann"), failed("cy", "0.9"), closed("ann", ask="0.9", cy="ill"), stopped])
    assert (set(asks["1.0"].answered), set(asks["1.0"].failed)) == ({"ann"}, set())
    assert set(asks["0.9"].failed) == {"cy"}


def test_a_run_is_over_unless_it_went_on_afterwards() -> None:
    started, round, ended = Entry("started", {"run": "a"}), Entry("round", {"number": 1}), Entry("ended")
    assert not is_over([])
    assert not is_over([started, round])
    assert is_over([started, round, ended])
    assert not is_over([started, round, ended, round])


def test_the_last_start_counts() -> None:
    assert started_in([]) is None
    last = started_in([Entry("started", {"run": "a"}), Entry("started", {"run": "b"}), Entry("round")])
    assert last is not None
    assert last["run"] == "b"


def test_who_was_refused_in_a_round_is_known_whatever_the_ask() -> None:
    """bob's answer to 1.0 came late, in round 2; a run that stopped forgives."""

    def refused(client: str, ask: str) -> Entry:
        return Entry("refused", {"ask": ask, "client": client, "reason": "odd"})

    def round(number: int) -> Entry:
        return Entry("round", {"number": number, "cohort": []})

    entries = [round(1), refused("ann", "1.0"), round(2), refused("bob", "1.0"), round(2), refused("cy", "2.0")]
    assert [refused_in(entries, number) for number in (1, 2, 3)] == [{"ann"}, {"bob", "cy"}, set()]
    assert refused_in([*entries, Entry("stopped", {"reason": "quorum"})], 2) == set()


def test_what_counts_is_what_was_closed() -> None:
    opened, ended = [answered("ann"), failed("bob")], closed("ann", bob="ill")
    assert not asks_in(opened)["1.0"].counts("ann")
    assert [asks_in([*opened, ended])["1.0"].counts(client) for client in ("ann", "bob")] == [True, False]
