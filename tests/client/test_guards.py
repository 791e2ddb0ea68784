"""Guards are raised in processes of their own: there is no way back. As root, also as a user without rights."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.guards import Guard
from fedtune.paths import app_root

SOMEBODY, TEAM = 61001, 61010  # numbers that no user and no group of a machine has
AS_USER = """
import json, os, resource, socket, sys, threading
from pathlib import Path
from client import guards, offline
user, team, port = (int(word) for word in sys.argv[1:4])
folder = Path(sys.argv[4])
if user != os.geteuid():
    os.setgroups([team]); os.setresgid(user, user, user); os.setresuid(user, user, user)
    offline.call("prctl", 4, 1, 0, 0, 0)  # what execve would do: /proc/self belongs to the new user
def connects():
    with socket.socket() as end:
        return end.connect_ex(("127.0.0.1", port)) == 0
def said(raised):
    return {guard.name: [guard.on, guard.why] for guard in raised}
"""

users = pytest.mark.parametrize(
    "user",
    [
        pytest.param(os.geteuid(), id="this user"),
        pytest.param(SOMEBODY, id="without rights", marks=pytest.mark.skipif(os.geteuid() != 0, reason="not root")),
    ],
)


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, and everybody may pass."""
    with tempfile.TemporaryDirectory(prefix="ft") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def result_of(code: str, user: int, port: int, folder: Path) -> Any:
    """What the code gives to `result`."""
    script = f"{AS_USER}\n{code}\nprint(json.dumps(result))"
    command = [sys.executable, "-c", script, str(user), str(TEAM), str(port), str(folder)]
    done = subprocess.run(command, cwd=app_root(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def on_or_skip(guard: list[Any], user: int) -> None:
    """Off is right only where another program cannot do it either."""
    if not guard[0]:
        tool = shutil.which("unshare")
        ways = [["--net"], ["--user", "--net"]] if tool else []
        done = [subprocess.run([tool, *way, "true"], user=user, capture_output=True, check=False).returncode for way in ways]
        assert 0 not in done, guard[1]
        pytest.skip(f"this machine permits none: {guard[1]}")


@users
def test_a_port_that_was_within_reach_is_not_any_more(user: int, port: int, folder: Path) -> None:
    code = "result = [connects(), said(guards.raise_guards()), connects()]"
    before, said, after = result_of(code, user, port, folder)
    assert before
    assert after is not said["network"][0]
    on_or_skip(said["network"], user)


@users
def test_threads_that_start_later_have_no_network_either(user: int, port: int, folder: Path) -> None:
    code = """
raised, found = said(guards.raise_guards()), []
thread = threading.Thread(target=lambda: found.append(connects())); thread.start(); thread.join()
result = [raised, found]"""
    said, found = result_of(code, user, port, folder)
    on_or_skip(said["network"], user)
    assert found == [False]


@users
def test_where_a_thread_runs_already_the_guard_says_that_it_is_off(user: int, port: int, folder: Path) -> None:
    code = """
done = threading.Event()
threading.Thread(target=done.wait, daemon=True).start()
result = [said(guards.raise_guards()), connects()]"""
    said, after = result_of(code, user, port, folder)
    assert said["network"][0] is False
    assert "2 threads" in said["network"][1]
    assert after


@users
def test_a_unix_socket_in_the_file_system_works_on(user: int, port: int, folder: Path) -> None:
    """A relay outside, and the trainer's end inside, which has left the network."""
    path = folder / "t.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen()
        code = """
guards.raise_guards()
end = socket.socket(socket.AF_UNIX); end.connect(str(folder / "t.sock")); end.sendall(b"ask")
result = end.recv(9).decode()"""
        relay = threading.Thread(target=_answer_once, args=(listener,))
        relay.start()
        assert result_of(code, user, port, folder) == "ASK"
        relay.join()


def _answer_once(listener: socket.socket) -> None:
    with listener.accept()[0] as end:
        end.sendall(end.recv(9).upper())


@users
def test_files_stay_readable_by_user_and_by_group(user: int, port: int, folder: Path) -> None:
    """Also in a user namespace, which knows neither the group nor any other user."""
    own, shared = folder / "own", folder / "shared"
    for path, owner, group, mode in ((own, user, -1, 0o600), (shared, -1, TEAM if user == SOMEBODY else -1, 0o640)):
        path.write_text(path.name)
        os.chown(path, owner, group)
        path.chmod(mode)
    code = """
guards.raise_guards()
result = [(folder / name).read_text() for name in ("own", "shared")] + [os.geteuid()]"""
    assert result_of(code, user, port, folder) == ["own", "shared", user]


@users
def test_no_new_privileges_and_no_memory_in_core_dumps(user: int, port: int, folder: Path) -> None:
    code = """
said = said(guards.raise_guards())
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
filter = Path("/proc/self/coredump_filter").read_text()
result = [said, status["NoNewPrivs"].strip(), resource.getrlimit(resource.RLIMIT_CORE), int(filter, 16)]"""
    said, no_new, core, filtered = result_of(code, user, port, folder)
    assert said["privileges"][0]
    assert said["core dumps"][0]
    assert (no_new, core, filtered) == ("1", [0, 0], 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: no second user to recognise")
def test_with_other_users_to_recognise_it_stays_in_the_user_namespace_of_all(port: int, folder: Path) -> None:
    """In one of its own, the uid 0 of this test would be 65534 to it."""
    (folder / "roots").write_text("")
    code = "result = [said(guards.raise_guards(other_users=%s)), connects(), (folder / 'roots').stat().st_uid]"
    said, after, owner = result_of(code % True, SOMEBODY, port, folder)
    assert owner == 0
    assert after is not said["network"][0]
    said, _, owner = result_of(code % False, SOMEBODY, port, folder)
    if "user namespace" in said["network"][1]:
        assert owner == 65534


@pytest.mark.parametrize("refused", [True, False])
def test_a_way_out_that_only_claims_to_work_is_not_believed(refused: bool, port: int, folder: Path) -> None:
    code = f"""
def claims(*_): return "all is well"
def refuses(*_): raise OSError(1, "not permitted")
guards.leave_network = claims; guards.leave_tcp = {"refuses" if refused else "claims"}
guards.only_loopback = lambda: False
result = said(guards.raise_guards())"""
    on, why = result_of(code, os.geteuid(), port, folder)["network"]
    assert not on
    assert "all is well" in why


def test_where_nothing_is_permitted_the_reasons_are_said(port: int, folder: Path) -> None:
    code = """
def refuses(*_): raise OSError(1, "unshare: Operation not permitted")
guards.leave_network = guards.leave_tcp = refuses
result = said(guards.raise_guards())"""
    on, why = result_of(code, os.geteuid(), port, folder)["network"]
    assert not on
    assert "unshare: Operation not permitted" in why


def test_what_the_log_says() -> None:
    assert str(Guard("network", True, "a namespace")) == "network: on (a namespace)"
    assert str(Guard("network", False, "not permitted")) == "network: OFF (not permitted)"
