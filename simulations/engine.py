"""The simulation: a job's clients, one after the other, on one resident base model in this process."""

from __future__ import annotations

from pathlib import Path

from client.trainer import Trainer
from fedtune.job import Job
from server.coordinator import RunResult, run_job
from server.records import Watcher
from server.run_folder import require_free
from simulations.grid import InProcessGrid


def simulate(job: Job, folder: Path, watcher: Watcher) -> RunResult:
    """Play the whole job here. What is wrong with the job, the model or any client's data ends it before the first step."""
    require_free(folder)
    trainer = Trainer.for_simulation(job)
    for number, client in enumerate(trainer.clients):
        watcher.doing("reading data", number, len(trainer.clients))
        trainer.data(client)
    return run_simulation(trainer, folder, watcher)


def run_simulation(trainer: Trainer, folder: Path, watcher: Watcher) -> RunResult:
    return run_job(trainer.job, InProcessGrid(trainer), folder, watcher)
