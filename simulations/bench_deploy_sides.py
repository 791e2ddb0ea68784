"""What `simulations/bench_deploy.py` compares: steps where the model is, a stock Flower app, and a deployment of fedtune.

Two clients on one machine, each with half of its cores, on the same text.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

import tomli_w

from client.data.load import load_client
from client.data.sources import clients_in
from client.loading import load_tokenizer
from fedtune.errors import RoundFailed
from fedtune.job import Job, checked_job
from fedtune.paths import app_root, base_model
from fedtune.processes import Processes, end, free_port, started_in
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle
from server.flower_control import COMPLETED, Control
from simulations.flower_processes import FlowerProcesses

CLIENTS = ("asyncio", "email")
LENGTH, BATCH, STEPS, RATE = 128, 4, 5, 1e-3
THREADS = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(CLIENTS)))}
POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
ENDED = "ended.txt"  # when each round of the stock app had ended
LONGEST = 900.0  # seconds for a run


def job_of(rounds: int, evaluate: bool) -> Job:
    """What the stock app does, for fedtune: the same steps, in the same precision. All else is as it comes."""
    return checked_job(
        {
            "name": "bench",
            "clients": {"names": CLIENTS, "count": len(CLIENTS)},
            "rounds": {"count": rounds, "evaluate_every": int(evaluate)},
            "adapter": {"rank": 8},
            "train": {"steps": STEPS, "batch": BATCH, "lr": RATE, "precision": "fp32"},
            "data": {"path": "builtin:stdlib", "max_length": LENGTH, "max_held_out": 16},
            "machine": {"threads": int(THREADS["OMP_NUM_THREADS"])},
        },
        "the bench",
    )


def write_tokens(folder: Path) -> None:
    """The clients' examples for the stock app, by the number of its partition: tokenized, and all of one length."""
    job = job_of(1, True)
    tokenizer, sources = load_tokenizer(job), clients_in(job.data, job.clients)
    for partition, name in enumerate(CLIENTS):
        data = load_client(sources[name], job.data, "causal", tokenizer, job.seed)
        parts = {"train": data.train, "test": data.held_out}
        rows = {part: [list(one.input_ids) for one in own if len(one.input_ids) == LENGTH] for part, own in parts.items()}
        (folder / f"{partition}.json").write_text(json.dumps(rows))


# the steps alone


class Local:
    """A process for each client, which holds model and data: all take the stock app's steps at the same time."""

    def __init__(self, data: Path) -> None:
        self._data = data

    def __enter__(self) -> Self:
        spawn = multiprocessing.get_context("spawn")
        pipes = [spawn.Pipe() for _ in CLIENTS]
        self._pipes = [ours for ours, _ in pipes]
        self.processes = [
            spawn.Process(target=take_steps, args=(its, str(self._data), partition)) for partition, (_, its) in enumerate(pipes)
        ]
        with patch.dict(os.environ, THREADS):
            for process in self.processes:
                process.start()
        for _, its in pipes:
            its.close()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            pipe.close()
            process.join()

    def rounds(self, count: int, evaluate: bool) -> list[float]:
        """Seconds of the slowest in each, after one that does not count."""
        return [self._round(evaluate) for _ in range(count + 1)][1:]

    def _round(self, evaluate: bool) -> float:
        for pipe in self._pipes:
            pipe.send(evaluate)
        return max(pipe.recv() for pipe in self._pipes)


def take_steps(asked: Connection, data: str, partition: int) -> None:
    from simulations.stock_app import task

    model, loaders = task.load_model(str(base_model())), task.load_data(data, partition, BATCH)
    while (evaluate := next_or_end(asked)) is not None:
        began = time.monotonic()
        task.train(model, loaders[0], STEPS, RATE)
        if evaluate:
            task.evaluate(model, loaders[1])
        asked.send(time.monotonic() - began)


def next_or_end(asked: Connection) -> bool | None:
    try:
        return asked.recv()
    except EOFError:
        return None


# a stock Flower app


def stock(folder: Path, data: Path, rounds: int, evaluate: bool) -> list[float]:
    """Seconds of each round, on Flower's own processes with Flower's own waits."""
    folder.mkdir()
    shutil.copytree(
        app_root() / "simulations" / "stock_app", folder / "stock-app", ignore=shutil.ignore_patterns("__pycache__")
    )
    with FlowerProcesses(folder, THREADS) as flower:
        del flower.environment[POLL]
        address = flower.superlink()
        for partition, name in enumerate(CLIENTS):
            node = ["--superlink", address, "--port", str(free_port()), "--node-config", f"partition-id={partition}"]
            flower.start(f"supernode-{name}", ["flower-supernode", "--insecure", *node])
        with Control(address) as control:
            run = control.submit(folder / "stock-app", config_of(data, folder / ENDED, rounds, evaluate))
            flower.until(lambda: control.status(run)[0].startswith("finished"), "the stock app's run to end", LONGEST)
            if control.status(run)[0] != COMPLETED:
                raise RoundFailed(f"the stock app's run failed: {control.status(run)[1]}")
    times = [float(line) for line in (folder / ENDED).read_text().split()]
    return [after - before for before, after in pairwise(times)]


def config_of(data: Path, ended: Path, rounds: int, evaluate: bool) -> dict[str, Any]:
    """For the keys of its pyproject.toml."""
    return {
        "num-server-rounds": rounds,
        "fraction-evaluate": float(evaluate),
        "local-steps": STEPS,
        "batch-size": BATCH,
        "learning-rate": RATE,
        "model": str(base_model()),
        "data": str(data),
        "ended": str(ended),
    }


# fedtune


def ours(folder: Path, rounds: int, evaluate: bool) -> list[float]:
    """Seconds of each round, deployed with TLS, node keys, signed asks and sealed answers; what the breakdown needs is
    in the folder's `trace`."""
    keys = CoordinatorKeys.init(folder / "keys", ["localhost"], f"localhost:{free_port()}")
    bundles = [make_bundle(keys, name) for name in CLIENTS]
    (folder / "trace").mkdir()
    (folder / "job.toml").write_text(tomli_w.dumps(job_of(rounds, evaluate).model_dump(mode="json", exclude_none=True)))
    with deployment(folder) as processes:
        port = keys.address.rpartition(":")[2]
        server = ["--host", "127.0.0.1", "--port", port, "--keys", str(keys.folder), "--out", str(folder / "run")]
        command = [sys.executable, "-m", "fedtune.cli"]
        processes.start("server", [*command, "server", str(folder / "job.toml"), "--dir", str(folder / "server"), *server])
        for bundle in bundles:
            own = ["--data", "builtin:stdlib", "--model", str(base_model()), "--dir", str(folder / bundle.name)]
            processes.start(f"client-{bundle.name}", [*command, "client", "--bundle", str(bundle), *own])
        processes.until(lambda: processes.ended("server") is not None, "the run to end", LONGEST)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [line["seconds"] for line in map(json.loads, lines) if line["round"] > 0]


@contextmanager
def deployment(folder: Path) -> Iterator[Processes]:
    """What server and clients have started themselves ends with them."""
    path = os.pathsep.join([str(app_root()), str(app_root() / "simulations" / "tracing")])
    try:
        with Processes(folder, {**THREADS, "PYTHONPATH": path, "FEDTUNE_TRACE": str(folder / "trace")}) as processes:
            yield processes
    finally:
        for own in ("server", *CLIENTS):
            end(started_in(folder / own))
