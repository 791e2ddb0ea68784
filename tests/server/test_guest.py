"""A server at a SuperLink that somebody else runs: whose runs it executes, whom it asks, and what the SuperLink can read."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run
from flwr.proto.runtime_pb2 import PullTaskInputResponse
from flwr.superlink.grid import HttpGrid
from rich.console import Console
from safetensors.torch import load_file

from fedtune.daemon import Said, State
from fedtune.errors import KeysError, RoundFailed, UserError
from fedtune.job import checked_job
from fedtune.processes import Processes, free_port, started_in
from fedtune.security.certificates import make_authority, make_server_certificate
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle
from fedtune.security.keyfiles import save_pem, write_private, write_public
from server.flower_control import Control, NoSuperLink
from server.following import submit_bare
from server.foreign import earlier_run, write_config
from server.guest import Guest
from server.own_grid import OwnGrid
from server.playing import Crashed
from server.runtime import Runtime, Taken
from server.serverapp import Given, opened, take
from server.settings import Settings, checked_guest
from server.supervisor import serve

HOST = "127.0.0.1"
# Flower's own SuperLink, with a tap that writes down every byte of every request and response, as its operator could.
TAPPED = """
import sys
from starlette.middleware import Middleware
from flwr.superlink import extensions

file, already = open(sys.argv.pop(1), "ab", buffering=0), extensions.get_middleware

class Tap:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def hear():
            message = await receive()
            file.write(message.get("body", b""))
            return message

        async def say(message):
            file.write(message.get("body", b""))
            await send(message)

        await self.app(scope, hear, say)

extensions.get_middleware = lambda: (*already(), Middleware(Tap))
from flwr.superlink.cli import flower_superlink
flower_superlink()
"""
SMALL = (
    "clients.count=1",
    "train.steps=1",
    "rounds.count=1",
    "data.max_held_out=2",
    "data.max_length=32",
    "machine.threads=1",
    "compare=false",
    "wire=plain",
    "rounds.evaluate_every=0",  # otherwise the update of the one client would be broadcast, and asks can be read
)


class Elsewhere:
    """A stock SuperLink of another operator, with an authority of his own, and one client of ours."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.at = f"{HOST}:{self.port}"
        self.carried, self.database, self.ca = folder / "carried", folder / "superlink.db", folder / "ca.pem"
        self.secret = folder / "secret"
        self.keys = CoordinatorKeys.init(folder / "keys", [], self.at)
        self.said = io.StringIO()

    def superlink(self) -> list[str]:
        authority = make_authority()
        certificate = make_server_certificate(authority, [HOST])
        write_public(self.ca, authority.pem)
        write_public(self.folder / "server.pem", certificate.pem)
        save_pem(self.folder / "server.key", certificate.key)
        write_private(self.secret, b"known to two")
        options = {
            "--ssl-ca-certfile": self.ca,
            "--ssl-certfile": self.folder / "server.pem",
            "--ssl-keyfile": self.folder / "server.key",
            "--superexec-auth-secret-file": self.secret,
            "--database": self.database,
            "--host": HOST,
            "--port": self.port,
            "--isolation": "process",
        }
        words = [str(word) for pair in options.items() for word in pair]
        return [sys.executable, "-c", TAPPED, str(self.carried), *words, "--enable-supernode-auth"]

    def client(self) -> list[str]:
        """As the page says: the bundle has the authority of that SuperLink."""
        bundle = make_bundle(self.keys, "asyncio")
        write_public(bundle / "network" / "ca.pem", self.ca.read_bytes())
        words = ["--bundle", bundle, "--dir", self.folder / "client", "--data", "builtin:stdlib", "--model", "builtin:stdlib"]
        return [sys.executable, "-m", "fedtune.cli", "client", *map(str, words)]

    def play(self, out: Path, *changes: str) -> None:
        given = checked_guest(
            "demo", self.folder / "server", self.at, self.ca, self.secret, self.keys.folder, out, [*SMALL, *changes], 120.0
        )
        serve(given, Console(file=self.said), Watched)

    def known_there(self) -> bytes:
        """All that went through, and all that was stored."""
        return b"".join(file.read_bytes() for file in sorted(self.folder.glob("superlink.db*"))) + self.carried.read_bytes()


class Watched(Guest):
    """Remembers who executed the ServerApp."""

    parents: ClassVar[set[int]] = set()

    def look(self) -> object:
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                if "server.serverapp" in words and any(str(self._settings.folder) in word for word in words):
                    self.parents.add(process.ppid())
            except psutil.Error:
                continue
        return super().look()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="ft") as name:
        elsewhere = Elsewhere(Path(name))
        with Processes(elsewhere.folder / "theirs", patience=30.0) as theirs:
            theirs.start("superlink", elsewhere.superlink())
            theirs.start("client", elsewhere.client())
            try:
                yield elsewhere
            except BaseException:
                print(elsewhere.said.getvalue(), theirs.logs())  # noqa: T201
                for log in (elsewhere.folder / "server" / "logs").glob("*.log"):
                    print(log, log.read_text())  # noqa: T201
                raise
        assert [found for part in ("client", "server", "theirs") for found in started_in(elsewhere.folder / part)] == []


ASK = b'"ask":"hello"'  # in the header of an ask, and of its answer
OF_AN_ANSWER = (b'"examples"', b'"scale"', b'"loss"')  # in headers of answers alone: how much data a client has, how it learns


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_the_superlink_of_somebody_else_carries_answers_blind(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """And reads them where they are not sealed, by the same search."""
    elsewhere.play(tmp_path / "sealed")
    sealed = elsewhere.known_there()
    elsewhere.play(tmp_path / "open", "security.end_to_end=false")
    opened = elsewhere.known_there()
    assert ASK in sealed
    assert [word for word in OF_AN_ANSWER if word in sealed] == []
    assert [word for word in OF_AN_ANSWER if word in opened] == list(OF_AN_ANSWER)
    update = pieces_of(tmp_path / "sealed")  # one client, one round: what it has learnt is what is published
    assert pieces_of(tmp_path / "open") == update
    assert [name for name, piece in update.items() if piece in sealed] == []
    assert [name for name, piece in update.items() if piece in opened] == list(update)

    assert Watched.parents == {os.getpid()}  # the ServerApp's
    assert str(elsewhere.keys.folder).encode() not in opened
    assert b"is played here" in (elsewhere.folder / "server" / "logs" / "serverapp.log").read_bytes()
    assert b"is played here" not in opened  # neither its log


def pieces_of(run: Path) -> dict[str, bytes]:
    """64 bytes from the middle of each B that was published. In its first step A learns nothing, since B is zero."""
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    raw = {name: tensor.numpy().tobytes() for name, tensor in tensors.items() if "lora_B" in name}
    return {name: data[len(data) // 2 :][:64] for name, data in raw.items()}


class Line:
    """A SuperLink's Control and Runtime in one: `tasks` are what it hands out, `before` who waits before us at each look."""

    def __init__(self, tasks: Sequence[Taken | None] = (), before: Sequence[list[int]] = (), status: str = "pending") -> None:
        self._tasks, self._before, self._status = list(tasks), list(before), status
        self.asked, self.returned = 0, list[str]()

    def status(self, run: int) -> tuple[str, str]:
        return self._status, ""

    def waiting_before(self, run: int) -> list[int]:
        return self._before.pop(0) if self._before else []

    def acquire(self) -> Taken | None:
        self.asked += 1
        return self._tasks.pop(0) if self._tasks else None

    def give_back(self, token: str, why: str) -> None:
        self.returned.append(token)

    def take(self, patience: float = 5.0) -> str:
        return take(9, self, self, lambda seconds: None, patience)


def test_only_the_task_of_our_run_is_taken() -> None:
    line = Line(tasks=[None, Taken(9, "ours")])
    assert (line.take(), line.asked, line.returned) == ("ours", 2, [])
    # nothing is asked for while somebody else's run is next; what comes all the same is not executed
    line = Line(tasks=[Taken(7, "theirs"), Taken(9, "ours")], before=[[7], [7], []])
    assert (line.take(), line.asked, line.returned) == ("ours", 2, ["theirs"])


def test_a_task_that_does_not_come_ends_it() -> None:
    line = Line(before=[[7, 8]] * 20)
    with pytest.raises(RoundFailed, match=r"in 5 s .* no task of our run: 2 runs of others wait before it"):
        line.take()
    assert line.asked == 0
    for status in ("running", "finished:failed"):  # an executor of theirs had it
        with pytest.raises(
            RoundFailed, match=f"took the run .it is {status}.: the SuperLink must be started with `--isolation"
        ):
            Line(status=status).take()


class Told:
    """As much of a Grid as a task needs."""

    def __init__(self, run: int) -> None:
        self._given = PullTaskInputResponse(run=Run(run_id=run, fab_hash="x"), task_id=3)
        self.runtime, self.run = self, None

    def PullTaskInput(self, request: object) -> PullTaskInputResponse:
        return self._given

    def set_run(self, run: object) -> None:
        self.run = run


def test_what_the_superlink_says_of_a_run_is_not_believed() -> None:
    given = Given(9, {"job": "{}", "folder": "here", "keys": "ours"})
    grid = Told(9)
    grid._given.run.override_config["keys"].string = "theirs"
    assert opened(given, grid).run_config == {"job": "{}", "folder": "here", "keys": "ours"}
    with pytest.raises(RoundFailed, match="another run than 9; nothing of it was executed"):
        opened(given, Told(8))


def test_nodes_of_others_are_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [NodeInfo(node_id=1, public_key=b"ours"), NodeInfo(node_id=2, public_key=b"theirs")]
    monkeypatch.setattr(HttpGrid, "get_nodes", lambda self: nodes)
    assert OwnGrid("127.0.0.1:1", b"", "token", {b"ours"}).get_node_ids() == [1]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorKeys:
    return CoordinatorKeys.init(tmp_path_factory.mktemp("coordinator") / "keys", [], "superlink.example.org:9000")


def test_what_the_server_is_given(tmp_path: Path, keys: CoordinatorKeys, job_file: Path) -> None:
    where = keys.address
    given = checked_guest(str(job_file), tmp_path / "well", where, keys=keys.folder)
    assert (given.here, given.ca) == (where, keys.folder / "ca.pem")
    assert "--secret" not in given.serverapp(tmp_path / "config")
    secret = tmp_path / "secret"
    secret.touch(0o644)
    for wrong, words in (
        ({"superlink": "superlink"}, "'superlink' is no address"),
        ({"ca": tmp_path / "no.pem"}, r"--superlink-ca .*no.pem.* cannot be read"),
        ({"ca": job_file}, "not a certificate in PEM form.*; wanted the authority"),
        ({"secret": secret}, "chmod 600"),
        ({"keys": tmp_path}, "no keys in"),
    ):
        with pytest.raises(KeysError, match=words):
            checked_guest(str(job_file), tmp_path / "srv", **{"superlink": where, "keys": keys.folder, **wrong})
    secret.chmod(0o600)
    with pytest.raises(UserError, match="is empty"):
        checked_guest(str(job_file), tmp_path / "srv", where, secret=secret, keys=keys.folder)
    assert not (tmp_path / "srv").exists()


def test_options_of_a_superlink_of_our_own_are_not_taken_with_another(run_command: Callable[..., tuple[int, str, str]]) -> None:
    for option, words in (("--insecure", "wants TLS and keys"), ("--port=8001", "leave --host and --port out")):
        code, _, said = run_command("server", "demo", "--dir", "srv", "--superlink", "example.org:9000", option)
        assert (code, words in said) == (2, True)


def test_the_command_goes_there(
    run_command: Callable[..., tuple[int, str, str]], keys: CoordinatorKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[Settings, type]] = []
    monkeypatch.setattr("server.supervisor.serve", lambda given, console, life, beside: served.append((given, life)))
    monkeypatch.setattr("server.commands.say_where", lambda run: None)
    words = ("--dir", tmp_path / "srv", "--superlink", keys.address, "--keys", keys.folder)
    assert run_command("server", "demo", *words)[0] == 0
    assert [(given.here, life) for given, life in served] == [(keys.address, Guest)]


def test_the_run_of_an_earlier_server_is_known(tmp_path: Path) -> None:
    assert earlier_run(tmp_path) is None
    write_config(tmp_path, 2**63, checked_job({}, "this test"), tmp_path / "run", tmp_path / "keys")
    assert earlier_run(tmp_path) == 2**63
    assert Given.read(tmp_path / "serverapp.json").config.keys() == {"job", "folder", "keys", "resume"}
    (tmp_path / "serverapp.json").write_text("{")
    assert earlier_run(tmp_path) is None


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_runs_of_others_wait_at_a_real_superlink_and_are_not_executed(tmp_path: Path) -> None:
    elsewhere = Elsewhere(tmp_path)
    with Processes(tmp_path / "theirs") as theirs:
        theirs.start("superlink", elsewhere.superlink())
        with Control(elsewhere.at, elsewhere.ca) as control:
            theirs.until(control.answers, "the SuperLink")
            others, ours, later = (submit_bare(control, tmp_path / str(number), "client.app:app") for number in range(3))
            assert control.waiting_before(ours) == [others]
            ca = elsewhere.ca.read_bytes()
            with Runtime(elsewhere.at, ca, elsewhere.secret.read_bytes()) as runtime:
                with pytest.raises(RoundFailed, match="1 runs of others wait before it"):
                    take(ours, control, runtime, patience=1)
                control.stop(others)
                assert take(ours, control, runtime, patience=1)
                assert [control.status(run)[0] for run in (ours, later)] == ["starting", "pending"]
            with Runtime(elsewhere.at, ca, b"guessed") as runtime, pytest.raises(UserError, match="--superlink-secret"):
                take(later, control, runtime, patience=1)


class There:
    """Processes and Control of a guest in one: `code` of its ServerApp (None: it runs), what the SuperLink says of the run."""

    def __init__(self, log: Path, code: int | None = None, status: tuple[str, str] | None = ("running", "")) -> None:
        self._log, self._code, self._status, self.left, self.stopped = log, code, status, list[int](), list[int]()

    def answers(self) -> bool:
        return self._status is not None

    def status(self, run: int) -> tuple[str, str]:
        if self._status is None:
            raise NoSuperLink("gone")
        return self._status

    def nodes(self) -> list[object]:
        self.status(0)
        return []

    def unfinished(self) -> list[int]:
        return self.left

    def stop(self, run: int) -> None:
        self.stopped.append(run)

    def ended(self, name: str) -> int | None:
        return self._code

    def pids(self) -> dict[str, int]:
        return {"serverapp": 7} if self._code is None else {}

    def log(self, name: str) -> Path:
        return self._log


@pytest.fixture
def guest(tmp_path: Path, keys: CoordinatorKeys, job_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Guest]:
    """guest(code, status): its SuperLink is at a port where nothing listens, and time passes only in sleep."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    (tmp_path / "serverapp.log").write_text("first\nround 1: nobody answered\n")

    def make(code: int | None = None, status: tuple[str, str] | None = ("running", "")) -> Guest:
        settings = checked_guest(str(job_file), tmp_path, f"{HOST}:{free_port()}", keys=keys.folder)
        there = There(tmp_path / "serverapp.log", code, status)
        return Guest(settings, there, there, Said(tmp_path, State("server", phase="stopped")), Console(file=io.StringIO()))

    return make


def follow(guest: Guest) -> None:
    guest._playing.follow(9, lambda: None, guest.look)


def test_how_the_run_ended_is_what_our_own_process_says(guest: Callable[..., Guest]) -> None:
    follow(guest(0, ("running", "")))
    follow(guest(0, None))  # the SuperLink could not be told any more
    with pytest.raises(RoundFailed, match=r"exit code 1; its last words in .*serverapp.log: round 1: nobody answered"):
        follow(guest(1, ("finished:completed", "")))
    with pytest.raises(Crashed, match=r"says that the run is finished:completed .no reason given. while it goes on here"):
        follow(guest(None, ("finished:completed", "")))
    with pytest.raises(Crashed, match=r"finished:failed .a.b. while .* must be started with `--isolation process`"):
        follow(guest(None, ("finished:failed", "a\x1bb")))


def test_runs_of_others_are_left_alone(guest: Callable[..., Guest], tmp_path: Path) -> None:
    there = guest()
    there._control.left = [5, 6]
    there._start()
    assert there._control.stopped == []
    write_config(tmp_path, 6, checked_job({}, "this test"), tmp_path / "run", tmp_path / "keys")
    there._start()
    assert there._control.stopped == [6]


def test_a_superlink_that_is_not_there_is_waited_for_a_minute(guest: Callable[..., Guest]) -> None:
    with pytest.raises(RoundFailed, match=r"--superlink 127.0.0.1:\d+: nothing listens at"):
        guest(None, None)._start()
    assert 60 <= time.monotonic() <= 62


def test_in_the_midst_of_a_run_it_is_waited_for_as_long_as_it_takes(
    guest: Callable[..., Guest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then only our own run is stopped, of which it may have lost sight."""
    there = guest(None, None)
    write_config(tmp_path, 6, checked_job({}, "this test"), tmp_path / "run", tmp_path / "keys")
    there._control.left = [5, 6]
    monkeypatch.setattr(type(there._control), "answers", lambda self: time.monotonic() > 3600)
    there._come_back()
    assert 3600 < time.monotonic() < 3602
    assert there._control.stopped == [6]
    assert "does not answer; the run goes on when it does" in State.read(tmp_path).why
