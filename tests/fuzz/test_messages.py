"""What the fuzzer of messages rests on: a seed stands for a message, and what is wrong is seen."""

from __future__ import annotations

import signal
import time
from collections import Counter
from random import Random

import pytest

from fedtune.envelope import Envelope, WireTensor
from tests.fuzz.mutations import damaged, mutated, rewritten
from tests.fuzz.watch import GROWTH, SECONDS, Seen, Watch, kind_of

TENSORS = tuple(WireTensor(name, "float32", (2, 3), "fedtune.raw", bytes(range(24))) for name in "ab")
MESSAGE = Envelope({"ask": "1.0", "round": 1, "client": "ann", "weight": 5.0, "metrics": {"loss": 1.5}}, TENSORS)


def test_a_seed_stands_for_a_message_and_others_for_others() -> None:
    once, again = ([repr(mutated(Random(seed), MESSAGE, [MESSAGE])) for seed in range(300)] for _ in range(2))
    assert once == again
    assert len(set(once)) > 200  # of the header alone there are not so many


def test_every_part_of_a_message_is_reached() -> None:
    found = [mutated(Random(seed), MESSAGE) for seed in range(2000)]
    for name in MESSAGE.header:
        assert any(one.header.get(name) != MESSAGE.header[name] for one in found), name
    for part in ("name", "dtype", "shape", "stype", "data"):
        assert any(
            tensor and getattr(tensor[0], part) != getattr(TENSORS[0], part) for one in found if (tensor := one.tensors)
        ), part


def test_bytes_and_values_are_changed_mostly() -> None:
    assert sum(damaged(Random(seed), b"0123456789") != b"0123456789" for seed in range(500)) > 450
    assert sum(repr(rewritten(Random(seed), {"a": {"b": [1, 2]}})) != repr({"a": {"b": [1, 2]}}) for seed in range(500)) > 400


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Without its alarm: there is one timer in a process, and the tests' own time limit has it."""
    monkeypatch.setattr(signal, "setitimer", lambda *given: None)
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    return Watch()


def test_an_error_of_a_case_is_wrong_and_a_reason_is_none(watch: Watch) -> None:
    watch.try_case(1, "gate", lambda: "refused: 'a' is not finite")
    watch.try_case(2, "gate", lambda: str(1 // 0))
    assert watch.seen.cases == {"gate": 2}
    assert [(number, target, text.splitlines()[0]) for number, target, text in watch.seen.wrong] == [
        (2, "gate", "WRONG: ZeroDivisionError: integer division or modulo by zero")
    ]


def test_a_slow_case_is_wrong_unless_it_only_waited_for_the_processor(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    waits = iter([2 * SECONDS, 0.0, 2 * SECONDS, 2 * SECONDS])

    def waiting() -> str:
        clock[0] += next(waits)
        return "refused"

    watch.try_case(1, "gate", waiting)
    assert watch.seen.wrong == []
    watch.try_case(2, "gate", waiting)
    assert [number for number, _, _ in watch.seen.wrong] == [2]


def test_memory_that_grows_is_wrong(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([watch.seen.began, watch.seen.began + GROWTH + 1])
    monkeypatch.setattr("tests.fuzz.watch.most_used", lambda: next(used))
    watch.try_case(3, "gate", lambda: "refused")
    assert [number for number, _, _ in watch.seen.wrong] == [3]


def test_kinds_have_no_names_and_numbers() -> None:
    one, other = "refused: 'q_proj.A' of shape (4, 32) needs 512 bytes", "refused: 'v' of shape (1, 1) needs 4 bytes\nmore"
    assert kind_of(one) == kind_of(other) != kind_of("refused: 'v' is not finite")


def test_what_two_processes_have_seen_is_added_up() -> None:
    one = Seen(Counter(a=2), Counter({"a  ok": 2}), [(1, "a", "x")], (0.1, 1, "a"), (0.2, 1, "a"), 10.0, 50.0, 20.0)
    other = Seen(Counter(a=1, b=1), Counter({"a  ok": 1, "b  no": 1}), [], (0.3, 7, "b"), (0.1, 7, "b"), 10.0, 40.0, 30.0)
    both = Seen.from_json(one.as_json()) + Seen.from_json(other.as_json())
    assert (both.cases, both.kinds) == (Counter(a=3, b=1), Counter({"a  ok": 3, "b  no": 1}))
    assert (both.slowest, both.longest, both.most) == ((0.3, 7, "b"), (0.2, 1, "a"), 50.0)
    assert both.wrong == [(1, "a", "x")]
