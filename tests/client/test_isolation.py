"""Both halves of a client, started as their units start them: what each can reach, and that they can talk."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from client.front import Peer
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_bundle
from tests.client.sandbox import USERS, Machine, directives, why_not

TRAINER, NETWORK = "fedtune-trainer.service", "fedtune-network.service"
REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

DATA, MODEL = "/srv/fedtune-data/data.jsonl", "/srv/fedtune-model/config.json"
SIGNS, NODE = "/etc/fedtune/bundle/trainer/client.key", "/etc/fedtune/bundle/network/node.key"
KEPT = {TRAINER: "/var/lib/fedtune-trainer/kept", NETWORK: "/var/lib/fedtune-network/kept"}
ALL = {DATA, MODEL, SIGNS, NODE, *KEPT.values()}
MAY_READ = {TRAINER: {DATA, MODEL, SIGNS, KEPT[TRAINER]}, NETWORK: {NODE, KEPT[NETWORK]}}

READS = """
import json, sys
def can_read(path):
    try:
        return bool(open(path).read(1))
    except OSError:
        return False
print(json.dumps([can_read(path) for path in sys.argv[1:]]))"""
CONNECTS = """
import json, socket, sys
with socket.socket() as end:
    print(json.dumps(end.connect_ex(("127.0.0.1", int(sys.argv[1]))) == 0))"""
# What the network half does with each message, and the answer's header.
CARRIES = """
import json, sys
from pathlib import Path
from client.transport import carry
from fedtune.envelope import Envelope
print(json.dumps(dict(carry(Envelope({"kind": "train", "ask": "r1-0"}), Path(sys.argv[1])).header)))"""
OPENS = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as end:
    try:
        end.connect(sys.argv[1])
        print(json.dumps("closed" if end.recv(1) == b"" else "open"))
    except OSError as error:
        print(json.dumps(type(error).__name__))"""
# `fedtune client`, without the other commands.
FEDTUNE = """
import typer
from client import commands
app = typer.Typer()
app.callback()(lambda: None)
commands.add_to(app)
app()"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """As an operator makes it from the units' own files and a bundle. In a short folder: sockets want that."""
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        machine = Machine(Path(folder))
        machine.hand_over()
        bundle = make_bundle(CoordinatorKeys.init(Path(folder) / "keys", [], "127.0.0.1:1"), "north")
        shutil.copytree(bundle, machine.path("/etc/fedtune/bundle"), dirs_exist_ok=True)
        machine.path(DATA).write_text('{"text": "private"}\n')
        machine.path(MODEL).write_text("{}")
        for path in (DATA, MODEL):
            machine.path(path).chmod(0o600)  # as a careful root copies
        machine.hand_over()
        for unit, path in KEPT.items():
            result_in(machine, unit, "print(0)")  # makes its folders
            machine.path(path).write_text("kept between rounds")
            os.chown(machine.path(path), USERS[directives(unit)["User"][0]], -1)
            machine.path(path).chmod(0o600)
        yield machine


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server on the loopback of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def result_in(machine: Machine, unit: str, code: str, *words: object, **how: Any) -> Any:
    process = machine.started(unit, [sys.executable, "-c", code, *map(str, words)], **how)
    out, trouble = process.communicate(timeout=60)
    assert process.returncode == 0, trouble
    return json.loads(out)


def readable(machine: Machine, unit: str, **how: Any) -> set[str]:
    paths = sorted(ALL)
    return {path for path, yes in zip(paths, result_in(machine, unit, READS, *map(machine.path, paths), **how)) if yes}  # noqa: B905


def test_the_trainer_cannot_open_a_tcp_connection_and_the_network_half_can(machine: Machine, port: int) -> None:
    assert result_in(machine, NETWORK, CONNECTS, port) is True
    assert result_in(machine, TRAINER, CONNECTS, port) is False


@pytest.mark.parametrize("unit", [TRAINER, NETWORK])
def test_each_half_reads_its_own_and_nothing_else(unit: str, machine: Machine) -> None:
    """Of data, model, both keys and what each keeps."""
    assert readable(machine, unit) == MAY_READ[unit]


@pytest.mark.parametrize("unit", [TRAINER, NETWORK])
def test_the_users_alone_keep_the_halves_apart(unit: str, machine: Machine) -> None:
    assert readable(machine, unit, reachable=True) == MAY_READ[unit]


def test_the_unit_alone_keeps_the_network_half_from_files_that_are_open_to_all(machine: Machine) -> None:
    """An operator's `chmod -R a+rX`, as happens."""
    opened = [machine.path(path) for path in MAY_READ[TRAINER]]
    before = {path: path.stat().st_mode for file in opened for path in (file, file.parent)}
    try:
        for path in before:
            path.chmod(0o755)
        assert readable(machine, NETWORK, reachable=True) == MAY_READ[NETWORK] | MAY_READ[TRAINER]
        assert readable(machine, NETWORK) == MAY_READ[NETWORK]
    finally:
        for path, mode in before.items():
            path.chmod(mode)


def command_of(machine: Machine, unit: str) -> list[str]:
    """The unit's ExecStart with its settings filled in, on this Python and below the machine's root."""
    settings = dict(re.findall(r"^(\w+)=(.*)$", (Path(__file__).parents[2] / "client/units/client.env").read_text(), re.M))
    line = re.sub(r"\$\{?(\w+)\}?", lambda match: settings[match[1]], directives(unit)["ExecStart"][0])
    program, *words = shlex.split(line)
    assert program.endswith("/fedtune")
    return [sys.executable, "-c", FEDTUNE, *(str(machine.path(word)) if word.startswith("/") else word for word in words)]


@contextmanager
def running(machine: Machine, unit: str) -> Iterator[Path]:
    """The socket of a trainer that was started as its unit says."""
    path = machine.path("/run/fedtune/trainer.sock")
    process = machine.started(unit, command_of(machine, unit))
    deadline = time.monotonic() + 90
    while not path.is_socket():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    try:
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert not path.exists(), "the trainer was not ended, or not by its own hand"


def listening_at(path: Path) -> Peer:
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(path))
        return Peer.at(end)


def test_a_trainer_started_by_its_unit_has_no_network_and_answers_the_relay_s_user_alone(machine: Machine, port: int) -> None:
    with running(machine, TRAINER) as path:
        trainer = listening_at(path)
        assert trainer.uid == USERS["fedtune-trainer"]
        inside = ["nsenter", "--net", f"--target={trainer.pid}", sys.executable, "-c", CONNECTS, str(port)]
        assert json.loads(subprocess.run(inside, capture_output=True, check=True).stdout) is False

        answer = result_in(machine, NETWORK, CARRIES, path)
        assert answer["ask"] == "r1-0"
        assert "sign" in answer["failed"]  # the ask of this test is nobody's; that it was answered is the point

        assert result_in(machine, NETWORK, OPENS, path, user="somebody") == "PermissionError"
        path.chmod(0o666)
        assert result_in(machine, NETWORK, OPENS, path, user="somebody") == "closed"
        guards = json.loads(machine.path("/var/lib/fedtune-trainer/guards.json").read_text())
    assert {guard["name"]: guard["on"] for guard in guards} == {"network": True, "privileges": True, "core dumps": True}
