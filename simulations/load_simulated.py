"""Thousands of scripted clients in one process, and the coordinator that asks them: its memory, its seconds, its disk."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import server.opening
import server.round
from fedtune.job import Job
from fedtune.wire.ends import ServerEnd
from server.asking import Asking
from server.checkpoint import Checkpoints
from server.coordinator import run_job
from server.exchange import Asks
from server.gatekeeper import Gatekeeper
from server.journal import Journal
from server.records import RoundRecord
from server.run_folder import JOURNAL, METRICS, RunFolder
from server.spool import Spool
from server.watchers import Quiet
from simulations.faults_job import Place
from simulations.grid import InProcessGrid
from simulations.load_clients import ScriptedTrainer, names
from simulations.load_meter import Meter

SMALL = ("adapter.rank=1", "rounds.quorum=0.5", "data.packing=true")
METHODS = {
    "small adapter": (*SMALL, "wire.preset=plain"),
    "small adapter, default codecs": (*SMALL, "wire.preset=balanced"),
    "scalars": ("strategy.name=fedkseed", "strategy.K=512", "train.optimizer=sgd", "train.clip=0", "wire.preset=plain"),
}
PARTS: Mapping[str, list[tuple[Any, str]]] = {
    "clients": [(ScriptedTrainer, "answer")],
    "hello": [(server.opening, "meet")],
    "ask": [(ServerEnd, "ask"), (Asks, "push"), (Asking, "_packed")],
    "receive": [(Asks, "pull"), (Asks, "reply")],
    "gate": [(Gatekeeper, "let_in"), (Gatekeeper, "left_out"), (Gatekeeper, "counted")],
    "spool": [(Spool, "put"), (Spool, "settle"), (Spool, "get"), (Spool, "clear")],
    "journal": [(Journal, "write")],
    "fold": [(server.round, "computed")],
    "publish": [(RunFolder, "publish")],
    "state": [(Checkpoints, "write"), (RunFolder, "log")],
}
WAITS: Mapping[str, list[tuple[Any, str]]] = {
    "fsync": [(os, "fsync")],
    "settle": [(Spool, "settle")],
    "clear": [(Spool, "clear")],
}


@dataclass(frozen=True)
class Moment:
    """At the end of a round."""

    round: int
    answers: int
    seconds: float
    resident: int  # bytes
    journal: int
    metrics: int
    state: int
    parts: Mapping[str, float]  # seconds of the processor
    waits: Mapping[str, float]  # seconds by the clock
    fsyncs: int


@dataclass
class Look(Quiet):
    """Writes down what a round has cost, as it ends."""

    folder: Path
    meter: Meter
    waits: Meter
    moments: list[Moment] = field(default_factory=list)
    began: tuple[float, float] = field(default_factory=lambda: now())

    def round_ended(self, record: RoundRecord) -> None:
        seconds, processor = (after - before for after, before in zip(now(), self.began, strict=True))
        parts, answers, fsyncs = dict(self.meter.seconds), self.meter.calls["clients"], self.waits.calls["fsync"]
        parts["rest"] = processor - sum(parts.values())
        gc.collect()
        sizes = [size(self.folder / name) for name in (JOURNAL, METRICS, "state")]
        self.moments.append(Moment(record.round, answers, seconds, resident(), *sizes, parts, dict(self.waits.seconds), fsyncs))
        for meter in (self.meter, self.waits):
            meter.seconds.clear()
            meter.calls.clear()
        self.began = now()


def now() -> tuple[float, float]:
    """By the clock, and of the processor."""
    return time.perf_counter(), time.process_time()


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def job_of(place: Place, method: str, clients: int, cohort: int, rounds: int, every: int) -> Job:
    told = f"clients.count={clients}", f"rounds.clients={cohort}", f"rounds.count={rounds}", f"rounds.evaluate_every={every}"
    return place.job(*METHODS[method], *told)


def measured(folder: Path, method: str, clients: int, cohort: int, rounds: int, every: int) -> list[Moment]:
    """One run; of each round what it has cost. The first is everybody's hello, where none is evaluated before."""
    place = Place.make(folder)
    job, meter, waits = job_of(place, method, clients, cohort, rounds, every), Meter(), Meter(time.perf_counter)
    look = Look(folder / "run", meter, waits)
    with waits.on(WAITS), meter.on(PARTS):
        run_job(job, InProcessGrid(ScriptedTrainer(names(clients), job)), folder / "run", look)
    return look.moments
