"""What a run would begin with: for each client what it would train in round 1, in how much memory and time, for how many bytes.

The method's own conversation is played with the real clients up to its ask to train: they probe, and nothing trains. Of a
method that does not say what each client trains, only the bytes are counted, those of the mean client (simulations/traffic.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fedtune.base import Blueprint, blueprint
from fedtune.job import Job
from fedtune.memory import Memory
from fedtune.strategy import Answer, Ask, ClientInfo, Strategy
from server.coordinator import draw_cohort
from server.meeting import meet
from server.records import Watcher
from simulations.engine import require_comparable, resident_trainer
from simulations.grid import InProcessGrid
from simulations.plan_round import ClientPlan, SelectiveRound, play
from simulations.stand import Stand
from simulations.traffic import traffic


@dataclass(frozen=True)
class Plan:
    job: str
    strategy: str
    clients: tuple[ClientPlan, ...]
    layers: int | None = None  # of the model
    numbers: int | None = None  # in all of them

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_job(job: Job, watcher: Watcher) -> Plan:
    """Raises what a run of the job would raise before its first training step."""
    require_comparable(job)
    trainer = resident_trainer(job, watcher)
    job, strategy, grid = trainer.job, trainer.strategy, InProcessGrid(trainer)
    model = blueprint(job)
    clients, nodes = meet(grid, job, model)
    strategy.check(list(clients.values()))
    cohort = draw_cohort(job, clients, 1)
    known = {
        info.id: ClientPlan(info.id, info.examples, info.steps, None if strategy.trains_whole else info.rank, info.limits)
        for info in clients.values()
    }
    if _says_what_trains(strategy, model, cohort[0]):
        round = SelectiveRound(trainer, model, cohort, watcher)
        planned = round.planned(known)
        return Plan(job.name, job.strategy.name, tuple(planned.values()), len(round.parts.layers), sum(round.parts.numbers))
    sent = traffic(strategy, job, model)
    drawn = {info.id: replace(known[info.id], down=sent.down, up=sent.up) for info in cohort}
    return Plan(job.name, job.strategy.name, tuple({**known, **drawn}.values()))


def _says_what_trains(strategy: Strategy, model: Blueprint, info: ClientInfo) -> bool:
    """Found with a client that knows shapes only."""
    stand = Stand(info.examples, info.rank, info.scale, torch.Generator(), info.pinned, info.steps, model.shapes)
    memory = Memory()

    def answer(one: ClientInfo, ask: Ask, step: str) -> Answer:
        return strategy.answer(Ask(ask.kind, ask.payload_for(one.id)), stand, memory)

    return play(strategy, strategy.start(model.adapter), [info], answer) is not None
