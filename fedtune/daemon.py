"""What a long-lived command says of itself: `state.json` in its folder, which `fedtune status`, `stop` and `doctor` read.

The folder of a server or client:  state.json   logs/<process>.log   home/ (Flower's)   and what each keeps beside them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from fedtune.errors import UserError

Phase = Literal["starting", "waiting", "running", "finished", "failed", "stopped"]
OVER: tuple[Phase, ...] = ("finished", "failed", "stopped")


@dataclass(frozen=True)
class State:
    role: Literal["server", "client"]
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=time.time)  # seconds since the epoch
    phase: Phase = "starting"
    why: str = ""  # it failed, or waits, in one line
    address: str = ""  # where the server listens, or which server the client goes to
    name: str = ""  # of the client
    run: Mapping[str, Any] = field(default_factory=dict)  # name, folder, flower (id), round, rounds
    clients: Mapping[str, str] = field(default_factory=dict)  # name -> connected, missing, revoked
    processes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> pid (None: down), restarts
    guards: Mapping[str, str] = field(default_factory=dict)  # of a client's trainer: name -> on, or why not

    def but(self, **changes: Any) -> State:
        return replace(self, **changes)

    @property
    def alive(self) -> bool:
        """Whether the process that wrote this still runs; another that was given its number later started later."""
        try:
            return self.phase not in OVER and psutil.Process(self.pid).create_time() <= self.started + 1
        except psutil.Error:
            return False

    def write(self, folder: Path) -> None:
        """Atomic: who reads sees the old one or the new one. Raises UserError where the disk will not have it."""
        temporary = folder / ".state.json.writing"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
            os.replace(temporary, folder / "state.json")
        except OSError as error:
            raise UserError(
                f"{folder / 'state.json'} cannot be written: {error.strerror}; free it, or name another --dir"
            ) from error

    @classmethod
    def read(cls, folder: Path) -> State:
        """Raises UserError where nothing was started."""
        try:
            return cls(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise UserError(
                f"nothing of fedtune runs in {folder}; wanted the --dir of a `fedtune server` or `fedtune client`"
            ) from error
        except PermissionError as error:
            raise closed(folder) from error
        except (ValueError, TypeError, OSError) as error:
            raise UserError(f"{folder / 'state.json'} cannot be read: {error}") from error


class Said:
    """The state in its folder while it lives: written whenever it changes."""

    def __init__(self, folder: Path, state: State) -> None:
        self._folder, self.state = folder, state
        state.write(folder)
        self._inode = _inode(folder)

    def still_there(self) -> bool:
        """Whether the folder is the one that it was: not removed meanwhile, nor another in its place."""
        return _inode(self._folder) == self._inode

    def say(self, **changes: Any) -> None:
        state = self.state.but(**changes)
        if state != self.state:
            self.state = state
            state.write(self._folder)

    @contextmanager
    def to_the_end(self, well: Phase = "finished") -> Iterator[None]:
        """Around everything that is started: the last phase is said when all of it has ended."""
        try:
            yield
        except KeyboardInterrupt as stop:
            self._over(phase="stopped", why=str(stop) or "Ctrl-C")
            raise
        except BaseException as error:
            self._over(phase="failed", why=" ".join(str(error).split()) or type(error).__name__)
            raise
        self._over(phase=well, why="")

    def _over(self, **changes: Any) -> None:
        nothing = {name: {**process, "pid": None} for name, process in self.state.processes.items()}
        if self.still_there():
            self.say(processes=nothing, **changes)


def _inode(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def closed(folder: Path) -> UserError:
    """What to say to another user than the one that runs it."""
    try:
        owner = f"of {folder.owner()}, for that user"
    except (OSError, KeyError):  # a folder above is closed too; a user without a name
        owner = "of another user, for its owner"
    return UserError(f"{folder} may not be read: it is {owner} alone; type the same as that user (sudo -u NAME fedtune …)")
