"""One server over its whole life, with a SuperLink that is played here."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fedtune.daemon import Said, State
from fedtune.errors import FedtuneError, KeysError, ModelError, RoundFailed, RunFolderError, UserError
from fedtune.folders import require_folder
from fedtune.job import checked_job, load_job
from fedtune.processes import free_port
from fedtune.security.addresses import Address
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle
from fedtune.signals import Stopped
from fedtune.tending import Tending
from server import playing, showing, supervisor
from server.flower_control import Node, NoSuperLink
from server.following import as_seen_anywhere
from server.journal import Entry, line_of
from server.records import RoundRecord
from server.run_folder import RunFolder
from server.settings import Settings, checked, require_port, require_writable
from server.supervisor import Server
from server.waiting import Wanted


class Played:
    """Processes and Control in one. `script` is run at every look at the run's status, and says what it is."""

    def __init__(self, folder: Path, script: Callable[[Played], str]) -> None:
        self.folder, self.script = folder, script
        self.up, self.started, self.stopped, self.code = False, 0, list[int](), 0
        (folder / "logs").mkdir(parents=True)
        self.left: list[int] = []
        self.commands = dict[str, list[str]]()
        self.over, self.died = "", 0  # the run's status, once it is over; the code of a ServerApp that crashed
        self.configs = list[dict[str, str]]()  # what each ServerApp was told

    # as Processes
    def start(self, name: str, command: list[str]) -> None:
        self.commands[name] = command
        if name == "superlink":
            self.up, self.started = True, self.started + 1
        else:
            self.died = 0
            self.configs.append(json.loads(Path(command[command.index("--config") + 1]).read_text()))

    def ended(self, name: str) -> int | None:
        """The ServerApp ends with its run."""
        if name == "serverapp":
            return self.died or (None if not self.over else int(self.over != "finished:completed"))
        return None if self.up else self.code

    def pids(self) -> dict[str, int]:
        return {"superlink": 7} if self.up else {}

    def until(self, ready: Callable[[], bool], what: str, timeout: float) -> None:
        assert ready()

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    # as Control
    def answers(self) -> bool:
        return self.up

    def nodes(self) -> list[Node]:
        if not self.up:
            raise NoSuperLink("gone")
        return [Node(3, b"a", "online"), Node(4, b"b", "online")]

    def unfinished(self) -> list[int]:
        return self.left

    def stop(self, run: int) -> None:
        self.stopped.append(run)

    def status(self, run: int) -> tuple[str, str]:
        if not self.up:
            raise NoSuperLink("gone")
        status, _, details = self.script(self).partition("; ")
        if status.startswith("finished"):
            self.over = status
            self.log("serverapp").write_text(f"first\n{details}\n")
        return status, details


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Played, str, State]]:
    """serve(script): the server's life; what was played, what it printed, and what it said last of itself."""

    def submit(control: Played, folder: Path, clientapp: str) -> int:
        (folder / "runs" / "run").mkdir(parents=True, exist_ok=True)
        return 9 + len(control.configs)

    monkeypatch.setattr(playing, "submit_bare", submit)
    monkeypatch.setattr(showing, "TensorBoard", Events)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(supervisor, "Tending", lambda processes: Tending(processes, clock=lambda: now[0]))
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def life(
        script: Callable[[Played], str], beside: Callable[[], object] = lambda: None, resume: bool = False, **job: object
    ) -> tuple[Played, str, State]:
        given = checked_job({"clients": {"count": 2}, "rounds": {"count": 2}, **job}, "this test")
        address = Address("127.0.0.1", 8000)
        settings = Settings(given, tmp_path, tmp_path / "runs" / "run", address, None, 5.0, resume=resume)
        played, paper = Played(tmp_path, script), io.StringIO()
        said = Said(tmp_path, State(role="server"))
        try:
            with said.to_the_end():
                Server(settings, played, played, said, Console(file=paper, width=200), beside).run()
        finally:
            life.played, life.paper = played, paper  # type: ignore[attr-defined]
        return played, paper.getvalue(), State.read(tmp_path)

    return life


class Events:
    """No TensorBoard, which takes seconds to import."""

    def __init__(self, folder: Path) -> None: ...
    def __enter__(self) -> Events:
        return self

    def __exit__(self, *error: object) -> None: ...
    def started(self, *given: object) -> None: ...
    def doing(self, *given: object) -> None: ...
    def round_ended(self, record: RoundRecord) -> None: ...


def write_round(played: Played, number: int) -> None:
    with (played.folder / "runs" / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(RoundRecord(number, loss=2.5).as_json()) + "\n")


def write_journal(played: Played, what: str, **about: object) -> None:
    with (played.folder / "runs" / "run" / "journal.jsonl").open("ab") as journal:
        journal.write(line_of(Entry(what, about), 0.0))


def test_from_the_first_client_to_the_last_round(serve: Callable[..., tuple[Played, str, State]]) -> None:
    rounds = iter(range(3))

    def script(played: Played) -> str:
        number = next(rounds, None)
        if number is None:
            return "finished:completed"
        write_round(played, number)
        assert State.read(played.folder).phase == "running"
        return "running"

    played, printed, state = serve(script)
    assert (state.phase, state.run["round"], state.run["flower"]) == ("finished", 2, "9")
    assert state.clients == {"node-3": "connected", "node-4": "connected"}
    assert state.processes == {"superlink": {"pid": None, "restarts": 0}}
    assert "connected: node-3, node-4" in printed
    assert "round 2/2  loss 2.500" in printed
    assert played.stopped == []


def test_it_says_that_a_run_begins_where_none_is_there_to_go_on(
    serve: Callable[..., tuple[Played, str, State]], tmp_path: Path
) -> None:
    assert f"no run in {tmp_path / 'runs' / 'run'}: it begins\n" in serve(lambda played: "finished:completed", resume=True)[1]


def test_the_serverapp_is_told_here_and_its_command_line_has_no_secret(serve: Callable[..., tuple[Played, str, State]]) -> None:
    command = serve(lambda played: "finished:completed")[0].commands["serverapp"]
    given = dict(zip(command[3::2], command[4::2], strict=True))
    assert given.keys() == {"--superlink", "--config", "--secret"}
    config = json.loads(Path(given["--config"]).read_text())
    assert (config["run"], config["keys"]) == (9, "")


def test_a_run_that_failed_ends_with_its_last_words(serve: Callable[..., tuple[Played, str, State]], tmp_path: Path) -> None:
    end = f"the run in {tmp_path / 'runs' / 'run'} goes on with the same command and --resume"
    with pytest.raises(RoundFailed, match=rf"exit code 1; its last words in .*serverapp.log: round 1: nobody answered; {end}"):
        serve(lambda played: "finished:failed; round 1: nobody answered")
    assert (State.read(tmp_path).phase, "nobody answered" in State.read(tmp_path).why) == ("failed", True)


def test_clients_that_do_not_come_end_it(serve: Callable[..., tuple[Played, str, State]]) -> None:
    with pytest.raises(RoundFailed, match=r"\(--wait\): 2 of 3 clients connected"):
        serve(lambda played: "", clients={"count": 3})


def test_a_superlink_that_dies_in_a_run_is_started_again_and_the_run_goes_on(
    serve: Callable[..., tuple[Played, str, State]], tmp_path: Path
) -> None:
    def script(played: Played) -> str:
        if played.started == 1:
            played.log("superlink").write_text("out of\nmemory\n")
            played.up, played.code = False, -9
            write_journal(played, "state", round=1)
        return "running" if len(played.configs) == 1 else "finished:completed"

    played, printed, state = serve(script)
    assert (played.started, played.stopped) == (2, [9])
    assert [config["resume"] for config in played.configs] == ["", "1"]
    assert "superlink was killed by SIGKILL (out of memory?)" in printed
    assert "the SuperLink was killed by SIGKILL (out of memory?); the run goes on from round 2\n" in printed
    assert state.processes["superlink"]["restarts"] == 1
    assert (state.phase, state.why, state.run["flower"]) == ("finished", "", "10")


def test_a_serverapp_that_dies_is_followed_by_another_that_goes_on(
    serve: Callable[..., tuple[Played, str, State]], tmp_path: Path
) -> None:
    """The reason stands in the state until the run does something again."""
    whys = list[str]()

    def script(played: Played) -> str:
        if len(played.configs) == 1:
            write_round(played, 0)
            write_journal(played, "state", round=0)
            played.died = -9
            return "running"
        if not whys:
            whys.append(State.read(tmp_path).why)
            write_round(played, 0)  # as one writes it that died before it could say that it had
            write_journal(played, "resumed")
            return "running"
        whys.append(State.read(tmp_path).why)
        return "finished:completed"

    played, printed, _ = serve(script)
    died = "the ServerApp was killed by SIGKILL (out of memory?); the run goes on from round 1"
    assert whys == [died, ""]
    assert printed.count(f"{died}\n") == 1
    assert printed.count("round 0/2") == 1
    assert played.stopped == [9]
    assert [config["resume"] for config in played.configs] == ["", "1"]
    assert [config["run"] for config in played.configs] == [9, 10]


def test_one_that_dies_again_and_again_is_given_up(serve: Callable[..., tuple[Played, str, State]], tmp_path: Path) -> None:
    def script(played: Played) -> str:
        with played.log("serverapp").open("a") as log:
            log.write("boom\n")
        played.died = 70
        return "running"

    with pytest.raises(RoundFailed, match=r"exit code 70: boom; given up, .* 5th time without a step forward; the run in"):
        serve(script)
    assert len(serve.played.configs) == 5  # type: ignore[attr-defined]
    assert serve.paper.getvalue().count("exit code 70: boom; the run begins again\n") == 4  # type: ignore[attr-defined]
    assert State.read(tmp_path).phase == "failed"


def test_what_the_user_must_mend_is_said_at_once(serve: Callable[..., tuple[Played, str, State]]) -> None:
    def script(played: Played) -> str:
        played.log("serverapp").write_text("2026-01-02 03:04:05,678 ERROR another process works on the run\n")
        played.died = 2
        return "running"

    with pytest.raises(UserError, match=r"^another process works on the run \(the log: "):
        serve(script)
    assert len(serve.played.configs) == 1  # type: ignore[attr-defined]


def test_why_a_run_waits_stands_in_the_state(serve: Callable[..., tuple[Played, str, State]], tmp_path: Path) -> None:
    seen, said = list[str](), "round 1: 1 of 3 clients answered, wanted 2"

    def script(played: Played) -> str:
        seen.append(State.read(tmp_path).why)
        if len(seen) == 1:
            write_journal(played, "waiting", reason=f"{said}\x1b[2J")
        elif len(seen) == 2:
            write_journal(played, "asked", ask="1.0", clients=["a"])
        return "running" if len(seen) < 3 else "finished:completed"

    printed = serve(script)[1]
    assert seen == ["", f"{said}?[2J", ""]
    assert printed.count(f"{said}?[2J\n") == 1


def test_what_is_kept_beside_it_is_looked_after(serve: Callable[..., tuple[Played, str, State]]) -> None:
    looks: list[str] = []
    script = iter(["running", "running", "finished:completed"])
    serve(lambda played: next(script), beside=lambda: looks.append(""))
    assert len(looks) > 3


def test_a_run_that_had_ended_before_the_superlink_died_counts(serve: Callable[..., tuple[Played, str, State]]) -> None:
    def script(played: Played) -> str:
        if played.started == 1:
            played.up, played.code = False, 1
            return "running"
        return "finished:completed"

    assert serve(script)[2].phase == "finished"


def test_runs_that_an_earlier_server_left_are_stopped(
    serve: Callable[..., tuple[Played, str, State]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Played, "unfinished", lambda self: [5, 6])
    assert serve(lambda played: "finished:completed")[0].stopped == [5, 6]


def test_ctrl_c_stops_the_run_at_flower(serve: Callable[..., tuple[Played, str, State]], tmp_path: Path) -> None:
    def script(played: Played) -> str:
        raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped) as stopped:
        serve(script)
    assert (stopped.value.exit_code, serve.played.stopped) == (143, [9])  # type: ignore[attr-defined]
    assert (State.read(tmp_path).phase, State.read(tmp_path).why) == ("stopped", "SIGTERM")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coordinator") / "keys"
    own = CoordinatorKeys.init(folder, [], "fl.example.org:8000")
    make_bundle(own, "north")
    return folder


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path, keys: Path, job_file: Path) -> None:
    folder, job = tmp_path / "srv", str(job_file)
    with pytest.raises(UserError, match=r"--insecure on 0.0.0.0 would let everybody .* --insecure-anywhere"):
        checked(job, folder, "0.0.0.0", 8000, insecure=True)
    with pytest.raises(UserError, match="--host fl is no IP address"):
        checked(job, folder, "fl", 8000)
    with pytest.raises(KeysError, match=f"no keys in {folder / 'keys'}"):
        checked(job, folder, "0.0.0.0", 8000)
    with pytest.raises(KeysError, match=r"192\.0\.2\.7"):  # listened on, and not in the certificate
        checked(job, folder, "192.0.2.7", 8000, keys)
    with pytest.raises(UserError, match="unknown key"):
        checked(job, folder, "127.0.0.1", 8000, keys, overrides=["sede=1"])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "job.toml").touch()
    with pytest.raises(RunFolderError, match="already holds a run"):
        checked(job, folder, "127.0.0.1", 8000, keys, out=tmp_path / "old")
    for model in (str(tmp_path), "./nowhere"):
        with pytest.raises(ModelError, match=r"model\.path a folder"):
            checked(job, folder, "127.0.0.1", 8000, keys, overrides=[f"model.path={model}"])
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "run", Path("/proc/nope")):
        with pytest.raises(RunFolderError, match=f"{out} cannot be written: .* --out"):
            checked(job, folder, "127.0.0.1", 8000, keys, out=out)
    assert not folder.exists()


def test_a_run_goes_on_with_the_job_that_it_began_with(tmp_path: Path, job_file: Path) -> None:
    """With as many clients as there were then; what changes no number of it may differ."""
    run = RunFolder.create(tmp_path / "srv" / "runs" / "tiny", as_seen_anywhere(load_job(job_file), 3)).path

    def again(*overrides: str, resume: bool = True) -> Settings:
        given = ("127.0.0.1", free_port())
        return checked(str(job_file), tmp_path / "srv", *given, overrides=overrides, insecure=True, resume=resume)

    settings = again("machine.threads=3")
    assert (settings.resume, settings.run, settings.job.clients.count) == (True, run, 3)
    with pytest.raises(UserError, match=r"another job \(train\.lr = 0\.01, now 0\.5\)"):
        again("train.lr=0.5")
    with pytest.raises(RunFolderError, match=r"already holds a run; .* --resume"):
        again(resume=False)
    assert settings.wanted() == Wanted(count=3)  # nobody had introduced himself
    told = {"examples": 5, "rank": 4, "scale": 1.0, "limits": {}}
    about = {"run": "tiny.1", "clients": dict.fromkeys(("ann", "bob", "cy"), told), "nodes": {"ann": 1, "bob": 2, "cy": 3}}
    (run / "journal.jsonl").write_bytes(line_of(Entry("started", about), 0.0))
    assert again("rounds.quorum=0.5").wanted() == Wanted(count=3, least=2)
    assert again("name=other").job.clients.count is None  # there is none yet


def test_looking_whether_a_run_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["file", "/proc/nope", "file/below"])
def test_a_folder_that_cannot_be_used_is_said_at_once(folder: str, tmp_path: Path, keys: Path, job_file: Path) -> None:
    (tmp_path / "file").touch()
    for side in (lambda place: checked(str(job_file), place, "127.0.0.1", free_port(), keys), require_folder):
        with pytest.raises(UserError, match="--dir"):
            side(tmp_path / folder)
    with pytest.raises(UserError, match=r"state\.json cannot be written: .* another --dir"):
        State(role="server").write(tmp_path / folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_closed_to_us_is_said_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=f"--dir {tmp_path} cannot be written"):
        require_folder(tmp_path)


def test_the_folder_of_a_client_is_not_a_server_s(tmp_path: Path, job_file: Path) -> None:
    State(role="client", phase="stopped").write(tmp_path)
    with pytest.raises(UserError, match="the folder of a fedtune client; give this server another --dir"):
        checked(str(job_file), tmp_path, "127.0.0.1", free_port(), insecure=True)


def test_what_the_superlink_is_started_with(
    tmp_path: Path, keys: Path, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.settings.require_port", lambda host, port: None)
    secure = checked(str(job_file), tmp_path / "srv", "0.0.0.0", 8000, keys)
    command = secure.superlink()
    assert {"--enable-supernode-auth", "--ssl-certfile", str(keys / "server.key")} <= set(command)
    assert "--insecure" not in command
    secret = str(tmp_path / "srv" / "server.secret")
    assert command[command.index("--superexec-auth-secret-file") + 1] == secret
    assert command[command.index("--isolation") + 1] == "process"
    assert {"--ca", str(keys / "ca.pem"), "--secret", secret} <= set(secure.serverapp(tmp_path / "config"))
    assert (secure.here, secure.registered()) == ("127.0.0.1:8000", {"north": False})
    for given in ({"host": "127.0.0.1", "insecure": True}, {"host": "0.0.0.0", "anywhere": True}):
        open_ = checked(str(job_file), tmp_path / "srv", port=8000, **given)
        assert open_.superlink()[-1] == "--insecure"
        assert (open_.keys, open_.ca, open_.registered()) == (None, None, None)


def test_one_server_at_a_time_in_a_folder_and_on_a_port(tmp_path: Path, job_file: Path) -> None:
    State(role="server").write(tmp_path)  # of this process, which is alive
    with pytest.raises(UserError, match=f"runs in {tmp_path} already .pid {os.getpid()}"):
        checked(str(job_file), tmp_path, "127.0.0.1", 8000, insecure=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"nothing can listen on 127.0.0.1:{port}: Address already in use; .* --port"):
            require_port("127.0.0.1", port)


def test_an_error_is_the_last_word_of_the_state(tmp_path: Path) -> None:
    said = Said(tmp_path, State(role="server", processes={"superlink": {"pid": 7, "restarts": 2}}))
    with pytest.raises(FedtuneError), said.to_the_end():
        raise FedtuneError("two\nlines")
    state = State.read(tmp_path)
    assert (state.phase, state.why, state.alive) == ("failed", "two lines", False)
    assert state.processes == {"superlink": {"pid": None, "restarts": 2}}
