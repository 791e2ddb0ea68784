"""The gate through a round: what it decides is the same in whatever order answers come, and lives through a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.adapter import Adapter, Factors
from fedtune.base import Blueprint
from fedtune.errors import Refused
from fedtune.job import Job
from fedtune.payload import payload_of
from fedtune.strategy import Answer, Ask, ClientInfo, Fold
from fedtune.wire import pack_answer, unpack_answer
from server.conduct import Conduct
from server.gatekeeper import Gatekeeper, GateMemory
from strategies.fedavg import FedAvg

START = Adapter({"q": Factors(torch.ones(2, 3), torch.zeros(5, 2), 1.0)}, base="b" * 32)
WAYS = {"ann": 1.0, "bob": 2.0, "cy": 70.0, "dee": 1.5, "eve": 3.0}  # how far each moves; all but cy near the others
ASK = Ask("train", payload_of(START), Fold.SEEN)


def keeper_of(make_job: Callable[..., Job], folder: Path, memory: GateMemory | None = None) -> Gatekeeper:
    plan = Blueprint(START, (), (), {})
    return Gatekeeper(make_job("gate.max_ratio=20"), FedAvg(), plan, memory or GateMemory(), folder / "quarantine")


def let_in(keeper: Gatekeeper, client: str, way: float, alone: bool = False) -> None:
    """One number of B is `way` from 0, and nothing else has moved; `alone`: without A."""
    B = torch.zeros(5, 2)
    B[0, 0] = way
    payload = payload_of(Adapter({"q": replace(START.lora["q"], B=B)}))
    if alone:
        payload = replace(payload, tensors={"q.lora_B": B}, roles={"q.lora_B": payload.roles["q.lora_B"]})
    envelope = pack_answer(Answer(payload), {"ask": "1.0", "base": START.base, "client": client})
    keeper.let_in(envelope, ClientInfo(client, 1, 2), unpack_answer)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(sorted(WAYS)))
def test_the_order_in_which_answers_come_plays_no_role(order: list[str], make_job: Callable[..., Job], tmp_path: Path) -> None:
    """The median of 1, 1.5, 2, 3 and 70 is 2; eve sends B alone, and is no part of it: of 1, 1.5, 2 and 70 it is 1.75."""
    keeper = keeper_of(make_job, tmp_path)
    keeper.open(ASK, "1.0")
    for client in order:
        let_in(keeper, client, WAYS[client], alone=client == "eve")
    assert keeper.left_out() == {
        "cy": "its update has a norm of 70, wanted at most 20 times the median of 1.75 (gate.max_ratio)",
        "eve": "its tensors are not those of the other clients: q.lora_A",
    }
    keeper.counted([client for client in order if client not in ("cy", "eve")])
    assert keeper.after(1) == GateMemory(Conduct(), {"train": (1.0, 2.0, 1.5)})  # by name: ann, bob, dee


def test_what_it_remembers_lives_through_a_checkpoint_and_counts(make_job: Callable[..., Job], tmp_path: Path) -> None:
    memory = GateMemory(Conduct({"ann": 2}, {}), {"train": (1.0, 2.0, 3.0)})
    again = GateMemory.from_json(json.loads(json.dumps(memory.as_json())))
    assert again == memory
    keeper = keeper_of(make_job, tmp_path, again)
    keeper.open(ASK, "1.0")
    let_in(keeper, "ann", 70.0)
    assert list(keeper.left_out()) == ["ann"]  # the median of 1, 2, 3, 70 is 2.5, and 20 times that 50
    keeper.open(replace(ASK, kind="sketch"), "1.0")
    let_in(keeper, "ann", 70.0)
    assert keeper.left_out() == {}  # of answers to asks of this kind nothing is known


def test_the_limit_of_the_job_needs_no_others(make_job: Callable[..., Job], tmp_path: Path) -> None:
    keeper = keeper_of(lambda *keys: make_job("gate.max_norm=5", *keys), tmp_path)
    keeper.open(ASK, "1.0")
    let_in(keeper, "ann", 5.0)
    with pytest.raises(Refused, match=r"a norm of 5.5, wanted at most 5 \(gate.max_norm\)"):
        let_in(keeper, "ann", 5.5)
