"""The same job over real sockets: a SuperLink, two nodes with their trainers, and the bits of the simulation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.errors import RoundFailed
from fedtune.job import Job, checked_job
from server.records import RoundRecord
from server.watchers import Quiet
from simulations.engine import simulate
from simulations.flower_processes import FlowerProcesses, started_in
from simulations.flower_run import run_through

CLIENTS = ("asyncio", "http")
ADAPTER = Path("adapter", "adapter_model.safetensors")


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
def test_two_nodes_over_sockets_give_the_simulated_adapter_bit_for_bit(flower: FlowerProcesses, tmp_path: Path) -> None:
    job, deployed, watcher = small_job(), tmp_path / "deployed", Rounds()
    try:
        run_through(flower, job, deployed, "client.app:app", watcher)
    except Exception:
        print(flower.logs())  # noqa: T201
        raise

    simulated = simulate(job, tmp_path / "simulated", Quiet())
    assert (deployed / ADAPTER).read_bytes() == (simulated.folder / ADAPTER).read_bytes()
    assert [record.loss for record in watcher.records] == [record.loss for record in simulated.records]
    assert [record.answered for record in watcher.records] == [2, 2, 2]

    # The nodes and their trainers outlive a run. One that cannot work ends as failed, with its reason.
    bad = small_job(data={"path": "/there/is/none"})
    with pytest.raises(RoundFailed, match="/there/is/none"):
        run_through(flower, bad, tmp_path / "failed", "client.app:app", Quiet())
