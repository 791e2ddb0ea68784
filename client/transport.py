"""Envelopes between relay and trainer: gRPC on a unix socket. No torch here: the relay has no use for it."""

from __future__ import annotations

import logging
import socket as sockets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc

from client import trainer_pb2, trainer_pb2_grpc
from fedtune.envelope import UNKNOWN_RUN, WIRE_VERSION, Envelope, WireTensor, header_in
from fedtune.errors import ClientFailed, MalformedMessage, UserError

log = logging.getLogger("fedtune.relay")
# The most that one protobuf message can be; Flower has the same limit.
LARGEST = 2**31 - 1
OPTIONS = (
    ("grpc.max_send_message_length", LARGEST),
    ("grpc.max_receive_message_length", LARGEST),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own: one that was lost is remembered as such
)
# Seconds to wait for a trainer that may be on its way up, or was killed: loading torch and a model can take a minute.
PATIENCE = 180.0
POLL, SAY = 0.05, 10.0  # seconds between two looks for it, and between two lines about it
KNOCKS = 20  # times that a trainer may let us in and shut the door, within 2 s
REPEATS = 2  # times that an ask is brought again after a trainer was lost over it
# The parts of an ask that would only make its answer larger.
ONLY_IN_ASKS = ("job", "roles", "scalars", "stamp", "signature")


def to_proto(envelope: Envelope) -> trainer_pb2.Envelope:
    tensors = (
        trainer_pb2.Tensor(name=t.name, dtype=t.dtype, shape=t.shape, stype=t.stype, data=t.data) for t in envelope.tensors
    )
    return trainer_pb2.Envelope(header_json=envelope.header_json(), tensors=tensors)


def from_proto(message: trainer_pb2.Envelope) -> Envelope:
    """Raises MalformedMessage when the header is no JSON object."""
    try:
        header = header_in(message.header_json)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"a message came whose header is not JSON: {error}") from error
    tensors = (WireTensor(t.name, t.dtype, tuple(t.shape), t.stype, t.data) for t in message.tensors)
    return Envelope(header, tuple(tensors))


def failure(reason: str, asked: Mapping[str, Any]) -> Envelope:
    """What `fedtune.wire.pack_failure` makes, without torch: the reason, and what tells the coordinator which ask it was."""
    repeated = {key: value for key, value in asked.items() if key not in ONLY_IN_ASKS}
    return Envelope({**repeated, "failed": reason, "version": WIRE_VERSION, "roles": {}, "scalars": {}})


def unknown_run(reason: str, asked: Mapping[str, Any]) -> Envelope:
    """The failure of a client that must hear the job first."""
    failed = failure(reason, asked)
    return Envelope({**failed.header, UNKNOWN_RUN: True})


def carry(ask: Envelope, socket: Path, patience: float | None = None) -> Envelope:
    """Bring an ask to the trainer and its answer back, however long it works. Where it dies at work, its supervisor starts it
    again, and the same ask is brought again: what it had answered before, it answers without work.

    Raises ClientFailed when no trainer takes it within `patience` seconds, or when it is lost once more after the repeats.
    """
    message, lost, unreached = to_proto(ask), 0, 0
    while True:
        await_listener(checked(socket), PATIENCE if patience is None else patience)
        try:
            return _brought(message, socket)
        except _Unreached:
            unreached += 1
            if unreached > KNOCKS:
                raise
            time.sleep(2 * POLL)
        except ClientFailed as why:
            lost += 1
            if lost > REPEATS:
                raise
            log.warning("%s; the ask is brought again when a trainer listens", why)


class _Unreached(ClientFailed):
    """It let us in and shut the door at once: it is just ending, or lets other users in."""


def _brought(message: trainer_pb2.Envelope, socket: Path) -> Envelope:
    """Raises ClientFailed when the trainer does not take it, or dies over it."""
    with grpc.insecure_channel(f"unix:{checked(socket)}", options=OPTIONS) as channel:
        try:
            return from_proto(trainer_pb2_grpc.TrainerStub(channel).Answer(message))
        except grpc.RpcError as error:
            if "failed to connect" in str(error.details()):
                raise _Unreached(
                    f"no trainer answers on {socket}: it lets other users in, see its log and --relay-user"
                ) from error
            raise ClientFailed(
                f"the trainer on {socket} was lost while it worked ({error.code().name}); see its log"
            ) from error


def await_listener(
    socket: Path,
    patience: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """gRPC's own way to ask whether a channel is ready takes 0.2 s at least. Raises ClientFailed."""
    began = said = clock()
    while error := _deaf(socket):
        waited = clock() - began
        if waited >= patience:
            raise ClientFailed(
                f"no trainer answers on {socket} ({error.strerror}); start it on this node: "
                f"python -m client.trainer_main --client NAME --socket {socket}"
            ) from error
        if clock() - said >= SAY:
            said = clock()
            log.warning("no trainer listens on %s yet; waited %.0f of %.0f s", socket, waited, patience)
        sleep(POLL)


def _deaf(socket: Path) -> OSError | None:
    """Why nobody can be reached there; None where somebody listens."""
    try:
        with sockets.socket(sockets.AF_UNIX) as probe:
            probe.connect(str(socket))
    except OSError as error:
        return error
    return None


def checked(socket: Path) -> Path:
    """The kernel takes 107 bytes at most, and a relative path would mean another place to each process."""
    socket = Path(socket).absolute()
    if len(str(socket).encode()) > 107:
        raise UserError(
            f"the socket's path has {len(str(socket).encode())} bytes, wanted at most 107, such as /run/t.sock: {socket}"
        )
    return socket
