"""The trainer's gRPC server: one unix socket, for the user ids that may ask, one ask at a time, and its health beside."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket as sockets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from client import trainer_pb2, trainer_pb2_grpc
from client.front import Front
from client.health import trainer_health
from client.told import plain
from client.transport import OPTIONS, checked, failure, from_proto, to_proto
from fedtune.envelope import Envelope
from fedtune.errors import MalformedMessage, UserError
from fedtune.health import Health
from fedtune.logs import about
from fedtune.security.signing import STAMP

log = logging.getLogger(__name__)
FOLDER, INNER = "fedtune-", "grpc.sock"  # in the folder for temporary files, and in that
YOUNG = 10.0  # seconds in which a socket may not listen yet


class Service(trainer_pb2_grpc.TrainerServicer):
    """Turns what arrives into envelopes. Whatever goes wrong travels back as a failure with its reason."""

    def __init__(self, answer: Callable[[Envelope], Envelope]) -> None:
        self._answer = answer

    def Answer(self, request: trainer_pb2.Envelope, context: grpc.ServicerContext) -> trainer_pb2.Envelope:
        try:
            ask = from_proto(request)
        except MalformedMessage as error:
            return to_proto(failure(str(error), {}))
        with about(**_named(ask.header)):
            try:
                return to_proto(self._answer(ask))
            except Exception as error:
                log.exception("could not answer")
                return to_proto(failure(f"{type(error).__name__}: {error}", ask.header))


class Serving:
    """A server at work behind its front door."""

    def __init__(self, server: grpc.Server, front: Front, socket: Path, folder: Path, health: Health) -> None:
        self._server, self._front, self._socket, self._folder, self._health = server, front, socket, folder, health

    def stop(self, grace: float | None) -> threading.Event:
        """Set when all is over; what is being answered gets `grace` seconds."""
        self._health.end()
        self._front.close()
        self._socket.unlink(missing_ok=True)
        over = self._server.stop(grace)
        shutil.rmtree(self._folder, ignore_errors=True)
        return over

    def wait_for_termination(self) -> None:
        self._server.wait_for_termination()


def serve(
    answer: Callable[[Envelope], Envelope],
    socket: Path,
    peers: Collection[int] | None = None,
    group: str | int | None = None,
    health: Health | None = None,
) -> Serving:
    """A started server. A second ask waits until the first is answered: there is one model.

    `peers` are the user ids that may ask; without it, this process's own. For others, `group` is one that they are in: it may
    open the socket then. `health` is told beside, whatever is at work.
    """
    socket = checked(socket)
    _refuse_a_second_trainer(socket)
    listener = _listen(socket, group)
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=FOLDER))  # for its owner alone
    server = grpc.server(ThreadPoolExecutor(max_workers=1, thread_name_prefix="trainer"), options=OPTIONS)
    trainer_pb2_grpc.add_TrainerServicer_to_server(Service(answer), server)
    health = health or trainer_health()
    health.add_to(server)
    server.add_insecure_port(f"unix:{checked(folder / INNER)}")
    server.start()
    front = Front(listener, folder / INNER, {os.geteuid()} if peers is None else peers)
    return Serving(server, front, socket, folder, health)


def _named(header: Mapping[str, Any]) -> dict[str, Any]:
    """Run and round of an ask, for the log: as it says itself, whoever wrote it."""
    stamp = header.get(STAMP)
    run = stamp.get("run") if isinstance(stamp, Mapping) else header.get("run")
    return {"run": plain(run), "round": plain(header.get("round"))}


def sweep() -> None:
    """Removes what trainers of this user that were killed have left: folders with a socket on which nobody listens."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        inner = folder / INNER
        with suppress(OSError), sockets.socket(sockets.AF_UNIX) as probe:
            mine = folder.lstat().st_uid == os.geteuid() and time.time() - inner.lstat().st_mtime > YOUNG
            if mine and probe.connect_ex(str(inner)) == errno.ECONNREFUSED:
                shutil.rmtree(folder, ignore_errors=True)


def _refuse_a_second_trainer(socket: Path) -> None:
    """It would lose its path to this one while it is at work."""
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(socket))
        except OSError:
            return  # nobody is there; a file that a killed trainer left is replaced
    raise UserError(f"a trainer already listens on {socket}: stop it first, or give this one another --socket")


def _listen(socket: Path, group: str | int | None) -> sockets.socket:
    listener = sockets.socket(sockets.AF_UNIX)
    try:
        _bind(listener, socket)
        if group is not None:
            _open_to(socket, group)
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {socket}: wanted a path in a folder that can be written ({error})") from error
    except UserError:
        listener.close()
        raise
    return listener


def _bind(listener: sockets.socket, socket: Path) -> None:
    if socket.is_socket():
        socket.unlink()
    before = os.umask(0o177)  # so that the socket is private from the moment that it exists
    try:
        listener.bind(str(socket))
    finally:
        os.umask(before)


def _open_to(socket: Path, group: str | int) -> None:
    try:
        shutil.chown(socket, group=group)
    except (LookupError, OSError) as error:
        raise UserError(
            f"cannot give {socket} to the group {group!r}: wanted a group of this machine that this user is in ({error})"
        ) from error
    socket.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP)
