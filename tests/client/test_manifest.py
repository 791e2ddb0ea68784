"""What is stored of a client's asks: which are known, how far memory goes back, and what goes when there is too much."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import pytest

from client import manifest as module
from client.manifest import MOST, NOTHING, Entry, Manifest, key_of
from fedtune.envelope import Envelope, WireTensor
from fedtune.errors import Damaged


def entry(ask: str, before: int = 0) -> Entry:
    round = int(ask.partition(".")[0])
    return Entry(f"key {ask}", ask, round, ("", f"memory {before}"), f"answer {ask}")


def of(*asks: str, size: int = 1) -> Manifest:
    """Each ask with a memory and an answer of its own, all of one size."""
    entries = tuple(entry(ask, number) for number, ask in enumerate(asks))
    made = Manifest("run", "schema", ("", f"memory {len(asks)}"), entries)
    return replace(made, sizes=dict.fromkeys(made.files(), size))


def names(entries: tuple[Entry, ...]) -> list[str]:
    return [entry.ask for entry in entries]


@pytest.mark.parametrize(
    ("ask", "round", "older"),
    [
        ("6.0", 6, ["4.0", "4.evaluate", "5.0", "5.evaluate"]),
        ("5.1", 5, ["4.0", "4.evaluate", "5.0", "5.evaluate"]),
        ("5.0", 5, ["4.0", "4.evaluate"]),
        ("4.0", 4, []),
        ("4.1", 4, ["4.0", "4.evaluate"]),  # of a time that the coordinator has gone back to
        ("3.0", 3, []),
    ],
)
def test_what_is_older_than_an_ask(ask: str, round: int, older: list[str]) -> None:
    assert names(of("4.0", "4.evaluate", "5.0", "5.evaluate").until(ask, round)) == older


def test_an_ask_is_found_by_its_content_and_in_its_run_alone() -> None:
    stored = of("4.0", "5.0")
    assert stored.find("run", "key 5.0") == entry("5.0", 1)
    assert stored.find("run", "key 6.0") is None
    assert stored.find("another", "key 5.0") is None


def test_the_last_two_rounds_stay() -> None:
    """Of those that the client took part in, however long ago."""
    kept = of("1.0", "4.0", "4.evaluate", "7.0", "7.1").bounded()
    assert names(kept.entries) == ["4.0", "4.evaluate", "7.0", "7.1"]
    assert kept.sizes.keys() == set(kept.files())
    assert "memory 0" not in kept.sizes


@pytest.mark.parametrize(
    ("ask", "round", "undone", "lacks"),
    [
        ("4.evaluate", 4, (), False),
        ("4.1", 4, (), False),
        ("4.0", 4, (), False),
        ("1.1", 1, (), True),  # what was remembered before 1.evaluate is not what was remembered before it
        ("1.evaluate", 1, (), True),
        ("0.evaluate", 0, (), True),
        ("2.0", 2, (), False),
        ("5.0", 5, (1,), True),
        ("5.0", 5, (4,), False),
    ],
)
def test_the_newest_ask_that_went_is_remembered(ask: str, round: int, undone: tuple[int, ...], lacks: bool) -> None:
    """Of 1.0, 1.evaluate, 3.0, 4.0 and 4.1 the last two rounds stay. It comes back from its bytes, and lives through a purge
    of nothing."""
    kept = of("1.0", "1.evaluate", "3.0", "4.0", "4.1").bounded().bounded()
    assert kept.purged == (1, "1.evaluate")
    assert Manifest.from_bytes(kept.as_bytes()).lacks(ask, round, undone) is lacks
    assert not of("1.0", "4.0").bounded().lacks("1.0", 1)


def test_there_are_never_more_than_so_many() -> None:
    asks = [f"1.{step}" for step in range(MOST + 3)]
    assert names(of(*asks).bounded().entries) == asks[3:]


def test_the_oldest_go_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each older entry takes 20 bytes: a memory and an answer. The memory now and the newest entry are not counted."""
    monkeypatch.setattr(module, "LARGEST", 45)
    assert names(of("1.0", "1.1", "1.2", "1.3", size=10).bounded().entries) == ["1.1", "1.2", "1.3"]
    assert names(of("1.0", "1.1", size=10**9).bounded().entries) == ["1.1"]


def test_a_memory_that_an_entry_shares_with_the_newest_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation changes nothing, so its answer alone is counted."""
    monkeypatch.setattr(module, "LARGEST", 10)
    entries = tuple(replace(entry(ask), before=("", "memory 1")) for ask in ("1.0", "1.1"))
    made = Manifest("run", "schema", ("", "memory 1"), entries)
    kept = replace(made, sizes=dict.fromkeys(made.files(), 10)).bounded()
    assert names(kept.entries) == ["1.0", "1.1"]


def test_it_comes_back_from_its_bytes() -> None:
    for stored in (Manifest(), of("1.0", "1.1"), Manifest("ü\ud800", memory=("a", "b"), sizes={"a": 1, "b": 2})):
        assert Manifest.from_bytes(stored.as_bytes()) == stored
    assert Manifest().memory == NOTHING


@pytest.mark.parametrize(
    "change",
    [
        *({"memory": ["", name]} for name in (7, None, ["a"], "../a", "a/b", "..", "a\0b", "\ud800", "unknown")),
        *({"entries": [{**asdict(entry("1.0")), **other}]} for other in ({"key": 1}, {"round": "x"}, {"answer": {}}, {"x": 1})),
        *({"sizes": sizes} for sizes in ({}, [], {"memory 1": "many", "answer 1.0": 1, "memory 0": 1})),
        *({"run": None}, {"schema": 3}, {"purged": 4}, {"entries": 5}),
    ],
)
def test_a_whole_manifest_that_says_what_none_says_is_damaged(change: dict[str, object]) -> None:
    """As another version may have written it, or a hand."""
    line = json.dumps({**asdict(of("1.0")), **change}).encode()
    with pytest.raises(Damaged):
        Manifest.from_bytes(hashlib.sha256(line).hexdigest().encode() + b" " + line)


def test_every_damaged_byte_and_every_torn_end_is_seen() -> None:
    data = of("1.0", "1.1").as_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        for given in (bytes(damaged), data[:position], data + data[:1]):
            with pytest.raises(Damaged):
                Manifest.from_bytes(given)


@pytest.mark.parametrize("text", [b"[]", b"{}", b'{"run": 1}', b"not JSON"])
def test_another_version_is_said_to_be_one(text: bytes) -> None:
    with pytest.raises(Damaged, match="another version of fedtune"):
        Manifest.from_bytes(module.digest_of([text]).encode() + b" " + text)


def test_a_key_is_of_the_content_and_not_of_the_signature() -> None:
    tensor = WireTensor("w", "uint8", (2,), "raw", b"ab")
    ask = Envelope({"ask": "1.0", "round": 1, "run": "r"}, (tensor,))
    key = key_of(ask)
    assert key_of(Envelope({"run": "r", "round": 1, "ask": "1.0", "stamp": {"serial": 7}, "signature": "s"}, (tensor,))) == key
    others = [
        Envelope({**ask.header, "round": 2}, (tensor,)),
        Envelope({**ask.header, "run": "q"}, (tensor,)),
        *(
            Envelope(ask.header, (replace(tensor, **changed),))
            for changed in ({"data": b"ac"}, {"shape": (1, 2)}, {"name": "v"}, {"dtype": "int8"}, {"stype": "x"})
        ),
        Envelope(ask.header, (replace(tensor, data=b"a"), replace(tensor, data=b"b"))),
        Envelope(ask.header),
    ]
    assert len({key, *map(key_of, others)}) == len(others) + 1
