"""One coordinator for each run folder: a second one is refused, and a killed one leaves nothing in the way."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.errors import RunFolderError

NAME = "lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Raises RunFolderError where another process has it. The kernel lets go of it when this process ends, however it does."""
    try:
        file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFolderError(
            f"{folder / NAME} cannot be opened ({error.strerror}): the run must lie where this user may write"
        ) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(file, 20, 0).decode(errors="replace").strip() or "unknown"
            raise RunFolderError(
                f"another process (pid {owner}) works on the run in {folder}: wait for it, stop it, or name another --out"
            ) from error
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(file)
