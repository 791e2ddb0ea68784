"""The coordinator's health, for whoever runs it: `fedtune server --health HOST:PORT`, as gRPC's health service.

    (empty)               it lives: the loop of the supervisor came round within the last half minute
    fedtune.Coordinator   it is ready: it waits for clients or runs a job, and its SuperLink accepts connections

Flower's own health server (--health-server-address) says SERVING as long as the SuperLink's process runs, and no more.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from fedtune.daemon import State
from fedtune.errors import UserError
from fedtune.health import ITSELF, Health
from fedtune.security.addresses import Address

COORDINATOR = "fedtune.Coordinator"
STALE = 30.0  # seconds after which a loop that has not come round is taken for stuck
AT_WORK = ("waiting", "running")
PATIENCE = 1.0  # seconds for the SuperLink to accept a connection


class CoordinatorHealth(Health):
    """Brought up to date whenever it is asked. `ready` must be quick."""

    def __init__(self, ready: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__([COORDINATOR])
        self._ready, self._clock = ready, clock
        self._looked = clock()

    def looked(self) -> None:
        """Called at every turn of the supervisor's loop."""
        self._looked = self._clock()

    def Check(self, request: HealthCheckRequest, context: grpc.ServicerContext) -> HealthCheckResponse:
        self.say(ITSELF, self._clock() - self._looked < STALE)
        self.say(COORDINATOR, self._ready())
        return super().Check(request, context)


@contextmanager
def told_at(at: Address, health: CoordinatorHealth) -> Iterator[int]:
    """Within, whoever reaches that address may ask; yields the port. Raises UserError where nothing can listen there."""
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    health.add_to(server)
    try:
        port: int = server.add_insecure_port(str(at))
    except RuntimeError as error:
        raise UserError(
            f"--health {at}: nothing can listen there; wanted an address of this machine and a free port"
        ) from error
    server.start()
    try:
        yield port
    finally:
        health.end()
        server.stop(None).wait()


def health_of(folder: Path, superlink: str) -> CoordinatorHealth:
    """Of the server in that folder, whose SuperLink this machine reaches at host:port."""
    return CoordinatorHealth(partial(is_ready, folder, superlink))


def is_ready(folder: Path, superlink: str) -> bool:
    """Whether it is at work, and its SuperLink accepts connections."""
    try:
        return State.read(folder).phase in AT_WORK and accepts(superlink)
    except UserError:
        return False


def accepts(superlink: str) -> bool:
    host, _, port = superlink.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PATIENCE):
            return True
    except (OSError, ValueError):
        return False
