"""`fedtune client` against Flower's SuperLink over real sockets: processes that are killed, servers that come late or move."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.said import GONE
from fedtune.daemon import State
from fedtune.errors import UserError
from fedtune.job import checked_job
from fedtune.paths import app_root
from fedtune.processes import Processes, free_port, started_in
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle
from server.flower_control import Control
from server.watchers import Quiet
from simulations import flower_processes
from simulations.flower_processes import FlowerProcesses
from simulations.flower_run import run_through

NAMES = ("asyncio", "http")
CLIENT = "import typer; from client.commands import add_to; app = typer.Typer(); add_to(app); app()"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path may not be long."""
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        yield Path(folder)


class Node:
    """A `fedtune client` of its own process."""

    def __init__(self, folder: Path, *options: object) -> None:
        self.folder, self.said = folder, folder.with_suffix(".out")
        environment = os.environ | {"PYTHONPATH": str(app_root()), "OMP_NUM_THREADS": "1"}
        with self.said.open("w") as out:
            command = [sys.executable, "-c", CLIENT, "--dir", str(folder), *map(str, options)]
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)

    @property
    def state(self) -> State:
        return State.read(self.folder)

    def until(self, ready: Callable[[State], bool], timeout: float = 60.0) -> State:
        deadline = time.monotonic() + timeout
        while True:
            try:
                if ready(self.state):
                    return self.state
            except (UserError, KeyError):
                pass  # not yet written
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, f"{self.said.read_text()}\n{self.state}"
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


@contextmanager
def running(*nodes: Node) -> Iterator[None]:
    """Whatever happens in between, nothing of them runs afterwards."""
    try:
        yield
        assert [node.stop() for node in nodes] == [0] * len(nodes)
        assert [started_in(node.folder) for node in nodes] == [[]] * len(nodes)
        assert {node.state.phase for node in nodes} == {"stopped"}
    finally:
        for node in nodes:
            if node.process.poll() is None:
                node.stop()


@pytest.mark.slow
def test_clients_that_were_there_before_their_server_do_its_job_and_outlive_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setattr(flower_processes, "free_port", lambda: port)
    server = f"127.0.0.1:{port}"
    nodes = [Node(folder / name, "--name", name, "--server", server, "--insecure") for name in NAMES]
    with running(*nodes):
        for node in nodes:
            node.until(lambda state: "nothing listens" in state.why and "supernode" in state.processes)
        killed = nodes[0].state.processes["supernode"]["pid"]
        os.kill(killed, signal.SIGKILL)
        nodes[0].until(lambda state: state.processes["supernode"] | {"pid": 0} == {"pid": 0, "restarts": 1})

        with FlowerProcesses(folder / "server", {"OMP_NUM_THREADS": "1"}) as flower:
            flower.superlink()
            for node in nodes:
                node.until(lambda state: state.phase == "running")
            job = {"clients": {"names": NAMES, "count": 2}, "train": {"steps": 1}, "machine": {"threads": 1}}
            short = {"rounds": {"count": 1, "evaluate_every": 9}, "data": {"max_held_out": 4}}
            run_through(flower, checked_job(job | short, "this test"), folder / "run", "client.app:app", Quiet())
            for node in nodes:
                node.until(lambda state: state.run["name"].startswith("run.") and state.run["round"] == 1)
                assert f"run {node.state.run['name']} of the coordinator begun" in node.said.read_text()
                assert "round 1: train answered in" in node.said.read_text()
        for node in nodes:
            node.until(lambda state: state.phase == "waiting" and state.why == GONE)

        with FlowerProcesses(folder / "another", {"OMP_NUM_THREADS": "1"}) as flower:  # which does not know the nodes
            flower.superlink()
            for node in nodes:
                node.until(lambda state: state.phase == "running")


@contextmanager
def superlink(folder: Path, keys: CoordinatorKeys) -> Iterator[Control]:
    """With TLS and node keys."""
    ca, certificate, key = map(str, keys.tls())
    tls = ["--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key, "--enable-supernode-auth"]
    host, _, port = keys.address.partition(":")
    with Processes(folder) as processes, Control(keys.address, Path(ca)) as control:
        processes.start("superlink", ["flower-superlink", "--host", host, "--port", port, *tls])
        processes.until(control.answers, "the SuperLink")
        yield control


@pytest.mark.slow
def test_a_node_that_is_not_registered_is_told_so_let_in_later_and_shut_out_when_revoked(folder: Path) -> None:
    """The network half alone: it has neither the trainer's part of the bundle nor a trainer."""
    keys = CoordinatorKeys.init(folder / "keys", ["127.0.0.1"], f"127.0.0.1:{free_port()}")
    bundle = make_bundle(keys, "north")
    (bundle / "trainer" / "client.key").unlink()
    node = Node(folder / "north", "--bundle", bundle, "--only", "network", "--socket", folder / "t.sock")
    with superlink(folder / "server", keys) as control, running(node):
        node.until(lambda state: "does not know this node" in state.why)
        control.register(keys.registry.client("north").node_pem(), "north")
        node.until(lambda state: state.phase == "running")
        assert list(node.state.processes) == ["supernode", "relay"]
        [known] = control.nodes()
        assert known.online

        os.kill(node.state.processes["supernode"]["pid"], signal.SIGKILL)
        log = node.folder / "logs" / "supernode.log"
        node.until(lambda _: "was killed: signs off and on" in log.read_text() and control.nodes()[0].online)
        assert [again.id for again in control.nodes()] == [known.id]
        control.unregister(known.id)
        node.until(lambda state: "does not know this node" in state.why)


@pytest.mark.slow
def test_a_server_with_a_certificate_of_another_authority_is_not_trusted(folder: Path) -> None:
    keys = CoordinatorKeys.init(folder / "keys", ["127.0.0.1"], f"127.0.0.1:{free_port()}")
    others = CoordinatorKeys.init(folder / "others", ["127.0.0.1"], keys.address)
    node = Node(folder / "north", "--bundle", make_bundle(keys, "north"), "--only", "network", "--socket", folder / "t.sock")
    with superlink(folder / "server", others), running(node):
        why = node.until(lambda state: "certificate" in state.why).why
        assert "authority" in why or "CA" in why, why
