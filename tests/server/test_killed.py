"""A run whose processes are killed ends with the bits of one that nobody disturbed. All processes are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedtune.daemon import State
from fedtune.errors import UserError
from fedtune.paths import app_root
from fedtune.processes import started_in, tail
from server.attempts import entries_of
from server.report_folder import read_run
from server.watchers import Quiet
from simulations.engine import simulate

ADAPTER = Path("adapter", "adapter_model.safetensors")
# Steps: time to be killed in the midst of them. Quorum: who was killed is waited for, since without him the bits are others.
SETTINGS = ("train.steps=20", "rounds.count=2", "rounds.quorum=1.0", "machine.threads=1")
LIMIT = 240.0  # seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(580),
    pytest.mark.skipif(not os.environ.get("FEDTUNE_SLOW"), reason="minutes: set FEDTUNE_SLOW to run it"),
]


class Deployed:
    """`fedtune up` as a process, and what it says of itself."""

    def __init__(self, place: Path, run: Path, job: Path) -> None:
        self.place, self.run, self._job = place, run, job
        self.up: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        words = ["up", str(self._job), "--clients", "2", "--dir", str(self.place), "--out", str(self.run), *options]
        settings = [word for key in SETTINGS for word in ("--set", key)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(app_root())}
        with (self.place.parent / "said").open("ab") as said:
            command = [sys.executable, "-m", "fedtune.cli", *words, *settings]
            self.up = subprocess.Popen(command, stdout=said, stderr=said, env=environment)

    @property
    def said(self) -> str:
        return tail(self.place.parent / "said", 20000)

    def kill(self, name: str, besides: int = 0) -> int:
        """A process of the server by its name, another than `besides`."""
        self.until(lambda: self._pid(name) not in (0, besides), f"a {name} to be there")
        pid = self._pid(name)
        os.kill(pid, signal.SIGKILL)
        return pid

    def _pid(self, name: str) -> int:
        try:
            return int(State.read(self.place / "server").processes.get(name, {}).get("pid") or 0)
        except UserError:
            return 0

    def until(self, reached: Callable[[], bool], what: str) -> None:
        assert self.up is not None
        deadline = time.monotonic() + LIMIT
        while not reached():
            assert self.up.poll() is None, f"it ended while {what} was waited for:\n{self.said}"
            assert time.monotonic() < deadline, f"{LIMIT:.0f} s for {what}:\n{self.said}"
            time.sleep(0.02)

    def until_written(self, what: str, times: int = 1, **about: object) -> None:
        """In the journal."""

        def reached() -> bool:
            found = [entry for entry in entries_of(self.run) if entry.what == what]
            return sum(about.items() <= dict(entry.about).items() for entry in found) >= times

        self.until(reached, f"{times} {what} {about} in the journal")

    def end(self) -> int:
        assert self.up is not None
        return self.up.wait(LIMIT)


@pytest.fixture
def deployed(job_file: Path, tmp_path: Path) -> Iterator[Deployed]:
    """In a folder whose path is short enough for sockets. Nothing of it is left."""
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        place = Path(folder, "up")
        deployed = Deployed(place, tmp_path / "run", job_file)
        try:
            yield deployed
        finally:
            if deployed.up is not None:
                deployed.up.kill()
                deployed.up.wait()
        deadline = time.monotonic() + 60
        while left := [found for path in place.iterdir() for found in started_in(path)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.2)


@pytest.fixture(scope="module")
def undisturbed(job_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fedtune.job import load_job

    job = load_job(job_file, [*SETTINGS, "clients.names=['ann', 'bob']", "clients.count=2", "compare=false"])
    return simulate(job, tmp_path_factory.mktemp("undisturbed") / "run", Quiet()).folder


def require_same(deployed: Deployed, undisturbed: Path) -> None:
    assert (deployed.run / ADAPTER).read_bytes() == (undisturbed / ADAPTER).read_bytes()
    assert [record.loss for record in read_run(deployed.run).rounds] == [record.loss for record in read_run(undisturbed).rounds]
    assert [record.answered for record in read_run(deployed.run).rounds] == [2, 2, 2]


def test_serverapp_and_superlink_are_killed_in_a_round(deployed: Deployed, undisturbed: Path) -> None:
    """The ServerApp when one has answered and the other has not, the SuperLink when the next has asked again."""
    deployed.start()
    deployed.until_written("answered", ask="1.0")
    first = deployed.kill("serverapp")
    deployed.until_written("resumed")
    deployed.kill("superlink")
    deployed.until_written("resumed", times=2)
    deployed.kill("serverapp", besides=first)
    assert deployed.end() == 0, deployed.said
    assert deployed.said.count("goes on from round 1") == 3
    require_same(deployed, undisturbed)


def test_a_client_is_killed_and_then_all_that_there_is(deployed: Deployed, undisturbed: Path) -> None:
    """One that is killed is started again by `fedtune up`; where that is killed itself, `--resume` goes on."""
    deployed.start()
    deployed.until_written("asked", ask="1.0")
    os.kill(State.read(deployed.place / "0").pid, signal.SIGKILL)
    deployed.until_written("state", round=1)
    assert "client ann was killed by SIGKILL" in deployed.said
    assert deployed.up is not None
    deployed.up.kill()
    deployed.up.wait()
    deployed.start("--resume")
    assert deployed.end() == 0, deployed.said
    require_same(deployed, undisturbed)

    deployed.start("--resume")
    assert deployed.end() == 0
    assert "has finished already" in deployed.said
