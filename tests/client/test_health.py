"""The trainer's health over its real socket: alive from the start, ready with a job, and both told while it works."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.health import TRAINER, saying, trainer_health
from client.resident import Resident
from client.service import serve
from client.transport import carry
from fedtune.envelope import Envelope
from fedtune.errors import UserError
from fedtune.health import main, status

HELLO = Envelope({"kind": "hello", "run": "r", "job": {"name": "good"}})


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        yield Path(folder) / "t.sock"


class Trainer:
    def answer(self, ask: Envelope) -> Envelope:
        return Envelope({"ask": ask.header.get("ask")})


def build(job: dict[str, Any]) -> Trainer:
    if job["name"] == "bad":
        raise UserError("no such model")
    return Trainer()


def test_it_is_ready_while_it_has_a_job(socket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    health = trainer_health()
    serving = serve(Resident(saying(build, health)).answer, socket, health=health)
    target, seen = f"unix:{socket}", []
    for job in ("none", "good", "bad", "good"):
        if job != "none":
            carry(Envelope({**HELLO.header, "job": {"name": job}}), socket)
        seen.append((status(target), status(target, TRAINER)))
    assert seen == [("SERVING", word) for word in ("NOT_SERVING", "SERVING", "NOT_SERVING", "SERVING")]
    assert status(target, "another") == "UNKNOWN"
    assert (main([target, TRAINER]), main([target, "another"])) == (0, 1)
    assert capsys.readouterr().out == "SERVING\nUNKNOWN\n"
    serving.stop(None).wait()
    assert status(target, patience=1) == "UNREACHABLE"


def test_it_is_told_while_an_ask_is_answered_and_others_wait(socket: Path) -> None:
    """There is one thread for asks: behind them, a probe would take the trainer for dead."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(ask: Envelope) -> Envelope:
        begun.set()
        go_on.wait()
        return ask

    serving = serve(slow, socket)
    asking = [threading.Thread(target=carry, args=(HELLO, socket)) for _ in range(3)]
    for one in asking:
        one.start()
    begun.wait()
    assert status(f"unix:{socket}") == "SERVING"
    go_on.set()
    for one in asking:
        one.join()
    serving.stop(None).wait()


def test_the_door_is_in_front_of_it_too(socket: Path) -> None:
    nobody = os.geteuid() + 1
    serving = serve(Trainer().answer, socket, peers={nobody})
    assert status(f"unix:{socket}", patience=2) == "UNREACHABLE"
    serving.stop(None).wait()
