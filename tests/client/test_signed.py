"""The trainer's door: its coordinator's asks, each once, of the run that it takes part in."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client.signed import DAY, Signed
from client.transport import failure
from fedtune import durable
from fedtune.envelope import UNKNOWN_RUN, Envelope, WireTensor
from fedtune.errors import UserError
from fedtune.security.sealing import UNANSWERED, is_sealed, opened
from fedtune.security.signing import ANSWER, ASK, STAMP, Stamp, signed, verified

COORDINATOR, STRANGER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
SEALING = X25519PrivateKey.generate()
NOW = 1_800_000_000 * 10**9


class Keys:
    """As much of a bundle as the door needs."""

    name, verify, seal = "north", COORDINATOR.public_key(), SEALING.public_key()
    signing = Ed25519PrivateKey.generate()


KEYS = Keys()


class Trainer:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Envelope] = []

    def answer(self, ask: Envelope) -> Envelope:
        self.asked.append(ask)
        return Envelope({"client": "north", "ask": ask.header["ask"]}, (WireTensor("w", "uint8", (1,), "raw", b"u"),))


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


@pytest.fixture
def door(trainer: Trainer, tmp_path: Path) -> Signed:
    return Signed(trainer, KEYS, tmp_path, clock=lambda: NOW)


def ask(id: str, serial: int, run: str = "run.1", kind: str = "train", client: str = "north", seal: bool = True) -> Envelope:
    stamp = Stamp(run, NOW + serial, client, seal)
    return signed(Envelope({"kind": kind, "ask": id}), stamp, COORDINATOR, ASK)


def hello(serial: int = 1, run: str = "run.1") -> Envelope:
    return ask("hello", serial, run, "hello", client="")


def reason(answer: Envelope) -> str:
    return str(answer.header["failed"])


def test_an_ask_of_the_coordinator_reaches_the_trainer_without_its_signature(door: Signed, trainer: Trainer) -> None:
    door.answer(hello())
    door.answer(ask("1.0", 2))
    first, second = (given.header for given in trainer.asked)
    assert first == {"kind": "hello", "ask": "hello", "run": "run.1"}  # the run is the stamp's, which no other run has
    assert second == {"kind": "train", "ask": "1.0", "run": "run.1"}


def test_the_answer_is_signed_by_the_client_and_sealed_for_the_coordinator(door: Signed) -> None:
    answer = door.answer(hello())
    assert is_sealed(answer)
    assert UNANSWERED not in answer.header
    stamp = Stamp("run.1", NOW + 1, "north", True)
    inner, given = verified(opened(answer, stamp, SEALING), KEYS.signing.public_key(), ANSWER)
    assert (inner.header, given) == ({"client": "north", "ask": "hello"}, stamp)


def test_without_end_to_end_it_is_signed_all_the_same(door: Signed) -> None:
    answer = door.answer(ask("hello", 1, kind="hello", client="", seal=False))
    inner, _ = verified(answer, KEYS.signing.public_key(), ANSWER)
    assert inner.tensors[0].data == b"u"


def test_a_refusal_of_the_policy_says_whose_it_is(tmp_path: Path) -> None:
    class Refusing:
        def answer(self, ask: Envelope) -> Envelope:
            return failure("policy.hours: not now", ask.header)

    door = Signed(Refusing(), KEYS, tmp_path, clock=lambda: NOW)
    stamp = Stamp("run.1", NOW + 1, "north", True)
    answer = door.answer(hello())
    assert answer.header[UNANSWERED] is True  # for the relay's log; the reason is sealed
    inner, _ = verified(opened(answer, stamp, SEALING), KEYS.signing.public_key(), ANSWER)
    assert (inner.header["client"], inner.header["failed"]) == ("north", "policy.hours: not now")


def test_an_unsigned_ask_is_refused(door: Signed, trainer: Trainer) -> None:
    assert "not signed" in reason(door.answer(Envelope({"kind": "hello", "ask": "hello"})))
    assert trainer.asked == []


def test_an_ask_of_somebody_else_is_refused(door: Signed, trainer: Trainer) -> None:
    forged = signed(Envelope({"kind": "hello", "ask": "hello"}), Stamp("run.1", NOW, "", True), STRANGER, ASK)
    assert "another key made it" in reason(door.answer(forged))
    assert trainer.asked == []


def test_a_replayed_ask_is_refused(door: Signed, trainer: Trainer) -> None:
    for asked in (hello(), ask("1.0", 2), ask("1.1", 3)):
        door.answer(asked)
    for old in (hello(), ask("1.0", 2), ask("2.0", 3)):  # nor is another one of the same serial
        assert "not newer than the last one" in reason(door.answer(old))
    assert len(trainer.asked) == 3


def test_the_last_ask_may_come_again_and_changes_nothing(door: Signed, trainer: Trainer, tmp_path: Path) -> None:
    """The relay repeats it to a trainer that was killed over it."""
    for _ in range(2):
        assert is_sealed(door.answer(hello()))
    door.answer(ask("1.0", 2))
    heard = (tmp_path / "heard.json").stat().st_ino
    again = Signed(trainer, KEYS, tmp_path, clock=lambda: NOW)
    assert is_sealed(again.answer(ask("1.0", 2)))
    assert [given.header["ask"] for given in trainer.asked] == ["hello", "hello", "1.0", "1.0"]
    assert trainer.asked[2] == trainer.asked[3]
    assert (tmp_path / "heard.json").stat().st_ino == heard


def test_where_nothing_is_kept_the_last_ask_is_an_old_one_too(trainer: Trainer) -> None:
    door = Signed(trainer, KEYS, None, clock=lambda: NOW)
    door.answer(hello())
    assert "not newer than the last one" in reason(door.answer(hello()))


@pytest.mark.parametrize("serial", [10**30, -(10**30)])
def test_a_serial_that_is_no_date_is_refused_as_any_other(serial: int, door: Signed, trainer: Trainer) -> None:
    door.answer(hello())
    assert reason(door.answer(ask("1.0", serial))).startswith(f"refused an ask: it is of no date ({str(NOW + serial)[:20]}")
    assert len(trainer.asked) == 1


def test_an_old_ask_under_a_new_id_is_refused(door: Signed, trainer: Trainer) -> None:
    door.answer(hello())
    old = ask("1.0", 2)
    door.answer(old)
    renamed = Envelope({**old.header, "ask": "2.0"}, old.tensors)
    assert "signature is wrong" in reason(door.answer(renamed))
    renumbered = Envelope({**old.header, STAMP: {**old.header[STAMP], "serial": NOW + 3}}, old.tensors)
    assert "signature is wrong" in reason(door.answer(renumbered))
    assert len(trainer.asked) == 2


def test_a_replay_is_refused_after_a_restart_too(door: Signed, tmp_path: Path) -> None:
    door.answer(hello())
    door.answer(ask("1.0", 2))
    again = Signed(restarted := Trainer(), KEYS, tmp_path, clock=lambda: NOW)
    assert "not newer than the last one" in reason(again.answer(hello()))
    again.answer(ask("1.1", 3))  # and the run goes on
    assert [given.header["ask"] for given in restarted.asked] == ["1.1"]


def test_an_ask_of_another_run_is_refused_until_it_says_hello(door: Signed, trainer: Trainer) -> None:
    assert "takes part in none" in wants_hello(door, ask("1.0", 1))
    door.answer(hello(2))
    assert "for run run.2, this trainer takes part in run.1" in wants_hello(door, ask("1.0", 3, run="run.2"))
    door.answer(hello(4, "run.2"))
    assert "for run run.1, this trainer takes part in run.2" in wants_hello(door, ask("1.0", 5, run="run.1"))
    assert [given.header["ask"] for given in trainer.asked] == ["hello", "hello"]


def wants_hello(door: Signed, asked: Envelope) -> str:
    """The reason of a failure that says so, sealed and signed as any answer is."""
    _, stamp = verified(asked, COORDINATOR.public_key(), ASK)
    told, _ = verified(opened(door.answer(asked), stamp, SEALING), KEYS.signing.public_key(), ANSWER)
    assert told.header[UNKNOWN_RUN] is True
    return reason(told)


def test_an_ask_for_another_client_is_refused(door: Signed) -> None:
    door.answer(hello())
    assert "for client 'south', this is 'north'" in reason(door.answer(ask("1.0", 2, client="south")))


def test_an_ask_of_tomorrow_is_refused_and_shuts_nobody_out(door: Signed) -> None:
    assert "set the clocks" in reason(door.answer(hello(DAY + 1)))
    assert "failed" not in door.answer(hello(1)).header


def test_a_refused_ask_changes_nothing_on_disk(door: Signed, tmp_path: Path) -> None:
    door.answer(hello())
    before = (tmp_path / "heard.json").read_bytes()
    door.answer(ask("1.0", 2, client="south"))
    door.answer(ask("1.0", 2, run="run.9"))
    assert (tmp_path / "heard.json").read_bytes() == before
    stored = json.loads(before)
    assert (stored["run"], stored["serial"], len(stored["ask"])) == ("run.1", NOW + 1, 64)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"run": "run.1", "serial": Infinity, "ask": ""}'])
def test_a_file_that_cannot_be_read_stops_the_trainer_before_it_listens(text: str, tmp_path: Path, trainer: Trainer) -> None:
    (tmp_path / "heard.json").write_text(text)
    with pytest.raises(UserError, match=r"heard\.json cannot be read"):
        Signed(trainer, KEYS, tmp_path)


def test_a_refusal_repeats_nothing_that_is_long_or_secret(door: Signed) -> None:
    refused = door.answer(replace(hello(), header={**hello().header, "job": {"much": "text"}, "kind": "train"}))
    assert refused.header.keys() == {"failed", "ask", "kind", "version", "roles", "scalars"}


def test_an_ask_of_long_ago_is_refused_even_by_who_has_heard_nothing(tmp_path: Path, trainer: Trainer) -> None:
    new = Signed(trainer, KEYS, tmp_path, clock=lambda: NOW + 8 * DAY)
    assert "more than 7 days ago" in reason(new.answer(hello()))
    assert trainer.asked == []


def test_who_wants_all_answers_sealed_refuses_the_others(tmp_path: Path, trainer: Trainer) -> None:
    door = Signed(trainer, KEYS, tmp_path, clock=lambda: NOW, must_seal=True)
    assert "policy.end_to_end" in reason(door.answer(ask("hello", 1, kind="hello", client="", seal=False)))
    assert "failed" not in door.answer(hello(2)).header


def test_what_nobody_expected_is_sealed_too_and_its_words_stay(tmp_path: Path) -> None:
    class Broken:
        def answer(self, ask: Envelope) -> Envelope:
            raise RuntimeError("/path/to/notes.jsonl: private words")

    door = Signed(Broken(), KEYS, tmp_path, clock=lambda: NOW)
    answer = door.answer(hello())
    assert is_sealed(answer)
    inner, _ = verified(opened(answer, Stamp("run.1", NOW + 1, "north", True), SEALING), KEYS.signing.public_key(), ANSWER)
    assert inner.header["failed"] == "RuntimeError in the trainer; its log says more"


def test_what_cannot_be_kept_is_refused_and_not_heard(
    door: Signed, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for one ask; the same ask is answered when it is not any more."""
    door.answer(hello())

    def full(path: Path, pieces: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(durable, "write", full)
        told = reason(door.answer(ask("1.0", 2)))
    assert "nothing can be written on this client's disk (No space left on device)" in told
    assert str(tmp_path) not in told
    assert is_sealed(door.answer(ask("1.0", 2)))
    assert [given.header["ask"] for given in trainer.asked] == ["hello", "1.0"]


def test_a_file_that_is_another_user_s_stops_the_trainer_in_one_line(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heard.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(UserError, match=r"heard\.json cannot be read"):
        Signed(trainer, KEYS, tmp_path)
