"""A real client of a real SuperLink: each of its processes is killed while it has an ask, and the answer arrives."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from client.unanswered import OPEN
from fedtune.envelope import Envelope
from fedtune.job import checked_job
from fedtune.processes import Processes, free_port, started_in
from fedtune.strategy import Ask
from fedtune.wire import pack_ask
from server.exchange import Reply, exchange
from server.flower_control import Control
from server.following import submit_bare
from server.own_grid import OwnGrid
from server.runtime import Runtime
from server.serverapp import Given, beating, opened, take
from tests.client.test_client_over_sockets import Node, running

Got = TypeVar("Got")
log = logging.getLogger("fedtune.tests")
NAME = "asyncio"
TIMEOUT = 800.0  # seconds; nothing is overdue before an eighth of it
HOPE = 60.0  # seconds in which every answer should be there, on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("FEDTUNE_SLOW"), reason="a minute or two: FEDTUNE_SLOW=1 runs it"),
]


class Stage:
    """A SuperLink, the task of a run at it, which this test plays, and one client."""

    def __init__(self, place: Path, port: int, client: Callable[[], Node], within: ExitStack) -> None:
        self.address, self.client, self._start = f"127.0.0.1:{port}", client(), client
        self._options = ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
        self._options += ["--database", str(place / "superlink.db")]
        self._processes = within.enter_context(Processes(place / "server"))
        self._control = within.enter_context(Control(self.address))
        self.superlink()
        (place / "run").mkdir()
        run = submit_bare(self._control, place / "run", "client.app:app")
        with Runtime(self.address, None) as runtime:
            token = take(run, self._control, runtime)
        self.grid = within.enter_context(OwnGrid(self.address, None, token, None))
        within.enter_context(beating(self.grid))
        opened(Given(run, {}), self.grid)
        self._thread = within.enter_context(ThreadPoolExecutor(1))
        self._asked = 0

    def superlink(self) -> None:
        self._processes.start("superlink", ["flower-superlink", *self._options])
        self._processes.until(self._control.answers, "the SuperLink")

    def kill_superlink(self) -> None:
        os.kill(self._processes.pids()["superlink"], signal.SIGKILL)
        self.until(lambda: self._processes.ended("superlink"))
        self.superlink()

    def kill(self, *names: str) -> None:
        for name in names:
            os.kill(self.client.state.processes[name]["pid"], signal.SIGKILL)

    def kill_supervisor(self) -> None:
        """Its processes live on until it is started again."""
        self.client.process.kill()
        self.client.process.wait()
        assert len(started_in(self.client.folder)) == 3
        self.client = self._start()

    def answered_though(self, kill: Callable[[], None]) -> float:
        """Seconds from the kill, when the trainer has just begun with an ask, to the answer."""
        [node] = self.until(self.grid.get_node_ids)
        self._asked += 1
        asked = self._thread.submit(lambda: list(exchange(self.grid, {node: self.hello()}, TIMEOUT, enough=1)))
        self.until(self._is_at_work)
        began = time.monotonic()
        kill()
        [reply] = asked.result(timeout=TIMEOUT)
        self._require(reply)
        return time.monotonic() - began

    def hello(self) -> Envelope:
        """Of a job that it does not know yet: model and data are loaded for it, which takes a while."""
        job = checked_job({"seed": self._asked, "clients": {"names": [NAME]}, "machine": {"threads": 1}}, "this test")
        return pack_ask(Ask("hello"), "", {"ask": "hello", "run": f"{self._asked:016x}", "job": job.model_dump(mode="json")})

    def _is_at_work(self) -> bool:
        try:
            return bool(json.loads((self.client.folder / OPEN).read_bytes())["brought"])
        except OSError:
            return False

    def _require(self, reply: Reply) -> None:
        assert reply.envelope is not None, reply.failed
        assert reply.envelope.header.get("client") == NAME, reply.envelope.header

    def until(self, look: Callable[[], Got]) -> Got:
        deadline = time.monotonic() + 120
        while not (found := look()):
            assert time.monotonic() < deadline, self.client.said.read_text()
            time.sleep(0.01)
        return found


@pytest.fixture
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="ft") as folder, ExitStack() as within:
        place, port = Path(folder), free_port()
        client = partial(Node, place / NAME, "--name", NAME, "--server", f"127.0.0.1:{port}", "--insecure")
        stage = Stage(place, port, client, within)
        within.enter_context(_ended(stage))
        stage.client.until(lambda state: state.phase == "running")
        yield stage


@contextmanager
def _ended(stage: Stage) -> Iterator[None]:
    try:
        yield
    finally:
        with running(stage.client):
            pass


@pytest.mark.timeout(600)
def test_whoever_is_killed_over_an_ask_its_answer_arrives(stage: Stage) -> None:
    ways: dict[str, Callable[[], None]] = {
        "nobody": lambda: None,
        "relay": lambda: stage.kill("relay"),
        "trainer": lambda: stage.kill("trainer"),
        "supernode": lambda: stage.kill("supernode"),
        "relay and supernode": lambda: stage.kill("relay", "supernode"),
        "all three": lambda: stage.kill("relay", "supernode", "trainer"),
        "supervisor": stage.kill_supervisor,
        "superlink": stage.kill_superlink,
    }
    took = {who: stage.answered_though(kill) for who, kill in ways.items()}
    log.info("seconds from the kill to the answer: %s", {who: round(seconds, 1) for who, seconds in took.items()})
    assert max(took.values()) < HOPE, took
