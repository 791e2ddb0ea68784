"""The ServerApp's process of a run: what is said of its end, and whether the run is over with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from fedtune.errors import RoundFailed, UserError
from server.playing import Crashed, Playing


class Ended:
    """Processes whose ServerApp has ended with `code`; its log is `text`."""

    def __init__(self, folder: Path, text: str, code: int = 1) -> None:
        self._log, self._code = folder / "serverapp.log", code
        self._log.write_text(text)

    def ended(self, name: str) -> int:
        return self._code

    def log(self, name: str) -> Path:
        return self._log


def follow(folder: Path, text: str, code: int = 1, written: int = 0) -> None:
    playing = Playing(SimpleNamespace(run=folder / "none"), Ended(folder, text, code), None)
    playing._written = written
    playing.follow(9, lambda: None, lambda: None)


@pytest.mark.parametrize(("length", "words"), [(3, "xxx"), (1200, "x" * 1200), (3000, "x" * 1499 + "…")])
def test_why_it_failed_is_its_last_line_however_long(tmp_path: Path, length: int, words: str) -> None:
    """Reasons of many clients stand in one line."""
    with pytest.raises(RoundFailed) as failed:
        follow(tmp_path, "first\n\x1b[2m" + "x" * length + "\n")
    where = tmp_path / "serverapp.log"
    assert str(failed.value) == f"the ServerApp ended with exit code 1; its last words in {where}: {words}"


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (1, RoundFailed, "exit code 1; its last words in .*: no quorum$"),
        (2, UserError, "^no quorum \\(the log: .*serverapp.log\\)$"),
        (70, Crashed, "^the ServerApp ended with exit code 70: no quorum$"),
        (-9, Crashed, "^the ServerApp was killed by SIGKILL \\(out of memory\\?\\)$"),
    ],
)
def test_only_the_first_two_codes_are_a_verdict_on_the_run(code: int, kind: type, said: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=said) as raised:
        follow(tmp_path, "2026-01-02 03:04:05,678 ERROR no quorum\n", code)
    assert type(raised.value) is kind


def test_nothing_is_raised_of_one_that_ended_well(tmp_path: Path) -> None:
    follow(tmp_path, "", 0)


def test_words_of_the_one_before_are_not_its_own(tmp_path: Path) -> None:
    with pytest.raises(Crashed, match=r"^the ServerApp ended with exit code 70$"):
        follow(tmp_path, "before\n", 70, written=len("before\n"))


def test_who_leaves_a_run_ends_its_process_too(tmp_path: Path) -> None:
    stopped = list[int]()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        processes = SimpleNamespace(pids=lambda: {"serverapp": process.pid}, ended=lambda name: process.poll())
        Playing(SimpleNamespace(), processes, SimpleNamespace(stop=stopped.append)).leave(9)
        assert not psutil.pid_exists(process.pid)
    assert stopped == [9]
