"""A client's memory and its last answers on disk: one folder, in which a single file says what counts.

    manifest                 what is stored (client/manifest.py)
    <digest>.safetensors     a part of a memory
    <digest>.answer          an answer

A commit writes the new files, then the manifest in one step; what it does not name goes afterwards. So whoever is killed leaves
the old state or the new one. In simulation clients keep much alike: a file that another one has too is linked, not written.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from client.manifest import Manifest, digest_of
from client.names import folder_name
from fedtune import durable
from fedtune.envelope import Envelope
from fedtune.errors import Damaged, MalformedMessage

log = logging.getLogger("fedtune.trainer")
HOME, SHARED, MANIFEST = ".memory", ".shared", "manifest"  # no client's folder begins with a dot
PART = ".safetensors"
Makers = Mapping[str, Callable[[], Iterable[bytes]]]  # file -> its bytes, for when it must be written


class Kept:
    """One client's. Nothing is there before the first commit."""

    def __init__(self, directory: Path, client: str, *, shared: bool = False) -> None:
        """`directory` is the node's, or that of all clients of a simulation; these have `shared` files."""
        self.folder = directory / HOME / folder_name(client)
        self._shared = directory / HOME / SHARED if shared else None

    def read(self) -> Manifest:
        """An empty one where there is none, or none that can be believed."""
        try:
            return Manifest.from_bytes((self.folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            return Manifest()
        except (OSError, Damaged) as error:
            log.warning("what this client remembers is damaged, it goes on without: %s: %s", self.folder / MANIFEST, error)
            return Manifest()

    def data(self, file: str) -> bytes:
        """Raises OSError."""
        return (self.folder / file).read_bytes()

    def answer(self, file: str) -> Envelope | None:
        """None where it is not there any more, or damaged."""
        try:
            data = self.data(file)
            if answer_file([data]) != file:
                raise MalformedMessage("it has another digest")
            return Envelope.read(io.BytesIO(data))
        except (OSError, MalformedMessage) as error:
            log.warning("a stored answer is damaged, its ask is answered anew: %s: %s", self.folder / file, error)
            self.discard(file)
            return None

    def discard(self, file: str) -> None:
        """What is damaged, so that it is written again when it is made again."""
        for path in (self.folder / file, *([self._shared / file] if self._shared else [])):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def commit(self, before: Manifest, after: Manifest, makers: Makers) -> None:
        """From what is there to what shall be. Raises OSError, and leaves what was there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            missing = [file for file in after.files() if file in makers and not self._has(file, before)]
            for file in missing:
                self._put(file, makers[file])
            if missing:
                durable.sync(self.folder)  # no manifest on disk before what it names
            durable.write(self.folder / MANIFEST, [after.as_bytes()])
        except BaseException:
            self._put_back(before, after)
            raise
        self._sweep(after)

    def _has(self, file: str, before: Manifest) -> bool:
        """Whole: the memory of before was read or written by this process. At other files nobody has looked for long."""
        return file in before.memory and (self.folder / file).exists()

    def forget(self) -> None:
        """The manifest goes first: nothing counts without it."""
        if self.folder.exists():
            (self.folder / MANIFEST).unlink(missing_ok=True)
            durable.sync(self.folder)
            self._sweep(Manifest())
            shutil.rmtree(self.folder, ignore_errors=True)

    def _put(self, file: str, make: Callable[[], Iterable[bytes]]) -> None:
        if self._shared and self._linked(self._shared / file, self.folder / file):
            return
        durable.write(self.folder / file, make(), name=False)
        if self._shared:
            self._linked(self.folder / file, self._shared / file)

    def _linked(self, source: Path, target: Path) -> bool:
        """Not so where nobody has it, or on a file system without links."""
        target.parent.mkdir(exist_ok=True)
        with suppress(OSError):
            os.link(source, target)
            return True
        return False

    def _put_back(self, before: Manifest, after: Manifest) -> None:
        """A manifest that was replaced, but not for sure, does not count either."""
        with suppress(OSError):
            if self.read() == after:
                durable.write(self.folder / MANIFEST, [before.as_bytes()])
            self._sweep(before)

    def _sweep(self, manifest: Manifest) -> None:
        """Also what a crash has left. The last one who has a shared file takes it away."""
        named = {MANIFEST, *manifest.files()}
        with suppress(OSError):
            for path in [path for path in self.folder.iterdir() if path.name not in named]:
                path.unlink(missing_ok=True)
                if self._shared:
                    _unshare(self._shared / path.name)


def sweep(directory: Path) -> None:
    """Take away what clients that were killed have left for nobody."""
    for path in (directory / HOME / SHARED).glob("*"):
        _unshare(path)


def answer_file(pieces: Iterable[bytes]) -> str:
    return f"{digest_of(pieces)}.answer"


def part_file(name: str) -> str:
    """Of a part of a memory; an empty one has none."""
    return f"{name}{PART}" if name else ""


def _unshare(path: Path) -> None:
    with suppress(OSError):
        if path.stat().st_nlink == 1:
            path.unlink()
