"""How often a ServerApp is started again: what counts is what the run's journal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import RoundFailed
from server.attempts import Attempts, entries_of, is_finished, where
from server.journal import Entry, line_of
from server.playing import Crashed

CRASH = Crashed("the ServerApp was killed by SIGKILL")


def write(folder: Path, what: str, **about: Any) -> None:
    with (folder / "journal.jsonl").open("ab") as journal:
        journal.write(line_of(Entry(what, about), 0.0))


def test_five_crashes_without_a_step_forward_are_the_end(tmp_path: Path) -> None:
    write(tmp_path, "started", run="r", clients={}, nodes={})
    attempts = Attempts(tmp_path, 2)
    waits = []
    for number in range(4):
        write(tmp_path, "asked", ask=f"1.{number}", clients=["a"])  # no step: it is asked again
        waits.append(attempts.after(CRASH))
    assert waits == [1, 2, 4, 8]
    with pytest.raises(
        RoundFailed, match=f"^{CRASH}; given up, as that was the 5th time .*; the run in {tmp_path} goes on with .* --resume$"
    ):
        attempts.after(CRASH)
    assert attempts.all == 5


@pytest.mark.parametrize("step", ["closed", "state"])
def test_after_a_step_forward_they_are_counted_anew(step: str, tmp_path: Path) -> None:
    attempts = Attempts(tmp_path, 99)
    for number in range(12):
        write(tmp_path, step, ask="1.0", answered=["a"], failed={}, round=number)
        assert [attempts.after(CRASH) for _ in range(2)] == [1, 2]


def test_what_was_done_before_a_server_began_is_no_step_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "state", round=1)
    attempts = Attempts(tmp_path, 2)
    assert [attempts.after(CRASH) for _ in range(2)] == [1, 2]


def test_a_journal_that_was_cut_is_no_step_forward(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path, 2)
    write(tmp_path, "state", round=0)
    write(tmp_path, "state", round=1)
    assert attempts.after(CRASH) == 1
    (tmp_path / "journal.jsonl").unlink()
    assert attempts.after(CRASH) == 2
    write(tmp_path, "state", round=0)
    assert attempts.after(CRASH) == 4


def test_where_it_goes_on(tmp_path: Path) -> None:
    assert where(entries_of(tmp_path), 3) == "the run begins again"
    write(tmp_path, "started", run="r", clients={}, nodes={})
    assert where(entries_of(tmp_path), 3) == "the run goes on from its first round"
    write(tmp_path, "state", round=2)
    assert Attempts(tmp_path, 3).going_on == "the run goes on from round 3"
    assert Attempts(tmp_path, 2).going_on == "the run goes on after its last round"


def test_a_run_that_is_over_goes_on_where_more_rounds_are_wanted(tmp_path: Path) -> None:
    write(tmp_path, "started", run="r", clients={}, nodes={})
    write(tmp_path, "state", round=2)
    assert not is_finished(tmp_path, 2)
    write(tmp_path, "ended")
    assert is_finished(tmp_path, 2)
    assert not is_finished(tmp_path, 3)
    assert not is_finished(tmp_path / "nothing", 3)
