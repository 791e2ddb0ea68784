"""A SuperNode's real loopback API, whose tasks are put there by hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import uvicorn
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedtune.envelope import Envelope, WireTensor
from fedtune.processes import free_port

SECRET = b"known to the SuperNode and to the relay"
ASK = Envelope({"kind": "train", "run": "demo", "round": 3, "ask": "r3-0"}, (WireTensor("w", "uint8", (2,), "raw", b"\1\2"),))
NODE, SERIES = 5, 1


class SuperNode:
    """Its loopback API; `put` is what its loop does with a message from the server."""

    def __init__(self, folder: Path) -> None:
        factory = NodeStateFactory(ObjectStoreFactory())
        self.state, self.folder, self.address = factory.state(), folder, f"127.0.0.1:{free_port()}"
        self.state.set_node_id(NODE)
        app = create_app(factory, SECRET)
        config = uvicorn.Config(app, port=int(self.address.rpartition(":")[2]), log_level="warning", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> SuperNode:
        self._thread.start()
        while not self._server.started:
            threading.Event().wait(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def put(self, content: RecordDict, run_id: int = 1, fab: bytes = b"", task: str = TaskType.CLIENT_APP) -> int:
        run = Run.create_empty(run_id)
        run.fab_id, run.fab_version, run.fab_hash, run.series_id = "flwrlabs/stowaway", "1.0.0", sha256(fab).hexdigest(), SERIES
        self.state.store_run(run)
        self.state.store_fab(Fab(run.fab_hash, fab, {}))
        self.state.set_run_series_context(SERIES, Context(run_id, NODE, {}, RecordDict(), {}, series_id=SERIES))
        message = Message(metadata=Metadata(run_id, "", 0, NODE, "", "", 0.0, 60.0, "query"), content=content)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.tree = get_object_tree(message)
        store = self.state.object_store
        store.preregister(run_id, self.tree)
        with no_object_id_recompute():
            for id, part in get_all_nested_objects(message).items():
                store.put(id, part.deflate())
        self.state.store_message(message)
        found = self.state.create_task(task_type=task, run_id=run_id, fab_hash=run.fab_hash)
        assert found is not None
        return found

    def reply(self) -> Message:
        """The one that lies there, with its content as it would be sent to the server."""
        [message] = self.state.get_messages_legacy(is_reply=True)
        return self.inflated(message)

    def inflated(self, message: Message) -> Message:
        if message.has_error():
            return message
        store = self.state.object_store
        ids = [tree.object_id for tree in parts(store.get_object_tree(message.metadata.message_id))]
        return inflate_object_from_contents(message.metadata.message_id, {id: store.get(id) for id in ids})

    def status_of(self, task: int) -> tuple[str, str]:
        [found] = self.state.get_tasks(task_ids=[task])
        return found.status.status, found.status.sub_status


def parts(tree: object) -> Iterator[object]:
    yield tree
    for child in tree.children:  # type: ignore[attr-defined]
        yield from parts(child)
