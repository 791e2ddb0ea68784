"""Logs of JSON lines are shown as text, and none is lost for being long."""

from __future__ import annotations

import json
from pathlib import Path

from server.loglines import coming_lines, last_lines


def said(message: str, **more: str) -> str:
    return json.dumps({"time": "once", "level": "ERROR", "process": "p", "message": message, **more}) + "\n"


def test_what_continues_a_line_cannot_be_taken_for_another(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("plain\n" + said("two\nINFO lines", traceback="T:\n  at"))
    wanted = ["once ERROR two", "    INFO lines", "    T:", "      at"]
    assert last_lines(log, 2) == ["plain", *wanted]
    assert last_lines(log, 1) == wanted
    steps = iter([lambda: log.write_text(log.read_text() + said("new\nline")), None])

    def alive() -> bool:
        act = next(steps)
        if act:
            act()
        return act is not None

    assert list(coming_lines({"a": log}, alive)) == [("a", "once ERROR new"), ("a", "    line")]


def test_the_last_lines_of_a_log_of_long_ones_are_all_shown(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("".join(said(f"{number} " + "x" * 3000) for number in range(40)))
    assert [line.split()[2] for line in last_lines(log, 7)] == [str(number) for number in range(33, 40)]
    assert len(last_lines(log, 100)) == 40
    assert last_lines(log, 0) == last_lines(tmp_path / "none", 5) == []
