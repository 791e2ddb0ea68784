"""A file that somebody else writes line by line: what was added since the last look."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path


class Growing:
    """`new()` gives each whole line once. A file that has become shorter has begun anew."""

    def __init__(self, file: Path, read: int = 0, longest: int = sys.maxsize) -> None:
        """`read`: bytes that are old; `longest`: bytes after which a line is cut, so that no writer fills the memory."""
        self._file, self._read, self._longest = file, read, longest

    def new(self) -> Iterator[bytes]:
        if not self._file.is_file():
            return
        if self._file.stat().st_size < self._read:
            self._read = 0
        with self._file.open("rb") as file:
            file.seek(self._read)
            while line := file.readline(self._longest):
                if not line.endswith(b"\n") and len(line) < self._longest:
                    return  # still being written
                self._read += len(line)
                yield line
