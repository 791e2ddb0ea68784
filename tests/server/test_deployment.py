"""The same job over real sockets: a SuperLink, two nodes with their trainers, and the bits of the simulation."""

from __future__ import annotations

import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.errors import JobError, RoundFailed
from fedtune.job import Job, checked_job
from server.app import job_of, wait_for_clients
from server.bundle import make_bundle
from server.records import RoundRecord
from server.watchers import Quiet
from simulations.engine import simulate
from simulations.flower_processes import FlowerProcesses, started_in
from simulations.flower_run import run_through

CLIENTS = ("asyncio", "http")
ADAPTER = Path("adapter", "adapter_model.safetensors")
MODEL = Path("model", "model.safetensors")
WEIGHTS = Path("weights", "weights.safetensors")


def small_job(**changes: object) -> Job:
    """Two rounds of two steps, on one thread: sums of floats depend on how many share the work."""
    given = {
        "seed": 3,
        "clients": {"names": CLIENTS, "count": 2},
        "train": {"steps": 2},
        "rounds": {"count": 2, "evaluate_every": 2},
        "data": {"max_held_out": 8},
        "machine": {"threads": 1},
    }
    return checked_job(given | changes, "this test")


class Rounds(Quiet):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.records: list[RoundRecord] = []

    def round_ended(self, record: RoundRecord) -> None:
        self.records.append(record)


class Nodes:
    """As much of a Grid as the wait for clients needs: one more node is connected at every look, up to `most`."""

    def __init__(self, most: int) -> None:
        self.most, self.looks = most, 0

    def get_node_ids(self) -> range:
        self.looks += 1
        return range(min(self.looks - 1, self.most))


def test_the_run_starts_when_the_last_client_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    wait_for_clients(Nodes(most=9), wanted=6, timeout=60)
    assert slept == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5]  # doubled up to half a second, while 0, 1, ... 5 are there


def test_clients_that_do_not_come_end_the_run_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(RoundFailed, match="2 of 3 clients connected within 5 s"):
        wait_for_clients(Nodes(most=2), wanted=3, timeout=5)


def test_the_job_comes_from_the_run_s_config() -> None:
    job = small_job()
    assert job_of(job.model_dump_json()) == job
    with pytest.raises(JobError, match="not JSON, given ''"):
        job_of("")
    with pytest.raises(JobError, match="unknown key 'sede', did you mean 'seed'"):
        job_of('{"sede": 1}')


def test_the_bundle_holds_no_code_and_declares_what_a_run_may_set(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", "server.app:app", "client.app:app")
    assert [file.name for file in folder.iterdir()] == ["pyproject.toml"]
    app = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    assert app["config"] == {"job": "", "folder": "", "keys": ""}


@pytest.fixture
def flower() -> Iterator[FlowerProcesses]:
    """A SuperLink and two nodes; afterwards nothing of it runs."""
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        with FlowerProcesses(Path(folder), {"OMP_NUM_THREADS": "1"}) as flower:
            address = flower.superlink()
            for client in CLIENTS:
                flower.supernode(client, address, flower.trainer(client))
            yield flower
        assert started_in(flower.folder) == []


@pytest.mark.slow
def test_two_nodes_over_sockets_give_the_simulated_bits(flower: FlowerProcesses, tmp_path: Path) -> None:
    """An adapter by the smallest wire, then on the same nodes a whole model for which only seeds and slopes have crossed, last
    the weights of the layers that were chosen by gradients, of which one node can afford a single one."""
    _require_same(flower, small_job(wire="tiny"), tmp_path / "adapter", ADAPTER)
    plain = {"steps": 2, "optimizer": "sgd", "clip": 0.0, "lr": 1e-3}
    _require_same(flower, small_job(strategy={"name": "fedkseed"}, train=plain), tmp_path / "whole", MODEL)

    limits = {"names": CLIENTS, "count": 2, "layers": {CLIENTS[0]: 1}}
    _require_same(flower, small_job(strategy={"name": "selective_layers"}, clients=limits), tmp_path / "layers", WEIGHTS)

    # The nodes and their trainers outlive a run. One that cannot work ends as failed, with its reason.
    bad = small_job(data={"path": "/there/is/none"})
    with pytest.raises(RoundFailed, match="/there/is/none"):
        run_through(flower, bad, tmp_path / "failed", "client.app:app", Quiet())


def _require_same(flower: FlowerProcesses, job: Job, folder: Path, file: Path) -> None:
    """What the job publishes is the same bit for bit over the sockets and in simulation, and so is every loss."""
    watcher = Rounds()
    try:
        run_through(flower, job, folder / "deployed", "client.app:app", watcher)
    except Exception:
        print(flower.logs())  # noqa: T201
        raise
    simulated = simulate(job, folder / "simulated", Quiet())
    assert (folder / "deployed" / file).read_bytes() == (simulated.folder / file).read_bytes()
    assert [record.loss for record in watcher.records] == [record.loss for record in simulated.records]
    assert [record.answered for record in watcher.records] == [2, 2, 2]
    assert [record.selected for record in watcher.records] == [record.selected for record in simulated.records]
