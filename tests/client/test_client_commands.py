"""`fedtune client` as it is typed: what is refused with what to type, and which processes it would start."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from client import commands, supervisor
from client.halves import processes
from client.settings import Settings, checked
from client.trainer_options import parser
from fedtune.daemon import State
from fedtune.errors import DataError, KeysError, ModelError, UserError
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle

HERE = "127.0.0.1:8000"


@pytest.fixture(scope="module")
def north(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a client."""
    keys = CoordinatorKeys.init(tmp_path_factory.mktemp("server") / "keys", ["coordinator"], "coordinator:8000")
    return make_bundle(keys, "north")


@pytest.fixture
def insecure(tmp_path: Path) -> Callable[..., Settings]:
    """insecure(...): a client without keys on this machine, with some options set."""
    return lambda **given: checked(**{"folder": tmp_path / "dir", "name": "a", "server": HERE, "insecure": True, **given})


def options_of(command: list[str]) -> dict[str, str]:
    """--name value, of a command in which each option has a value."""
    return dict(zip(command[3::2], command[4::2], strict=True))


def test_without_bundle_and_insecure_it_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="fedtune keys client NAME"):
        checked(tmp_path, name="a", server=HERE)


def test_both_is_refused_for_nobody_knows_what_was_meant(tmp_path: Path, north: Path) -> None:
    with pytest.raises(UserError, match="leave --insecure out"):
        checked(tmp_path, north, insecure=True)


@pytest.mark.parametrize("missing", ["name", "server"])
def test_insecure_needs_what_a_bundle_would_say(insecure: Callable[..., Settings], missing: str) -> None:
    with pytest.raises(UserError, match="--name NAME --server"):
        insecure(**{missing: ""})


@pytest.mark.parametrize("server", ["coordinator:8000", "192.0.2.7:8000", "[2001:db8::1]:8000", "127.0.0.1.example.org:8000"])
def test_insecure_leaves_this_machine_only_when_it_is_forced(insecure: Callable[..., Settings], server: str) -> None:
    with pytest.raises(UserError, match="--insecure-anywhere"):
        insecure(server=server)
    assert insecure(server=server, anywhere=True).server == server


@pytest.mark.parametrize("server", ["localhost:8000", "127.1.2.3:8000", "[::1]:8000"])
def test_insecure_on_this_machine_is_taken(insecure: Callable[..., Settings], server: str) -> None:
    assert insecure(server=server).server == server


def test_an_address_without_a_port_says_so_before_anything_starts(insecure: Callable[..., Settings], tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="wanted host:port"):
        insecure(server="localhost")
    assert not (tmp_path / "dir").exists()


def test_the_trainer_half_has_no_address_to_be_insecure_about(tmp_path: Path) -> None:
    assert checked(tmp_path, name="a", insecure=True, only="trainer").server == ""


@pytest.mark.parametrize("socket", [None, "dir/t.sock"])
def test_a_socket_for_another_user_lies_where_he_can_reach_it(
    insecure: Callable[..., Settings], tmp_path: Path, socket: str
) -> None:
    with pytest.raises(UserError, match=r"--relay-user net .* is closed to all other users"):
        insecure(relay_user="net", socket=socket and tmp_path / socket)
    assert insecure(relay_user="net", socket=tmp_path / "t.sock").socket == tmp_path / "t.sock"


def test_another_name_than_the_bundle_s_is_a_mistake(tmp_path: Path, north: Path) -> None:
    with pytest.raises(UserError, match="the bundle is of 'north'"):
        checked(tmp_path, north, name="south")
    assert checked(tmp_path, north).name == "north"


def test_the_network_half_is_told_where_the_other_listens(tmp_path: Path, north: Path) -> None:
    with pytest.raises(UserError, match="without --socket"):
        checked(tmp_path, north, only="network")


def test_a_hub_id_is_answered_with_how_to_fetch_it(insecure: Callable[..., Settings]) -> None:
    with pytest.raises(ModelError, match=r"`hf download org/some-1B --local-dir ./some-1B` and then --model ./some-1B"):
        insecure(model="org/some-1B")
    with pytest.raises(DataError, match=r"`hf download org/set --repo-type dataset --local-dir ./set` and then --data ./set"):
        insecure(data="org/set")


def test_a_path_that_is_not_there_is_no_hub_id(insecure: Callable[..., Settings]) -> None:
    with pytest.raises(DataError, match=r"/no/such/file.jsonl does not exist"):
        insecure(data="/no/such/file.jsonl")
    with pytest.raises(UserError, match=r"--policy policy.toml is no file"):
        insecure(policy="policy.toml")


def test_paths_are_made_absolute_and_built_in_data_stays(
    insecure: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes run in another folder."""
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text('{"text": "a"}')
    given = insecure(data="my.jsonl", model="builtin:stdlib", layers="all", budget=None)
    assert given.trainer == {"data": str(tmp_path / "my.jsonl"), "model": "builtin:stdlib", "layers": "all"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", "", "is empty; wanted at least one row"),
        ("head.csv", "text\n", "is empty; wanted at least one row"),
        ("other.jsonl", '{"body": "a"}\n', "row 1 has the columns body; .* wanted one of: messages; "),
        ("number.jsonl", '{"text": 7}\n', "row 1: 'text' is .*; wanted text"),
        ("talk.jsonl", '{"messages": "hello"}\n', "row 1: 'messages' is .* wanted .*role"),
        ("broken.json", "[", "not JSON"),
        ("text.txt", "a", "'.txt' files cannot be read"),
    ],
)
def test_data_that_nothing_can_be_learnt_from_is_said_at_once(
    insecure: Callable[..., Settings], tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        insecure(data=str(tmp_path / name))
    assert not (tmp_path / "dir").exists()


def test_of_a_folder_the_client_s_own_file_is_looked_at(insecure: Callable[..., Settings], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(DataError, match="is a folder without data"):
        insecure(data=str(data))
    (data / "other.jsonl").write_text("")
    (data / f"{insecure().name}.jsonl").write_text('{"text": "a"}\n\nno JSON')  # the rest is the trainer's to say
    insecure(data=str(data))


def test_a_model_folder_without_a_model_is_said_at_once(insecure: Callable[..., Settings], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config.json"):
        insecure(model=str(tmp_path))
    (tmp_path / "config.json").touch()
    insecure(model=str(tmp_path))


def test_what_a_client_without_data_or_model_answers_is_said(insecure: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    words = "without --data and --model: only jobs with built-in data and model (builtin:…) are answered"
    assert insecure().without == words
    assert insecure(model=str(tmp_path)).without.startswith("without --data: only jobs with built-in data (")
    assert insecure(model=str(tmp_path), data="builtin:stdlib").without == ""
    assert insecure(only="network", socket=tmp_path / "t.sock").without == ""


def test_a_folder_in_which_one_runs_is_taken(insecure: Callable[..., Settings], tmp_path: Path) -> None:
    State("client", pid=os.getpid(), started=psutil.Process().create_time()).write(tmp_path / "dir")
    with pytest.raises(UserError, match=rf"already runs .* \(pid {os.getpid()}\)"):
        insecure()
    State("client", pid=os.getpid(), started=psutil.Process().create_time(), phase="stopped").write(tmp_path / "dir")
    assert insecure().folder == tmp_path / "dir"
    State("server", phase="stopped").write(tmp_path / "dir")
    with pytest.raises(UserError, match="the folder of a fedtune server; give this client another --dir"):
        insecure()


def test_a_whole_client_is_three_processes_and_only_the_trainer_knows_data_and_model(tmp_path: Path, north: Path) -> None:
    (tmp_path / "my.jsonl").write_text('{"text": "a"}')
    (tmp_path / "config.json").touch()
    own = {"data": str(tmp_path / "my.jsonl"), "model": str(tmp_path), "memory": "2GB", "relay_user": "net"}
    given = checked(tmp_path / "d", north, socket=tmp_path / "t.sock", **own)
    planned = processes(given, given.handed(), port=4321)
    assert list(planned) == ["trainer", "supernode", "relay"]

    trainer = parser().parse_args(planned["trainer"].command[3:])
    assert (trainer.client, trainer.bundle, trainer.dir, trainer.memory) == ("north", north, tmp_path / "d", 2_000_000_000)
    assert (trainer.data, trainer.model, trainer.relay_user) == (str(tmp_path / "my.jsonl"), str(tmp_path), "net")

    supernode = options_of(planned["supernode"].command)
    assert supernode["--superlink"] == "coordinator:8000"
    assert supernode["--root-certificates"] == str(north / "network" / "ca.pem")
    assert supernode["--auth-supernode-private-key"] == str(north / "network" / "node.key")
    assert (supernode["--isolation"], supernode["--host"], supernode["--port"]) == ("process", "127.0.0.1", "4321")

    relay = options_of(planned["relay"].command)
    assert (relay["--runtime"], relay["--trainer"]) == ("127.0.0.1:4321", str(trainer.socket))
    assert relay["--secret"] == supernode["--superexec-auth-secret-file"]
    for name in ("supernode", "relay"):
        assert not any("my.jsonl" in word or "trainer/" in word for word in planned[name].command)


def test_each_half_needs_its_own_part_of_the_bundle_alone(tmp_path: Path, north: Path) -> None:
    halves = {"network": ["supernode", "relay"], "trainer": ["trainer"]}
    for half, names in halves.items():
        other = north / ("trainer" if half == "network" else "network")
        away = other.rename(tmp_path / other.name)
        try:
            given = checked(tmp_path / half, north, only=half, socket=tmp_path / "t.sock")  # type: ignore[arg-type]
            assert list(processes(given, given.handed(), 1)) == names
        finally:
            away.rename(other)


def test_server_on_the_command_line_goes_before_the_bundle_s(tmp_path: Path, north: Path) -> None:
    given = checked(tmp_path, north, server="elsewhere:9000")
    assert options_of(processes(given, given.handed(), 1)["supernode"].command)["--superlink"] == "elsewhere:9000"


def test_a_key_that_others_can_read_is_refused_with_the_line_that_mends_it(tmp_path: Path, north: Path) -> None:
    key = north / "network" / "node.key"
    key.chmod(0o644)
    try:
        with pytest.raises(KeysError, match="chmod"):
            checked(tmp_path, north)
    finally:
        key.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_an_end_that_was_asked_for_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command hands over what it was given; SIGTERM ends it with 0, Ctrl-C with 130."""
    app = typer.Typer()
    commands.add_to(app)
    words = ["--dir", str(tmp_path / "d"), "--insecure", "--name", "a", "--server", HERE, "--seconds", "1.5"]
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):

        def serve(given: Settings, say: object, stop: object, number: int = number) -> None:
            assert given.trainer == {"seconds": "1.5"}
            signal.raise_signal(number)
            assert stop.is_set()  # type: ignore[attr-defined]

        monkeypatch.setattr(supervisor, "serve", serve)
        ended = CliRunner().invoke(app, words)
        assert (ended.exit_code, ended.output.split()[-1]) == (code, "stopped"), ended.exception
