"""The guard of `fedtune up`: a process that waits for its end, however it comes, and ends all that was started in its folder.

python -m simulations.guard FOLDER [--remove]
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from fedtune.errors import UserError
from fedtune.paths import app_root
from fedtune.processes import end, started_in

REMOVE, LOCK = "--remove", "up.lock"
FAREWELL = 20.0  # seconds for a client to end its own processes
CLEANING = 60.0  # seconds for the guard of one that was killed
POLL = 0.2  # seconds


@contextmanager
def guarded(place: Path, *options: str) -> Iterator[None]:
    """What is started in `place` ends also where we are killed. Raises UserError where it is somebody else's."""
    command = [sys.executable, "-m", "simulations.guard", str(place), *options]
    environment = os.environ | {"PYTHONPATH": str(app_root())}
    with locked(place) as lock:
        clean_up(place, remove=False)  # of one that was killed together with its guard
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True, pass_fds=[lock]):
            yield  # its input ends with us; otherwise when this block is left


@contextmanager
def locked(place: Path) -> Iterator[int]:
    """For us and our guard, who has it after us: it ends what it finds here, be it of the next one."""
    file, deadline = os.open(place / LOCK, os.O_RDWR | os.O_CREAT, 0o600), time.monotonic() + CLEANING
    try:
        while not _taken(file):
            owner = os.pread(file, 20, 0).decode(errors="replace").strip()
            if (owner.isdigit() and psutil.pid_exists(int(owner))) or time.monotonic() > deadline:
                raise UserError(f"a `fedtune up` runs in {place} already (pid {owner}): end it, or name another --dir")
            time.sleep(POLL)
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield file
    finally:
        os.close(file)


def _taken(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def clean_up(place: Path, remove: bool) -> None:
    """The clients end what they have started; then what is left is ended: a server's processes, those of a killed client."""
    end(started_in(place / "clients"), FAREWELL)
    for folder in place.iterdir() if place.is_dir() else ():
        end(started_in(folder))
    if remove:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.read()
    clean_up(Path(sys.argv[1]), REMOVE in sys.argv[2:])
