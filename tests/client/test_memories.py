"""Memories as asks change them: all or nothing, back where the coordinator goes back, and the same after a restart."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.kept import HOME, MANIFEST, Kept
from client.memories import Memories, Work, schema_of
from fedtune import durable
from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed
from fedtune.memory import Memory

ANSWERED = Envelope({"answered": True})
OLD, NEW = "schema 1", "schema 2"


def memories(folder: Path | None, schema: str = OLD, *, answers: bool = False, shared: bool = False) -> Memories:
    return Memories(folder, lambda client: schema, answers=answers, shared=shared)


def ask(name: str, content: int = 0, run: str = "run") -> Envelope:
    return Envelope({"ask": name, "run": run, "round": int(name.partition(".")[0]), "content": content})


def past(memory: Memory) -> list[int]:
    """The contents of the asks that it has seen."""
    return memory["past"].tolist() if "past" in memory else []


def worked(memories: Memories, asked: Envelope, client: str = "ann") -> Work:
    """Each content leaves its trace; 0 is an evaluation, which leaves none. What is alike follows from the content too."""
    work, content = memories.work(client, asked), int(asked.header["content"])
    if content:
        work.memory["past"] = torch.tensor([*past(work.memory), content])
        work.memory.keep("broadcast", torch.full((2,), float(content)))
    return work


def answered(memories: Memories, asked: Envelope, client: str = "ann") -> list[int]:
    memories.commit(worked(memories, asked, client), ANSWERED)
    return past(memories.of(client))


@pytest.mark.parametrize("on_disk", [False, True])
def test_work_that_is_not_committed_changes_nothing(on_disk: bool, tmp_path: Path) -> None:
    known = memories(tmp_path if on_disk else None)
    assert answered(known, ask("1.0", 7)) == [7]
    work = worked(known, ask("2.0", 8))
    assert (past(work.memory), past(known.of("ann"))) == ([7, 8], [7])
    assert answered(known, ask("2.0", 9)) == [7, 9]


def test_another_process_finds_it(tmp_path: Path) -> None:
    answered(memories(tmp_path), ask("1.0", 7))
    answered(memories(tmp_path), ask("2.0", 8))
    found = memories(tmp_path).of("ann")
    assert (past(found), found["broadcast"].tolist()) == ([7, 8], [8.0, 8.0])


def test_the_same_name_with_another_content_finds_the_memory_from_before_it(tmp_path: Path) -> None:
    for name, content in (("1.0", 7), ("1.1", 8), ("2.0", 9)):
        answered(memories(tmp_path), ask(name, content))
    assert answered(memories(tmp_path), ask("1.1", 6)) == [7, 6]
    assert answered(memories(tmp_path), ask("2.0", 9)) == [7, 6, 9]


def test_a_failure_after_going_back_leaves_what_was_there(tmp_path: Path) -> None:
    known = memories(tmp_path)
    for name, content in (("1.0", 7), ("2.0", 8)):
        answered(known, ask(name, content))
    assert past(worked(known, ask("1.0", 5)).memory) == [5]
    assert past(known.of("ann")) == past(memories(tmp_path).of("ann")) == [7, 8]


def test_another_run_begins_with_nothing_and_the_same_goes_on(tmp_path: Path) -> None:
    known = memories(tmp_path)
    answered(known, ask("1.0", 7))
    known.begin("ann", "run")
    assert past(known.of("ann")) == [7]
    known.begin("ann", "another")
    assert past(known.of("ann")) == past(memories(tmp_path).of("ann")) == []
    assert not (tmp_path / HOME / "ann").exists()


def test_an_ask_of_a_run_that_said_no_hello_here_begins_with_nothing_too(tmp_path: Path) -> None:
    """And the old run is gone once it is answered, not before."""
    answered(memories(tmp_path), ask("1.0", 7))
    known = memories(tmp_path)
    assert past(worked(known, ask("1.0", 8, run="another")).memory) == [8]
    assert past(known.of("ann")) == [7]
    assert answered(known, ask("1.0", 8, run="another")) == [8]
    assert past(memories(tmp_path).of("ann")) == [8]


def test_nothing_is_written_before_there_is_something_to_remember(tmp_path: Path) -> None:
    known = memories(tmp_path)
    known.begin("ann", "run")
    assert answered(known, ask("0.evaluate")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_memory_of_another_schema_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answered(memories(tmp_path), ask("1.0", 7))
    assert answered(memories(tmp_path, NEW), ask("2.0", 8)) == [8]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert past(memories(tmp_path, NEW).of("ann")) == [8]


def test_a_schema_is_of_all_that_it_is_told() -> None:
    told: list[tuple[object, ...]] = [("base", {"a": (1, 2)}, 4), ("other", {"a": (1, 2)}, 4), ("base", {"a": (1, 3)}, 4)]
    assert len({schema_of(*one) for one in told}) == 3
    assert schema_of({"a": 1, "b": Path("x")}) == schema_of({"b": Path("x"), "a": 1})


def test_a_full_disk_is_a_failure_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = memories(tmp_path, answers=True)
    answered(known, ask("1.0", 7))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write", full)
        with pytest.raises(ClientFailed, match=r"No space left on device.*make room"):
            answered(known, ask("2.0", 8))
    assert past(known.of("ann")) == past(memories(tmp_path).of("ann")) == [7]
    assert answered(known, ask("2.0", 8)) == [7, 8]


def test_interrupted_in_the_middle_it_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = memories(tmp_path)
    answered(known, ask("1.0", 7))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answered(known, ask("2.0", 8))
    assert answered(known, ask("2.0", 9)) == [7, 9]


def test_what_clients_keep_alike_is_in_memory_and_on_disk_once(tmp_path: Path) -> None:
    known = memories(tmp_path, shared=True)
    for client in ("ann", "bob"):
        answered(known, ask("1.0", 7), client)
    assert known.of("ann")["broadcast"] is known.of("bob")["broadcast"]
    alike = {part.name for part in [known.of("ann").parts()[0]]}
    files = [path for path in (tmp_path / HOME).rglob("*.safetensors") if path.stem in alike]
    assert (len(files), len({path.stat().st_ino for path in files})) == (3, 1)  # ann's, bob's, and the one to link


def test_a_memory_that_was_damaged_is_whole_when_it_is_made_again(tmp_path: Path) -> None:
    """By the same ask: the file has the same name then."""
    answered(memories(tmp_path), ask("1.0", 7))
    for file in (tmp_path / HOME / "ann").glob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert answered(memories(tmp_path), ask("1.0", 7)) == [7]
    assert past(memories(tmp_path).of("ann")) == [7]


@pytest.mark.parametrize("back", ["1.0", "2.0"])
def test_where_the_memory_of_then_is_kept_no_more_it_begins_with_none(
    back: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last two rounds are kept, 3 and 4. What was remembered before 3.0 holds round 2, so it is not that before 2.0."""
    known = memories(tmp_path)
    for round in (1, 2, 3, 4):
        answered(known, ask(f"{round}.0", round))
    assert answered(known, ask("3.0", 7)) == [1, 2, 7]
    assert not caplog.records
    assert answered(memories(tmp_path), ask(back, 8)) == [8]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert answered(memories(tmp_path), ask("3.0", 9)) == [8, 9]
    assert answered(memories(tmp_path), ask(back, 6)) == [6]  # and this one is known again


# Sequences of asks, with failures and restarts among them, against a memory that is a list.


@dataclass
class Model:
    """What must be remembered: of each entry its name, its round, and the past before it; and the last name that went. Names
    are in the order of asks, as steps have one digit."""

    past: list[int] = field(default_factory=list)
    entries: list[tuple[str, int, list[int]]] = field(default_factory=list)
    purged: str = ""
    answers: bool = True
    on_disk: tuple[list[int], list[tuple[str, int, list[int]]], str] = ([], [], "")

    def restart(self) -> None:
        self.past, self.entries, self.purged = self.on_disk

    def ask(self, name: str, content: int) -> None:
        round = int(name.partition(".")[0])
        before = self.entries
        if name <= self.purged:
            self.past, self.entries, self.purged = [], [], ""
        gone = [n for n, (other, of, _) in enumerate(self.entries) if other == name or of > round]
        if gone:
            self.past, self.entries = self.entries[gone[0]][2], self.entries[: gone[0]]
        stored = self.answers or bool(content) or self.entries != before  # else an ask leaves nothing
        self.entries = [*self.entries, (name, round, self.past)]
        self.past = [*self.past, content] if content else self.past
        rounds = sorted({round for _, round, _ in self.entries})[-2:]
        self.purged = max([self.purged, *(name for name, round, _ in self.entries if round not in rounds)])
        self.entries = [entry for entry in self.entries if entry[1] in rounds]
        if stored:
            self.on_disk = self.past, self.entries, self.purged


NAMES = st.sampled_from([f"{round}.{step}" for round in (1, 2, 3) for step in (0, 1)])
STEPS = st.lists(st.tuples(st.sampled_from(["ask", "ask", "fail", "restart", "damage"]), NAMES, st.integers(0, 3)), max_size=14)


@pytest.mark.parametrize("answers", [False, True])
@settings(max_examples=15, deadline=None)
@given(steps=STEPS)
def test_any_sequence_is_remembered_as_by_a_list(answers: bool, steps: list[tuple[str, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        known, model = memories(Path(folder), answers=answers), Model(answers=answers)
        for step, name, content in steps:
            if step == "ask":
                answered(known, ask(name, content))
                model.ask(name, content)
            elif step == "fail":
                worked(known, ask(name, content))
            else:
                known = memories(Path(folder), answers=answers)
                model.restart()
            assert past(known.of("ann")) == model.past
        model.restart()
        assert past(memories(Path(folder)).of("ann")) == model.past


@settings(max_examples=15, deadline=None)
@given(steps=STEPS, byte=st.integers(0, 10**6))
def test_what_is_damaged_is_lost_and_never_believed(steps: list[tuple[str, str, int]], byte: int) -> None:
    """A memory that was lost begins again: so what is remembered is always an end of what happened."""
    with tempfile.TemporaryDirectory() as folder:
        known, model = memories(Path(folder), answers=True), Model()
        for step, name, content in steps:
            if step == "ask":
                answered(known, ask(name, content))
                model.ask(name, content)
            elif step == "damage":
                damage(Kept(Path(folder), "ann").folder, byte)
                known = memories(Path(folder), answers=True)
            found = past(known.of("ann"))
            assert found == model.past[len(model.past) - len(found) :]


def damage(folder: Path, byte: int) -> None:
    """One file but the manifest, which has a test of its own."""
    if files := sorted(path for path in folder.glob("*") if path.name != MANIFEST):
        file = files[byte % len(files)]
        data = bytearray(file.read_bytes())
        data[byte % len(data)] ^= 1
        file.write_bytes(data)
