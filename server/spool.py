"""Answers on disk, one file each, until the round is over: memory does not grow with the cohort, and a crash loses none.

They are folded in the order of client ids, whatever order they came in, so the same answers give the same bits.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fedtune import durable
from fedtune.envelope import Envelope
from fedtune.errors import Damaged, MalformedMessage
from fedtune.folding import FoldedAnswers
from fedtune.strategy import Answer, Fold


class Spool:
    """The accepted answers to one ask."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # made with the first answer

    def put(self, client: str, envelope: Envelope) -> str:
        """There as a whole, or not there; after `settle` through a power cut too. Its digest, which `get` wants."""
        self._folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        durable.write(self._path(client), _hashed(envelope.pieces(), digest.update), name=False, content=False)
        return digest.hexdigest()

    def settle(self) -> None:
        """All of it is on the disk, in much less time than one by one. What a power cut takes before, clients send again."""
        if self._folder.exists():
            durable.sync_files(self._folder.glob("*.answer"))
            durable.sync(self._folder)

    def get(self, client: str, digest: str) -> Envelope:
        """Raises Damaged where it is not there any more as it was written."""
        path = self._path(client)
        try:
            with path.open("rb") as file:  # read twice: to hold it twice would cost memory
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise Damaged(f"the answer of '{client}' in {path} is not what was written")
                file.seek(0)
                return Envelope.read(file)
        except (OSError, MalformedMessage) as error:
            raise Damaged(f"the answer of '{client}' in {path} cannot be read: {error}") from error

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
        self,
        spool: Spool,
        digests: Mapping[str, str],
        weights: Mapping[str, float],
        fold: Fold,
        decode: Callable[[str, Envelope], Answer],
    ) -> None:
        super().__init__(weights, fold, lambda client: decode(client, spool.get(client, digests[client])))


def _hashed(pieces: Iterator[bytes], update: Callable[[bytes], object]) -> Iterator[bytes]:
    for piece in pieces:
        update(piece)
        yield piece
