"""The loopback API of the node's SuperNode, as much of it as the relay needs.

Flower's own functions do the work. Its retries are left out: they end the process as soon as a token is no longer known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import httpx
from flwr.app import Context, Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from client.waits import Waits

SHORTEST, LONGEST = 0.02, 0.5  # seconds between looks for a part of a message
SIGNED = ("/flwr.proto.Runtime/AcquireTask",)  # the one request that comes before a task has its own token


class Task(RuntimeHttpClient):
    """One message that this process has to answer; the SuperNode takes no other until then."""

    _came: Message | None = None  # without its content
    keep: Callable[[bytes], None] | None = None  # is told of what came

    def pull(self) -> tuple[Message, Context]:
        """The FAB that comes with them is not looked at."""
        message, context, _, _ = pull_task_input(self)
        return message, context

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        """Remembers what came, so that a content that cannot be read is answered too."""
        response = super().PullMessages(request)
        if response.messages_list:
            came = response.messages_list[0]
            self._came = message_from_proto(came)
            if self.keep:
                self.keep(came.SerializeToString())
        return response

    def came_before(self, came: bytes) -> None:
        """To a relay before this one, which told its `keep`."""
        self._came = message_from_proto(ProtoMessage.FromString(came))

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        """A task is there before the SuperNode has all of its message from the server. Flower asks again after 1, 2, 4 s."""
        waits = Waits(SHORTEST, LONGEST)
        while (response := super().PullObject(request)).object_found and not response.object_available:
            time.sleep(waits.next())
        return response

    def reply(self, message: Message, context: Context) -> None:
        push_message(self, message, context)
        push_task_output(self, None, SubStatus.COMPLETED, "")

    def fail(self, reason: str) -> None:
        """As an error reply. A message that never came has none: the SuperNode gives the task up when heartbeats stay away."""
        if self._came is None:
            return
        error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
        metadata = self._came.metadata
        context = Context(metadata.run_id, metadata.dst_node_id, {}, None, {})  # type: ignore[arg-type]
        push_message(self, Message(error, reply_to=self._came), context)
        push_task_output(self, None, SubStatus.FAILED, reason)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Without heartbeats the SuperNode gives a task up after a minute."""
        sender = HeartbeatSender(self._beat)
        sender.start()
        try:
            yield
        finally:
            sender.stop()

    def _beat(self) -> bool:
        try:
            self.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False  # asked again, with growing waits
        return True


class Runtime:
    """Where tasks come from. `secret` is what the SuperNode was given too: without it any local user could take them."""

    def __init__(self, address: str, secret: bytes | None = None) -> None:
        self._address = address
        signs = [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=SIGNED)] if secret else []
        self._client = _client(RuntimeHttpClient, address, *signs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def acquire(self) -> str:
        """The token of a task that is now ours; empty where there is none. Only ClientApps' tasks are taken."""
        return str(self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])).token)

    @contextmanager
    def task(self, token: str) -> Iterator[Task]:
        task = _client(Task, self._address, RuntimeTokenHttpInterceptor(token))
        try:
            with task.beating():
                yield task
        finally:
            task.close()


def _client(kind: type[Any], address: str, *interceptors: Any) -> Any:
    version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
    return kind.from_server_address(address, insecure=True, root_certificates=None, interceptors=[version, *interceptors])
