"""The ServerApp of one run, as a process of the server: the SuperLink is told that there is a run, and nothing else of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from fedtune.errors import FedtuneError, RoundFailed, UserError
from fedtune.job import Job
from fedtune.logs import as_text
from fedtune.processes import Processes, end, tail
from fedtune.tending import PREFIX, ending
from server.attempts import resumable
from server.flower_control import Control
from server.following import POLL, STATUS_POLL, ended, submit_bare
from server.foreign import write_config
from server.report_units import one_line
from server.settings import Settings

CLIENTAPP, SERVERAPP = "client.app:app", "serverapp"
DONE, FAILED, TO_MEND = 0, 1, 2  # exit codes of server/serverapp.py; with any other it says nothing of the run
FAR, LONGEST = 1 << 16, 1500  # bytes of the log that are looked at, characters of its last line that are said
FAREWELL = 5.0  # seconds for our process to end once the SuperLink has heard of the end


class Crashed(FedtuneError):
    """The ServerApp or its SuperLink ended, and not because of the run, which can go on. The message says how."""


class Playing:
    def __init__(self, settings: Settings, processes: Processes, control: Control) -> None:
        self._settings, self._processes, self._control = settings, processes, control
        self._written = 0  # bytes of the log that are of processes before this one

    def begin(self, job: Job, resume: bool = False) -> int:
        """The run's number at Flower. `resume`: what is in the run folder is gone on with."""
        settings, keys, log = self._settings, self._settings.keys, self._processes.log(SERVERAPP)
        run = submit_bare(self._control, settings.folder, CLIENTAPP)
        config = write_config(settings.folder, run, job, settings.run, keys.folder if keys else None, resume)
        if not resume:
            log.unlink(missing_ok=True)
        self._written = log.stat().st_size if log.exists() else 0
        self._processes.start(SERVERAPP, settings.serverapp(config))
        return run

    def follow(self, run: int, show: Callable[[], object], between: Callable[[], object]) -> None:
        """To its end, which is what our process says. `show` and `between` are called at every look; `between` raises when
        there is no hope. Raises Crashed where the run can go on, RoundFailed or UserError where it cannot."""
        asked = time.monotonic()
        while (code := self._processes.ended(SERVERAPP)) is None:
            between()
            show()
            if time.monotonic() - asked >= STATUS_POLL:
                asked = time.monotonic()
                if said := ended(self._control, run):
                    self._require_at_end(*said)
            time.sleep(POLL)
        show()
        if code != DONE:
            raise self._reason(code)

    def leave(self, run: int) -> None:
        """Nothing of it goes on, here or at Flower."""
        with suppress(FedtuneError):
            self._control.stop(run)
        if pid := self._processes.pids().get(SERVERAPP):
            end([psutil.Process(pid)])
            self._processes.ended(SERVERAPP)

    def _require_at_end(self, status: str, details: str) -> None:
        """The SuperLink hears of the end first; our process then ends within seconds. If not, somebody else ended the run."""
        deadline = time.monotonic() + FAREWELL
        while self._processes.ended(SERVERAPP) is None:
            if time.monotonic() > deadline:
                said = one_line(f"{status} ({details or 'no reason given'})", 500)
                mend = ", and must be started with `--isolation process`" if self._settings.foreign else ""
                raise Crashed(
                    f"the SuperLink says that the run is {said} while it goes on here: it was stopped or executed there{mend}"
                )
            time.sleep(POLL)

    def _reason(self, code: int) -> FedtuneError:
        words, log = self._last_words(), self._processes.log(SERVERAPP)
        if code == TO_MEND:
            return UserError(f"{words or 'the ServerApp wants something to be mended'} (the log: {log})")
        if code == FAILED:
            last = f"its last words in {log}: {words}"
            return RoundFailed(f"the ServerApp ended with exit code 1; {last}{resumable(self._settings.run)}")
        return Crashed(f"the ServerApp {ending(code)}" + (f": {words}" if words and code > 0 else ""))

    def _last_words(self) -> str:
        """One line, which may hold the reasons of many clients; empty where it wrote nothing."""
        log = self._processes.log(SERVERAPP)
        own = log.stat().st_size - self._written if log.exists() else 0
        lines = tail(log, min(FAR, max(own, 0))).strip().splitlines()
        return PREFIX.sub("", one_line(as_text(lines[-1]), LONGEST)) if lines else ""
