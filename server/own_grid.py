"""Flower's Grid as our ServerApp has it: nobody but our own clients is asked anything, whoever else is at the SuperLink."""

from __future__ import annotations

import logging
from collections.abc import Set
from types import TracebackType
from typing import Any, Self

import httpx
from flwr.proto.runtime_pb2 import PushTaskOutputRequest
from flwr.supercore.run import RunNotRunningException
from flwr.superlink.grid import HttpGrid

log = logging.getLogger("fedtune.serverapp")


class OwnGrid(HttpGrid):
    """`welcome`: the nodes' public keys (PEM); None, as there is no TLS without `ca`, is everybody: a run without keys."""

    def __init__(self, address: str, ca: bytes | None, token: str, welcome: Set[bytes] | None) -> None:
        super().__init__(address, insecure=ca is None, root_certificates=ca, token=token)
        self._welcome = welcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def runtime(self) -> Any:
        """The connection that speaks for our task."""
        return self._runtime_client

    def finish(self, outcome: str, details: str) -> None:
        """Tells the SuperLink, if it can be told; the run is over in any case."""
        self._retry_invoker.max_tries = 3
        try:
            self.runtime.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=details))
        except (httpx.HTTPError, RunNotRunningException) as error:
            log.warning("the SuperLink was not told that the run is over: %s", error)

    def get_node_ids(self) -> list[int]:
        return [node.node_id for node in self.get_nodes() if self._welcome is None or node.public_key in self._welcome]
