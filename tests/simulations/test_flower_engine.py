"""The Ray engine, and the processes of Flower that it starts and ends."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from client.data.sources import clients_in
from client.trainer import Trainer
from fedtune.base import blueprint
from fedtune.errors import RunFolderError, UserError
from fedtune.job import Job, checked_job
from fedtune.strategy import Ask
from fedtune.wire import pack_ask
from server.following import Progress
from server.records import RoundRecord
from server.watchers import Quiet
from simulations import flower_engine
from simulations.engine import simulate
from simulations.flower_client import Worker
from simulations.flower_engine import as_seen_anywhere, federation, run_with_flower
from simulations.flower_processes import FlowerProcesses, ProcessDied, end, started_in

WEIGHTS = Path("adapter", "adapter_model.safetensors")


class Told(Quiet):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.clients: dict[str, int] = {}
        self.records: list[RoundRecord] = []

    def started(self, job: Job, clients: dict[str, int]) -> None:
        self.clients = clients

    def round_ended(self, record: RoundRecord) -> None:
        self.records.append(record)


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[FlowerProcesses]:
    with FlowerProcesses(tmp_path / "flower") as flower:
        yield flower


def test_without_ray_the_user_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedtune\[ray\]'"):
        run_with_flower(Job(), tmp_path / "run", Quiet())


def test_a_folder_with_a_run_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.toml").touch()
    monkeypatch.setattr(flower_engine, "FlowerProcesses", None)
    with pytest.raises(RunFolderError, match="already holds a run"):
        run_with_flower(Job(), tmp_path, Quiet())


def test_a_worker_gets_as_many_cores_as_its_trainer_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = as_seen_anywhere(checked_job({"machine": {"threads": 3}}, "test"), clients=5)
    assert federation(job) == "num-supernodes=5 client-resources-num-cpus=3 client-resources-num-gpus=0.0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    job = as_seen_anywhere(Job(), clients=2)
    assert federation(job) == "num-supernodes=2 client-resources-num-cpus=1 client-resources-num-gpus=1.0"


def test_paths_in_the_job_hold_in_another_folder_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "mine.py").write_text("from strategies.fedavg import FedAvg as Mine")
    monkeypatch.chdir(tmp_path)
    job = checked_job({"data": {"path": "texts"}, "model": {"path": "owner/name"}, "strategy": "mine.py:Mine"}, "test")
    moved = as_seen_anywhere(job, clients=1)
    assert moved.data.path == str(tmp_path / "texts")
    assert moved.model.path == "owner/name"
    assert moved.strategy.name == f"{tmp_path / 'mine.py'}:Mine"
    assert as_seen_anywhere(Job(), clients=1).strategy.name == "fedavg"


def test_progress_tells_of_each_whole_line_once(tmp_path: Path) -> None:
    lines = [json.dumps(RoundRecord(number).as_json()) + "\n" for number in (0, 1)]
    metrics, told = tmp_path / "metrics.jsonl", Told()
    progress = Progress(metrics, told)
    progress.show()
    assert told.records == []
    metrics.write_text(lines[0] + lines[1][:10])
    progress.show()
    progress.show()
    assert [record.round for record in told.records] == [0]
    metrics.write_text(lines[0] + lines[1])
    progress.show()
    assert [record.round for record in told.records] == [0, 1]


STUBBORN_CHILD = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], stdout=sys.stdout, start_new_session=True)
time.sleep(600)
"""


def test_children_in_sessions_of_their_own_and_deaf_to_sigterm_are_ended_too(flower: FlowerProcesses) -> None:
    flower.start("parent", [sys.executable, "-c", STUBBORN_CHILD])
    flower.until(lambda: flower.log("parent").read_text() == "up\n", "the child")
    processes = started_in(flower.folder)
    assert len(processes) == 2
    end(processes, patience=0.2)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_processes_of_others_are_left_alone(flower: FlowerProcesses, tmp_path: Path) -> None:
    with FlowerProcesses(tmp_path / "other") as other:
        theirs = other.start("sleeper", [sys.executable, "-c", "import time; time.sleep(600)"])
        end(started_in(flower.folder))
        assert theirs.poll() is None
    assert theirs.poll() is not None


def test_a_process_that_dies_is_told_with_the_end_of_its_log(flower: FlowerProcesses) -> None:
    process = flower.start("node", [sys.executable, "-c", "import sys; sys.exit('no such port')"])
    process.wait(timeout=30)
    with pytest.raises(ProcessDied, match=r"node ended with exit code 1; its log:\sno such port"):
        flower.until(lambda: False, "never")


def test_waiting_in_vain_ends(flower: FlowerProcesses) -> None:
    with pytest.raises(ProcessDied, match="in vain for rain"):
        flower.until(lambda: False, "rain", timeout=0.0)


def test_memory_that_another_worker_wrote_is_seen(make_job: Callable[..., Job], tmp_path: Path) -> None:
    """Two Ray workers answer for one client in turn, and each answers as the only one would. Its own B starts every round."""
    job = make_job("strategy.name=fedsa_lora", "train.steps=1")
    workers = [Worker(job, clients_in(job.data, job.clients), tmp_path) for _ in range(2)]
    alone = Trainer.for_simulation(job)
    payload = alone.strategy.broadcast(alone.strategy.start(blueprint(job).adapter))
    for round in (1, 2, 3):
        header = {"ask": f"{round}.0", "run": "tiny", "round": round, "base": alone.resident.base}
        ask = pack_ask(Ask("train", payload), "", header)
        assert workers[round % 2].answer(ask, "ann").tensors == alone.answer(ask, "ann").tensors
    assert dict(workers[0].memory("bob")) == {}


@pytest.mark.slow
def test_the_job_through_ray_gives_the_same_adapter_and_leaves_no_process(tmp_path: Path) -> None:
    """On one thread, for sums of floats depend on how many share the work."""
    given = {
        "clients": {"names": ("asyncio", "http")},
        "train": {"steps": 1},
        "rounds": {"count": 2, "evaluate_every": 2},
        "data": {"max_held_out": 8},
        "machine": {"threads": 1},
    }
    job, told = checked_job(given, "this test"), Told()
    before = set(psutil.pids())
    run_with_flower(job, tmp_path / "ray", told)
    here = simulate(job, tmp_path / "here", Quiet())
    assert (tmp_path / "ray" / WEIGHTS).read_bytes() == (here.folder / WEIGHTS).read_bytes()
    assert [record.loss for record in told.records] == [record.loss for record in here.records]
    assert list(told.clients) == ["asyncio", "http"]
    assert not _left(set(psutil.pids()) - before)


def _left(pids: set[int]) -> list[str]:
    """Names of those of Ray's and Flower's processes among them that do not end by themselves within ten seconds."""
    found = [process for process in psutil.process_iter() if process.pid in pids]
    ours = [process for process in found if any(part in _name(process.pid) for part in ("ray", "flwr", "flower"))]
    return [_name(process.pid) for process in psutil.wait_procs(ours, timeout=10)[1]]


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        return ""
