"""The simulation: a job's clients, one after the other, on one resident base model in this process."""

from __future__ import annotations

from pathlib import Path

from client.names import folder_name
from client.trainer import Trainer
from fedtune.errors import JobError
from fedtune.job import Job
from server.coordinator import RunResult, finished, run_job
from server.records import Watcher
from server.report_folder import read_run
from server.resuming import require_resumable
from server.run_folder import RunFolder, require_free, writing
from simulations.compare import compare
from simulations.grid import InProcessGrid

MEMORY = "memory"  # of all clients, in the run's folder: for --resume, also with more rounds


def simulate(job: Job, folder: Path, watcher: Watcher, resume: bool = False) -> RunResult:
    """Play the whole job here, and the baselines where it says `compare`; with `resume` go on with the run in the folder.

    What is wrong with the job, the model or any client's data ends it before the first step.
    """
    require_resumable(folder, job) if resume else require_free(folder)
    require_comparable(job)
    if resume and is_done(job, folder) and (done := finished(job, folder)):
        return done
    trainer = resident_trainer(job, watcher, folder / MEMORY)
    result = run_simulation(trainer, folder, watcher, resume=resume)
    if job.compare:
        compare_with(trainer, folder, watcher)
    return result


def is_done(job: Job, folder: Path) -> bool:
    """What comes after the rounds is there too."""
    own = not job.make_strategy().personal or (folder / "clients").is_dir()
    return own and (not job.compare or (folder / "comparison.json").exists())


def compare_with(trainer: Trainer, folder: Path, watcher: Watcher) -> None:
    """Measure the baselines for the finished run in `folder`, and write them there."""
    RunFolder(folder).compared(compare(trainer, read_run(folder).rounds, watcher))


def require_comparable(job: Job) -> None:
    """Raises JobError where the baselines could not be measured as the run was."""
    if job.compare and job.rounds.evaluate_every != 1:
        every = job.rounds.evaluate_every
        raise JobError(f"compare = true needs every round evaluated, given rounds.evaluate_every = {every}; set it to 1")
    if job.compare and job.make_strategy().trains_whole:
        raise JobError(
            f"compare = true trains adapters to compare with, and '{job.strategy.name}' trains the whole model, at a rate "
            "of its own; type --set compare=false, and compare runs with `fedtune compare`"
        )
    if job.compare and job.data.held_out == 0:
        raise JobError("compare = true measures on held-out examples, given data.held_out = 0; set data.held_out = 0.2")


def resident_trainer(job: Job, watcher: Watcher, memory: Path | None = None) -> Trainer:
    """The trainer with every client's data read, so that a bad file is known before any time is spent. What the clients
    remember is kept in `memory`; without it, it goes with this process."""
    trainer = Trainer.for_simulation(job, memory)
    for number, client in enumerate(trainer.clients):
        watcher.doing("reading data", number, len(trainer.clients))
        trainer.data(client)
    if job.compare and not any(trainer.data(client).held_out for client in trainer.clients):
        raise JobError("compare = true measures on held-out examples, and no client has any: give the clients more data")
    return trainer


def run_simulation(
    trainer: Trainer, folder: Path, watcher: Watcher, write_model: bool = True, resume: bool = False
) -> RunResult:
    result = run_job(trainer.job, InProcessGrid(trainer), folder, watcher, write_model, resume=resume)
    if trainer.strategy.personal:
        write_own_adapters(trainer, result)
    return result


def write_own_adapters(trainer: Trainer, result: RunResult) -> None:
    """`clients/<client>/adapter` in the run's folder: what each client ends with. On a node it lies with the trainer."""
    last, payload = trainer.job.rounds.count, trainer.strategy.broadcast(result.state)
    for client in trainer.clients:
        trainer.strategy.use(trainer.as_it_came(client, payload), trainer.local(client, last), trainer.memory(client))
        with writing(result.folder):
            trainer.write_own(client, last, result.folder / "clients" / folder_name(client) / "adapter")
