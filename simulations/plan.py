"""What a run would begin with: for each client what it would train in round 1, in how much memory and time, for how many bytes.

The method's own conversation is played with the real clients up to its ask to train: they probe, and nothing trains. Of a
method that does not say what each client trains, only the bytes are counted, those of the mean client (simulations/traffic.py).
Messages go through the job's codecs; nothing has trained, so that coded sizes are those of normal numbers in place of updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fedtune.base import Blueprint, blueprint
from fedtune.job import Job
from fedtune.memory import Memory
from fedtune.strategy import Answer, Ask, ClientInfo, Strategy
from fedtune.wire.codec import codec_from
from fedtune.wire.presets import PRESETS, Wire
from server.coordinator import draw_cohort
from server.meeting import meet
from server.records import Watcher
from simulations.engine import require_comparable, resident_trainer
from simulations.grid import InProcessGrid
from simulations.plan_round import ClientPlan, SelectiveRound, play
from simulations.stand import Stand
from simulations.traffic import Traffic, traffic


@dataclass(frozen=True)
class Plan:
    job: str
    strategy: str
    clients: tuple[ClientPlan, ...]
    layers: int | None = None  # of the model
    numbers: int | None = None  # in all of them
    wire: str = ""  # the preset and its codecs
    ratio: float | None = (
        None  # how many times as large the bytes were, evaluations among them, were every number sent as it is
    )
    exact: Mapping[str, str] = field(default_factory=dict)  # direction -> why it loses nothing, though the preset would

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_job(job: Job, watcher: Watcher) -> Plan:
    """Raises what a run of the job would raise before its first training step."""
    require_comparable(job)
    trainer = resident_trainer(job, watcher)
    job, strategy, grid = trainer.job, trainer.strategy, InProcessGrid(trainer)
    model = blueprint(job)
    clients, _ = meet(grid, job, model)
    strategy.check(list(clients.values()))
    cohort = draw_cohort(job, clients, 1)
    known = {
        info.id: ClientPlan(info.id, info.examples, info.steps, None if strategy.trains_whole else info.rank, info.limits)
        for info in clients.values()
    }
    if _says_what_trains(strategy, model, cohort[0]):
        round = SelectiveRound(trainer, model, cohort, watcher)
        planned = round.planned(known)
        size = len(round.parts.layers), sum(round.parts.numbers)
        return _with_wire(Plan(job.name, job.strategy.name, tuple(planned.values()), *size), job, strategy)
    sent = traffic(strategy, job, model, job.make_wire())
    drawn = {info.id: _sending(known[info.id], sent) for info in cohort}
    plan = _with_wire(Plan(job.name, job.strategy.name, tuple({**known, **drawn}.values())), job, strategy)
    return replace(plan, ratio=_ratio(sent, job.rounds.evaluate_every))


def _sending(one: ClientPlan, sent: Traffic) -> ClientPlan:
    evaluation = sent.evaluation.down + sent.evaluation.up if sent.evaluation else None
    return replace(one, down=sent.down, up=sent.up, plain=sent.plain, evaluation=evaluation)


def _ratio(sent: Traffic, every: int) -> float:
    """Over as many rounds of training as an evaluation comes after."""
    parts = [(max(every, 1), sent), *([(1, sent.evaluation)] if sent.evaluation else [])]
    return sum(times * one.plain for times, one in parts) / sum(times * (one.down + one.up) for times, one in parts)


def _with_wire(plan: Plan, job: Job, strategy: Strategy) -> Plan:
    """And the ratio of what its clients send and are sent."""
    sent, plain = (sum(figures) for figures in zip(*map(_sent, plan.clients), strict=True))
    reasons = {"down": strategy.exact_down, "up": strategy.exact_up}
    forced = {way: why for way, why in reasons.items() if why and not _is_exact(job, way)}
    return replace(plan, wire=wire_line(job, job.make_wire()), ratio=plain / sent if plain and sent else None, exact=forced)


def _sent(one: ClientPlan) -> tuple[int, int]:
    return (one.down or 0) + (one.up or 0), one.plain or 0


def _is_exact(job: Job, way: str) -> bool:
    """As the job has it, whatever its method needs."""
    return codec_from(getattr(job.wire, way) or getattr(PRESETS[job.wire.preset], way)).exact


def wire_line(job: Job, wire: Wire) -> str:
    """In a line: the preset and the codecs, as a job file writes them."""
    if wire.up.change.plain and wire.down.change.plain:
        return "plain"
    codecs = {"up": wire.up.change, "down": wire.down.change, "first": wire.down.first}
    return f"{job.wire.preset}, " + ", ".join(f"{way} {codec.text}" for way, codec in codecs.items())


def _says_what_trains(strategy: Strategy, model: Blueprint, info: ClientInfo) -> bool:
    """Found with a client that knows shapes only."""
    stand = Stand(info.examples, info.rank, info.scale, torch.Generator(), info.pinned, info.steps, model.shapes)
    memory = Memory()

    def answer(one: ClientInfo, ask: Ask, step: str) -> Answer:
        return strategy.answer(Ask(ask.kind, ask.payload_for(one.id)), stand, memory)

    return play(strategy, strategy.start(model.adapter), [info], answer) is not None
