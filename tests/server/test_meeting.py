"""What the server knows of each client before the first round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from client.trainer import Trainer
from fedtune.base import blueprint
from fedtune.envelope import Envelope
from fedtune.errors import RoundFailed
from fedtune.job import Job
from server.meeting import meet
from simulations.grid import InProcessGrid

MakeJob = Callable[..., Job]


def steps(job: Job) -> dict[str, int]:
    clients, _ = meet(InProcessGrid(Trainer.for_simulation(job)), job, blueprint(job))
    return {id: info.steps for id, info in clients.items()}


def test_the_steps_of_a_round_are_the_jobs(make_job: MakeJob) -> None:
    assert steps(make_job("train.steps=3")) == {"ann": 3, "bob": 3, "cy": 3}


def test_by_epochs_each_client_has_steps_of_its_own(make_job: MakeJob) -> None:
    """Of 6, 8 and 11 texts a fifth, rounded, is held out: 5, 6 and 9 are left. Two passes in batches of 4: 10/4, 12/4, 18/4."""
    assert steps(make_job("train.steps=0", "train.epochs=2", "train.batch=4")) == {"ann": 3, "bob": 3, "cy": 5}


class Claiming(Trainer):
    """bob says of himself that he can afford `claim`."""

    claim: object

    def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
        given = super().answer(envelope, client)
        return replace(given, header={**given.header, "limits": self.claim}) if client == "bob" else given


def test_what_clients_can_afford_is_known_before_the_first_round(make_job: MakeJob) -> None:
    """`all` is more than any model has; who says nothing has no limit of its own."""
    job = make_job("clients.layers={ann=2, bob='all'}", "clients.memory.ann='2 MB'", "clients.seconds.bob=0.5")
    clients, _ = meet(InProcessGrid(Trainer.for_simulation(job)), job, blueprint(job))
    assert {id: info.limits for id, info in clients.items()} == {
        "ann": {"layers": 2.0, "memory": 2e6},
        "bob": {"layers": 1e6, "seconds": 0.5},
        "cy": {},
    }


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        (
            {"layers": math.nan},
            r"bob: it says that it can afford \{'layers': nan\}; wanted layers, memory, seconds, each above 0",
        ),
        ({"layers": math.inf}, r"can afford \{'layers': inf\}"),
        ({"layers": 0}, r"can afford \{'layers': 0.0\}"),
        ({"memory": -1, "layers": 2}, r"can afford \{'memory': -1.0\}"),
        ({"seconds": 1, "patience": 3}, r"can afford \{'patience': 3.0\}"),
        ({"layers": "many"}, "node 2: its hello cannot be read: could not convert string to float: 'many'"),
        ({"layers": None}, "node 2: its hello cannot be read"),
        ({"layers": [1]}, "node 2: its hello cannot be read"),
        ({"layers": 10**400}, "node 2: its hello cannot be read"),
        ("all", "node 2: its hello cannot be read"),
        (3, "node 2: its hello cannot be read"),
        (None, "node 2: its hello cannot be read"),
    ],
)
def test_who_can_afford_what_nobody_can_is_left_out(claim: object, reason: str, make_job: MakeJob) -> None:
    """The others go on; where all three are needed, the run ends with the reason."""
    job = make_job()
    trainer = Claiming.for_simulation(job)
    trainer.claim = claim
    clients, _ = meet(InProcessGrid(trainer), job, blueprint(job))
    assert sorted(clients) == ["ann", "cy"]
    job = make_job("clients.count=3")
    with pytest.raises(RoundFailed, match=rf"2 clients can take part, wanted 3 \(clients.count\): .*{reason}"):
        meet(InProcessGrid(trainer), job, blueprint(job))


class Patchy(InProcessGrid):
    """The first message comes back as one to a node that is away, and at the next look the node is not there."""

    lost, gone = False, False

    def get_node_ids(self) -> list[int]:
        gone, self.gone = self.gone, False
        return [] if gone else super().get_node_ids()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        messages = super().pull_messages(message_ids)
        if self.lost or not messages:
            return messages
        self.lost = self.gone = True
        return [Message(metadata=messages[0].metadata, error=Error(code=ErrorCode.NODE_UNAVAILABLE, reason="no heartbeat"))]


def test_a_client_that_is_wanted_and_away_is_greeted_when_it_is_back(make_job: MakeJob) -> None:
    """As after a restart of the server, when nodes of before count as connected and are not yet."""
    job = make_job("clients.count=1")
    clients, _ = meet(Patchy(Trainer.for_simulation(job)), job, blueprint(job))
    assert set(clients) == {"ann"}
