"""`fedtune server`: a SuperLink behind its door, the clients of a job, their run, and what is said of it all on the way.

starting -> waiting (for clients) -> running -> finished | failed | stopped
Everything that is started is ended on every way out. The folder keeps the SuperLink's database, the logs and the last state.
A ServerApp or SuperLink that ends before the run does is started again, and the run goes on where its journal says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from secrets import token_bytes
from typing import Any

from rich.console import Console

from fedtune.daemon import Said, State
from fedtune.errors import FedtuneError, RoundFailed, UserError
from fedtune.job import Job
from fedtune.processes import Processes, end, past_proxies, started_in
from fedtune.security.keyfiles import make_folder, write_private
from fedtune.tending import Tending, ending
from server.attempts import Attempts
from server.enrolment import Anybody, Enrolment, Standing
from server.flower_control import Control, NoSuperLink
from server.following import as_seen_anywhere, ended
from server.playing import SERVERAPP, Crashed, Playing
from server.run_folder import holds_run
from server.settings import SECRET, Settings
from server.showing import Showing, shown
from server.waiting import wait_for

START = 60.0  # seconds for the SuperLink to answer
LOOK = 2.0  # seconds between looks at registry and nodes
POLL = 0.2  # seconds
VERDICTS = (RoundFailed, UserError)  # of a run: to start it again would only repeat them


def serve(
    settings: Settings, console: Console, life: type[Server] | None = None, beside: Callable[[], object] = lambda: None
) -> None:
    """Up to the end of the run. Raises RoundFailed where it did not complete. `life`: absent is one with its own SuperLink;
    `beside` is called now and then, for what is kept alive beside it."""
    settings.wanted()
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
            (life or Server)(settings, processes, control, said, console, beside).run()


class Server:
    """One SuperLink while it is tended, and one run on it."""

    def __init__(
        self,
        settings: Settings,
        processes: Processes,
        control: Control,
        said: Said,
        console: Console,
        beside: Callable[[], object] = lambda: None,
    ) -> None:
        self._settings, self._processes, self._control = settings, processes, control
        self._said, self._console, self._beside = said, console, beside
        self._tending = Tending(processes)
        self._playing = Playing(settings, processes, control)
        self._enrolment = _enrolment(settings, control)
        self._attempts = Attempts(settings.run, settings.job.rounds.count)
        self._clients: Mapping[str, Standing] | None = None
        self._looked = float("-inf")
        self._falls = 0  # of the SuperLink
        self._told: set[str] = set()

    def run(self) -> None:
        self._start()
        self._said.say(phase="waiting")
        wanted = self._settings.wanted()
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
        for run in self._stop_what_is_left():
            self._tell(f"run {run}, left by an earlier server, was stopped at Flower")

    def _stop_what_is_left(self) -> list[int]:
        """Runs of ours at Flower that nobody plays any more."""
        left = self._control.unfinished()
        for run in left:
            self._control.stop(run)
        return left

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

    def _tend(self) -> None:
        self._beside()
        for name in self._tending.tend():
            self._falls += 1
            self._tell(f"{name} {self._tending.how_it_ended(name)}; it is started again", True)
        self._said.say(processes=self._processes_as_json())

    def _processes_as_json(self) -> Mapping[str, Mapping[str, Any]]:
        restarts = {SERVERAPP: self._attempts.all}
        once = {name: {"pid": pid, "restarts": restarts.get(name, 0)} for name, pid in self._processes.pids().items()}
        return once | dict(self._tending.as_json())

    def _play(self, clients: list[str]) -> None:
        settings, run = self._settings, self._settings.run
        goes_on = settings.resume and holds_run(run)
        if settings.resume and not goes_on:
            self._tell(f"no run in {run}: it begins")
        job = settings.job if goes_on else as_seen_anywhere(settings.job, len(clients))
        about = {"name": job.name, "folder": str(run), "flower": "", "round": 0, "rounds": job.rounds.count}
        self._said.say(phase="running", run=about)
        with shown(run, job, clients, self._said, self._console, self._tell) as showing:
            self._to_the_end(job, showing)

    def _to_the_end(self, job: Job, showing: Showing) -> None:
        """Raises RoundFailed or UserError where the run itself came to an end that is none."""
        attempts, resume = self._attempts, self._settings.resume
        while True:
            try:
                if attempts.all:
                    self._come_back()
                return self._attempt(job, resume, showing)
            except VERDICTS:
                raise
            except FedtuneError as crash:
                wait, resume = attempts.after(crash), True
                showing.crashed(f"{crash}; {attempts.going_on}")
            self._pause(wait)

    def _attempt(self, job: Job, resume: bool, showing: Showing) -> None:
        falls, run = self._falls, self._playing.begin(job, resume)
        self._said.say(run={**self._said.state.run, "flower": str(run)})
        try:
            self._playing.follow(run, showing.look, lambda: self._between(run, falls))
        except BaseException:
            self._playing.leave(run)
            raise

    def _between(self, run: int, falls: int) -> None:
        """No ServerApp outlives its SuperLink, which has forgotten what is on its way. Unless the run had ended before."""
        self.look()
        if self._falls > falls:
            self._again()
            if ended(self._control, run) is None:
                raise Crashed(f"the SuperLink {ending(self._tending.exit_code('superlink') or 0)}")

    def _come_back(self) -> None:
        """To the SuperLink, with nothing of the attempt before. Raises Crashed where it is not there."""
        if not self._again():
            raise Crashed(f"the SuperLink on {self._settings.here} does not answer")
        self._stop_what_is_left()

    def _again(self) -> bool:
        """Waits for the SuperLink that is started again."""
        deadline = time.monotonic() + START
        while not (answers := self._control.answers()) and time.monotonic() < deadline:
            self._tend()
            time.sleep(POLL)
        return answers

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.look()
            time.sleep(POLL)

    def _tell(self, words: str, again: bool = False) -> None:
        """Each thing once, unless it is told `again`."""
        if again or words not in self._told:
            self._told.add(words)
            self._console.print(words, markup=False, highlight=False, soft_wrap=True)


def _enrolment(settings: Settings, control: Control) -> Enrolment | Anybody:
    if settings.keys is None:
        return Anybody(control)
    return Enrolment(control, settings.keys.registry, alone=settings.foreign is None)
