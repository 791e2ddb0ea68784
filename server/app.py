"""Flower's ServerApp: reads the job from the run's config, waits for its clients and runs the rounds."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import JobError, RoundFailed
from fedtune.job import Job, checked_job
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.keyfiles import verify_key
from server.coordinator import run_job
from server.fetching import fetch_well
from server.journal import read
from server.past import started_in
from server.post import OPEN, Post, SignedPost
from server.run_folder import JOURNAL, holds_run
from server.serials import NAME as SERIALS
from server.watchers import Quiet

app = ServerApp()
PATIENCE = 60.0  # seconds for clients to come back


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Who started the run looks on through `metrics.jsonl` in its folder.

    What this raises ends the Flower run as failed, with the message as its details.
    """
    fetch_well()
    config = context.run_config
    job, folder, resume = job_of(str(config["job"])), Path(str(config["folder"])), bool(config.get("resume"))
    if resume and holds_run(folder):
        await_the_same(grid, folder, str(config.get("keys", "")))
    else:
        wait_for_clients(grid, job.clients.count or 1, job.rounds.timeout)
    run_job(job, grid, folder, Quiet(), post_of=partial(post_of, job, str(config.get("keys", "")), grid), resume=resume)


def job_of(text: str) -> Job:
    try:
        return checked_job(json.loads(text), "the run's config")
    except ValueError as error:
        raise JobError(f"the run's config 'job' is not JSON, given {text[:40]!r}: start the run with fedtune") from error


def post_of(job: Job, keys: str, grid: Grid, run: str) -> Post:
    """Signed by the keys in that folder; open where none is named, as `--insecure` asks for."""
    if not keys:
        return OPEN
    own = CoordinatorKeys.load(Path(keys))
    records = own.registry.clients().values()
    return SignedPost(
        own.signing,
        own.sealing,
        {record.name: verify_key(record.verify) for record in records if not record.revoked},
        run,
        end_to_end=job.security.end_to_end,
        revoked={record.name: record.revoked for record in records if record.revoked},
        owner=Owners(grid, {record.node_pem(): record.name for record in records}),
        serials=own.folder / SERIALS,
    )


class Owners:
    """Whose node it is, by the key that it has shown to the SuperLink."""

    def __init__(self, grid: Grid, names: Mapping[bytes, str]) -> None:
        self._grid, self._names = grid, names
        self._known: dict[int, str | None] = {}

    def __call__(self, node: int) -> str | None:
        if node not in self._known:
            nodes = getattr(self._grid, "get_nodes", list)()  # of Flower's own Grid; others have none
            self._known |= {found.node_id: self._names.get(found.public_key) for found in nodes}
        return self._known.get(node)


def await_the_same(grid: Grid, folder: Path, keys: str = "") -> None:
    """The clients that the run has had, save those that were revoked: after a crash of the SuperLink they come back within
    seconds. Not for ever: a round that is taken up again can do without some, as any round can."""
    started = started_in(read(folder / JOURNAL)[0])
    if started:
        records = CoordinatorKeys.registry_in(Path(keys)).clients().values() if keys else ()
        gone = {record.name for record in records if record.revoked}
        with suppress(RoundFailed):
            wait_for_clients(grid, len(started["clients"].keys() - gone), PATIENCE)


def wait_for_clients(grid: Grid, wanted: int, timeout: float) -> None:
    """Polls with waits that grow from 50 ms to half a second. Raises RoundFailed after `timeout` seconds."""
    deadline, wait = time.monotonic() + timeout, 0.05
    while (connected := len(list(grid.get_node_ids()))) < wanted:
        if time.monotonic() > deadline:
            raise RoundFailed(f"{connected} of {wanted} clients connected within {timeout:.0f} s (rounds.timeout)")
        time.sleep(wait)
        wait = min(2 * wait, 0.5)
