"""Where clients are found again."""

from __future__ import annotations

from collections.abc import Callable

from client.trainer import Trainer
from fedtune.base import blueprint
from fedtune.envelope import Envelope
from fedtune.job import Job
from server.meeting import meet
from server.roll import Roll
from simulations.grid import InProcessGrid

MakeJob = Callable[..., Job]


class Elsewhere(InProcessGrid):
    """Only these nodes are connected."""

    there: tuple[int, ...] = (1, 2, 3)

    def get_node_ids(self) -> list[int]:
        return list(self.there)


class Liar(Trainer):
    """cy says that it is another."""

    name = "cy"

    def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
        given = super().answer(envelope, client)
        return Envelope({**given.header, "client": self.name}, given.tensors) if client == "cy" else given


def test_a_stranger_takes_only_the_place_of_one_who_is_not_there(make_job: MakeJob) -> None:
    """bob is away, ann is at her node; a new node says that it is one of them."""
    job = make_job()
    for name, wanted in (("ann", {"ann": 1, "bob": 2}), ("bob", {"ann": 1, "bob": 3})):
        trainer = Liar.for_simulation(job)
        grid, plan = Elsewhere(trainer), blueprint(job)
        grid.there = (1, 2)
        roll = Roll(grid, job, plan, *meet(grid, job, plan))
        grid.there, trainer.name = (1, 3), name
        roll.find(["ann", "bob"])
        assert roll.nodes == wanted
