"""The ServerApp of one run, as a process of the server: the SuperLink is told that there is a run, and nothing else of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedtune.errors import RoundFailed
from fedtune.job import Job
from fedtune.processes import Processes, tail
from server.flower_control import Control
from server.following import POLL, STATUS_POLL, Progress, ended, submit_bare
from server.foreign import write_config
from server.loglines import CONTROL
from server.report_units import one_line
from server.settings import Settings

CLIENTAPP, SERVERAPP = "client.app:app", "serverapp"
FAR, LONGEST = 1 << 16, 1500  # bytes of the log that are looked at, characters of its last line that are said
FAREWELL = 5.0  # seconds for our process to end once the SuperLink has heard of the end


class Playing:
    def __init__(self, settings: Settings, processes: Processes, control: Control) -> None:
        self._settings, self._processes, self._control = settings, processes, control

    def begin(self, job: Job) -> int:
        """The run's number at Flower."""
        settings, keys = self._settings, self._settings.keys
        run = submit_bare(self._control, settings.folder, CLIENTAPP)
        config = write_config(settings.folder, run, job, settings.run, keys.folder if keys else None)
        self._processes.log(SERVERAPP).unlink(missing_ok=True)
        self._processes.start(SERVERAPP, settings.serverapp(config))
        return run

    def follow(self, run: int, progress: Progress, between: Callable[[], object]) -> None:
        """To its end, which is what our process says. `between` is called at every look; it raises when there is no hope."""
        asked = time.monotonic()
        while (code := self._processes.ended(SERVERAPP)) is None:
            between()
            progress.show()
            if time.monotonic() - asked >= STATUS_POLL:
                asked = time.monotonic()
                if said := ended(self._control, run):
                    self._require_at_end(*said)
            time.sleep(POLL)
        progress.show()
        if code != 0:
            raise RoundFailed(f"the ServerApp ended with exit code {code}; its last words{self._last_words()}{self._left()}")

    def _require_at_end(self, status: str, details: str) -> None:
        """The SuperLink hears of the end first; our process then ends within seconds. If not, somebody else ended the run."""
        deadline = time.monotonic() + FAREWELL
        while self._processes.ended(SERVERAPP) is None:
            if time.monotonic() > deadline:
                said = one_line(f"{status} ({details or 'no reason given'})", 500)
                mend = ", and must be started with `--isolation process`" if self._settings.foreign else ""
                raise RoundFailed(
                    f"the SuperLink says that the run is {said} while it goes on here: it was stopped or executed there{mend}"
                    f"{self._left()}"
                )
            time.sleep(POLL)

    def _left(self) -> str:
        run = self._settings.run
        return f"; finished rounds are in {run}, so a new run needs another --out" if run.is_dir() else ""

    def _last_words(self) -> str:
        """One line, which may hold the reasons of many clients."""
        log = self._processes.log(SERVERAPP)
        last = (tail(log, FAR).strip().splitlines() or [""])[-1]
        return f" in {log}: {one_line(CONTROL.sub('', last), LONGEST)}"
