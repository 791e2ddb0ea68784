"""One Flower run: submitted with `flwr run`, followed to its end, and its status read, for `flwr run` exits 0 on failure."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import tomli_w

from fedtune.errors import FedtuneError, RoundFailed
from fedtune.job import Job
from server.bundle import make_bundle
from server.records import RoundRecord, Watcher
from simulations.flower_processes import CONNECTION, POLL, FlowerProcesses

COMPLETED = "finished:completed"
STATUS_POLL = 2.0  # seconds; each question starts a process


def run_through(flower: FlowerProcesses, job: Job, folder: Path, clientapp: str, watcher: Watcher, *options: str) -> None:
    """The job on the SuperLink that `flower` has started. Raises RoundFailed with Flower's reason when it failed."""
    bundle = make_bundle(flower.folder / "bundle", "server.app:app", clientapp)
    config = flower.folder / "run.toml"
    config.write_text(tomli_w.dumps({"job": job.model_dump_json(), "folder": str(folder.absolute())}), encoding="utf-8")
    progress = Progress(folder / "metrics.jsonl", watcher)
    submitted = flower.start("run", ["flwr", "run", str(bundle), CONNECTION, "--stream", "--run-config", str(config), *options])
    while submitted.poll() is None:
        flower.check()
        progress.show()
        time.sleep(POLL)
    status, details = ended(flower, progress)
    if status != COMPLETED:
        raise RoundFailed(f"the run through Flower ended as {status}: {details or flower.log('run').read_text()[-2000:]}")


def ended(flower: FlowerProcesses, progress: Progress) -> tuple[str, str]:
    """Status and details of the run that was submitted last, once it has ended: its stream of logs may have broken before."""
    run = run_id(flower.log("run").read_text(errors="replace"))
    while not (status := status_of(flower, run))[0].startswith("finished"):
        flower.check()
        progress.show()
        time.sleep(STATUS_POLL)
    progress.show()
    return status


def run_id(said: str) -> str:
    """From what `flwr run` printed. Raises FedtuneError when Flower did not take the run."""
    started = re.search(r"started run (\d+)", said)
    if started is None:
        raise FedtuneError(f"Flower did not take the run: {said[-2000:]}")
    return started[1]


def status_of(flower: FlowerProcesses, run: str) -> tuple[str, str]:
    command = ["flwr", "list", CONNECTION, "--run-id", run, "--format", "json"]
    listed = subprocess.run(command, env=flower.environment, cwd=flower.folder, capture_output=True, text=True, check=False)
    try:
        found = json.loads(listed.stdout)["runs"][0]
    except (ValueError, LookupError) as error:
        raise FedtuneError(f"Flower does not say how the run stands: {listed.stdout}{listed.stderr}") from error
    return str(found["status"]), re.sub(r"^\w+ failed with exception: ", "", str(found["status-details"] or ""))


class Progress:
    """Tells a watcher of each round as its line appears in `metrics.jsonl`."""

    def __init__(self, metrics: Path, watcher: Watcher) -> None:
        self._metrics, self._watcher, self._read = metrics, watcher, 0

    def show(self) -> None:
        if not self._metrics.exists():
            return
        with self._metrics.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                self._read += len(line)
                self._watcher.round_ended(RoundRecord.from_json(json.loads(line)))
