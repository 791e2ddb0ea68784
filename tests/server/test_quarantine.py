"""Refused answers in the run's folder: what is kept, how much of it, and that it never ends a run."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from pathlib import Path

import pytest

from fedtune import durable
from fedtune.envelope import Envelope, WireTensor
from server.quarantine import ABOUT, Quarantine


def answer(size: int = 3, **header: object) -> Envelope:
    return Envelope({"ask": "7.0", **header}, (WireTensor("x", "uint8", (size,), "raw", b"x" * size),))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_an_answer_is_kept_as_it_came_with_the_reason(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine", 5, clock=lambda: 17.5)
    name = quarantine.put(answer(), 7, "7.0", "../ann", "its weight is 0")
    hashed = hashlib.sha256(b"../ann").hexdigest()[:16]
    assert name == f"0007-{hashed}-0.answer"
    file = tmp_path / "quarantine" / name
    with file.open("rb") as opened:
        assert Envelope.read(opened) == answer()
    assert json.loads(file.with_suffix(".json").read_text()) == {
        "round": 7,
        "ask": "7.0",
        "client": "../ann",
        "reason": "its weight is 0",
        "size": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "time": 17.5,
    }


def test_the_oldest_go_first_also_when_the_run_is_taken_up_again(tmp_path: Path) -> None:
    for number in range(12):
        Quarantine(tmp_path, 3).put(answer(), 7, "7.0", "ann", str(number))
    reasons = [json.loads(file.read_text())["reason"] for file in sorted(tmp_path.glob("*.json"))]
    assert sorted(reasons, key=int) == ["9", "10", "11"]
    assert len(names(tmp_path)) == 6


def test_together_they_take_no_more_than_so_many_bytes(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 100, most_bytes=3 * ABOUT)
    for number in range(5):
        quarantine.put(answer(ABOUT // 2), 7, "7.0", "ann", str(number))
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3 * ABOUT
    assert "4" in [json.loads(file.read_text())["reason"] for file in tmp_path.glob("*.json")]


def test_one_that_is_larger_than_all_may_be_is_not_kept_and_drives_out_nobody(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 100, most_bytes=3 * ABOUT)
    quarantine.put(answer(), 7, "7.0", "ann", "")
    before = names(tmp_path)
    assert quarantine.put(answer(3 * ABOUT), 7, "7.0", "ann", "") is None
    assert names(tmp_path) == before


def test_nothing_is_written_where_none_are_wanted(tmp_path: Path) -> None:
    assert Quarantine(tmp_path / "quarantine", 0).put(answer(), 7, "7.0", "ann", "") is None
    assert not (tmp_path / "quarantine").exists()


def test_what_a_crash_left_behind_goes_and_a_stranger_s_file_stays(tmp_path: Path) -> None:
    """Half of a file, and an answer without its note."""
    for name in (".0001-aa-4.answer.writing", "0001-aa-3.answer", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert str(Quarantine(tmp_path, 1).put(answer(), 7, "7.0", "ann", "")).endswith("-0.answer")
    assert [name for name in names(tmp_path) if not name.startswith("0007")] == ["notes.txt"]


def test_a_full_disk_is_logged_and_costs_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "write", full)
    with caplog.at_level(logging.WARNING):
        assert Quarantine(tmp_path, 3).put(answer(), 7, "7.0", "ann", "") is None
    assert "No space left on device" in caplog.text
