"""What the SuperNode sends on to the server: replies that are whole, one for each ask.

A relay that is killed while it gives its answer back leaves a part of one, and Flower's loop would wait for the rest of it for
ever. Here it waits for the next relay's. Where no relay has the task any more, the server is told so, and asks again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

from flwr.app import Message
from flwr.common.constant import Status
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supernode.nodestate.in_memory_nodestate import CLIENT_APP_CRASHED_ERROR, InMemoryNodeState

log = logging.getLogger("flwr")
OPEN = (Status.PENDING, Status.STARTING, Status.RUNNING)
SELDOM = 20  # looks for a reply, before each look whether anybody is at work on it
KNOWN = ("get_messages_legacy", "delete_messages", "get_tasks", "_store_error_replies")


class Replies:
    """The node's state, as the loop sees it while it waits for the reply to the ask that it has pulled."""

    def __init__(self, state: Any) -> None:
        self._state, self._looks = state, 0
        self._came: dict[str, Message] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_messages_legacy(self, *, is_reply: bool) -> list[Message]:
        """The whole ones. Others are kept until the rest of them is there, or another is whole in their place."""
        self._looks += 1
        for message in self._state.get_messages_legacy(is_reply=is_reply):
            self._came[message.metadata.message_id] = message
        self._drop(reply for reply in self._came.values() if reply.metadata.reply_to_message_id not in self._state.msg_store)
        whole = [reply for reply in self._came.values() if self._is_whole(reply)]
        if whole:
            self._drop(reply for reply in self._came.values() if reply is not whole[0])
            return whole[:1]
        if self._looks % SELDOM == 0 and not self._state.get_tasks(statuses=OPEN):
            self._give_up()
        return []

    def _is_whole(self, reply: Message) -> bool:
        store = self._state.object_store
        try:
            tree = store.get_object_tree(reply.metadata.message_id)
        except NoObjectInStoreError:
            return False
        return all(store.get(part.object_id) for part in iterate_object_tree(tree))

    def _drop(self, replies: Iterable[Message]) -> None:
        for id in [reply.metadata.message_id for reply in replies]:
            del self._came[id]
            self._state.delete_messages(message_ids=[id])
            self._state.object_store.delete(id)

    def _give_up(self) -> None:
        """As Flower does for a task without heartbeats, also where a part of an answer is there, or nobody took the ask."""
        log.warning("no relay has the ask any more: the server is told, and sends it again")
        self._drop(list(self._came.values()))
        asks = [entry.message for entry in self._state.msg_store.values() if not entry.message.metadata.reply_to_message_id]
        self._state.get_messages_legacy(is_reply=False)  # Flower's word is only for those that were taken
        self._state._store_error_replies({ask.metadata.run_id for ask in asks}, CLIENT_APP_CRASHED_ERROR)


def send_whole_replies(loop: ModuleType) -> bool:
    """Whether the loop is as we know it; where Flower has changed it, it runs stock."""
    push: Callable[..., None] | None = getattr(loop, "_push_messages", None)
    if push is None or not all(hasattr(InMemoryNodeState, name) for name in KNOWN):
        log.warning("Flower's loop has changed: a relay that is killed while it answers can keep this node until a restart")
        return False
    loop._push_messages = partial(_push_whole, push)  # type: ignore[attr-defined]
    return True


def _push_whole(push: Callable[..., None], *, state: Any, **given: Any) -> None:
    push(state=Replies(state), **given)
