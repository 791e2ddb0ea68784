"""Flower's ServerApp: reads the job from the run's config, waits for its clients and runs the rounds."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import http_grid

from fedtune.errors import JobError, RoundFailed
from fedtune.job import Job, checked_job
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.keyfiles import verify_key
from server.coordinator import run_job
from server.post import OPEN, Post, SignedPost
from server.watchers import Quiet

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Who started the run looks on through `metrics.jsonl` in its folder.

    What this raises ends the Flower run as failed, with the message as its details.
    """
    fetch_sooner()
    job = job_of(str(context.run_config["job"]))
    post = post_of(job, str(context.run_config.get("keys", "")), context.run_id)
    wait_for_clients(grid, job.clients.count or 1, job.rounds.timeout)
    run_job(job, grid, Path(str(context.run_config["folder"])), Quiet(), post=post)


def fetch_sooner() -> None:
    """Parts of an answer that are still on their way are asked for again within 50 ms; Flower would wait 1, 2, 4 s."""
    if pull := getattr(http_grid, "pull_objects", None):
        http_grid.pull_objects = partial(pull, initial_backoff=0.05, backoff_cap=0.5)  # type: ignore[attr-defined]


def job_of(text: str) -> Job:
    try:
        return checked_job(json.loads(text), "the run's config")
    except ValueError as error:
        raise JobError(f"the run's config 'job' is not JSON, given {text[:40]!r}: start the run with fedtune") from error


def post_of(job: Job, keys: str, run: int) -> Post:
    """Signed by the keys in that folder; open where none is named, as `--insecure` asks for."""
    if not keys:
        return OPEN
    own = CoordinatorKeys.load(Path(keys))
    records = own.registry.clients().values()
    return SignedPost(
        own.signing,
        own.sealing,
        {record.name: verify_key(record.verify) for record in records if not record.revoked},
        f"{job.name}.{run}",
        end_to_end=job.security.end_to_end,
        revoked={record.name: record.revoked for record in records if record.revoked},
    )


def wait_for_clients(grid: Grid, wanted: int, timeout: float) -> None:
    """Polls with waits that grow from 50 ms to half a second. Raises RoundFailed after `timeout` seconds."""
    deadline, wait = time.monotonic() + timeout, 0.05
    while (connected := len(list(grid.get_node_ids()))) < wanted:
        if time.monotonic() > deadline:
            raise RoundFailed(f"{connected} of {wanted} clients connected within {timeout:.0f} s (rounds.timeout)")
        time.sleep(wait)
        wait = min(2 * wait, 0.5)
