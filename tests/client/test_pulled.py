"""Flower's own loop, with an ask whose run ends while it is fetched: nothing of it is left for the relay to wait for."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.common.constant import Status
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import start_client_internal as loop
from flwr.supernode.nodestate import NodeStateFactory

from client.pulled import PULL, forget_asks_of_ended_runs
from fedtune.messages import to_record
from tests.client.supernode import ASK, NODE, SERIES

OPEN = (Status.PENDING, Status.STARTING, Status.RUNNING)


def pulled_when_the_run_has_ended() -> Any:
    """The node's state after one turn of the loop."""
    state = NodeStateFactory(ObjectStoreFactory()).state()
    run = Run.create_empty(1)
    run.series_id = SERIES
    state.store_run(run)
    state.set_run_series_context(SERIES, Context(1, NODE, {}, RecordDict(), {}, series_id=SERIES))
    message = Message(metadata=Metadata(1, "", 0, NODE, "", "", 0.0, 60.0, "query"), content=to_record(ASK))
    message.metadata.__dict__["_message_id"] = message.object_id

    def ended(*_: object) -> bytes:
        raise RunNotRunningException

    pull = getattr(loop, PULL)
    assert None is pull(
        state=state,
        object_store=state.object_store,
        node_config={},
        receive=lambda: (message, get_object_tree(message)),
        get_run=ended,
        get_fab=ended,
        pull_object=ended,
        confirm_message_received=ended,
        trusted_entities=None,
    )
    return state


def test_stock_the_ask_stays_behind_and_ours_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, PULL, getattr(loop, PULL))
    stock = pulled_when_the_run_has_ended()
    assert len(stock.msg_store) == 1, "if Flower has mended that, client/pulled.py can go"
    assert len(stock.get_tasks(statuses=OPEN)) == 1

    assert forget_asks_of_ended_runs(loop)
    ours = pulled_when_the_run_has_ended()
    assert len(ours.msg_store) == 0
    assert len(ours.object_store) == 0
    assert ours.get_tasks(statuses=OPEN) == []


def test_another_loop_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    assert not forget_asks_of_ended_runs(ModuleType("changed"))
    assert "has changed" in caplog.text
