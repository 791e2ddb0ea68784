"""What `fedtune client` does with processes that end, a bundle that changes and a connection that comes and goes."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from client.connection import ACTIVATE, STALE, Connection
from client.handed import Handed
from client.said import FIRM, GONE, Line, Told
from client.settings import Settings, checked
from client.supervisor import Client, serve
from client.told import ANSWERS, LINE, LINK, Answers, Follow, Link
from fedtune.daemon import State
from fedtune.errors import FedtuneError, KeysError, UserError
from fedtune.processes import free_port
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle
from fedtune.security.probe import Probe

CA = Path("ca.pem")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Prober:
    """A server as `found` describes it."""

    def __init__(self) -> None:
        self.found, self.asked = Probe(True), []

    def __call__(self, server: str, ca: Path | None) -> Probe:
        self.asked.append((server, ca))
        return self.found


@pytest.fixture
def prober() -> Prober:
    return Prober()


@pytest.fixture
def connection(tmp_path: Path, prober: Prober, clock: Clock) -> Connection:
    return Connection("host:8000", CA, tmp_path / LINK, prober, clock)


def test_while_the_server_answers_the_node_nobody_probes_it(
    connection: Connection, prober: Prober, clock: Clock, tmp_path: Path
) -> None:
    Link("/v1/fleet/pull-messages", 200, clock.now, well=clock.now).write(tmp_path / LINK)
    clock.now += STALE - 1  # it trains; a heartbeat comes at least every 23 s
    assert connection.why(up=True) is None
    assert prober.asked == []


def test_a_warning_of_the_supernode_has_the_server_probed_at_once(
    connection: Connection, prober: Prober, clock: Clock, tmp_path: Path
) -> None:
    Link("/v1/fleet/pull-messages", 200, clock.now, well=clock.now, warned=clock.now + 1).write(tmp_path / LINK)
    prober.found = Probe(False, "nothing listens at host:8000")
    assert connection.why(up=True) == "nothing listens at host:8000"
    assert prober.asked == [("host:8000", CA)]


def test_probes_are_seldom(connection: Connection, prober: Prober, clock: Clock) -> None:
    for _ in range(20):
        connection.why(up=True)
        clock.now += 0.5
    assert len(prober.asked) == 2  # 10 s, one each 5 s


def test_an_address_that_is_none_is_a_reason_and_no_end(tmp_path: Path) -> None:
    assert "host:port" in str(Connection("nonsense", None, tmp_path / LINK).why(up=True))


def test_a_server_that_has_ended_is_told_from_one_that_cannot_be_reached(tmp_path: Path) -> None:
    here = Connection(f"127.0.0.1:{free_port()}", None, tmp_path / LINK)
    nowhere = Connection("no-such-host.invalid:1", None, tmp_path / LINK)
    assert all("is the server started" in str(here.why(up)) for up in (True, False))
    assert nowhere.why(up=True)
    assert (here.gone, nowhere.gone) == (True, False)


@pytest.mark.parametrize(
    ("link", "up", "found", "wanted"),
    [
        (None, True, Probe(True), "host:8000 answers, and the SuperNode is about to connect"),
        (None, False, Probe(True), "the SuperNode has ended"),
        (None, True, Probe(True, "the certificate of host expired"), "the certificate of host expired"),
        (Link(ACTIVATE, 401), True, Probe(True, clock=1.0), "does not know this node (answer 401): it was revoked, or is not"),
        (Link(ACTIVATE, 401), True, Probe(True, clock=-720.0), "differ by 12 minutes"),
        (Link(ACTIVATE, 400), False, Probe(True, clock=0.0), "does not know this node (answer 400)"),
        (Link(ACTIVATE, 412), True, Probe(True, clock=0.0), "or another client runs with the same bundle"),
        (Link("/v1/fleet/pull-messages", 503), True, Probe(True), "answers 503 to /v1/fleet/pull-messages"),
        (Link("/v1/fleet/pull-messages", 200, 900.0, 900.0), True, Probe(True), "has had no answer for more than 30 s"),
    ],
)
def test_each_trouble_has_words_of_its_own(
    connection: Connection, prober: Prober, tmp_path: Path, link: Link | None, up: bool, found: Probe, wanted: str
) -> None:
    """At second 1000; a clock that differs by 720 s is 12 minutes off, by more than the 300 s that Flower takes."""
    if link:
        link.write(tmp_path / LINK)
    prober.found = found
    assert wanted in str(connection.why(up))


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def said(tmp_path: Path, lines: list[str]) -> Told:
    return Told(tmp_path, State("client"), lines.append)


def test_the_line_tells_changes_and_leaves_out_what_is_short(
    said: Told, lines: list[str], clock: Clock, tmp_path: Path
) -> None:
    line = Line(said, clock)
    seconds: Sequence[str | None] = (
        ["refused"] * 4 + [None] * 3 + ["short"] + [None] * 2 + ["gone"] * 4 + ["other"] * 4 + [None]
    )
    for why in seconds:
        line.now(why, "h:1")
        clock.now += 1
    assert FIRM == 2
    assert lines == [
        "not connected: refused",
        "connected to h:1",
        "connection lost: gone",
        "not connected: other",
        "connected again to h:1",
    ]
    assert (said.state.phase, said.state.why, State.read(tmp_path).address) == ("running", "", "h:1")


def test_a_server_that_ends_after_its_asks_is_no_trouble(said: Told, lines: list[str], clock: Clock) -> None:
    line = Line(said, clock)

    def goes(*, after: str) -> str:
        line.now(None, "h:1")
        for _ in range(4):
            line.now(after, "h:1", gone=True)
            clock.now += 1
        return lines[-1]

    assert goes(after="nothing listens") == "connection lost: nothing listens"
    said.answered({"kind": "train", "run": "demo", "round": 1, "seconds": 1.0})
    assert goes(after="nothing listens") == GONE
    assert said.state.why == GONE
    assert lines.count(GONE) == 1


def test_the_reason_of_a_wait_is_in_the_state(said: Told, tmp_path: Path, clock: Clock) -> None:
    Line(said, clock).now("nothing listens", "h:1")
    assert (State.read(tmp_path).phase, State.read(tmp_path).why) == ("waiting", "nothing listens")


def test_what_the_relay_tells_becomes_few_lines_and_the_state_s_round(said: Told, lines: list[str], tmp_path: Path) -> None:
    relay = Answers(tmp_path / ANSWERS)
    follow = Follow(tmp_path / ANSWERS)
    relay.tell({"kind": "hello", "run": "demo", "job": {"large": 1}}, 2.0)
    relay.tell({"kind": "evaluate", "run": "demo", "round": 0}, 0.2)
    relay.tell({"kind": "train", "run": "demo", "round": 1}, 1.26)
    relay.tell({"kind": "train", "run": "demo", "round": 2}, 0.1, "policy.hours: given 3, allowed 9-17")
    for told in follow.new():
        said.answered(told)
    assert lines == [
        "run demo of the coordinator begun",
        "round 1: train answered in 1.3 s",
        "run demo, round 2: train not answered: policy.hours: given 3, allowed 9-17",
    ]
    assert State.read(tmp_path).run == {"name": "demo", "round": 2}
    assert list(follow.new()) == []
    assert list(Follow(tmp_path / ANSWERS).new()) == []  # a client that starts again does not tell the old ones


def test_a_line_that_is_still_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    follow = Follow(tmp_path / ANSWERS)
    with (tmp_path / ANSWERS).open("a") as file:
        file.write('{"kind":')
        file.flush()
        assert list(follow.new()) == []
        file.write(' "train"}\n')
        file.flush()
        assert list(follow.new()) == [{"kind": "train"}]


STRANGE = [
    b"\xff\n",
    b"none of ours\n",
    b"[1]\n",
    b"7\n",
    b"[" * 12_000 + b"\n",  # deeper than Python follows
    b'{"kind": "train", "round": ' + b"9" * 5000 + b"}\n",  # more digits than Python reads
    b"x" * (3 * LINE) + b"\n",
    b'{"kind": {"a": "\\u001b[2J"}, "run": ["r"], "round": "two", "seconds": "soon", "failed": {"b": 1}}\n',
    b'{"kind": "train", "round": [1], "seconds": NaN}\n',
    b'{"kind": "train", "round": 1e999, "seconds": 1' + b"0" * 400 + b"}\n",
    b'{"kind": "hello", "run": null}\n',
]


def test_whatever_a_relay_that_was_taken_over_tells_the_supervisor_goes_on(
    said: Told, lines: list[str], tmp_path: Path
) -> None:
    follow = Follow(tmp_path / ANSWERS)
    (tmp_path / ANSWERS).write_bytes(b"".join(STRANGE))
    Answers(tmp_path / ANSWERS).tell({"kind": "train", "run": "demo", "round": 3}, 1.0)
    for told in follow.new():
        said.answered(told)
    assert lines[-1] == "round 3: train answered in 1.0 s"
    assert all(line.isprintable() for line in lines)
    assert State.read(tmp_path).run == {"name": "demo", "round": 3}


def test_a_relay_s_file_that_is_none_is_passed_over(tmp_path: Path) -> None:
    follow = Follow(tmp_path / ANSWERS)
    os.mkfifo(tmp_path / ANSWERS)  # to open it would wait for a writer
    assert list(follow.new()) == []
    (tmp_path / ANSWERS).unlink()
    (tmp_path / ANSWERS).mkdir()
    assert list(follow.new()) == []


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ('{"status": "200", "well": "now", "path": "a\\u001bb"}', Link("a?b")),
        ('{"status": 401, "well": NaN, "warned": [1], "path": 7}', Link("7", 401)),
        ('{"status": 200, "well": 1e999}', Link("", 200)),
        ('{"unknown": 1}', None),
        ("[" * 100_000, None),
        ("[1]", None),
    ],
)
def test_whatever_the_supernode_s_file_says_the_supervisor_goes_on(
    connection: Connection, tmp_path: Path, given: str, read: Link | None
) -> None:
    (tmp_path / LINK).write_text(given)
    assert Link.read(tmp_path / LINK) == read
    assert connection.why(up=True)


def test_the_relay_s_file_begins_anew_before_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.told.MOST", 300)
    relay, follow, read = Answers(tmp_path / ANSWERS), Follow(tmp_path / ANSWERS), []
    for number in range(20):
        relay.tell({"round": number}, 0)
        read += [told["round"] for told in follow.new()]
    assert read == list(range(20))
    assert (tmp_path / ANSWERS).stat().st_size < 400


class Fake:
    """Processes that only exist here: `fall` ends one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands, self.codes = folder, [], {}

    def start(self, name: str, command: Sequence[str]) -> None:
        self.commands.append((name, list(command)))
        self.codes[name] = None

    def fall(self, name: str, code: int, last: str) -> None:
        self.codes[name] = code
        self.log(name).write_text(f"first\n{last}\n")

    def ended(self, name: str) -> int | None:
        return self.codes[name]

    def pids(self) -> Mapping[str, int]:
        return {}

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorKeys:
    return CoordinatorKeys.init(tmp_path_factory.mktemp("server") / "keys", ["coordinator"], "127.0.0.1:9")


@pytest.fixture(scope="module")
def made(keys: CoordinatorKeys) -> Path:
    return make_bundle(keys, "north")


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return shutil.copytree(made, tmp_path / "north")


@pytest.fixture
def settings(bundle: Path, tmp_path: Path) -> Settings:
    return checked(tmp_path, bundle)


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


@pytest.fixture
def client(settings: Settings, fake: Fake, said: Told) -> Client:
    return Client(settings, Handed(settings), fake, said)  # type: ignore[arg-type]


def test_one_that_ends_is_said_with_its_last_line_and_started_again(client: Client, fake: Fake, lines: list[str]) -> None:
    assert [name for name, _ in fake.commands] == ["trainer", "supernode", "relay"]
    client.step()
    fake.fall("trainer", -9, "the last words")
    client.step()
    log = fake.log("trainer")
    assert lines[-1] == f"trainer was killed by SIGKILL (out of memory?): the last words (the log: {log}); it is started again"


def test_what_the_user_must_mend_ends_the_client(client: Client, fake: Fake) -> None:
    fake.fall("trainer", 2, "policy.toml: unknown key 'hour', did you mean 'hours'?")
    with pytest.raises(UserError, match="did you mean 'hours'"):
        client.step()


def test_a_client_whose_folder_was_removed_ends_and_leaves_none(
    client: Client, said: Told, bundle: Path, tmp_path: Path
) -> None:
    """The old one lives on under another name, so that the new one cannot have its inode."""
    folder = tmp_path
    client.step()
    away = folder.rename(folder.with_name(f"{folder.name}-away"))
    with pytest.raises(FedtuneError, match="was removed or replaced while") as ended, said.to_the_end():
        client.step()
    assert not isinstance(ended.value, UserError)  # exit code 1: there is nothing that was typed wrongly
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(FedtuneError, match="was removed or replaced while"), said.to_the_end():
        client.step()
    assert list(folder.iterdir()) == []
    shutil.rmtree(away)


def move(bundle: Path, server: str) -> None:
    file = bundle / "client.toml"
    file.write_text(re.sub(r'(?m)^server = ".*"$', f'server = "{server}"', file.read_text()))


def test_a_server_that_moves_restarts_the_supernode_alone(client: Client, fake: Fake, bundle: Path, said: Told) -> None:
    move(bundle, "127.0.0.1:10")
    client.step()
    assert [name for name, _ in fake.commands[3:]] == ["supernode"]
    assert "127.0.0.1:10" in fake.commands[3][1]
    assert said.state.address == "127.0.0.1:10"
    client.step()
    assert len(fake.commands) == 4


def test_another_signing_key_of_the_coordinator_restarts_the_trainer_alone(client: Client, fake: Fake, bundle: Path) -> None:
    file = bundle / "client.toml"
    text = file.read_text()
    seal = re.search(r'(?m)^seal = "(.*)"$', text)
    assert seal is not None
    file.write_text(re.sub(r'(?m)^verify = ".*"$', f'verify = "{seal[1]}"', text, count=1))  # any 32 bytes are a key
    client.step()
    assert [name for name, _ in fake.commands[3:]] == ["trainer"]


def test_a_bundle_that_is_half_copied_leaves_the_old_one_in_use(
    client: Client, fake: Fake, bundle: Path, lines: list[str]
) -> None:
    whole = (bundle / "client.toml").read_text()
    (bundle / "client.toml").write_text(whole[:40])
    client.step()
    client.step()
    assert len(fake.commands) == 3
    assert [line for line in lines if "the old one is used" in line] == lines[:1]
    (bundle / "client.toml").write_text(whole)
    move(bundle, "127.0.0.1:11")
    client.step()
    assert "127.0.0.1:11" in fake.commands[3][1]


def test_a_bundle_that_cannot_be_read_at_the_start_ends_it(settings: Settings, bundle: Path) -> None:
    (bundle / "client.toml").write_text("")
    with pytest.raises(KeysError):
        serve(settings, lambda line: None, threading.Event())


def test_the_secret_of_the_two_is_for_nobody_else(client: Client, tmp_path: Path) -> None:
    secret = tmp_path / "runtime.secret"
    assert (secret.stat().st_mode & 0o777, secret.stat().st_size) == (0o600, 32)


def test_the_guards_of_the_trainer_come_into_the_state(said: Told, tmp_path: Path) -> None:
    said.guards()  # not yet there
    found = [{"name": "network", "on": True, "why": "gone"}, {"name": "core dumps", "on": False, "why": "not permitted"}]
    (tmp_path / "guards.json").write_text(json.dumps(found))
    said.guards()
    assert State.read(tmp_path).guards == {"network": "on", "core dumps": "not permitted"}
