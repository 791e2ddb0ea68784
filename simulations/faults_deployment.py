"""A server and its clients on this machine, each with all its processes, over TLS with keys: started, looked at, killed.

What would start a service again does so here: `fedtune server --resume` and `fedtune client` come back when they are gone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from fedtune.daemon import State
from fedtune.errors import UserError
from fedtune.processes import Processes, end, free_port, started_in, tail
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle
from server.journal import Entry, entry_of
from server.run_folder import JOURNAL
from simulations.faults_job import Place
from simulations.faults_proxy import Proxy

SERVER, SUPERVISOR = "server", "supervisor"
OF_SERVER = ("superlink", "serverapp", SUPERVISOR)
OF_CLIENT = ("supernode", "relay", "trainer", SUPERVISOR)
CLOCK = "FEDTUNE_FAULTS_CLOCK"  # variable that names the file of simulations/faulty_clock
HOST = "127.0.0.1"


class Deployment:
    """Where it is `cuttable`, each client goes to the server through a proxy of its own. Leaving the `with` ends all that was
    started."""

    def __init__(
        self, place: Place, folder: Path, clients: Sequence[str], settings: Sequence[str] = (), cuttable: bool = False
    ) -> None:
        self.clients, self.folder, self.clock = list(clients), folder, folder / "clock"
        self._place, self._stack, self._cuttable, self.run = place, ExitStack(), cuttable, folder
        self._settings = [word for key in (*settings, f"clients.names={self.clients}") for word in ("--set", key)]
        self.proxies: dict[str, Proxy] = {}

    def __enter__(self) -> Self:
        self.keys = CoordinatorKeys.init(self.folder / "keys", [], f"{HOST}:{free_port(HOST)}")
        self.set_clock(0.0)
        path = Path(__file__).parent / "faulty_clock"
        environment = {"OMP_NUM_THREADS": "1", CLOCK: str(self.clock), "PYTHONPATH": _before(path)}
        with ExitStack() as stack:
            stack.callback(self._end_all)
            self._processes = stack.enter_context(Processes(self.folder, environment, logs=self.folder / "logs"))
            for client in self.clients:
                make_bundle(self.keys, client)
                if self._cuttable:
                    self.proxies[client] = stack.enter_context(Proxy(HOST, self._port))
                self.start(client)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def _port(self) -> int:
        return int(self.keys.address.rpartition(":")[2])

    def begin(self, run: Path) -> None:
        """A server for the run in that folder, which goes on if it is there."""
        self.run = run
        self.start(SERVER)

    def start(self, owner: str) -> None:
        self._processes.start(owner, self.command(owner))

    def command(self, owner: str) -> list[str]:
        words = [sys.executable, "-m", "fedtune.cli"]
        if owner == SERVER:
            listens = ["--host", HOST, "--port", str(self._port), "--keys", str(self.keys.folder)]
            where = ["--dir", str(self.folder / SERVER), "--out", str(self.run), "--resume"]
            return [*words, "server", str(self._place.job_file), *listens, *where, *self._settings]
        own = ["--model", str(self._place.model), "--data", str(self._place.data)]
        through = ["--server", f"{HOST}:{self.proxies[owner].port}"] if self._cuttable else []
        where = ["--bundle", str(self.keys.bundle(owner)), "--dir", str(self.folder / owner)]
        return [*words, "client", *where, *through, *own]

    def ended(self, owner: str) -> int | None:
        return self._processes.ended(owner)

    def said(self, owner: str, last: int = 2000) -> str:
        return tail(self._processes.log(owner), last)

    def send(self, owner: str, process: str, number: int = signal.SIGKILL) -> psutil.Process | None:
        """The signal, to that process of server or client. None where it does not run just now."""
        try:
            found = psutil.Process(self._pid(owner, process))
            if not _lives(found):
                return None
            found.send_signal(number)
        except (psutil.Error, ValueError):
            return None
        return found

    def kill_server(self) -> bool:
        """All that it has; they are gone when this returns. False where one of them was down."""
        killed = [self.send(SERVER, process) for process in reversed(OF_SERVER)]
        while any(process and _lives(process) for process in killed):
            time.sleep(0.01)
        return all(killed)

    def answers_of_clients(self) -> list[Path]:
        """That they keep, to give them again."""
        return [file for client in self.clients for file in sorted((self.folder / client).rglob("*.answer"))]

    def cut(self, client: str) -> bool:
        """Its network, for those who talk."""
        self.proxies[client].break_off()
        return True

    def silence(self, client: str) -> bool:
        self.proxies[client].fall_silent()
        return True

    def heal(self, client: str) -> None:
        self.proxies[client].heal()

    def set_clock(self, seconds: float) -> bool:
        """The coordinator's, wrong by that much."""
        self.clock.write_text(str(seconds))
        return True

    @property
    def environment(self) -> Mapping[str, str]:
        return self._processes.environment

    def _pid(self, owner: str, process: str) -> int:
        """-1 of one that is down, which no process has."""
        if process == SUPERVISOR:
            return self._processes.pids().get(owner, -1)
        with suppress(UserError):
            pid = State.read(self.folder / owner).processes.get(process, {}).get("pid") or -1
            if any(pid == found.pid for found in started_in(self.folder / owner)):
                return int(pid)
        return -1

    def left(self) -> list[psutil.Process]:
        """Processes of it that still run."""
        return [found for own in ("", SERVER, *self.clients) for found in started_in(self.folder / own)]

    def _end_all(self) -> None:
        for own in (SERVER, *self.clients):
            end(started_in(self.folder / own))


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Following:
    """The lines of a journal as they come, also where a torn one is cut off."""

    def __init__(self, run: Path) -> None:
        self._file, self._read = run / JOURNAL, 0

    def new(self) -> Iterator[Entry]:
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            self._read = min(self._read, os.fstat(file.fileno()).st_size)
            file.seek(self._read)
            for line in file:
                if (entry := entry_of(line)) is None:
                    return
                self._read += len(line)
                yield entry


def _before(path: Path) -> str:
    """In front of what PYTHONPATH has; the app's root comes with it."""
    from fedtune.paths import app_root

    return os.pathsep.join(filter(None, [str(path), str(app_root()), os.environ.get("PYTHONPATH")]))
