"""`fedtune server --superlink`: a server at a SuperLink that somebody else runs.

No SuperLink is started; runs and nodes of others there are left alone.
"""

from __future__ import annotations

import time

from fedtune.errors import RoundFailed
from fedtune.security.probe import probe
from server.foreign import Foreign, earlier_run
from server.supervisor import POLL, START, Server


class Guest(Server):
    def _start(self) -> None:
        self._reach()
        sealed = self._settings.job.security.end_to_end
        self._tell(
            f"at the SuperLink {self._foreign.at} (TLS, node keys, signed asks, {'sealed' if sealed else 'OPEN'} answers)"
        )
        if not sealed:
            self._tell("security.end_to_end = false: whoever runs that SuperLink can read every answer")
        for earlier in self._stop_what_is_left():
            self._tell(f"run {earlier}, left by an earlier server, was stopped at Flower")

    def _stop_what_is_left(self) -> list[int]:
        """Runs of others are let alone."""
        earlier = earlier_run(self._settings.folder)
        if earlier is None or earlier not in self._control.unfinished():
            return []
        self._control.stop(earlier)
        return [earlier]

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

    def _again(self) -> bool:
        """Who runs it starts it again, however long that takes."""
        while not self._control.answers():
            why = f"the SuperLink {self._foreign.at} does not answer; the run goes on when it does"
            self._tell(why)
            self._said.say(why=why)
            self._tend()
            time.sleep(POLL)
        return True

    def _tend(self) -> None:
        """There is nothing that would be started again."""
        self._beside()
        self._said.say(processes=self._processes_as_json())
