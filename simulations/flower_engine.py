"""The simulation through `flwr run` and Ray, for machines with many cores or several of them: same job, same messages."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

from client.data.load import load_client
from client.data.sources import Source, clients_in
from client.kept import HOME
from client.loading import load_tokenizer, pick_device
from client.trainer import with_labels
from fedtune.errors import UserError
from fedtune.job import Job
from server.following import as_seen_anywhere
from server.records import Watcher
from server.resuming import require_resumable
from server.run_folder import require_free
from simulations.flower_client import MEMORY
from simulations.flower_processes import FlowerProcesses
from simulations.flower_run import run_through


def run_with_flower(job: Job, folder: Path, watcher: Watcher, resume: bool = False) -> None:
    """Play the whole job on Ray. What is wrong with the job or its data is said before any process starts.

    Raises RoundFailed with Flower's reason when the run failed. A client may be asked by any worker, so results are the
    in-process engine's, bit for bit, only where every worker computes with as many threads as it did (`machine.threads`).
    """
    require_resumable(folder, job) if resume else require_free(folder)
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "--engine flower needs Ray: pip install 'fedtune[ray]', or leave --engine out to simulate in this process"
        )
    sources = clients_in(job.data, job.clients)
    job = with_labels(as_seen_anywhere(job, len(sources)), sources)
    watcher.started(job, training_examples(job, sources))
    with tempfile.TemporaryDirectory(prefix="ft") as home, FlowerProcesses(Path(home), ray_environment(home)) as flower:
        flower.superlink("--simulation")
        run_through(flower, job, folder, "simulations.flower_client:app", watcher, federation(job), resume)
    forget(folder / MEMORY)


def forget(clients: Path) -> None:
    """Take the clients' memories away; their own adapters, where the method is personal, stay."""
    shutil.rmtree(clients / HOME, ignore_errors=True)
    if clients.is_dir() and not any(clients.iterdir()):
        clients.rmdir()


def training_examples(job: Job, sources: dict[str, Source]) -> dict[str, int]:
    """Client -> training examples, read here so that bad data ends the run with its own words."""
    tokenizer = load_tokenizer(job)
    settings = job.data, job.model.task, tokenizer, job.seed, job.model.label_names
    return {client: len(load_client(source, *settings).train) for client, source in sources.items()}


def federation(job: Job) -> str:
    """One node for each client, and what each of Ray's workers may use. A GPU goes to one client at a time."""
    gpus = float(pick_device(job.machine.device).type == "cuda")
    settings = {
        "num-supernodes": job.clients.count,
        "client-resources-num-cpus": job.machine.threads or 1,
        "client-resources-num-gpus": gpus,
    }
    return " ".join(f"{key}={value}" for key, value in settings.items())


def ray_environment(home: str) -> dict[str, str]:
    """Ray's session beside Flower's home, so that nothing is left in /tmp."""
    return {"RAY_TMPDIR": home, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
