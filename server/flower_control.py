"""What an operator asks of a SuperLink, over Flower's Control API: nodes in and out, a run submitted, watched and stopped.

In this process, where each call of the `flwr` command would take seconds and does not say which key a node has.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import parse_config_args
from flwr.common.serde import fab_to_proto, run_status_from_proto, user_config_to_proto
from flwr.proto import control_pb2 as flower
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.utils import simulation_config_from_json

from fedtune.errors import FedtuneError
from server.door import HEADER, word_of

COMPLETED = "finished:completed"
TIMEOUT = 10.0  # seconds


class NoSuperLink(FedtuneError):
    """It does not answer: not yet up, gone, or being started again."""


@dataclass(frozen=True)
class Node:
    id: int
    key: bytes  # PEM
    status: str  # registered, online, offline, unregistered

    @property
    def online(self) -> bool:
        return self.status == "online"


class Says:
    """Puts our word into the header of each request."""

    def __init__(self, word: str) -> None:
        self._word = word

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[HEADER] = self._word
        return call_next(context)


class Control:
    """A connection to the SuperLink at `address`; without `ca` it is not encrypted. Raises FedtuneError with Flower's words.

    `secret`: what the SuperLink was started with, where it stands behind our door.
    """

    def __init__(self, address: str, ca: Path | None = None, secret: bytes = b"") -> None:
        self.address = address
        verify = ssl.create_default_context(cafile=str(ca)) if ca else False
        says = [Says(word_of(secret))] if secret else []
        self._client = ControlHttpClient(f"http{'s' * bool(ca)}://{address}", interceptors=says, verify=verify, timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()

    def answers(self) -> bool:
        try:
            self.nodes()
        except NoSuperLink:
            return False
        return True

    def nodes(self) -> list[Node]:
        """All that were ever registered."""
        with self._in_words():
            found = self._client.ListNodes(flower.ListNodesRequest()).nodes_info
        return [Node(node.node_id, node.public_key, node.status) for node in found]

    def register(self, key: bytes, name: str) -> None:
        with self._in_words():
            self._client.RegisterNode(flower.RegisterNodeRequest(public_key=key, name=name))

    def unregister(self, node: int) -> None:
        with self._in_words():
            self._client.UnregisterNode(flower.UnregisterNodeRequest(node_id=node))

    def submit(self, bundle: Path, config: Mapping[str, str], federation: str = "") -> int:
        """The run's id. `federation`: key=value of Flower's simulation, with spaces between."""
        with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # of how Flower calls pathspec
            content = build_fab_from_disk(bundle)
        settings = {key.replace("-", "_"): value for key, value in parse_config_args([federation]).items()}
        request = flower.StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
            override_config=user_config_to_proto(dict(config)),
            override_federation_config=simulation_config_from_json(settings) if settings else None,
        )
        with self._in_words():
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise FedtuneError(f"Flower did not take the run{': ' * bool(answer.note)}{answer.note}")
        return int(answer.run_id)

    def status(self, run: int) -> tuple[str, str]:
        """Such as `running` or `finished:failed`, and its details."""
        with self._in_words():
            found = self._client.ListRuns(flower.ListRunsRequest(run_id=run)).run_dict
        if run not in found:
            raise FedtuneError(f"Flower does not know the run {run}")
        return spoken(found[run])

    def unfinished(self) -> list[int]:
        """Runs that an earlier server left in the database."""
        with self._in_words():
            found = self._client.ListRuns(flower.ListRunsRequest()).run_dict
        return [int(run) for run, about in found.items() if not spoken(about)[0].startswith("finished")]

    def waiting_before(self, run: int) -> list[int]:
        """Runs that were submitted before this one and wait for an executor."""
        with self._in_words():
            found = self._client.ListRuns(flower.ListRunsRequest()).run_dict
        waiting = {number: about.pending_at for number, about in found.items() if spoken(about)[0] == "pending"}
        return [int(other) for other, since in waiting.items() if (since, other) < (waiting.get(run, ""), run)]

    def stop(self, run: int) -> None:
        with self._in_words():
            self._client.StopRun(flower.StopRunRequest(run_id=run))

    def log(self, run: int) -> Iterator[str]:
        """What the run's ServerApp says, until it ends."""
        with self._in_words():
            for part in self._client.StreamLogs(flower.StreamLogsRequest(run_id=run)):
                yield part.log_output

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            said = FlowerError.from_json(error.response.text)
            reason = " ".join(filter(None, [said.message, said.public_details])) if said else error.response.text.strip()
            raise FedtuneError(f"the SuperLink at {self.address} refused: {reason or error}") from error
        except httpx.HTTPError as error:
            raise NoSuperLink(f"the SuperLink at {self.address} does not answer: {error}") from error


def spoken(run: Any) -> tuple[str, str]:
    """Status and details of a run as Flower's messages have it; of a failure its reason alone."""
    status = run_status_from_proto(run.status)
    details = re.sub(r"^\w+ failed with exception: ", "", status.details or "")
    return ":".join(filter(None, [status.status, status.sub_status])), details
