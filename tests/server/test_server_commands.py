"""`fedtune server`, `status`, `stop` and `logs`: against folders written here, and once against all real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from fedtune.daemon import State
from fedtune.errors import FedtuneError, UserError
from fedtune.job import load_job
from fedtune.processes import Processes, free_port, started_in
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle
from fedtune.signals import Stopped
from server import loglines
from server.attempts import entries_of
from server.commands import add_to
from server.journal import Entry, line_of
from server.loglines import coming_lines, last_lines
from server.records import RoundRecord
from server.run_folder import RunFolder
from server.settings import Settings
from server.standing import Standing, process_words
from server.stopping import stop_in

app = typer.Typer()
add_to(app)
COMMAND = [
    sys.executable,
    "-c",
    "import typer; from server.commands import add_to; app = typer.Typer(pretty_exceptions_enable=False); add_to(app); app()",
]


def say(*words: object) -> tuple[int, str]:
    """Exit code and output of one of the commands."""
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a server in round 1; its process is this one."""
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    lines = [json.dumps(RoundRecord(number, loss=2.5 - number / 4).as_json()) for number in (0, 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"round": 2, "lo')
    about = {"name": "tiny", "folder": str(run), "flower": "9", "round": 1, "rounds": 4}
    clients = {"north": "connected", "south": "missing", "west": "connected"}
    processes = {"superlink": {"pid": 71, "restarts": 2}}
    State("server", phase="running", address="0.0.0.0:8000", run=about, clients=clients, processes=processes).write(tmp_path)
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_status_in_words(folder: Path) -> None:
    code, said = say("status", "--dir", folder)
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert code == 0
    assert lines[0] == "server: running"
    assert lines[3] == f"run tiny: round 1 of 4, held-out loss 2.250, in {folder / 'runs' / 'tiny'}"
    assert lines[4:] == [
        "clients connected: north, west",
        "clients missing: south",
        "process superlink: pid 71, started again 2 times",
    ]


def test_status_for_programs(folder: Path) -> None:
    code, said = say("status", "--dir", folder, "--json")
    given = json.loads(said)
    assert (code, given["alive"], given["phase"], given["pid"]) == (0, True, "running", os.getpid())
    assert (given["run"]["round"], given["run"]["rounds"], given["run"]["loss"]) == (1, 4, 2.25)
    assert given["clients"]["south"] == "missing"


@pytest.mark.parametrize(
    ("phase", "pid", "word", "code"),
    [
        ("finished", 1, "finished", 0),
        ("failed", 1, "failed: no quorum", 1),
        ("stopped", 1, "stopped: no quorum", 1),
        ("running", 2**22 + 1, "gone: no quorum", 1),  # no kernel gives such a number
    ],
)
def test_status_when_it_is_over(folder: Path, phase: str, pid: int, word: str, code: int) -> None:
    why = "" if phase == "finished" else "no quorum"
    State.read(folder).but(phase=phase, pid=pid, why=why).write(folder)
    found, said = say("status", "--dir", folder)
    assert (found, said.splitlines()[0]) == (code, f"server: {word}")
    assert "connected" not in said
    given = json.loads(say("status", "--dir", folder, "--json")[1])
    assert (given["alive"], given["clients"]) == (False, {})


def test_status_of_a_client_and_of_nothing(tmp_path: Path) -> None:
    guards = {"network": "on", "memory": "not permitted"}
    State("client", name="north", guards=guards, run={"name": "71", "round": 22}).write(tmp_path)
    said = say("status", "--dir", tmp_path)[1]
    assert said.startswith("client north: starting\n")
    assert "  run        71: round 22\n" in said
    assert "guards     not permitted: memory" in said
    with pytest.raises(UserError, match=f"nothing of fedtune runs in {tmp_path / 'x'}"):
        say("status", "--dir", tmp_path / "x")
    assert process_words({"pid": None, "restarts": 0}) == "not running"
    assert Standing.read(tmp_path).last == {}


def test_logs_of_all_and_of_one(folder: Path) -> None:
    (folder / "logs" / "superlink.log").write_text("one\ntwo\nthree")
    (folder / "logs" / "run.log").write_text("\x1b[92mINFO \x1b[0m: a\x07b\n")
    assert say("logs", "--dir", folder, "--lines", "2") == (0, "run: INFO : ab\nsuperlink: two\nsuperlink: three\n")
    assert say("logs", "superlink", "--dir", folder, "--lines", "1") == (0, "three\n")
    lines = say("logs", "--dir", folder, "--json")[1].splitlines()
    assert json.loads(lines[1]) == {"process": "superlink", "line": "one"}
    assert say("logs", "--dir", folder, "--lines", "0") == (0, "")
    with pytest.raises(UserError, match="no log of 'superlnk', did you mean 'superlink'"):
        say("logs", "superlnk", "--dir", folder)
    with pytest.raises(UserError, match="holds no logs"):
        say("logs", "--dir", folder / "runs")


@pytest.fixture
def somebody_else(folder: Path) -> Iterator[None]:
    """Who may not enter the folder."""
    folder.chmod(0o700 if os.geteuid() == 0 else 0)
    before = os.geteuid()
    os.seteuid(65534 if before == 0 else before)
    yield
    os.seteuid(before)
    folder.chmod(0o700)


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_another_user_is_told_that_he_may_not_read(folder: Path, somebody_else: None, command: str) -> None:
    with pytest.raises(UserError, match=r"may not be read: it is of .*, for .* alone; type the same as that user \(sudo -u"):
        say(command, "--dir", folder)


@pytest.mark.parametrize("command", ["server", "client", "up"])
def test_what_a_long_lived_command_leaves_is_for_its_owner(
    command: str, run_command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*given: object, **more: object) -> None:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "file").touch()

    for name in ("server.supervisor.serve", "client.supervisor.serve", "simulations.up.deploy"):
        monkeypatch.setattr(name, made)
    monkeypatch.setattr("server.commands.say_where", lambda run: None)
    monkeypatch.setattr("server.settings.require_port", lambda *given: None)
    own = {"server": ["demo", "--insecure", "--host", "127.0.0.1"], "client": ["--insecure", "--name", "a"], "up": []}
    own["client"] += ["--server", "127.0.0.1:8000"]
    before = os.umask(0)
    try:
        assert run_command(command, *own[command], "--dir", tmp_path / "dir")[0] == 0
        assert open_to_others(tmp_path / "made") == []
        assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700
        assert os.umask(0) == 0  # put back
    finally:
        os.umask(before)


def test_who_reads_no_further_than_the_first_line_of_a_log_sees_no_error(tmp_path: Path) -> None:
    """More than a pipe holds, so that writing goes on when nobody reads any more."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "superlink.log").write_text(f"{'x' * 99}\n" * 5000)
    words = ["logs", "--dir", str(tmp_path), "--lines", "5000"]
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(30), process.stderr.read()) == (0, b"")


def test_last_lines_of_a_large_log_are_whole(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("".join(f"{number:0100d}\n" for number in range(1000)))
    assert last_lines(log, 3) == [f"{number:0100d}" for number in (997, 998, 999)]
    assert last_lines(log, 2000) == [f"{number:0100d}" for number in range(1000)]


def test_what_comes_is_followed_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loglines.time, "sleep", lambda seconds: None)
    log = tmp_path / "a.log"
    log.write_text("old\n")
    acts = iter([lambda: log.write_text("old\nha"), lambda: log.write_text("old\nhalf\n"), lambda: log.write_text("new\n")])

    def alive() -> bool:
        act = next(acts, None)
        if act is not None:
            act()
        return act is not None

    assert list(coming_lines({"a": log}, alive)) == [("a", "half"), ("a", "new")]


SLEEPER = """
import signal, sys, time
from pathlib import Path
from fedtune.daemon import State
state = State("server", phase="running")
state.write(Path(sys.argv[1]))
def stop(*_):
    state.but(phase="stopped").write(Path(sys.argv[1]))
    sys.exit(143)
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2:] else stop)
print("up", flush=True)
time.sleep(600)
"""


def sleeper(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A process that says of itself that it is a server."""
    process = subprocess.Popen([sys.executable, "-c", SLEEPER, str(folder), *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_stop_ends_it_and_waits(tmp_path: Path) -> None:
    with sleeper(tmp_path) as process:
        code, said = say("stop", "--dir", tmp_path)
        assert process.poll() == 143
    assert (code, said) == (0, f"the server (pid {process.pid}) is stopped\n")
    again = json.loads(say("stop", "--dir", tmp_path, "--json")[1])
    assert again == {"role": "server", "pid": process.pid, "stopped": False, "left": 0, "phase": "stopped", "run": ""}
    assert say("stop", "--dir", tmp_path) == (0, "no server runs here (stopped)\n")


def test_stop_says_how_the_run_goes_on(tmp_path: Path, folder: Path) -> None:
    State.read(folder).but(phase="stopped").write(folder)
    said = say("stop", "--dir", folder)[1]
    assert (
        said == f"no server runs here (stopped); the run in {folder / 'runs' / 'tiny'} goes on with its command and --resume\n"
    )
    State.read(folder).but(phase="finished").write(folder)
    assert say("stop", "--dir", folder)[1] == "no server runs here (finished)\n"


def test_ctrl_c_says_how_the_run_goes_on(
    run_command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_file: Path
) -> None:
    def stopped(given: Settings, *more: object) -> None:
        given.run.mkdir(parents=True)
        raise Stopped(15)

    monkeypatch.setattr("server.supervisor.serve", stopped)
    words = ("--insecure", "--host", "127.0.0.1", "--port", free_port(), "--dir", tmp_path)
    code, _, said = run_command("server", job_file, *words)
    assert (code, said.endswith(f"; the run in {tmp_path / 'runs' / 'tiny'} goes on with the same command and --resume\n")) == (
        143,
        True,
    )


def test_a_run_that_is_over_is_not_played_again(
    run_command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_file: Path
) -> None:
    run = RunFolder.create(tmp_path / "runs" / "tiny", load_job(job_file)).path
    entries = [Entry("state", {"round": 2}), Entry("ended")]
    (run / "journal.jsonl").write_bytes(b"".join(line_of(entry, 0.0) for entry in entries))
    served, told = list[object](), list[Path]()
    monkeypatch.setattr("server.supervisor.serve", lambda *given: served.append(given))
    monkeypatch.setattr("server.commands.say_where", told.append)
    words = ("--insecure", "--host", "127.0.0.1", "--port", free_port(), "--dir", tmp_path, "--resume")
    code, said, _ = run_command("server", job_file, *words)
    assert (code, said, told, served) == (0, f"the run in {run} has finished already\n", [run], [])
    assert run_command("server", job_file, *words, "--set", "rounds.count=3")[0] == 0
    assert len(served) == 1


def test_a_record_that_a_crash_has_cut_is_passed_over(folder: Path) -> None:
    with (folder / "runs" / "tiny" / "metrics.jsonl").open("a") as metrics:
        metrics.write("\n")
    assert json.loads(say("status", "--dir", folder, "--json")[1])["run"]["loss"] == 2.25


def test_stop_says_when_it_will_not_end(tmp_path: Path) -> None:
    with sleeper(tmp_path, "deaf") as process:
        with pytest.raises(FedtuneError, match=f"pid {process.pid}. still runs .* type `kill -9 {process.pid}`"):
            stop_in(tmp_path, patience=0.1)
        process.kill()


def test_stop_ends_what_a_killed_server_has_left(tmp_path: Path) -> None:
    superlink = {"superlink": {"pid": 7, "restarts": 0}}
    State("server", pid=2**22 + 1, phase="running", processes=superlink).write(tmp_path)
    processes = Processes(tmp_path)
    with processes:
        left = processes.start("superlink", [sys.executable, "-c", "import time; time.sleep(600)"])
        while psutil.Process(left.pid).environ().get("FLWR_HOME") is None:
            time.sleep(0.01)  # between fork and exec
        assert stop_in(tmp_path).words == "no server runs here (gone); processes that it had left, ended now: 1"
        assert not psutil.pid_exists(left.pid)
    last = State.read(tmp_path)
    assert (last.phase, last.processes) == ("failed", {"superlink": {"pid": None, "restarts": 0}})
    assert "without a last word" in last.why
    assert stop_in(tmp_path).words == "no server runs here (failed)"


CLIENTS = ("asyncio", "http")
SMALL = ["clients.count=2", "rounds.count=1", "train.steps=1", "data.max_held_out=2", "machine.threads=1", "compare=false"]


class Deployment:
    """A coordinator's folder with keys, and the processes of its server and nodes."""

    def __init__(self, folder: Path, nodes: Processes) -> None:
        self.folder, self.nodes, self.port = folder, nodes, free_port()
        self.keys = CoordinatorKeys.init(folder / "keys", [], f"127.0.0.1:{self.port}")
        self.bundles = {name: make_bundle(self.keys, name) for name in CLIENTS}

    def serve(self) -> subprocess.Popen[bytes]:
        given = ["demo", "--dir", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port)]
        settings = [word for key in SMALL for word in ("--set", key)]
        return self.nodes.start("server", [*COMMAND, "server", *given, *settings])

    def node(self, name: str) -> None:
        """A stock SuperNode with its trainer."""
        bundle, socket = self.bundles[name], self.nodes.folder / f"{name}.sock"
        trainer = ["--bundle", str(bundle), "--socket", str(socket), "--dir", str(self.nodes.folder / name)]
        self.nodes.start(f"trainer-{name}", [sys.executable, "-m", "client.trainer_main", *trainer])
        network = bundle / "network"
        known = ["--root-certificates", str(network / "ca.pem"), "--auth-supernode-private-key", str(network / "node.key")]
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()), *known]
        self.nodes.start(f"supernode-{name}", [*command, "--node-config", f'trainer-socket="{socket}"'])

    def kill_serverapp(self) -> None:
        """When it has asked for round 1."""
        journal = self.folder / "runs" / "demo"
        asked = lambda: [entry for entry in entries_of(journal) if entry.what == "asked" and entry["ask"] == "1.0"]  # noqa: E731
        self.nodes.until(lambda: bool(asked()), "round 1", timeout=240)
        os.kill(State.read(self.folder).processes["serverapp"]["pid"], signal.SIGKILL)

    def until(self, phase: str, connected: int = 0) -> State:
        def reached() -> bool:
            if not (self.folder / "state.json").is_file():
                return False
            state = State.read(self.folder)
            return state.phase == phase and sum(word == "connected" for word in state.clients.values()) >= connected

        self.nodes.until(reached, f"the server to be {phase}", timeout=240)
        return State.read(self.folder)


def open_to_others(folder: Path) -> list[str]:
    """What they reach in it, where they may enter it. The umask of most closes nothing."""
    return sorted(path.name for path in folder.iterdir() if not path.is_symlink() and path.stat().st_mode & 0o077)


@pytest.fixture
def deployment() -> Iterator[Deployment]:
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        with Processes(Path(folder, "nodes"), {"OMP_NUM_THREADS": "1"}) as nodes:
            (Path(folder) / "srv").mkdir()
            yield Deployment(Path(folder) / "srv", nodes)
        assert started_in(nodes.folder) == []
        assert started_in(Path(folder) / "srv") == []


@pytest.mark.slow
def test_a_server_is_stopped_while_it_waits_and_then_runs_its_job_to_the_end(deployment: Deployment) -> None:
    """Over TLS, with node keys, signed asks and sealed answers. In the midst of its round the ServerApp is killed."""
    folder = deployment.folder
    first = deployment.serve()
    deployment.until("waiting")  # a stock SuperNode gives up after some tries
    deployment.node("http")
    state = deployment.until("waiting", connected=1)
    assert dict(state.clients) == {"asyncio": "missing", "http": "connected"}
    assert say("stop", "--dir", folder) == (0, f"the server (pid {first.pid}) is stopped\n")
    assert first.poll() == 143
    assert started_in(folder) == []
    assert say("status", "--dir", folder)[0] == 1

    deployment.serve()  # the same folder: the SuperLink's database knows the nodes, and the node that was there comes back
    deployment.until("waiting")
    deployment.node("asyncio")
    deployment.kill_serverapp()
    deployment.until("finished")
    given = json.loads(say("status", "--dir", folder, "--json")[1])
    assert (given["phase"], given["run"]["round"], given["clients"]) == ("finished", 1, {})
    assert given["run"]["loss"] > 0
    assert open_to_others(folder) == []
    assert re.search(r"^serverapp: .* run \d+ is played here$", say("logs", "--dir", folder)[1], re.MULTILINE)
    assert (folder / "runs" / "demo" / "adapter" / "adapter_model.safetensors").is_file()
    while (code := deployment.nodes.ended("server")) is None:
        time.sleep(0.1)
    said = deployment.nodes.log("server").read_text()
    assert (code, "round 1/1" in said, "loaded with" in said) == (0, True, True)
    assert "the ServerApp was killed by SIGKILL (out of memory?); the run goes on from round 1\n" in said
