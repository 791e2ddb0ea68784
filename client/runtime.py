"""The loopback API of the node's SuperNode, as much of it as the relay needs.

Flower's own functions do the work. Its retries are left out: they end the process as soon as a token is no longer known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from client.waits import Waits
from fedtune.errors import FedtuneError

SHORTEST, LONGEST = 0.02, 0.5  # seconds between looks for a part of a message
SIGNED = ("/flwr.proto.Runtime/AcquireTask",)  # the one request that comes before a task has its own token


class NothingCame(FedtuneError):
    """A task of ours has no message that we could answer."""


class Task(RuntimeHttpClient):
    """One message that this process has to answer; the SuperNode takes no other until then.

    The SuperNode keeps its content until it is answered, so that another relay can take it up.
    """

    keep: Callable[[bytes], None] | None = None  # is told of what came
    _response: PullAppMessagesResponse | None = None  # what came: a message without its content, and the names of its parts

    def pull(self, again: bool = False) -> Message:
        """`again`: a relay before this one may have had it. Raises NothingCame."""
        if self._response is None:
            self._start(again)
            self._response = self._received()
        came = self._came()
        [tree] = self._response.message_object_trees
        pulled = make_pull_object_fn_protobuf(self.PullObject, Node(node_id=came.metadata.dst_node_id), came.metadata.run_id)
        message = pull_and_inflate_object_from_tree(tree, pulled, lambda part: None, return_type=Message)
        message.metadata.__dict__["_message_id"] = tree.object_id  # as Flower does: it is no part of the content
        return message

    def came_before(self, came: bytes) -> None:
        """To a relay before this one, which told its `keep`."""
        self._response = PullAppMessagesResponse.FromString(came)

    def _start(self, again: bool) -> None:
        """The FAB that comes with it is not looked at."""
        try:
            self.PullTaskInput(PullTaskInputRequest())
        except httpx.HTTPStatusError:
            if not again:  # a task is started once
                raise

    def _received(self) -> PullAppMessagesResponse:
        """The SuperNode gives a message once."""
        response = self.PullMessages(PullAppMessagesRequest())
        if not response.messages_list:
            raise NothingCame("the SuperNode has given the message of this task to another relay")
        if self.keep:
            self.keep(response.SerializeToString())
        return response

    def _came(self) -> Message:
        if self._response is None:
            raise NothingCame
        return message_from_proto(self._response.messages_list[0])

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        """A task is there before the SuperNode has all of its message from the server. Flower asks again after 1, 2, 4 s."""
        waits = Waits(SHORTEST, LONGEST)
        while (response := super().PullObject(request)).object_found and not response.object_available:
            time.sleep(waits.next())
        return response

    def reply(self, message: Message) -> None:
        self._push(message)
        push_task_output(self, None, SubStatus.COMPLETED, "")

    def fail(self, reason: str, code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION) -> None:
        """As an error reply. A message that never came has none: client/replies.py makes one where nobody has the task."""
        if self._response is not None:
            self._push(Message(Error(code=code, reason=reason), reply_to=self._came()))
        push_task_output(self, None, SubStatus.FAILED, reason)

    def _push(self, reply: Message) -> None:
        """And then the SuperNode may throw away what was answered."""
        metadata = self._came().metadata
        context = Context(metadata.run_id, metadata.dst_node_id, {}, RecordDict(), {})
        push_message(self, reply, context)
        confirmed = ConfirmMessageReceivedRequest(node=Node(node_id=metadata.dst_node_id), run_id=metadata.run_id)
        confirmed.message_object_id = metadata.message_id
        self.ConfirmMessageReceived(confirmed)

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
