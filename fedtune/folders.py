"""Folders that are written whole, and folders that must be usable before anything begins."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune import durable
from fedtune.errors import KeysError, UserError
from fedtune.security.keyfiles import make_folder


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` at the end; a failure leaves the old one or none."""
    temporary, old = (folder.with_name(f".{folder.name}.{word}") for word in ("writing", "old"))
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        durable.sync_tree(temporary)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        durable.sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def require_folder(folder: Path) -> None:
    """Makes it, for its owner alone, where there is none. Raises UserError where nothing could be written into it."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"--dir {folder} is no folder; wanted one, or a path where nothing is yet")
    try:
        make_folder(folder)
    except KeysError as error:
        raise UserError(f"{error}; or name another folder with --dir") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--dir {folder} cannot be written; name another, or make it yours: sudo chown -R $USER {folder}")
