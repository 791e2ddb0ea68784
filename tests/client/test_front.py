"""The trainer's front door: who is let in, who is not, and that nothing is changed or left over."""

from __future__ import annotations

import logging
import os
import socket as sockets
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.front import Front
from client.service import serve
from client.transport import carry
from fedtune.envelope import Envelope, WireTensor
from fedtune.errors import ClientFailed, UserError
from fedtune.paths import app_root

SOMEBODY = 61002  # a number that no user and no group of a machine has
ASK = Envelope({"kind": "train"}, (WireTensor("w", "uint8", (3,), "fedtune.raw", b"\0\1\2"),))
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="not root: cannot become another user")


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder) / "t.sock"


@contextmanager
def user(number: int) -> Iterator[None]:
    """This process as another user with a group of the same number."""
    os.setegid(number)
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def as_somebody(code: str, path: Path) -> str:
    """What it prints, in a process of its own: in this one the server would change its user, too."""
    start = """
import os, socket, sys; from client.transport import carry; from fedtune.envelope import Envelope
import grpc._channel  # that grpc would import at its first use, when this user may not read it any more
path, number = sys.argv[1], int(sys.argv[2])
os.setgroups([]); os.setgid(number); os.setuid(number)
"""
    command = [sys.executable, "-c", start + code, str(path), str(SOMEBODY)]
    done = subprocess.run(command, cwd=app_root(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fronts() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "front"]


def echo(ask: Envelope) -> Envelope:
    return ask


def test_a_user_who_may_not_ask_is_closed_out_and_named_in_the_log(socket: Path, caplog: pytest.LogCaptureFixture) -> None:
    serving = serve(echo, socket, peers={SOMEBODY})
    with caplog.at_level(logging.WARNING), sockets.socket(sockets.AF_UNIX) as end:
        end.connect(str(socket))
        assert end.recv(1) == b""
    with pytest.raises(ClientFailed, match="no trainer answers"):
        carry(ASK, socket, patience=0.3)
    serving.stop(None).wait()
    assert f"only [{SOMEBODY}] may ask" in caplog.text
    assert f"this was user {os.geteuid()}, process {os.getpid()}" in caplog.text


def test_this_user_is_let_in_unless_others_are_named(socket: Path) -> None:
    serving = serve(echo, socket)
    assert carry(ASK, socket) == ASK
    serving.stop(None).wait()


@as_root
def test_another_user_in_the_socket_s_group_is_let_in_if_named(socket: Path) -> None:
    serving = serve(echo, socket, peers={SOMEBODY}, group=SOMEBODY)
    assert stat.S_IMODE(socket.stat().st_mode) == 0o660
    assert as_somebody("print(carry(Envelope({'user': os.geteuid()}), path).header['user'])", socket) == str(SOMEBODY)
    serving.stop(None).wait()


@as_root
def test_one_in_the_group_who_is_not_named_gets_no_further_than_the_door(socket: Path) -> None:
    serving = serve(echo, socket, peers={os.geteuid()}, group=SOMEBODY)
    reads = "end = socket.socket(socket.AF_UNIX); end.settimeout(5); end.connect(path); print(end.recv(1))"
    assert as_somebody(reads, socket) == "b''"
    serving.stop(None).wait()


@as_root
@pytest.mark.parametrize("group", [None, 61003])
def test_one_outside_the_group_cannot_even_connect(group: int | None, socket: Path) -> None:
    serving = serve(echo, socket, peers={SOMEBODY}, group=group)
    with user(SOMEBODY), sockets.socket(sockets.AF_UNIX) as end, pytest.raises(PermissionError):
        end.connect(str(socket))
    serving.stop(None).wait()


@as_root
def test_the_way_round_the_door_is_closed(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC's own socket lies in a folder that no other user may enter."""
    monkeypatch.setattr(tempfile, "tempdir", str(socket.parent))
    serving = serve(echo, socket, peers={os.geteuid()})
    (inner,) = socket.parent.glob("fedtune-*/grpc.sock")
    with user(SOMEBODY), sockets.socket(sockets.AF_UNIX) as end, pytest.raises(PermissionError):
        end.connect(str(inner))
    serving.stop(None).wait()


def test_an_unknown_group_is_a_user_s_mistake_and_leaves_no_socket_open(socket: Path) -> None:
    with pytest.raises(UserError, match="no-such-group"):
        serve(echo, socket, group="no-such-group")
    with sockets.socket(sockets.AF_UNIX) as end, pytest.raises(OSError):  # noqa: PT011  refused, or gone
        end.connect(str(socket))


def test_a_file_that_is_no_socket_is_left_alone(socket: Path) -> None:
    socket.write_text("of somebody")
    with pytest.raises(UserError, match="cannot listen"):
        serve(echo, socket)
    assert socket.read_text() == "of somebody"


def test_stopping_leaves_no_file_no_folder_and_no_thread(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(socket.parent))
    before = fronts()
    serving = serve(echo, socket)
    carry(ASK, socket)
    assert list(socket.parent.glob("fedtune-*"))
    serving.stop(None).wait()
    for thread in set(fronts()) - set(before):
        thread.join(timeout=10)
    assert set(fronts()) <= set(before)
    assert list(socket.parent.iterdir()) == []


def test_who_waits_for_the_end_is_told_when_it_comes(socket: Path) -> None:
    serving = serve(echo, socket)
    waiting = threading.Thread(target=serving.wait_for_termination)
    waiting.start()
    serving.stop(None)
    waiting.join(timeout=10)
    assert not waiting.is_alive()


@contextmanager
def fronted(folder: Path) -> Iterator[tuple[sockets.socket, sockets.socket]]:
    """Both ends of a connection through a front door."""
    with sockets.socket(sockets.AF_UNIX) as outer, sockets.socket(sockets.AF_UNIX) as inner:
        for listener, name in ((outer, "outer"), (inner, "inner")):
            listener.bind(str(folder / name))
            listener.listen()
        front = Front(outer, folder / "inner", {os.geteuid()})
        with sockets.socket(sockets.AF_UNIX) as client:
            client.connect(str(folder / "outer"))
            with inner.accept()[0] as server:
                yield client, server
        front.close()


def test_a_side_that_has_said_all_can_still_listen(socket: Path) -> None:
    with fronted(socket.parent) as (client, server):
        client.sendall(b"all that I have")
        client.shutdown(sockets.SHUT_WR)
        assert server.makefile("rb").read() == b"all that I have"
        server.sendall(b"an answer")
        assert client.recv(99) == b"an answer"


@pytest.mark.parametrize("who", [0, 1])
def test_a_side_that_goes_ends_the_other(who: int, socket: Path) -> None:
    with fronted(socket.parent) as ends:
        ends[who].close()
        ends[1 - who].settimeout(10)
        assert ends[1 - who].recv(1) == b""


def test_more_bytes_than_any_buffer_arrive_in_order_both_ways_at_once(socket: Path) -> None:
    sent = [bytes([number]) * 3_000_001 + b"end" for number in (1, 2)]
    got = [b"", b""]

    def read(end: sockets.socket, place: int) -> None:
        while not got[place].endswith(b"end"):
            got[place] += end.recv(1 << 20)

    with fronted(socket.parent) as ends:
        reading = [threading.Thread(target=read, args=(end, place)) for place, end in enumerate(ends)]
        writing = [threading.Thread(target=end.sendall, args=(sent[place],)) for place, end in enumerate(ends)]
        for thread in reading + writing:
            thread.start()
        for thread in reading + writing:
            thread.join(timeout=20)
    assert got == [sent[1], sent[0]]


def test_when_the_server_behind_it_is_gone_the_door_says_so_and_closes(socket: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sockets.socket(sockets.AF_UNIX) as outer, sockets.socket(sockets.AF_UNIX) as client:
        outer.bind(str(socket))
        outer.listen()
        front = Front(outer, socket.parent / "nobody", {os.geteuid()})
        client.connect(str(socket))
        assert client.recv(1) == b""
        front.close()
    assert "No such file" in caplog.text
