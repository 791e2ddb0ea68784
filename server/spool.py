"""Answers on disk, one file each, until the round is folded: memory does not grow with the cohort.

They are folded in the order of client ids, whatever order they came in, so the same answers give the same bits.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from fedtune.envelope import Envelope
from fedtune.folding import FoldedAnswers
from fedtune.strategy import Answer, Fold


class Spool:
    """The accepted answers to one ask."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # made with the first answer

    def put(self, client: str, envelope: Envelope) -> None:
        """Atomic: either the whole answer lies in the spool or none of it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(client)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.writelines(envelope.pieces())
        os.replace(temporary, path)

    def get(self, client: str) -> Envelope:
        with self._path(client).open("rb") as file:
            return Envelope.read(file)

    def clear(self) -> None:
        """All of it, also where Ctrl-C comes in the middle."""
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, client: str) -> Path:
        """Named by a hash: a client's own name may be longer than a file's, or lead out of the folder."""
        return self._folder / (hashlib.sha256(client.encode()).hexdigest() + ".answer")


class SpooledAnswers(FoldedAnswers):
    """What a strategy gets back: the spooled answers, read one at a time."""

    def __init__(
        self, spool: Spool, weights: Mapping[str, float], fold: Fold, decode: Callable[[str, Envelope], Answer]
    ) -> None:
        super().__init__(weights, fold, lambda client: decode(client, spool.get(client)))
