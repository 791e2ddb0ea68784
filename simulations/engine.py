"""The simulation: a job's clients, one after the other, on one resident base model in this process."""

from __future__ import annotations

from pathlib import Path

from client.trainer import Trainer
from fedtune.errors import JobError
from fedtune.job import Job
from server.coordinator import RunResult, run_job
from server.records import Watcher
from server.run_folder import RunFolder, require_free
from simulations.compare import compare
from simulations.grid import InProcessGrid


def simulate(job: Job, folder: Path, watcher: Watcher) -> RunResult:
    """Play the whole job here. What is wrong with the job, the model or any client's data ends it before the first step."""
    require_free(folder)
    return run_simulation(resident_trainer(job, watcher), folder, watcher)


def simulate_and_compare(job: Job, folder: Path, watcher: Watcher) -> RunResult:
    """`simulate`, and then, where the job says `compare`, the baselines on the same resident model."""
    if job.compare and job.rounds.evaluate_every != 1:
        raise JobError(f"compare = true needs every round evaluated, given rounds.evaluate_every = {job.rounds.evaluate_every}")
    require_free(folder)
    trainer = resident_trainer(job, watcher)
    result = run_simulation(trainer, folder, watcher)
    if job.compare:
        RunFolder(folder).compared(compare(trainer, result, watcher))
    return result


def resident_trainer(job: Job, watcher: Watcher) -> Trainer:
    """The trainer with every client's data read, so that a bad file is known before any time is spent."""
    trainer = Trainer.for_simulation(job)
    for number, client in enumerate(trainer.clients):
        watcher.doing("reading data", number, len(trainer.clients))
        trainer.data(client)
    return trainer


def run_simulation(trainer: Trainer, folder: Path, watcher: Watcher) -> RunResult:
    return run_job(trainer.job, InProcessGrid(trainer), folder, watcher)
