"""Files that outlive a crash: whole or not there, and on the disk, not only in its cache, before anybody counts on them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

AT_ONCE = 16  # files


def write(path: Path, pieces: Iterable[bytes], *, name: bool = True, content: bool = True) -> None:
    """Who reads `path` sees the old content or the new one, whatever happens meanwhile. Raises OSError, and leaves the old.

    `name`: whether a power cut may not take the new one back either; `content`: nor leave it empty or in parts. A file whose
    loss is noticed and mended needs no such wait.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            if content:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if name:
        sync(path.parent)


def sync(folder: Path) -> None:
    """The names in it: a file that was made, renamed or removed there is so after a power cut too."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_files(files: Iterable[Path]) -> None:
    """Many at once: a disk does them together in the time that it needs for a few."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(_sync_file, files))


def _sync_file(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """A folder with all that lies in it, written by somebody else."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what lies deeper comes first
        if path.is_symlink():
            continue
        _sync_file(path)
    sync(folder)
