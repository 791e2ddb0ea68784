"""`fedtune server --superlink`: a server at a SuperLink that somebody else runs.

No SuperLink is started; runs and nodes of others there are left alone; the ServerApp, which has the keys, is a process of ours;
and how a run ended is what that process says.
"""

from __future__ import annotations

import time

from fedtune.errors import RoundFailed
from fedtune.job import Job
from fedtune.security.probe import probe
from server.following import POLL, STATUS_POLL, Progress, ended, submit_bare
from server.foreign import Foreign, earlier_run, write_config
from server.loglines import last_lines
from server.report_units import one_line
from server.supervisor import CLIENTAPP, FAREWELL, START, Server

SERVERAPP = "serverapp"


class Guest(Server):
    def _start(self) -> None:
        self._reach()
        sealed = self._settings.job.security.end_to_end
        self._tell(
            f"at the SuperLink {self._foreign.at} (TLS, node keys, signed asks, {'sealed' if sealed else 'OPEN'} answers)"
        )
        if not sealed:
            self._tell("security.end_to_end = false: whoever runs that SuperLink can read every answer")
        earlier = earlier_run(self._settings.folder)
        if earlier is not None and earlier in self._control.unfinished():
            self._control.stop(earlier)
            self._tell(f"run {earlier}, left by an earlier server, was stopped at Flower")

    @property
    def _foreign(self) -> Foreign:
        assert self._settings.foreign is not None
        return self._settings.foreign

    def _reach(self) -> None:
        """Raises RoundFailed with what keeps us from it, after a while."""
        deadline = time.monotonic() + START
        while not self._control.answers():
            found = probe(str(self._foreign.at), self._foreign.ca)
            if time.monotonic() > deadline or (found.reachable and found.problem):
                raise RoundFailed(f"--superlink {self._foreign.at}: {found.problem or 'it does not answer'}")
            time.sleep(1.0)

    def _tend(self) -> bool:
        pids = self._processes.pids()
        self._said.say(processes={name: {"pid": pid, "restarts": 0} for name, pid in pids.items()})
        return False

    def _submit(self, job: Job) -> int:
        settings, keys = self._settings, self._settings.keys
        assert keys is not None, "a SuperLink of somebody else is gone to with keys alone"
        run = submit_bare(self._control, settings.folder, CLIENTAPP)
        config = write_config(settings.folder, run, job, settings.run, keys.folder)
        self._processes.log(SERVERAPP).unlink(missing_ok=True)
        self._processes.start(SERVERAPP, self._foreign.serverapp(config))
        return run

    def _follow(self, run: int, progress: Progress) -> None:
        asked = time.monotonic()
        while (code := self._processes.ended(SERVERAPP)) is None:
            self.look()
            progress.show()
            if time.monotonic() - asked >= STATUS_POLL:
                asked = time.monotonic()
                if said := ended(self._control, run):
                    self._require_at_end(*said)
            time.sleep(POLL)
        progress.show()
        if code != 0:
            raise RoundFailed(f"the ServerApp ended with exit code {code}; its last words{self._last_words()}")

    def _require_at_end(self, status: str, details: str) -> None:
        """The SuperLink hears of the end first; our process then ends within seconds. If not, somebody else ended the run."""
        deadline = time.monotonic() + FAREWELL
        while self._processes.ended(SERVERAPP) is None:
            if time.monotonic() > deadline:
                said = one_line(f"{status} ({details or 'no reason given'})", 500)
                raise RoundFailed(
                    f"the SuperLink says that the run is {said} while it goes on here: it was stopped or executed there, "
                    "and must be started with `--isolation process`"
                )
            time.sleep(POLL)

    def _last_words(self) -> str:
        log = self._processes.log(SERVERAPP)
        return f" in {log}: {' '.join(last_lines(log, 1))}"
