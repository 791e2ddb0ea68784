"""Who is not let in, over a real SuperLink with TLS and node keys: each is refused in words that say what to do."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.daemon import State
from fedtune.errors import KeysError, UserError
from fedtune.processes import Processes, free_port, tail
from fedtune.security.certificates import Issued, make_authority, make_server_certificate
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle
from fedtune.security.keyfiles import load_tls_key, make_folder, save_pem, write_private, write_public
from server.enrolment import Enrolment
from server.flower_control import Control
from server.settings import checked_keys
from tests.server.hosts import SERVER, Hosts, why_not

pytestmark = pytest.mark.slow

HOST = "127.0.0.1"
REASON = why_not()
SECRET = b"known to this server alone"
UNSIGNED = "it is not signed: the run was not started by `fedtune server` with the keys of this coordinator"
FAREWELL = 20.0  # seconds for a client to end its own processes
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


class Server:
    """The SuperLink that `fedtune server` starts, and the nodes that it lets in; no run."""

    def __init__(self, folder: Path, keys: CoordinatorKeys, processes: Processes, control: Control) -> None:
        self.folder, self.keys, self.control, self._processes = folder, keys, control, processes
        self._enrolment = Enrolment(control, keys.registry)

    def look(self) -> dict[str, str]:
        """As `fedtune server` does every two seconds."""
        return dict(self._enrolment.step())

    def until(self, ready: Callable[[], bool], what: str) -> None:
        self._processes.until(ready, what)

    def log(self) -> str:
        return tail(self._processes.log("superlink"), 100_000)

    @contextlib.contextmanager
    def executing(self) -> Iterator[None]:
        """Flower's own executor, which takes the tasks of all runs, and has our secret."""
        where = ["--runtime-api-address", self.keys.address, "--root-certificates", str(self.keys.tls()[0])]
        secret = ["--superexec-auth-secret-file", str(self.folder / "secret")]
        with Processes(self.folder / "executor", self.environment) as processes:
            processes.start("superexec", ["flower-superexec", "--plugin-type", "serverapp", *where, *secret])
            yield

    @property
    def environment(self) -> dict[str, str]:
        return self._processes.environment


@contextlib.contextmanager
def superlink(folder: Path, keys: CoordinatorKeys, host: str, on: Sequence[str] = ()) -> Iterator[Server]:
    """Up to the moment when it listens. `on`: words that bring a command to another host."""
    ca, certificate, key = map(str, keys.tls())
    port = keys.address.rpartition(":")[2]
    tls = ["--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key, "--enable-supernode-auth"]
    make_folder(folder)
    write_private(folder / "secret", SECRET)
    tls += ["--isolation", "process", "--superexec-auth-secret-file", str(folder / "secret")]
    command = [sys.executable, "-m", "server.superlink", "--host", host, "--port", port, *tls]
    with Processes(folder, ENVIRONMENT) as processes, Control(keys.address, Path(ca), SECRET) as control:
        processes.start("superlink", [*on, *command])
        server = Server(folder, keys, processes, control)
        server.until(lambda: "Uvicorn running" in server.log(), "the SuperLink")
        yield server


class Client:
    """A `fedtune client` on this machine."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self._processes = folder, processes

    def until_it_says(self, words: str) -> str:
        self._processes.until(lambda: words in self.why(), f"the client to say {words!r}; it says: {self.why()!r}")
        return self.why()

    def until_connected(self) -> None:
        self._processes.until(lambda: self.state().phase == "running", "the client to be connected")

    def state(self) -> State:
        try:
            return State.read(self.folder)
        except UserError:
            return State("client")  # not yet

    def why(self) -> str:
        return self.state().why

    def said(self) -> str:
        return tail(self._processes.log("client"), 100_000)

    def log(self, process: str) -> str:
        return tail(self.folder / "logs" / f"{process}.log", 100_000)

    def until(self, ready: Callable[[], bool], what: str) -> None:
        self._processes.until(ready, what)


@contextlib.contextmanager
def client(folder: Path, bundle: Path, *options: str) -> Iterator[Client]:
    with Processes(folder, ENVIRONMENT, patience=FAREWELL) as processes:
        own = folder / "own"
        words = ["client", "--bundle", str(bundle), "--dir", str(own), *options]
        processes.start("client", [sys.executable, "-m", "fedtune.cli", *words])
        yield Client(own, processes)


def network_half(folder: Path, bundle: Path) -> contextlib.AbstractContextManager[Client]:
    """Nobody trains."""
    return client(folder, bundle, "--only", "network", "--socket", str(folder / "t.sock"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path may not be long."""
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        keys = CoordinatorKeys.init(Path(folder) / "keys", [], f"{HOST}:{free_port()}")
        with superlink(Path(folder) / "server", keys, HOST) as server:
            yield server


def shown(keys: CoordinatorKeys, authority: Issued, names: Sequence[str], now: datetime) -> None:
    """What the server shows from its next start on."""
    certificate = make_server_certificate(authority, names, days=1, now=now)
    write_public(keys.folder / "server.pem", certificate.pem)
    save_pem(keys.folder / "server.key", certificate.key)


def authority_of(keys: CoordinatorKeys) -> Issued:
    return Issued((keys.folder / "ca.pem").read_bytes(), load_tls_key(keys.folder / "ca.key"))


NOW = datetime.now(UTC)


@pytest.mark.parametrize(
    ("foreign", "host", "now", "words", "mend"),
    [
        (True, "127.0.0.1", NOW, "not by the authority in ca.pem", "`fedtune keys rotate client NAME`"),
        (False, "127.0.0.1", NOW - timedelta(days=2), "certificate expired on", "`fedtune keys rotate server`"),
        (False, "127.0.0.2", NOW, "not for 127.0.0.2 but for fl.example.org", "`fedtune keys rotate server 127.0.0.2"),
    ],
    ids=["of another authority", "expired", "for another name"],
)
def test_a_certificate_that_is_not_right(folder: Path, foreign: bool, host: str, now: datetime, words: str, mend: str) -> None:
    """Nothing of the node goes to such a server, and `fedtune server` does not start with it."""
    keys = CoordinatorKeys.init(folder / "keys", [], f"{host}:{free_port()}")
    bundle = make_bundle(keys, "north")
    shown(keys, make_authority() if foreign else authority_of(keys), ["fl.example.org"], now)
    with pytest.raises(KeysError, match=words):
        checked_keys(keys.folder, host)
    with superlink(folder / "server", keys, host) as server, network_half(folder / "north", bundle) as north:
        assert mend in north.until_it_says(words)
        north.until(lambda: "CERTIFICATE_VERIFY_FAILED" in north.log("supernode"), "the SuperNode to refuse the server")
        assert "/v1/fleet/" not in server.log()


def test_a_node_whose_key_is_not_registered(server: Server, folder: Path) -> None:
    bundle = make_bundle(server.keys, "stranger")
    server.keys.registry.remove("stranger")
    server.look()
    with network_half(folder / "stranger", bundle) as stranger:
        why = stranger.until_it_says("does not know this node")
        assert "its operator sees it with `fedtune keys list`" in why
        assert not any(node.online for node in server.control.nodes())
        assert '"POST /v1/fleet/activate-node HTTP/1.1" 412' in server.log()


def test_a_node_that_is_revoked_while_it_is_connected(server: Server, folder: Path) -> None:
    bundle = make_bundle(server.keys, "revoked")
    server.look()
    with network_half(folder / "revoked", bundle) as revoked:
        revoked.until_connected()
        assert server.look()["revoked"] == "connected"
        server.keys.registry.revoke("revoked")
        began = time.monotonic()
        assert server.look()["revoked"] == "revoked"
        why = revoked.until_it_says("does not know this node")
        assert time.monotonic() - began < 15  # asks every 3 s at the latest
        assert "it was revoked, or is not registered there" in why
        revoked.until(lambda: revoked.state().processes["supernode"]["restarts"] > 0, "its SuperNode to have ended")
        assert not any(node.online for node in server.control.nodes())


SUBMITS = """
import sys
from pathlib import Path
from fedtune.errors import FedtuneError
from server.flower_control import Control
try:
    with Control(sys.argv[1], Path(sys.argv[2])) as control:
        print("let in as run", control.submit(Path(sys.argv[3]), {}))
except FedtuneError as error:
    print(error)"""
PROJECT = """
[project]
name = "intruder"
version = "1.0.0"
license = "Apache-2.0"
description = ""
[tool.flwr.app]
publisher = "intruder"
[tool.flwr.app.components]
serverapp = "intruder:server"
clientapp = "intruder:client"
[tool.flwr.app.config]
said = ""
"""
# Wherever it is imported, it says so. Its ServerApp does what our coordinator does, without a key.
INTRUDER = """
import json, sys
from pathlib import Path
with open({trace!r}, "a") as trace:
    trace.write(Path(sys.argv[0]).name + "\\n")
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from fedtune.envelope import Envelope
from server.exchange import exchange
client, server = ClientApp(), ServerApp()
@server.main()
def main(grid, context):
    said = []
    for ask in ({{"kind": "hello", "run": "evil", "job": {{}}}}, {{"kind": "train", "run": "evil", "round": 1, "ask": "r1-0"}}):
        said += [reply.envelope.header for reply in exchange(grid, dict.fromkeys(grid.get_node_ids(), Envelope(ask)), 60)]
    Path(context.run_config["said"]).write_text(json.dumps(said))
"""


def intruder(folder: Path) -> tuple[Path, Path]:
    """An app, and the file where its code leaves a trace."""
    (app := folder / "intruder").mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "intruder.py").write_text(INTRUDER.format(trace=str(folder / "trace")))
    return app, folder / "trace"


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_run_that_is_submitted_from_another_machine(folder: Path) -> None:
    """The certificate is right, the port is open; that the same is let in with the secret, the test after the next shows."""
    app, trace = intruder(folder)
    with Hosts(["elsewhere"]) as hosts:
        keys = CoordinatorKeys.init(folder / "keys", [], f"{hosts.address}:8000")
        with superlink(folder / "server", keys, "0.0.0.0", hosts.on(SERVER)) as server:
            words = hosts.on("elsewhere", sys.executable, "-c", SUBMITS, keys.address, str(keys.tls()[0]), str(app))
            answer = subprocess.run(words, env=server.environment, capture_output=True, text=True, check=True).stdout
            assert "refused: only /v1/fleet/ and /health are open to other machines" in answer
            assert "everything else is asked for on the server itself" in answer
            assert '"POST /v1/control/start-run HTTP/1.1" 403' in server.log()
    assert not trace.exists()


def test_a_run_that_is_submitted_from_the_server_s_own_machine(server: Server, folder: Path) -> None:
    """By another user, or by a stranger whom a forwarder makes local."""
    app, trace = intruder(folder)
    words = [sys.executable, "-c", SUBMITS, server.keys.address, str(server.keys.tls()[0]), str(app)]
    with server.executing():
        answer = subprocess.run(words, env=server.environment, capture_output=True, text=True, check=True).stdout
    assert "refused: this is for processes of `fedtune server` alone" in answer
    assert server.control.unfinished() == []
    assert not trace.exists()


def test_a_run_of_somebody_who_has_the_server_s_secret(server: Server, folder: Path) -> None:
    """Its asks come to a real node, and the trainer answers none; its code comes too, and the node does not run it."""
    app, trace = intruder(folder)
    bundle, said = make_bundle(server.keys, "north"), folder / "said.json"
    server.look()
    with client(folder / "north", bundle) as north:
        north.until_connected()
        run = server.control.submit(app, {"said": str(said)})
        with server.executing():
            server.until(lambda: server.control.status(run)[0].startswith("finished"), "the intruder's run to end")
        assert server.control.status(run) == ("finished:completed", "")
        assert [header["failed"] for header in json.loads(said.read_text())] == [f"refused an ask: {UNSIGNED}"] * 2
        north.until(lambda: "train not answered" in north.said(), "the operator to be told")
        for kind in ("run evil: hello", "run evil, round 1: train"):
            assert f"{kind} not answered: refused an ask: {UNSIGNED}" in north.said()
        assert north.log("trainer").count(f"refused an ask: {UNSIGNED}") == 2
    assert trace.read_text().split() == ["flwr-serverapp"]  # of that executor; the SuperLink itself has started none
    assert not (north.folder / "heard.json").exists()  # nothing was taken up
