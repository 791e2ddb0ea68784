"""A client's folder: who is killed or cut short leaves the old state or the new one, and what is damaged is not believed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.kept import HOME, MANIFEST, SHARED, Kept, part_file
from client.manifest import Manifest
from tests.client.kept_states import answer, commit, interrupted, is_whole, state


@pytest.mark.parametrize(
    ("shared", "before", "after"),
    [("own", "", "1"), ("own", "1,2", "1,2,3"), ("shared", "", "1"), ("shared", "1,2", "1,4"), ("own", "1,2", "5")],
)
def test_killed_at_every_step_it_is_the_old_state_or_the_new_one(shared: str, before: str, after: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.client.kept_states", str(tmp_path), shared, before, after]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    outcomes = json.loads(ran.stdout)
    assert len(outcomes) > 6
    assert outcomes == sorted(outcomes)  # the old one up to a step, and the new one from there on
    assert set(outcomes) == {False, True}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_an_error_at_every_step_leaves_the_old_state(error: int, tmp_path: Path) -> None:
    """Until the new one counts; from then on nothing that fails matters."""
    old, new, failed, at = state(1, 2)[0], state(1, 2, 3)[0], 0, 0

    def fail() -> None:
        raise OSError(error, os.strerror(error))

    while True:
        at += 1
        kept = Kept(tmp_path / str(at), "ann")
        commit(kept, (), (1, 2))
        with interrupted(at, fail) as taken:
            try:
                commit(kept, (1, 2), (1, 2, 3))
                wanted = new
            except OSError:
                failed, wanted = failed + 1, old
        assert kept.read() == wanted
        assert is_whole(kept, wanted)
        if len(taken) < at:
            break
    assert failed > 5


def test_a_memory_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "ann")
    commit(kept, (), (1, 2))
    file = kept.folder / part_file(f"{2:064x}")
    before = file.stat().st_ino
    commit(kept, (1, 2), (1, 2, 3))
    assert file.stat().st_ino == before


def test_a_file_at_which_nobody_has_looked_is_written_again_when_it_is_made_again(tmp_path: Path) -> None:
    """An older memory was damaged on the disk, and the new one is the same."""
    kept = Kept(tmp_path, "ann")
    commit(kept, (), (1, 2))
    (kept.folder / part_file(f"{1:064x}")).write_bytes(b"damaged")
    commit(kept, (1, 2), (1, 2, 3))
    assert is_whole(kept, state(1, 2, 3)[0])


def test_what_nobody_names_goes(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "ann")
    commit(kept, (), (1, 2))
    (kept.folder / f".{MANIFEST}.writing").write_bytes(b"half")
    (kept.folder / part_file("f" * 64)).write_bytes(b"left by a crash")
    commit(kept, (1, 2), (2,))
    assert {path.name for path in kept.folder.iterdir()} == {MANIFEST, *state(2)[0].files()}


def test_what_two_clients_have_is_on_disk_once(tmp_path: Path) -> None:
    ann, bob = (Kept(tmp_path, client, shared=True) for client in ("ann", "bob"))
    commit(ann, (), (1, 2))
    commit(bob, (), (1,))
    alike = part_file(f"{1:064x}")
    assert (ann.folder / alike).stat().st_ino == (bob.folder / alike).stat().st_ino
    shared = tmp_path / HOME / SHARED
    commit(ann, (1, 2), (3,))
    assert alike in {path.name for path in shared.iterdir()}  # bob has it
    commit(bob, (1,), (3,))
    assert {path.name for path in shared.iterdir()} == set(state(3)[0].files())
    for kept in (ann, bob):
        kept.forget()
    assert list(shared.iterdir()) == []


def test_without_links_each_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    ann, bob = (Kept(tmp_path, client, shared=True) for client in ("ann", "bob"))
    for kept in (ann, bob):
        commit(kept, (), (1, 2))
        assert is_whole(kept, kept.read())


def test_a_damaged_answer_is_not_there_and_written_again_when_it_is_made_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "ann", shared=True)
    commit(kept, (), (1,))
    file = kept.read().entries[0].answer
    data = kept.data(file)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1
        (kept.folder / file).write_bytes(damaged)
        assert kept.answer(file) is None
    assert kept.answer(file) is None  # not there any more
    commit(kept, (1,), (1,))
    assert kept.answer(file) == answer(1)


def test_a_damaged_manifest_is_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(tmp_path, "ann")
    commit(kept, (), (1,))
    (kept.folder / MANIFEST).write_bytes(b"x" + (kept.folder / MANIFEST).read_bytes()[1:])
    assert kept.read() == Manifest()
    assert len(caplog.records) == 1
    assert "damaged" in caplog.text


def test_who_forgets_leaves_nothing(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "ann")
    kept.forget()
    commit(kept, (), (1,))
    kept.forget()
    assert (kept.read(), kept.folder.exists()) == (Manifest(), False)
