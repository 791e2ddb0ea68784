"""Processes that are started again when they end, and what is said of their ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fedtune.processes import Processes
from fedtune.tending import Tending, ending, last_words


def said(level: str, message: str, **more: str) -> str:
    return json.dumps({"time": "2026-01-02T03:04:05.678Z", "level": level, "process": "p", "message": message, **more})


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ("INFO: all is well\n", ""),
        ("first\nlast\n\n", "last"),
        ("2026-01-02 03:04:05,678 ERROR policy.toml: unknown key 'hour'\n2026-01-02 03:04:06,000 INFO bye\n",
         "policy.toml: unknown key 'hour'"),
        ("\x1b[91mERROR \x1b[0m:     Exit Code: 305\nFailed to connect.\n[code: 2004]\nINFO:     Shutting down\n",
         "Exit Code: 305: Failed to connect."),
        ("usage: python -m client.trainer_main [-h]\npython -m client.trainer_main: error: --layers 0 was given\n",
         "--layers 0 was given"),
        ("Killed it\nmodule.py:3: UserWarning: old\n  import old\n", "module.py:3: UserWarning: old"),
        ("\x1b]0;title\x07red \x1b[31mwords\x9b\n", "]0;titlered words"),
        (f"{said('ERROR', 'no such file', traceback='Traceback: a')}\n{said('INFO', 'bye')}\n", "no such file"),
        (f"{said('INFO', 'all is well')}\n{said('WARNING', 'last')}\n", "WARNING last"),
        (f"{said('ERROR', 'Exit Code: 305' + chr(10) + 'Failed to connect.')}\n", "Exit Code: 305: Failed to connect."),
        (f"{said('INFO', 'the start of it was cut off')[9:]}\nlast\n", "last"),
        (f"{said('ERROR', 'a' + chr(27) + '[31mb')}\n", "ab"),
        ('{"level": 1}\n', '{"level": 1}'),
    ],
)  # fmt: skip
def test_the_line_that_tells_why(log: str, words: str) -> None:
    assert last_words(log) == words


def test_an_exit_code_in_words() -> None:
    assert ending(3) == "ended with exit code 3"
    assert ending(-9) == "was killed by SIGKILL (out of memory?)"
    assert ending(-15) == "was killed by SIGTERM"
    assert ending(-250) == "was killed by signal 250"


def test_words_of_one_that_ran_before_are_not_taken_for_those_of_the_last(tmp_path: Path) -> None:
    now = [0.0]
    script = f"import os; os.path.exists({str(tmp_path / 'second')!r}) or print('ERROR the first')"
    with Processes(tmp_path) as processes:
        tending = Tending(processes, clock=lambda: now[0])
        tending.keep("one", [sys.executable, "-c", script])
        processes.until(lambda: processes.ended("one") is not None, "its end")
        assert tending.tend() == ["one"]
        assert tending.how_it_ended("one") == f"ended with exit code 0: the first (the log: {processes.log('one')})"
        (tmp_path / "second").touch()
        now[0] += 60
        tending.tend()
        processes.until(lambda: processes.ended("one") is not None, "its end")
        assert tending.tend() == ["one"]
        assert tending.how_it_ended("one") == f"ended with exit code 0 (the log: {processes.log('one')})"
