"""What a client keeps of today's work."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from client.diary import Diary, Used
from fedtune.errors import UserError

BEFORE = '{"day": "2026-03-01", "rounds": {"a.1": {"steps": 2, "seconds": 0.5}}}'  # without asks
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_it_outlives_the_process(tmp_path: Path) -> None:
    file = tmp_path / "new" / "diary.json"
    Diary(file).note("run", 3, "3.0", Used(5, 1.5, 1), NOON)
    again = Diary(file)
    assert again.used("run", 3, "3.0", NOON) == Used(5, 1.5, 1)
    assert [again.used(*other, NOON) for other in (("run", 4, "3.0"), ("other", 3, "3.0"), ("run", 3, "3.1"))] == [Used()] * 3
    assert again.rounds(NOON) == 1
    assert [path.name for path in file.parent.iterdir()] == ["diary.json"]


def test_a_round_counts_once_however_often_it_is_asked() -> None:
    diary = Diary(None)
    for steps in (1, 2, 3):
        diary.note("run", 1, f"1.{steps}", Used(steps), NOON)
    assert (diary.rounds(NOON), diary.asks("run", 1, NOON)) == (1, 3)
    diary.note("run", 2, "2.0", Used(), NOON)
    assert (diary.rounds(NOON), diary.asks("run", 2, NOON)) == (2, 1)


def test_what_the_other_asks_of_a_round_have_used() -> None:
    diary = Diary(None)
    for ask, used in (("1.0", Used(1, 0.5, 1)), ("1.1", Used(2, 0.25, 3)), ("1.0", Used(4, 1.0, 2))):
        diary.note("run", 1, ask, used, NOON)
    diary.note("run", 2, "2.0", Used(9, 9.0, 1), NOON)
    assert diary.others("run", 1, "1.1", NOON) == Used(4, 1.0)
    assert diary.others("run", 1, "1.2", NOON) == Used(4 + 2, 1.0 + 0.25)


def test_a_day_is_of_utc_whatever_the_clock_on_the_wall_says(tmp_path: Path) -> None:
    """23:30 UTC is 01:30 of the next day in a zone two hours ahead, and the same day of the diary."""
    late = datetime(2026, 3, 1, 23, 30, tzinfo=UTC)
    diary = Diary(tmp_path / "diary.json")
    diary.note("run", 1, "1.0", Used(), NOON)
    assert diary.rounds(late.astimezone(timezone(timedelta(hours=2)))) == 1
    assert diary.rounds(late + timedelta(hours=1)) == 0


def test_names_of_runs_do_not_make_it_long(tmp_path: Path) -> None:
    file = tmp_path / "diary.json"
    Diary(file).note("x" * 10**6, 1, "y" * 10**6, Used(), NOON)
    assert file.stat().st_size < 200


ENDLESS = '{"day": "2026-03-01", "rounds": {"r": {"a": {"steps": Infinity, "seconds": 0, "times": 1}}}}'
BROKEN = ["", "{", "[]", '{"day": "2026-03-01", "rounds": [1]}', '{"day": "2026-03-01"}', BEFORE, ENDLESS, "[" * 100_000]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_one_is_not_taken_for_an_empty_one(broken: str, tmp_path: Path) -> None:
    file = tmp_path / "diary.json"
    file.write_text(broken)
    with pytest.raises(UserError, match=r"diary\.json cannot be read .* delete it to count them from 0"):
        Diary(file)


def test_what_lies_on_disk_says_no_name_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "diary.json"
    Diary(file).note("oncology", 1, "leukemia", Used(2, 0.5, 1), NOON)
    page = json.loads(file.read_text())
    assert page["day"] == "2026-03-01"
    [asks] = page["rounds"].values()
    assert list(asks.values()) == [{"steps": 2, "seconds": 0.5, "times": 1}]
    assert "oncology" not in file.read_text()
    assert "leukemia" not in file.read_text()
