"""No serial of an ask is less than one before, whatever becomes of the clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune import durable
from server.serials import AHEAD, Serials

NOW = 1_800_000_000 * 10**9
FIVE_MINUTES = 300 * 10**9


def test_they_grow_over_restarts_with_a_clock_that_is_set_back(tmp_path: Path) -> None:
    used, file = list[int](), tmp_path / "serial"
    for clock in (NOW, NOW - FIVE_MINUTES, NOW - 2 * FIVE_MINUTES, NOW + FIVE_MINUTES):
        serials = Serials(file, lambda clock=clock: clock)
        used += [serials.next() for _ in range(3)]
    assert used == sorted(set(used))
    assert used[-3:] == [NOW + FIVE_MINUTES, NOW + FIVE_MINUTES + 1, NOW + FIVE_MINUTES + 2]


def test_a_restart_is_at_most_a_minute_ahead(tmp_path: Path) -> None:
    """However often: a day ahead, and clients would refuse it."""
    for clock in range(NOW, NOW + 5 * AHEAD, AHEAD):
        assert Serials(tmp_path / "serial", lambda clock=clock: clock).next() <= clock + AHEAD


def test_the_disk_is_written_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, now = list[int](), [NOW]
    monkeypatch.setattr(durable, "write", lambda file, pieces: written.append(int(b"".join(pieces))))
    serials = Serials(tmp_path / "serial", lambda: now[0])
    for now[0] in range(NOW, NOW + AHEAD + 1, AHEAD // 100):
        serials.next()
    assert written == [NOW + AHEAD]
    now[0] += 1
    assert [serials.next(), *written] == [NOW + AHEAD + 1, NOW + AHEAD, NOW + AHEAD + 1 + AHEAD]


@pytest.mark.parametrize("left", ["", "x", "9" * 10**5])
def test_a_file_that_cannot_be_read_ends_nothing(left: str, tmp_path: Path) -> None:
    (tmp_path / "serial").write_text(left)
    assert Serials(tmp_path / "serial", lambda: NOW).next() >= NOW


def test_where_it_cannot_be_written_the_clock_must_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Serials(tmp_path / "nowhere" / "serial", lambda: NOW).next() == NOW
    assert "cannot be written (No such file or directory)" in caplog.text
