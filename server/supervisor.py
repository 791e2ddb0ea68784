"""`fedtune server`: a SuperLink behind its door, the clients of a job, their run, and what is said of it all on the way.

starting -> waiting (for clients) -> running -> finished | failed | stopped
Everything that is started is ended on every way out. The folder keeps the SuperLink's database, the logs and the last state.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from secrets import token_bytes
from typing import Any

from rich.console import Console

from fedtune.daemon import Said, State
from fedtune.errors import FedtuneError, RoundFailed
from fedtune.job import Job
from fedtune.processes import Processes, end, past_proxies, started_in
from fedtune.security.keyfiles import make_folder, write_private
from fedtune.tending import Tending, ending
from server.enrolment import Anybody, Enrolment, Standing
from server.flower_control import Control, NoSuperLink
from server.following import Progress, as_seen_anywhere, ended
from server.playing import Playing
from server.records import RoundRecord, Watcher
from server.settings import SECRET, Settings
from server.table import LiveTable
from server.tensorboard import TensorBoard
from server.waiting import wait_for, wanted_of
from server.watchers import Quiet, Several

START = 60.0  # seconds for the SuperLink to answer
LOOK = 2.0  # seconds between looks at registry and nodes


def serve(settings: Settings, console: Console, life: type[Server] | None = None) -> None:
    """Up to the end of the run. Raises RoundFailed where it did not complete. `life`: absent is one with its own SuperLink."""
    wanted_of(settings.job, settings.registered())
    make_folder(settings.folder)
    if settings.foreign is None:
        os.environ.update(past_proxies(settings.listens.host))  # here too: what speaks to the SuperLink is in this process
        write_private(settings.folder / SECRET, token_bytes(32))
    secret = settings.secret.read_bytes() if settings.secret else b""
    said = Said(settings.folder, State(role="server", address=str(settings.listens)))
    with said.to_the_end():
        end(started_in(settings.folder))  # what a server that was killed has left
        processes = Processes(settings.folder, logs=settings.folder / "logs")
        with processes, Control(settings.here, settings.ca, secret) as control:
            (life or Server)(settings, processes, control, said, console).run()


class Server:
    """One SuperLink while it is tended, and one run on it."""

    def __init__(self, settings: Settings, processes: Processes, control: Control, said: Said, console: Console) -> None:
        self._settings, self._processes, self._control = settings, processes, control
        self._said, self._console = said, console
        self._tending = Tending(processes)
        self._playing = Playing(settings, processes, control)
        self._enrolment = _enrolment(settings, control)
        self._clients: Mapping[str, Standing] | None = None
        self._looked = float("-inf")
        self._told: set[str] = set()

    def run(self) -> None:
        self._start()
        self._said.say(phase="waiting")
        wanted = wanted_of(self._settings.job, self._settings.registered())
        clients = wait_for(wanted, self.look, self._console, self._settings.patience)
        there = wanted.there(clients)
        self._tell(f"connected: {', '.join(there)}")
        self._play(there)

    def _start(self) -> None:
        self._tending.keep("superlink", self._settings.superlink())
        self._said.say(processes=self._processes_as_json())
        self._processes.until(self._control.answers, f"the SuperLink to answer on {self._settings.here}", START)
        guarded = "TLS, node keys, signed asks" if self._settings.keys else "INSECURE: no TLS, no keys"
        self._tell(f"listening on {self._settings.listens} ({guarded})")
        for run in self._control.unfinished():
            self._control.stop(run)
            self._tell(f"run {run}, left by an earlier server, was stopped at Flower")

    def look(self) -> Mapping[str, Standing] | None:
        """Tends the processes and, now and then, nodes and registry. None while nobody can say who is there."""
        self._tend()
        if time.monotonic() - self._looked < LOOK:
            return self._clients
        self._looked = time.monotonic()
        try:
            self._clients = self._enrolment.step()
        except NoSuperLink:
            self._clients = None
        except FedtuneError as error:  # a file of the registry that cannot be read, a node that has just gone
            self._tell(str(error))
        else:
            for name, problem in self._enrolment.problems.items():
                self._tell(f"{name}: {problem}")
            self._said.say(clients=self._clients)
        return self._clients

    def _tend(self) -> bool:
        """Whether the SuperLink has ended since the last time."""
        fallen = self._tending.tend()
        for name in fallen:
            self._tell(f"{name} {self._tending.how_it_ended(name)}; it is started again", True)
        self._said.say(processes=self._processes_as_json())
        return bool(fallen)

    def _processes_as_json(self) -> Mapping[str, Mapping[str, Any]]:
        once = {name: {"pid": pid, "restarts": 0} for name, pid in self._processes.pids().items()}
        return once | dict(self._tending.as_json())

    def _play(self, clients: list[str]) -> None:
        settings = self._settings
        job = as_seen_anywhere(settings.job, len(clients))
        run = self._playing.begin(job)
        about = {"name": job.name, "folder": str(settings.run), "flower": str(run), "round": 0, "rounds": job.rounds.count}
        self._said.say(phase="running", run=about)
        try:
            with LiveTable(self._console) as table, TensorBoard(settings.run) as events:
                watcher = Several([table, events, Rounds(self._said, table)])
                watcher.started(job, dict.fromkeys(clients, 0))
                progress = Progress(settings.run / "metrics.jsonl", watcher)
                self._playing.follow(run, progress, lambda: self._between(run))
        except BaseException:
            with suppress(FedtuneError):
                self._control.stop(run)
            raise

    def _between(self, run: int) -> None:
        """A run does not outlive its SuperLink, unless it had ended before."""
        if self._tend():
            self._again()
            if ended(self._control, run) is None:
                raise RoundFailed(
                    f"the SuperLink {ending(self._tending.exit_code('superlink') or 0)} in the midst of the run, which was "
                    f"lost with it; finished rounds are in {self._settings.run}, its log is {self._processes.log('superlink')}"
                )
        self.look()

    def _again(self) -> None:
        """Waits for the SuperLink that is started again."""
        deadline = time.monotonic() + START
        while not self._control.answers() and time.monotonic() < deadline:
            self._tend()
            time.sleep(0.2)

    def _tell(self, words: str, again: bool = False) -> None:
        """Each thing once, unless it is told `again`."""
        if again or words not in self._told:
            self._told.add(words)
            self._console.print(words, markup=False, highlight=False, soft_wrap=True)


def _enrolment(settings: Settings, control: Control) -> Enrolment | Anybody:
    if settings.keys is None:
        return Anybody(control)
    return Enrolment(control, settings.keys.registry, alone=settings.foreign is None)


class Rounds(Quiet):
    """Writes the round that was reached into the state, and has the table say how far the run is."""

    def __init__(self, said: Said, table: Watcher) -> None:
        self._said, self._table, self._planned = said, table, 0

    def started(self, job: Job, clients: Mapping[str, int]) -> None:
        self._planned = job.rounds.count
        self._table.doing("rounds", 0, self._planned)

    def round_ended(self, record: RoundRecord) -> None:
        self._said.say(run={**self._said.state.run, "round": record.round})
        self._table.doing("rounds", record.round, self._planned)
