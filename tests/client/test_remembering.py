"""The door for asks that came before: answered without work, as the policy still allows; poison is not taken a third time."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from client import remembering
from client.kept import MANIFEST
from client.memories import Memories
from client.remembering import BEGUN, Remembering
from fedtune import durable
from fedtune.envelope import Envelope, WireTensor
from fedtune.errors import Forbidden


class Trainer:
    """Counts what it was asked; what it answers differs each time, and is stored as the real one's is."""

    def __init__(self, folder: Path) -> None:
        self.asked, self._folder = 0, folder

    def answer(self, ask: Envelope) -> Envelope:
        self.asked += 1
        answer = Envelope({"ask": ask.header["ask"], "time": self.asked}, (WireTensor("w", "uint8", (1,), "raw", b"u"),))
        if ask.header["kind"] == "train":
            memories = Memories(self._folder, lambda client: "schema", answers=True)
            memories.commit(memories.work("north", ask), answer)
        return answer


def allowed(ask: Envelope) -> None:
    pass


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


@pytest.fixture
def door(trainer: Trainer, tmp_path: Path) -> Remembering:
    return Remembering(trainer, tmp_path, "north", allowed)


def ask(name: str = "1.0", content: int = 0, run: str = "run", kind: str = "train") -> Envelope:
    return Envelope({"ask": name, "run": run, "round": 1, "kind": kind, "content": content})


def test_the_same_ask_has_the_same_answer_and_no_work_is_done(door: Remembering, trainer: Trainer, tmp_path: Path) -> None:
    first, second = door.answer(ask()), door.answer(ask("1.1"))
    assert door.answer(ask()) == first
    assert door.answer(ask("1.1")) == second
    assert trainer.asked == 2
    assert Remembering(trainer, tmp_path, "north", allowed).answer(ask()) == first  # in another process
    assert trainer.asked == 2


def test_another_content_or_run_is_another_ask(door: Remembering, trainer: Trainer) -> None:
    for given in (ask(), ask(content=1), ask(run="another"), ask()):
        door.answer(given)
    assert trainer.asked == 4  # the last one's run is over


def test_a_hello_is_answered_anew(door: Remembering, trainer: Trainer) -> None:
    for _ in range(3):
        door.answer(ask(kind="hello"))
    assert trainer.asked == 3


def test_a_damaged_answer_is_made_again(door: Remembering, trainer: Trainer, tmp_path: Path) -> None:
    door.answer(ask())
    (stored,) = tmp_path.rglob("*.answer")
    stored.write_bytes(stored.read_bytes()[:-1])
    assert door.answer(ask()).header["time"] == 2
    assert door.answer(ask()).header["time"] == 2
    (manifest,) = tmp_path.rglob(MANIFEST)
    manifest.write_bytes(b"")
    assert door.answer(ask()).header["time"] == 3


def test_a_policy_that_has_become_stricter_is_kept_to(trainer: Trainer, tmp_path: Path) -> None:
    def forbidden(ask: Envelope) -> None:
        raise Forbidden("policy.hours: not now")

    Remembering(trainer, tmp_path, "north", allowed).answer(ask())
    answer = Remembering(trainer, tmp_path, "north", forbidden).answer(ask())
    assert (answer.header["failed"], answer.tensors, trainer.asked) == ("policy.hours: not now", (), 1)


class Dying(Trainer):
    def answer(self, ask: Envelope) -> Envelope:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def die(folder: Path, given: Envelope) -> None:
    """A process of its own is killed over it."""
    if (child := os.fork()) == 0:
        Remembering(Dying(folder), folder, "north", allowed).answer(given)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_an_ask_over_which_the_trainer_died_twice_is_given_up(trainer: Trainer, tmp_path: Path) -> None:
    for _ in range(2):
        die(tmp_path, ask())
    for _ in range(2):  # and stays so
        answer = Remembering(trainer, tmp_path, "north", allowed).answer(ask())
        assert "the trainer died twice over this ask" in str(answer.header["failed"])
    assert trainer.asked == 0
    (tmp_path / BEGUN).unlink()
    assert "failed" not in Remembering(trainer, tmp_path, "north", allowed).answer(ask()).header


@pytest.mark.parametrize("after", ["a restart of the machine", "half a day", "a clock that was set back", "a minute"])
def test_an_ask_that_was_given_up_is_tried_again_in_time(
    after: str, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twice, in one life of the machine: a power cut is no fault of the ask's."""
    (tmp_path / "boot_id").write_text("first\n")
    monkeypatch.setattr(remembering, "BOOT", tmp_path / "boot_id")
    for _ in range(2):
        die(tmp_path, ask())
    begun = json.loads((tmp_path / BEGUN).read_text())
    assert begun["times"] == 2
    if after == "a restart of the machine":
        (tmp_path / "boot_id").write_text("second\n")
    else:
        passed = {"half a day": remembering.FORGOTTEN + 1, "a clock that was set back": -3600.0, "a minute": 60.0}[after]
        (tmp_path / BEGUN).write_text(json.dumps({**begun, "at": begun["at"] - passed}))
    answer = Remembering(trainer, tmp_path, "north", allowed).answer(ask())
    assert ("failed" in answer.header) is (after == "a minute")


def test_another_ask_is_none_of_it(trainer: Trainer, tmp_path: Path) -> None:
    die(tmp_path, ask())
    Remembering(trainer, tmp_path, "north", allowed).answer(ask("1.1"))
    die(tmp_path, ask())
    assert "failed" not in Remembering(trainer, tmp_path, "north", allowed).answer(ask()).header


def test_who_failed_and_said_so_did_not_die(door: Remembering, trainer: Trainer, tmp_path: Path) -> None:
    trainer.answer = lambda ask: Envelope({"failed": "no"})  # type: ignore[method-assign]
    for _ in range(4):
        assert door.answer(ask()).header["failed"] == "no"
    assert not (tmp_path / BEGUN).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"ask": 1}', '{"ask": "x", "times": null}'])
def test_a_damaged_note_is_none(text: str, door: Remembering, tmp_path: Path) -> None:
    (tmp_path / BEGUN).write_text(text)
    assert "failed" not in door.answer(ask()).header


def test_a_full_disk_is_said_before_any_work(door: Remembering, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write", full)
    assert "No space left on device): make room" in str(door.answer(ask()).header["failed"])
    assert trainer.asked == 0
