"""One Flower run on a SuperLink that a simulation or a test has started."""

from __future__ import annotations

from pathlib import Path

from fedtune.job import Job
from server.flower_control import Control
from server.following import Progress, follow, keep_log, require_completed, submit
from server.records import Watcher
from simulations.flower_processes import FlowerProcesses


def run_through(
    flower: FlowerProcesses,
    job: Job,
    folder: Path,
    clientapp: str,
    watcher: Watcher,
    federation: str = "",
    resume: bool = False,
) -> None:
    """The job on the SuperLink that `flower` has started. Raises RoundFailed with Flower's reason when it failed."""
    with Control(flower.address) as control:
        run = submit(control, job, folder, flower.folder, clientapp, federation, resume)
        log = keep_log(flower.address, None, run, flower.log("run"))
        status, details = follow(control, run, Progress(folder / "metrics.jsonl", watcher), flower.check)
    log.join(timeout=5.0)
    require_completed(status, details, flower.log("run").read_text(errors="replace"))
