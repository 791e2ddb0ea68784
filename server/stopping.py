"""`fedtune stop`: asks the process that holds a folder to end, waits until it is gone, and ends what a killed one has left."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from fedtune.daemon import State
from fedtune.errors import FedtuneError
from fedtune.processes import end, started_in
from server.attempts import resumable
from server.standing import GONE, Standing

POLL = 0.1  # seconds
PATIENCE = 60.0  # seconds: the run is stopped at Flower, and every process ends


@dataclass(frozen=True)
class Stop:
    role: str
    pid: int
    stopped: bool  # it was alive, and is no longer
    left: int  # processes that one before it had left, ended now
    phase: str  # that it said last; gone: it was killed
    run: str = ""  # the folder of a server's run that can go on

    @property
    def words(self) -> str:
        first = f"the {self.role} (pid {self.pid}) is stopped" if self.stopped else f"no {self.role} runs here ({self.phase})"
        first += f"; processes that it had left, ended now: {self.left}" if self.left else ""
        return first + (resumable(Path(self.run), "its command") if self.run else "")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def stop_in(folder: Path, patience: float = PATIENCE) -> Stop:
    """Raises UserError where nothing was started, FedtuneError where it does not end."""
    folder = folder.absolute()
    state = State.read(folder)
    alive = state.alive
    if alive:
        _end(state, patience)
    left = started_in(folder)
    end(left)
    last = Standing.read(folder)
    if last.phase == GONE:
        _say_its_last(folder, last.state)
    run = "" if last.phase == "finished" else str(last.state.run.get("folder", ""))
    return Stop(state.role, state.pid, alive, len(left), last.phase, run if state.role == "server" else "")


def _say_its_last(folder: Path, state: State) -> None:
    """For one that could not; by its own user alone, who could otherwise not write the file any more."""
    if folder.stat().st_uid == os.geteuid():
        down = {name: {**process, "pid": None} for name, process in state.processes.items()}
        why = "it ended without a last word: it was killed, or this machine was restarted"
        state.but(phase="failed", why=why, processes=down).write(folder)


def _end(state: State, patience: float) -> None:
    deadline = time.monotonic() + patience
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(state.pid)
        process.send_signal(signal.SIGTERM)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:  # ended, and its parent has not looked yet
            if time.monotonic() > deadline:
                raise FedtuneError(
                    f"the {state.role} (pid {state.pid}) still runs {patience:.0f} s after SIGTERM; type `kill -9 {state.pid}` "
                    "and the same command again, which ends what it has started"
                )
            time.sleep(POLL)
