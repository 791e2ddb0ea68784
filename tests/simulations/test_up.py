"""`fedtune up`: what it keeps alive, what it uses again, and that two of them do not get into each other's way."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedtune.errors import UserError
from fedtune.job import load_job
from server.following import as_seen_anywhere
from server.journal import Entry, line_of
from server.run_folder import RunFolder
from server.settings import Settings
from simulations import up
from simulations.guard import LOCK, locked

GONE = 2**22 + 1  # no kernel gives such a number


class Ended:
    """Clients of which one has ended with that code."""

    def __init__(self, code: int) -> None:
        self._code = code

    def tend(self) -> list[str]:
        return ["ann"]

    def exit_code(self, name: str) -> int:
        return self._code

    def last_words(self, name: str) -> str:
        return "--data is empty"

    def how_it_ended(self, name: str) -> str:
        return "was killed by SIGKILL (the log: ann.log)"


def test_a_client_that_ends_is_started_again_unless_it_wants_something_to_be_mended() -> None:
    paper = StringIO()
    up._tend(Ended(-9), Console(file=paper))
    assert paper.getvalue() == "client ann was killed by SIGKILL (the log: ann.log); it is started again\n"
    with pytest.raises(UserError, match=r"^ann: --data is empty$"):
        up._tend(Ended(2), Console(file=paper))


def test_what_goes_on_needs_the_folder_that_it_began_in(run_command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = run_command("up", "--resume")
    assert (code, "type the --dir that it was begun with" in said) == (2, True)


@pytest.fixture
def deploy(job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Settings]]:
    """deploy(...): the settings of servers that would have been started; no process is."""
    served = list[Settings]()
    monkeypatch.setattr("server.supervisor.serve", lambda given, console, beside: served.append(given))
    monkeypatch.setattr("fedtune.tending.Tending.keep", lambda self, name, command: None)

    def deploy(**given: bool) -> list[Settings]:
        up.deploy(str(job_file), 2, tmp_path / "place", tmp_path / "run", ["clients.count=2"], **given)
        return served

    return deploy


def test_keys_bundles_and_port_are_used_again(deploy: Callable[..., list[Settings]], tmp_path: Path) -> None:
    deploy()
    files = {path: path.read_bytes() for path in (tmp_path / "place" / "keys").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a deployment already; go on with it: --resume, or name another --dir"):
        deploy()
    first, second = deploy(resume=True)
    assert {path: path.read_bytes() for path in files} == files
    assert first.listens == second.listens
    assert (first.resume, second.resume) == (False, True)


def test_one_that_is_over_is_not_begun_again(deploy: Callable[..., list[Settings]], tmp_path: Path) -> None:
    [began] = deploy()
    run = RunFolder.create(tmp_path / "run", as_seen_anywhere(began.job, 2)).path
    (run / "journal.jsonl").write_bytes(line_of(Entry("ended"), 0.0))
    assert deploy(resume=True) == [began]
    assert load_job(run / "job.toml").clients.names == ("ann", "bob")


def test_two_at_a_time_in_one_folder_are_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match=f"runs in {tmp_path} already .pid {os.getpid()}"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_the_guard_of_one_that_was_killed_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end what the next one starts."""
    (tmp_path / LOCK).write_text(f"{GONE}\n")
    guard = os.open(tmp_path / LOCK, os.O_RDWR)
    fcntl.flock(guard, fcntl.LOCK_EX)
    waited = list[float]()

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            os.close(guard)

    monkeypatch.setattr(time, "sleep", sleep)
    with locked(tmp_path):
        assert len(waited) == 3
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
