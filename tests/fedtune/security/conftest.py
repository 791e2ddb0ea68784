"""A coordinator's keys, and a small HTTPS server on loopback that shows any certificate."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from time import time

import pytest

from fedtune.security.certificates import Issued
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.keyfiles import save_pem

Serve = Callable[..., int]


@pytest.fixture
def keys(tmp_path: Path) -> CoordinatorKeys:
    return CoordinatorKeys.init(tmp_path / "keys", ["fl.example.org"], "fl.example.org:8000")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """serve(certificate, ahead): the port of a server with this certificate (None: without TLS), `ahead` seconds ahead."""
    with ExitStack() as stack:

        def start(certificate: Issued | None, ahead: float = 0.0) -> int:
            context = server_context(certificate, tmp_path) if certificate else None
            return stack.enter_context(serving(context, ahead))

        yield start


def server_context(certificate: Issued, folder: Path) -> ssl.SSLContext:
    (folder / "shown.pem").write_bytes(certificate.pem)
    save_pem(folder / "shown.key", certificate.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "shown.pem", folder / "shown.key")
    return context


@contextmanager
def serving(context: ssl.SSLContext | None, ahead: float) -> Iterator[int]:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time() + ahead, usegmt=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()
