"""What the journal says happened is on the disk, in order; what a crash or a bad disk did to its end is cut off."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.wire.ledger import Cost
from server.journal import Entry, Journal, entry_of, line_of, read
from server.journal_lines import MUST

WORDS = st.dictionaries(
    st.text(max_size=5).filter(lambda name: name not in ("what", "at")), st.text() | st.integers(), max_size=3
)


def written(file: Path, count: int) -> list[bytes]:
    journal = Journal(file, clock=lambda: 7.0)
    for number in range(count):
        journal.write("state", round=number)
    journal.close()
    return file.read_bytes().splitlines(keepends=True)


def numbers(entries: list[Entry]) -> list[Any]:
    return [entry["round"] for entry in entries]


def test_a_line_is_its_crc_and_its_text(tmp_path: Path) -> None:
    """crc32 of the text, as zlib, gzip and PNG have it."""
    (line,) = written(tmp_path / "journal", 1)
    assert line == b'8e51eaa8 {"what":"state","at":7.0,"round":0}\n'


@given(st.text(max_size=10).filter(lambda what: what not in MUST), WORDS)
def test_whatever_is_written_is_read(what: str, about: dict[str, Any]) -> None:
    line = line_of(Entry(what, about), 1.5)
    assert line.count(b"\n") == 1
    assert entry_of(line) == Entry(what, {**about, "at": 1.5})


def test_a_journal_that_is_cut_anywhere_holds_the_lines_before(tmp_path: Path) -> None:
    lines = written(tmp_path / "whole", 3)
    data = b"".join(lines)
    ends = [len(lines[0]), len(lines[0] + lines[1]), len(data)]
    for size in range(len(data) + 1):
        file = tmp_path / "cut"
        file.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        journal = Journal(file)
        assert numbers(journal.entries) == list(range(whole))
        assert journal.cut == size - (ends[whole - 1] if whole else 0)
        journal.write("state", round=9)
        journal.close()
        assert numbers(read(file)[0]) == [*range(whole), 9]


def test_a_line_of_which_one_bit_is_another_ends_what_holds(tmp_path: Path) -> None:
    lines = written(tmp_path / "whole", 3)
    for byte in range(len(lines[1])):
        damaged = bytearray(lines[1])
        damaged[byte] ^= 1 << (byte % 8)
        (tmp_path / "bad").write_bytes(lines[0] + damaged + lines[2])
        assert numbers(read(tmp_path / "bad")[0]) == [0], damaged


@pytest.mark.parametrize("line", [b"", b"\n", b"x\n", b"00000000 \n", b'e3b0c442 {"no": "what"}\n', b"\xff" * 40 + b"\n"])
def test_what_is_no_line_is_none(line: bytes) -> None:
    assert entry_of(line) is None


ANSWERED = {"ask": "1.0", "client": "a", "digest": "d", "cost": {"bytes": 9, "header": 5, "transport": 4, "plain": 9}}


@pytest.mark.parametrize(
    ("what", "about"),
    [
        ("state", {"round": "1"}),
        ("state", {"round": True}),
        ("state", {}),
        ("round", {"number": 1, "cohort": {"a": 1}}),
        ("closed", {"ask": "1.0", "answered": [["a"]], "failed": {}}),
        ("closed", {"ask": "1.0", "answered": [], "failed": {"a": "ill"}}),
        ("answered", {**ANSWERED, "client": None}),
        ("answered", {**ANSWERED, "cost": {"bytes": 9}}),
        ("answered", {**ANSWERED, "late": {"ask": "0.0"}}),
        ("failed", {"ask": "1.0", "client": "\ud800", "reason": "ill"}),
        ("started", {"run": "r", "clients": ["a"], "nodes": {"a": 1}}),
    ],
)
def test_a_line_that_nobody_can_go_on_by_ends_what_holds(what: str, about: dict[str, Any], tmp_path: Path) -> None:
    """Its checksum is right: it is of another version, or somebody wrote it."""
    whole = [line_of(Entry("answered", ANSWERED), 1.0), line_of(Entry("state", {"round": 0}), 2.0)]
    assert None not in map(entry_of, whole)
    (tmp_path / "journal").write_bytes(b"".join([*whole, line_of(Entry(what, about), 3.0), whole[1]]))
    assert [entry.what for entry in read(tmp_path / "journal")[0]] == ["answered", "state"]


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "journal"
    journal = Journal(file)
    journal.write("state", round=0)
    before, write = file.read_bytes(), os.write

    def half(descriptor: int, data: bytes) -> int:
        write(descriptor, data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        journal.write("state", round=1)
    monkeypatch.undo()
    assert file.read_bytes() == before
    journal.write("state", round=2)
    journal.close()
    assert numbers(read(file)[0]) == [0, 2]


def test_a_disk_that_takes_a_part_at_a_time_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    assert len(written(tmp_path / "journal", 2)) == 2
    assert numbers(read(tmp_path / "journal")[0]) == [0, 1]


@pytest.mark.parametrize("claimed", [5e-324, 1e20, 1e308])
def test_whatever_a_client_says_of_itself_the_run_can_be_taken_up(claimed: float) -> None:
    """server/meeting.py takes all that is above 0."""
    client = {"examples": 1, "rank": 1, "scale": claimed, "limits": {"memory": claimed}}
    started = Entry("started", {"run": "demo.0", "clients": {"ann": client}, "nodes": {"ann": 2**64 - 1}})
    assert entry_of(line_of(started, 0.0)) is not None


def test_a_line_that_may_wait_is_synced_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, synced, sync = tmp_path / "journal", list[int](), os.fsync
    journal = Journal(file)

    def noted(opened: int) -> None:
        synced.append(os.fstat(opened).st_size)
        sync(opened)

    monkeypatch.setattr(os, "fsync", noted)
    for client in ("ann", "bob"):
        journal.write("answered", soon=True, ask="1.0", client=client, digest="d", cost=asdict(Cost()))
    assert synced == []
    journal.write("closed", ask="1.0", answered=["ann", "bob"], failed={})
    journal.close()
    assert synced == [file.stat().st_size]  # one call, when all three lines were in the file
    assert [entry.what for entry in read(file)[0]] == ["answered", "answered", "closed"]


def test_rounds_that_are_settled_are_forgotten_and_stay_in_the_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write("started", run="run", clients={}, nodes={})
    for number in (1, 2):
        journal.write("round", number=number, cohort=["ann"])
        journal.write("published", round=number)
    journal.forget(1)
    assert [(entry.what, *entry.about.values())[:2] for entry in journal.entries[1:]] == [("round", 2), ("published", 2)]
    assert journal.entries[0].what == "started"
    journal.forget(2)
    journal.close()
    assert [entry.what for entry in journal.entries] == ["started"]
    assert len(read(tmp_path / "journal")[0]) == 5
