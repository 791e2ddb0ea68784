"""The trainer's gRPC server: one unix socket, readable by its owner only, one ask at a time."""

from __future__ import annotations

import logging
import os
import socket as sockets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from client import trainer_pb2, trainer_pb2_grpc
from client.transport import OPTIONS, checked, failure, from_proto, to_proto
from fedtune.envelope import Envelope
from fedtune.errors import MalformedMessage, UserError

log = logging.getLogger(__name__)


class Service(trainer_pb2_grpc.TrainerServicer):
    """Turns what arrives into envelopes. Whatever goes wrong travels back as a failure with its reason."""

    def __init__(self, answer: Callable[[Envelope], Envelope]) -> None:
        self._answer = answer

    def Answer(self, request: trainer_pb2.Envelope, context: grpc.ServicerContext) -> trainer_pb2.Envelope:
        try:
            ask = from_proto(request)
        except MalformedMessage as error:
            return to_proto(failure(str(error), {}))
        try:
            return to_proto(self._answer(ask))
        except Exception as error:
            log.exception("could not answer")
            return to_proto(failure(f"{type(error).__name__}: {error}", ask.header))


def serve(answer: Callable[[Envelope], Envelope], socket: Path) -> grpc.Server:
    """A started server. A second ask waits until the first is answered: there is one model."""
    socket = checked(socket)
    _refuse_a_second_trainer(socket)
    server = grpc.server(ThreadPoolExecutor(max_workers=1, thread_name_prefix="trainer"), options=OPTIONS)
    trainer_pb2_grpc.add_TrainerServicer_to_server(Service(answer), server)
    before = os.umask(0o177)  # so that the socket is private from the moment that it exists
    try:
        server.add_insecure_port(f"unix:{socket}")
    except RuntimeError as error:
        raise UserError(f"cannot listen on {socket}: wanted a path in a folder that can be written") from error
    finally:
        os.umask(before)
    server.start()
    return server


def _refuse_a_second_trainer(socket: Path) -> None:
    """gRPC would take the path from a trainer that is at work."""
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(socket))
        except OSError:
            return  # nobody is there; a file that a killed trainer left is replaced
    raise UserError(f"a trainer already listens on {socket}: stop it first, or give this one another --socket")
