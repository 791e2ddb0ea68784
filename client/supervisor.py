"""`fedtune client`: starts trainer, SuperNode and relay, keeps them running, and says how the client stands.

It never ends by itself: a server that is not there yet, is started again or moves is waited for.
"""

from __future__ import annotations

import threading
from secrets import token_bytes

import psutil

from client.connection import Connection
from client.halves import SECRET, Planned, processes, server_of
from client.handed import Handed
from client.said import Line, Say, Told
from client.settings import Settings
from client.told import ANSWERS, LINK, Follow
from fedtune.daemon import State
from fedtune.errors import FedtuneError, UserError
from fedtune.processes import Processes, end, free_port, past_proxies, started_in
from fedtune.security.keyfiles import make_folder, write_private
from fedtune.tending import Tending

LOOK = 0.5  # seconds
TO_MEND = 2  # exit code of ours: the user has to mend something, so starting again does not help
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # the trainer has no network: a library that tried would wait for it


def serve(settings: Settings, say: Say, stop: threading.Event) -> None:
    """Until `stop` is set. Raises UserError where one of the processes says that the user has to mend something."""
    handed = Handed(settings)
    make_folder(settings.folder)
    told = Told(settings.folder, State("client", name=settings.name, address=server_of(settings, handed.bundle)), say)
    with told.to_the_end(well="stopped"):
        end(started_in(settings.folder))  # what a client that was killed has left
        with Processes(settings.folder, OFFLINE | past_proxies(), logs=settings.folder / "logs") as started:
            client = Client(settings, handed, started, told)
            while not stop.wait(LOOK):
                client.step()


class Client:
    """All its processes run when it is made; `step()` twice a second keeps them running."""

    def __init__(self, settings: Settings, handed: Handed, started: Processes, told: Told) -> None:
        self._settings, self._handed, self._started, self._told = settings, handed, started, told
        self._tending, self._line = Tending(started), Line(told)
        self._running: dict[str, Planned] = {}
        self._answers = Follow(settings.folder / ANSWERS)
        self._port = free_port() if settings.network else 0
        if settings.network:
            (settings.folder / LINK).unlink(missing_ok=True)
            write_private(settings.folder / SECRET, token_bytes(32))
        self._begin()

    def step(self) -> None:
        self._require_folder()
        self._tend()
        if self._handed.changed():
            self._take_up()
        for answer in self._answers.new():
            self._told.answered(answer)
        if self._settings.network:
            up = self._started.ended("supernode") is None
            self._line.now(self._connection.why(up), self._connection.server, self._connection.gone)
        else:
            self._told.say(phase="running" if self._settings.socket.is_socket() else "starting")
        self._told.guards()
        self._told.say(processes=self._tending.as_json())

    def _require_folder(self) -> None:
        """Raises FedtuneError: what tells an old ask that comes again from a new one has gone with it."""
        if not self._told.still_there():
            raise FedtuneError(
                f"{self._settings.folder} was removed or replaced while this client ran, and with it what the client "
                f"remembers against old asks; start it again if that was meant"
            )

    def _begin(self) -> None:
        """Starts what does not run, or has read something of the bundle that is another now."""
        bundle = self._handed.bundle
        for name, plan in processes(self._settings, bundle, self._port).items():
            if plan == self._running.get(name):
                continue
            if name in self._running:
                self._told.tell(f"{name} is started again: the bundle has changed")
                self._end(name)
            self._tending.keep(name, plan.command)
            self._running[name] = plan
            if name == "supernode":
                self._connection = Connection(
                    server_of(self._settings, bundle), bundle and bundle.ca, self._settings.folder / LINK
                )

    def _take_up(self) -> None:
        if self._handed.problem:
            self._told.tell(f"the bundle has changed, and the old one is used: {self._handed.problem}")
        else:
            self._begin()

    def _end(self, name: str) -> None:
        if pid := self._started.pids().get(name):
            end([psutil.Process(pid)])
        self._started.ended(name)

    def _tend(self) -> None:
        for name in self._tending.tend():
            if self._tending.exit_code(name) == TO_MEND:
                raise UserError(f"{name}: {self._tending.last_words(name)} (the log: {self._started.log(name)})")
            self._told.tell(f"{name} {self._tending.how_it_ended(name)}; it is started again")
