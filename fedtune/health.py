"""gRPC's health service: what a process says of itself, and how one asks it, as grpc_health_probe does.

    python -m fedtune.health unix:/run/fedtune/trainer.sock fedtune.Trainer      exit code 0 where it is SERVING

The empty service is the process itself (liveness), others are what it is ready for (readiness).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub, add_HealthServicer_to_server

Status = Literal["SERVING", "NOT_SERVING", "UNKNOWN", "UNREACHABLE"]
ITSELF = ""
PATIENCE = 5.0  # seconds


class Health(HealthServicer):  # type: ignore[misc]  # gRPC's has no types
    """Not ready for any of its services at first. It answers from threads of its own, so also while a server's are at work."""

    def __init__(self, services: Iterable[str] = ()) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="health")
        super().__init__(experimental_thread_pool=self._pool)
        for service in services:
            self.say(service, False)

    def say(self, service: str, well: bool) -> None:
        self.set(service, HealthCheckResponse.SERVING if well else HealthCheckResponse.NOT_SERVING)

    def add_to(self, server: grpc.Server) -> None:
        add_HealthServicer_to_server(_OnItsOwn(self, self._pool), server)

    def end(self) -> None:
        """From now on nothing is well, and it stays so."""
        self.enter_graceful_shutdown()


class _OnItsOwn:
    """The calls of a health service, each with the thread pool that gRPC is to take for it."""

    def __init__(self, health: Health, pool: ThreadPoolExecutor) -> None:
        def check(request: HealthCheckRequest, context: grpc.ServicerContext) -> HealthCheckResponse:
            return health.Check(request, context)

        check.experimental_thread_pool = pool  # type: ignore[attr-defined]
        self.Check, self.Watch = check, health.Watch


def status(target: str, service: str = ITSELF, patience: float = PATIENCE) -> Status:
    """Of a service at `target`, such as 127.0.0.1:8081 or unix:/run/t.sock. UNKNOWN is one that it has never heard of."""
    with grpc.insecure_channel(target) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(service=service), timeout=patience)
        except grpc.RpcError as error:
            return "UNKNOWN" if error.code() is grpc.StatusCode.NOT_FOUND else "UNREACHABLE"
    named: Status = "SERVING" if answer.status == HealthCheckResponse.SERVING else "NOT_SERVING"
    return named


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedtune.health", description="Ask a process whether it is well.")
    parser.add_argument("target", help="host:port, or unix:/path/of/a.sock")
    parser.add_argument("service", nargs="?", default=ITSELF, help="such as fedtune.Trainer; absent is the process itself")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds to wait for its answer")
    given = parser.parse_args(arguments)
    found = status(given.target, given.service, given.patience)
    print(found)  # noqa: T201  it is what was asked for
    return 0 if found == "SERVING" else 1


if __name__ == "__main__":
    raise SystemExit(main())
