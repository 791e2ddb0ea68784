"""The door before the trainer's gRPC server: it knows which user is at the other end of a unix socket, and lets only some in.

gRPC for Python neither shows the peer's credentials nor takes a socket that is already open. So this listens where the relay
connects, asks the kernel who that is (SO_PEERCRED), and passes the bytes on to gRPC's own socket in a folder that is private.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

PIECE = 1 << 18  # bytes; a unix socket holds about as many
CLOSED = (errno.EINVAL, errno.EBADF)  # what accept says when the listener was shut down, or is no more


@dataclass(frozen=True)
class Peer:
    """Who opened the other end of a socket, as the kernel saw it; `listen` counts as opening."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def at(cls, end: socket.socket) -> Peer:
        credentials = struct.Struct("3i")
        return cls(*credentials.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)))

    def __str__(self) -> str:
        return f"user {self.uid}, process {self.pid}"


class Front:
    """Takes over a listening socket. After `close()` nobody else comes in, and who is in may finish."""

    def __init__(self, listener: socket.socket, inner: Path, peers: Collection[int]) -> None:
        self._listener, self._inner, self._peers = listener, inner, frozenset(peers)
        _in_background(self._accept)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which a mere close leaves waiting
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                outside, _ = self._listener.accept()
            except OSError as error:
                if error.errno in CLOSED:
                    return
                log.error("cannot accept a connection: %s", error.strerror)
                time.sleep(0.1)  # too many open files, mostly: that passes
            else:
                self._admit(outside)

    def _admit(self, outside: socket.socket) -> None:
        inside = socket.socket(socket.AF_UNIX)
        try:
            if (peer := Peer.at(outside)).uid not in self._peers:
                raise PermissionError(f"only {sorted(self._peers)} may ask this trainer, and this was {peer}")
            inside.connect(str(self._inner))
        except OSError as error:
            log.warning("closed a connection: %s", error)
            outside.close()
            inside.close()
        else:
            _in_background(_join, outside, inside)


def _join(outside: socket.socket, inside: socket.socket) -> None:
    """Both ways at once, until both ends are done."""
    with outside, inside:
        back = _in_background(_pass_on, inside, outside)
        _pass_on(outside, inside)
        back.join()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    """Until the source ends; a side that breaks off ends the other too."""
    piece = bytearray(PIECE)
    view = memoryview(piece)
    try:
        while count := source.recv_into(piece):
            target.sendall(view[:count])
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _in_background(work: Callable[..., None], *given: socket.socket) -> threading.Thread:
    thread = threading.Thread(target=work, args=given, name="front", daemon=True)
    thread.start()
    return thread
