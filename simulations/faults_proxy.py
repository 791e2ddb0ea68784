"""A stretch of network between one client and the server that can be cut: connections that end, or silence."""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

PIECE, LOOK = 1 << 16, 0.1  # bytes, seconds


class Proxy:
    """Listens on `port`, and carries bytes both ways. One thread."""

    def __init__(self, host: str, to: int) -> None:
        self._to, self._listener = (host, to), socket.create_server((host, 0))
        self.port = int(self._listener.getsockname()[1])
        self._other: dict[socket.socket, socket.socket] = {}
        self._broken, self._silent, self._over = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._carry, name=f"proxy {self.port}", daemon=True)
        self.cut = 0  # connections that were ended by `break_off`

    def break_off(self) -> None:
        """Open connections end at once, and so does every new one."""
        self._broken.set()

    def fall_silent(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        self._silent.set()

    def heal(self) -> None:
        self._broken.clear()
        self._silent.clear()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        for end in (self._listener, *self._other):
            end.close()

    def _carry(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._over.is_set():
                if self._silent.is_set():
                    self._over.wait(LOOK)
                    continue
                if self._broken.is_set():
                    self._end_all(selector)
                for key, _ in selector.select(LOOK):
                    own = key.fileobj
                    assert isinstance(own, socket.socket)
                    if own is self._listener:
                        self._join(selector)
                    elif own in self._other:
                        self._pass_on(selector, own)

    def _join(self, selector: selectors.BaseSelector) -> None:
        near, _ = self._listener.accept()
        try:
            if self._broken.is_set():
                raise ConnectionError
            far = socket.create_connection(self._to)
        except OSError:  # the server is not there
            near.close()
            return
        self._other |= {near: far, far: near}
        for end in (near, far):
            selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, selector: selectors.BaseSelector, end: socket.socket) -> None:
        try:
            piece = end.recv(PIECE)
            if piece:
                self._other[end].sendall(piece)
                return
        except OSError:
            pass
        self._close(selector, end)

    def _end_all(self, selector: selectors.BaseSelector) -> None:
        self.cut += len(self._other) // 2
        for end in list(self._other):
            self._close(selector, end)

    def _close(self, selector: selectors.BaseSelector, end: socket.socket) -> None:
        for one in (end, self._other.get(end, end)):
            if one in self._other:
                del self._other[one]
                with suppress(KeyError, ValueError):
                    selector.unregister(one)
                one.close()
