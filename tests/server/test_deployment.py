"""The same job as it is deployed, over real sockets: TLS, keys, sealed answers, three clients; and the simulation's bits."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from flwr.proto.node_pb2 import NodeInfo
from rich.console import Console

from fedtune.envelope import Envelope
from fedtune.errors import JobError, Refused, RoundFailed
from fedtune.job import Job, checked_job
from fedtune.processes import Processes, free_port, started_in
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import Bundle, make_bundle
from fedtune.security.sealing import sealed
from fedtune.security.signing import ANSWER, ASK, Stamp, signed, verified
from server.app import await_the_same, job_of, post_of, wait_for_clients
from server.bundle import make_bundle as make_fab
from server.journal import Entry, line_of
from server.post import Post
from server.records import RoundRecord
from server.report_folder import read_run
from server.run_folder import without_none
from server.settings import checked
from server.supervisor import serve
from server.watchers import Quiet
from simulations.engine import simulate

CLIENTS = ("asyncio", "email", "http")
ADAPTER = Path("adapter", "adapter_model.safetensors")
MODEL = Path("model", "model.safetensors")
WEIGHTS = Path("weights", "weights.safetensors")


def small_job(**changes: object) -> Job:
    """Two rounds of two steps, on one thread: sums of floats depend on how many share the work."""
    given = {
        "seed": 3,
        "clients": {"names": CLIENTS, "count": 3},
        "train": {"steps": 2},
        "rounds": {"count": 2, "evaluate_every": 2},
        "data": {"max_held_out": 8},
        "machine": {"threads": 1},
    }
    return checked_job(given | changes, "this test")


def said_by(post: Post, bundle: Path, node: int) -> Envelope:
    """What that client's trainer answers to a hello at that node, as the coordinator takes it."""
    keys = Bundle.load(bundle, "trainer")
    _, asked = verified(post.out(node, Envelope({"ask": "hello"})), keys.verify, ASK)
    stamp = Stamp(asked.run, asked.serial, keys.name, asked.seal)
    message = signed(Envelope({"client": keys.name, "ask": "hello"}), stamp, keys.signing, ANSWER)
    return post.back(node, sealed(message, stamp, keys.seal))


def test_who_was_revoked_before_the_run_is_not_among_those_who_are_heard(tmp_path: Path) -> None:
    keys = CoordinatorKeys.init(tmp_path / "keys", [], "localhost:8000")
    bundles = {name: make_bundle(keys, name) for name in ("north", "south")}
    shown = [NodeInfo(node_id=n, public_key=keys.registry.client(name).node_pem()) for n, name in enumerate(bundles)]

    class Grid(Nodes):
        def get_nodes(self) -> list[NodeInfo]:
            return shown

    before = post_of(small_job(), str(keys.folder), Grid(2), "tiny.1")
    assert [said_by(before, bundle, node).header["client"] for node, bundle in enumerate(bundles.values())] == list(bundles)
    keys.registry.revoke("south")
    post = post_of(small_job(), str(keys.folder), Grid(2), "tiny.1")
    assert set(post._clients) == {"north"}
    assert said_by(post, bundles["north"], 0).header["client"] == "north"
    with pytest.raises(Refused, match=r"south.*revoked"):
        said_by(post, bundles["south"], 1)


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


def test_who_was_revoked_is_not_waited_for_when_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = CoordinatorKeys.init(tmp_path / "keys", ["north", "south"], "localhost:8000")
    for name in ("north", "south"):
        make_bundle(keys, name)
    keys.registry.revoke("south")
    own = {"examples": 5, "rank": 4, "scale": 1.0, "limits": {}}
    about = {"run": "tiny.1", "clients": {"north": own, "south": own}, "nodes": {"north": 1, "south": 2}}
    (tmp_path / "journal.jsonl").write_bytes(line_of(Entry("started", about), 0.0))
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    await_the_same(Nodes(most=1), tmp_path, str(keys.folder))
    assert slept == [0.05]


def test_the_job_comes_from_the_run_s_config() -> None:
    job = small_job()
    assert job_of(job.model_dump_json()) == job
    with pytest.raises(JobError, match="not JSON, given ''"):
        job_of("")
    with pytest.raises(JobError, match="unknown key 'sede', did you mean 'seed'"):
        job_of('{"sede": 1}')


def test_the_bundle_holds_no_code_and_declares_what_a_run_may_set(tmp_path: Path) -> None:
    folder = make_fab(tmp_path / "bundle", "server.app:app", "client.app:app")
    assert [file.name for file in folder.iterdir()] == ["pyproject.toml"]
    app = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    assert app["config"] == {"job": "", "folder": "", "keys": "", "resume": ""}


class Deployed:
    """Keys, and three clients that outlive the servers; a server for each job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.keys = CoordinatorKeys.init(folder / "keys", [], f"127.0.0.1:{self.port}")
        self.said = io.StringIO()

    def client(self, name: str) -> list[str]:
        bundle, folder = make_bundle(self.keys, name), self.folder / name
        words = ["--bundle", str(bundle), "--dir", str(folder), "--data", "builtin:stdlib", "--model", "builtin:stdlib"]
        return [sys.executable, "-m", "fedtune.cli", "client", *words]

    def play(self, job: Job, run: Path) -> tuple[RoundRecord, ...]:
        file, server = run.with_suffix(".toml"), self.folder / "server"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(tomli_w.dumps(without_none(job.model_dump(mode="json"))), encoding="utf-8")
        given = checked(str(file), server, "127.0.0.1", self.port, self.keys.folder, run, patience=120.0)
        serve(given, Console(file=self.said))
        return read_run(run).rounds


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployed]:
    """TLS, node keys, signed asks, sealed answers; afterwards nothing of it runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        deployed = Deployed(Path(folder))
        with Processes(deployed.folder / "clients", patience=30.0) as clients:
            for name in CLIENTS:
                clients.start(name, deployed.client(name))
            try:
                yield deployed
            except Exception:
                print(deployed.said.getvalue(), clients.logs())  # noqa: T201
                raise
        assert [found for name in (*CLIENTS, "server", "clients") for found in started_in(deployed.folder / name)] == []


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_three_nodes_give_the_simulated_bits(deployed: Deployed, tmp_path: Path) -> None:
    """The default job, then on the same nodes (where FEDTUNE_SLOW is set) a whole model for which only seeds and slopes have
    crossed, and the weights of the layers that were chosen by gradients, of which one node can afford a single one. Clients
    wait for each new server."""
    require_same(deployed, small_job(), tmp_path / "adapter", ADAPTER)
    if os.environ.get("FEDTUNE_SLOW"):
        plain = {"steps": 2, "optimizer": "sgd", "clip": 0.0, "lr": 1e-3}
        require_same(deployed, small_job(strategy={"name": "fedkseed"}, train=plain), tmp_path / "whole", MODEL)
        limits = {"names": CLIENTS, "count": 3, "layers": {CLIENTS[0]: 1}}
        chosen = small_job(strategy={"name": "selective_layers"}, clients=limits, wire="tiny")
        require_same(deployed, chosen, tmp_path / "layers", WEIGHTS)

    # One that cannot work ends as failed, with its reason.
    with pytest.raises(RoundFailed, match="max_length"):
        deployed.play(small_job(data={"max_length": 10**7}), tmp_path / "failed")


def require_same(deployed: Deployed, job: Job, folder: Path, file: Path) -> None:
    """What the job publishes is the same bit for bit over the network and in simulation, and so is every loss."""
    records = deployed.play(job, folder / "deployed")
    simulated = simulate(job, folder / "simulated", Quiet())
    assert (folder / "deployed" / file).read_bytes() == (simulated.folder / file).read_bytes()
    assert [record.loss for record in records] == [record.loss for record in simulated.records]
    assert [record.answered for record in records] == [3, 3, 3]
    assert [record.selected for record in records] == [record.selected for record in simulated.records]
