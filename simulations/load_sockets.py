"""A deployment with many nodes on one machine: `fedtune server`, and SuperNodes and relays as `fedtune client` starts them.

Over TLS, with node keys, signed asks and sealed answers. Behind all relays is one process that answers at once
(simulations/load_trainer.py), so a round takes what carrying its messages takes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import tomli_w

from client.halves import processes
from client.settings import Settings
from client.supervisor import SECRET
from fedtune.processes import Processes, end, free_port, started_in
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import Bundle, make_bundle
from fedtune.security.keyfiles import write_private
from server.run_folder import METRICS
from simulations.faults_job import Place
from simulations.load_clients import names
from simulations.load_simulated import SMALL

HOST = "127.0.0.1"
LONGEST = 600.0  # seconds for a run
SETTINGS = (*SMALL, "rounds.evaluate_every=0", "rounds.quorum=1.0", "machine.threads=1")
KINDS = {"SuperLink": "server.superlink", "ServerApp": "server.serverapp", "trainers": "simulations.load_trainer"}
KINDS |= {"SuperNodes": "client.supernode", "relays": "client.relay"}


@dataclass(frozen=True)
class Use:
    """Of all processes of one kind."""

    processor: float  # seconds
    resident: int  # bytes


@dataclass(frozen=True)
class Carried:
    """A run with so many nodes, without its first round."""

    nodes: int
    rounds: Sequence[float]  # seconds of each
    seconds: float  # of all of them, by the clock
    use: dict[str, Use]
    busy: float  # of the machine's cores, by all that runs on it
    load: float

    @property
    def round(self) -> float:
        return median(self.rounds)


class Nodes:
    """SuperNodes and relays; more of them are added as they are wanted."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._names, self._running = folder, names(most), 0
        self.keys = CoordinatorKeys.init(folder / "keys", [], f"{HOST}:{free_port()}")
        self._bundles = [Bundle.load(make_bundle(self.keys, name), "both") for name in self._names]
        (folder / "sockets").mkdir()
        self._processes = Processes(folder / "nodes")

    @contextmanager
    def started(self) -> Iterator[None]:
        with self._processes:
            bundles, sockets = self._bundles[0].folder.parent, self._folder / "sockets"
            self._processes.start("trainer", [sys.executable, "-m", "simulations.load_trainer", str(bundles), str(sockets)])
            self._processes.until(lambda: len(list(sockets.iterdir())) == len(self._names), "the trainers to listen")
            yield

    def grow(self, count: int) -> None:
        """To so many."""
        for bundle in self._bundles[self._running : count]:
            own = self._folder / "nodes" / bundle.name
            own.mkdir()
            write_private(own / SECRET, os.urandom(32))
            given = Settings(own, "network", bundle.name, "", bundle.folder, self._folder / "sockets" / bundle.name)
            for what, plan in processes(given, bundle, free_port()).items():
                self._processes.start(f"{what}-{bundle.name}", plan.command)
        self._running = count

    def uses(self) -> dict[str, Use]:
        return uses([*started_in(self._folder / "nodes"), *started_in(self._folder / "server")])


def uses(found: Sequence[psutil.Process]) -> dict[str, Use]:
    """By kind, of those that run."""
    all = dict.fromkeys(KINDS, Use(0.0, 0))
    for process in found:
        try:
            words, times, memory = process.cmdline(), process.cpu_times(), process.memory_full_info()
        except psutil.Error:
            continue
        for kind, module in KINDS.items():
            if module in words:
                before = all[kind]
                all[kind] = Use(before.processor + times.user + times.system, before.resident + memory.pss)
    return all


def measured(folder: Path, counts: Sequence[int], rounds: int, wire: str) -> Iterator[Carried]:
    """Runs with so many nodes, one after the other; `wire` is their preset."""
    place, nodes = Place.make(folder), Nodes(folder, max(counts))
    with nodes.started():
        for count in counts:
            nodes.grow(count)
            yield run(place, nodes, count, rounds, wire)


def run(place: Place, nodes: Nodes, count: int, rounds: int, wire: str) -> Carried:
    folder, made = place.folder, place.folder / f"run-{count}"
    job = place.job(*SETTINGS, f"wire.preset={wire}", f"clients.count={count}", f"rounds.count={rounds}")
    file = folder / f"job-{count}.toml"
    file.write_text(tomli_w.dumps(job.model_dump(mode="json", exclude_none=True)))
    port = nodes.keys.address.rpartition(":")[2]
    given = ["--host", HOST, "--port", port, "--keys", str(nodes.keys.folder), "--dir", str(folder / "server")]
    command = [sys.executable, "-m", "fedtune.cli", "server", str(file), *given, "--out", str(made)]
    try:
        with Processes(folder / "servers") as server:
            server.start(f"server-{count}", command)
            server.until(lambda: len(seconds(made)) >= 1, f"the first round with {count} nodes", LONGEST)
            first, began, busy = nodes.uses(), time.monotonic(), psutil.cpu_times_percent(None)
            server.until(lambda: len(seconds(made)) >= rounds, "the last round", LONGEST)
            took, busy, last, load = time.monotonic() - began, psutil.cpu_times_percent(None), nodes.uses(), os.getloadavg()[0]
            server.until(lambda: server.ended(f"server-{count}") is not None, "the server to end", LONGEST)
    finally:
        end(started_in(folder / "server"))
    use = {kind: Use(last[kind].processor - first[kind].processor, last[kind].resident) for kind in KINDS}
    return Carried(count, seconds(made)[1:], took, use, 1 - busy.idle / 100, load)


def seconds(run: Path) -> list[float]:
    """Of the rounds that have ended."""
    lines = (run / METRICS).read_text().splitlines() if (run / METRICS).exists() else []
    return [json.loads(line)["seconds"] for line in lines]
