"""What the trainer's log says while an ask is answered."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from client.service import Service
from client.transport import from_proto, to_proto
from fedtune.envelope import Envelope
from fedtune.logs import JsonLines


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ({"run": "r1", "round": 3}, {"run": "r1", "round": 3}),
        ({"round": 3, "stamp": {"run": "demo.7"}}, {"run": "demo.7", "round": 3}),  # signed: the stamp has it
        ({"run": "x\x1b[31m" + "y" * 900, "round": [1]}, {"run": "x?[31m" + "y" * 494, "round": "[1]"}),  # from a stranger
        ({"stamp": "none"}, {}),
    ],
)
def test_run_and_round_of_the_ask_are_in_each_line(header: dict[str, Any], named: dict[str, Any]) -> None:
    def answer(ask: Envelope) -> Envelope:
        return Envelope({"line": line()})

    said = json.loads(from_proto(Service(answer).Answer(to_proto(Envelope(header)), None)).header["line"])
    assert {name: said[name] for name in ("run", "round") if name in said} == named
    assert "run" not in json.loads(line())  # and in none afterwards


def line() -> str:
    return JsonLines().format(logging.makeLogRecord({"msg": "at work"}))
