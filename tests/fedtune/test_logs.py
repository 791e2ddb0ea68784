"""Logs as JSON: each line one object, whoever wrote it, with what it is about; and the same lines as text again."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from fedtune import logs
from fedtune.logs import JsonLines, about, as_text
from fedtune.paths import app_root

PROCESS = """
import logging, sys, threading, warnings
flower = logging.getLogger("flwr")  # as Flower does when it is imported: a handler of its own, and propagation beside
before = logging.StreamHandler(); before.setLevel(logging.INFO); flower.addHandler(before); flower.setLevel(logging.DEBUG)
from fedtune.logs import about, always, configure
import os; configure("relay", **eval(os.environ.get("GIVEN", "{}")), client="")
always(client="ann")
log = logging.getLogger("fedtune.relay")
log.info("first"); log.debug("not said")
with about(run="r1", round=3):
    with about(ask="3.0"):
        log.warning("within")
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("broken\\nin two")
flower.warning("Flower's"); flower.debug("below its level")
late = logging.StreamHandler(sys.stdout); late.setLevel(logging.ERROR)  # as uvicorn does when it begins to serve
web = logging.getLogger("uvicorn"); web.propagate = False; web.addHandler(late)
web.info("below its level"); web.error("web")
warnings.warn("old")
thread = threading.Thread(target=lambda: [][0]); thread.start(); thread.join()
raise SystemError("the end \\x1b[31m\\u2028")
"""


def written(mode: str, given: str = "{}") -> str:
    environment = {**os.environ, "FEDTUNE_LOG": mode, "GIVEN": given}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], cwd=app_root(), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    return done.stdout + done.stderr


def test_every_line_of_a_process_is_one_object() -> None:
    lines = [json.loads(line) for line in written("json").splitlines()]
    assert [(line["level"], line["message"].partition("\n")[0]) for line in lines] == [
        ("INFO", "first"),
        ("WARNING", "within"),
        ("ERROR", "broken"),
        ("WARNING", "Flower's"),
        ("ERROR", "web"),
        ("WARNING", "<string>:21: UserWarning: old"),
        ("CRITICAL", "IndexError: list index out of range"),
        ("CRITICAL", "SystemError: the end \x1b[31m\u2028"),
    ]
    assert {(line["process"], line["client"]) for line in lines} == {("relay", "ann")}
    assert [{key: line[key] for key in ("run", "round", "ask") if key in line} for line in lines[:4]] == [
        {},
        {"run": "r1", "round": 3, "ask": "3.0"},
        {"run": "r1", "round": 3},
        {},
    ]
    assert [number for number, line in enumerate(lines) if "traceback" in line] == [2, 6, 7]
    assert lines[2]["traceback"].endswith("ZeroDivisionError: division by zero")


def test_without_it_or_with_another_word_the_log_is_text() -> None:
    said, wrong = written(""), written("xml")
    assert " INFO first\n" in said
    assert "ZeroDivisionError: division by zero\n" in said
    assert "{" not in said
    assert "FEDTUNE_LOG=xml was given, wanted text or json" in wrong
    assert " INFO first\n" in wrong


def test_a_process_with_a_log_of_its_own_says_what_it_would_have_said() -> None:
    lines = [json.loads(line)["message"].partition("\n")[0] for line in written("json", "{'format': None}").splitlines()]
    assert lines[:4] == ["within", "broken", "Flower's", "web"]  # ours below a warning are not for this log
    said = written("text", "{'format': None}").splitlines()
    assert {"within", "Flower's"} <= set(said)  # as Python's last resort and Flower's handler write them
    assert "first" not in said


def record(message: str, **more: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message, "levelname": "ERROR", "created": 1767323045.678, **more})


def test_a_line_of_json_is_the_text_log_s_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_always", {})  # whatever a process of an earlier test has said of itself
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    with about(run="r", round=None):
        line = JsonLines().format(record("%s: no", args=("x\x1b[31m",)))
    assert json.loads(line) == {"time": "2026-01-02T03:04:05.678Z", "level": "ERROR", "message": "x\x1b[31m: no", "run": "r"}
    assert as_text(line) == "2026-01-02 03:04:05,678 ERROR x: no"
    assert as_text(line.replace("2026-01-02T", "yesterday ")) == "yesterday 03:04:05.678Z ERROR x: no"
    for other in ("", "{", "{}", '{"level": "INFO"}', "[1]", "words", "{" * 100_000):
        assert as_text(other) == other
    monkeypatch.undo()
    time.tzset()


def test_of_a_long_traceback_the_end_is_kept() -> None:
    try:
        raise ValueError("a" * 9000 + " the end")
    except ValueError:
        line = json.loads(JsonLines().format(record("broken", exc_info=sys.exc_info())))
    assert len(line["traceback"]) == 4000
    assert line["traceback"].endswith("a the end")
