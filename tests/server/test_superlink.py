"""Flower's SuperLink behind our door."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.routers.runtime.router import router
from flwr.superlink import extensions
from flwr.superlink import main as flower

from fedtune.errors import FedtuneError, UserError
from fedtune.processes import Processes, free_port
from fedtune.security.keyfiles import write_private
from server.door import Door
from server.flower_control import Control
from server.following import submit_bare
from server.runtime import Runtime
from server.superlink import close_side_doors, install_door, is_news, option, own_addresses, secret_in


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook is put back afterwards."""
    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)


def test_the_door_stands_before_all_that_flower_has() -> None:
    before = [middleware.cls for middleware in flower._get_middleware()]
    install_door("word")
    assert flower._get_middleware()[0].kwargs["word"] == "word"
    assert [middleware.cls for middleware in flower._get_middleware()] == [Door, *before]


def test_a_flower_without_the_hook_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(extensions, "get_middleware")
    with pytest.raises(SystemExit, match=r"the SuperLink is not started; wanted flwr>=1.41,<1.43"):
        install_door("word")


@pytest.mark.parametrize("other", [None, list, lambda: [type("Middleware", (), {"cls": object})]])
def test_a_flower_that_does_not_use_the_hook_is_not_started(monkeypatch: pytest.MonkeyPatch, other: object) -> None:
    if other is None:
        monkeypatch.delattr(flower, "_get_middleware")
    else:
        monkeypatch.setattr(flower, "_get_middleware", other)
    with pytest.raises(SystemExit, match="does not take the door"):
        install_door("word")


def test_ways_around_the_door_are_closed() -> None:
    environment = {"FLWR_INTERNAL_GRPC_CONTROL_API": "1", "FORWARDED_ALLOW_IPS": "*", "PATH": "/bin"}
    close_side_doors(environment)
    assert environment == {"PATH": "/bin"}


def test_which_addresses_are_its_own() -> None:
    assert option(["--insecure", "--host", "192.0.2.7", "--port", "1"], "--host") == "192.0.2.7"
    assert option(["--host", "127.0.0.1", "--host=::"], "--host") == "::"
    assert option(["--insecure"], "--host") == ""
    assert own_addresses("0.0.0.0") == own_addresses("::") == ()
    assert own_addresses("192.0.2.7") == (ip_address("192.0.2.7"),)


def test_without_a_secret_that_executors_are_asked_for_it_is_not_started(tmp_path: Path) -> None:
    write_private(tmp_path / "secret", b"known to us")
    (tmp_path / "seen").write_bytes(b"known to all")
    (tmp_path / "seen").chmod(0o644)
    write_private(tmp_path / "empty", b"")
    asked, file = ["--isolation", "process"], "--superexec-auth-secret-file"
    assert secret_in([*asked, file, str(tmp_path / "secret")]) == b"known to us"
    for options, words in (
        (asked, "without, others could take our tasks"),
        ([file, str(tmp_path / "secret")], "without, others could take our tasks"),  # Flower then starts executors itself
        ([*asked, file, str(tmp_path / "seen")], "chmod 600"),
        ([*asked, file, str(tmp_path / "empty")], "is empty"),
    ):
        with pytest.raises(SystemExit, match=words):
            secret_in(options)


def record(name: str, message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord(name, logging.INFO, "", 0, message, args, None)


def test_requests_that_went_well_are_no_news() -> None:
    line = '%s - "%s %s HTTP/%s" %d'
    assert not is_news(record("uvicorn.access", line, "192.0.2.7:1", "POST", "/v1/fleet/pull-messages", "1.1", 200))
    assert is_news(record("uvicorn.access", line, "192.0.2.7:1", "POST", "/v1/control/start-run", "1.1", 403))
    assert not is_news(record("flwr", "ControlServicer.ListNodes"))
    assert is_news(record("flwr", "ControlServicer.StartRun"))


SECRET = b"known to this server alone"


def address_of_this_machine() -> str:
    """Not loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError as error:
            pytest.skip(f"this machine has no address beside loopback: {error}")
        return str(probe.getsockname()[0])


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[int]:
    """The port of one that listens on all addresses. It has our secret, and a run that waits."""
    port = free_port()
    write_private(tmp_path / "secret", SECRET)
    executors = ["--isolation", "process", "--superexec-auth-secret-file", str(tmp_path / "secret")]
    command = [sys.executable, "-m", "server.superlink", "--insecure", "--host", "0.0.0.0", "--port", str(port), *executors]
    # peers that say that they come from loopback, and a second way in: both are there to be closed
    environment = {"FORWARDED_ALLOW_IPS": "*", "FLWR_INTERNAL_GRPC_CONTROL_API": "1"}
    with Processes(tmp_path, environment) as processes, Control(f"127.0.0.1:{port}", None, SECRET) as control:
        processes.start("superlink", [*command, "--database", str(tmp_path / "superlink.db")])
        processes.until(control.answers, "the SuperLink")
        submit_bare(control, tmp_path, "client.app:app")
        yield port


@pytest.mark.slow
def test_a_real_superlink_lists_nothing_and_takes_nothing_from_outside(superlink: int) -> None:
    outside = address_of_this_machine()
    with Control(f"127.0.0.1:{superlink}", None, SECRET) as control:
        assert control.nodes() == []
        assert len(control.unfinished()) == 1
    with Control(f"{outside}:{superlink}", None, SECRET) as control:
        control._client._client.headers["X-Forwarded-For"] = "127.0.0.1"
        for ask in (control.nodes, control.unfinished, lambda: control.stop(1), lambda: list(control.log(1))):
            with pytest.raises(FedtuneError, match="refused: only /v1/fleet/ and /health are open to other machines"):
                ask()
        assert control._client._client.get(f"http://{outside}:{superlink}/health").status_code == 200


@pytest.mark.slow
def test_who_comes_from_loopback_without_the_secret_gets_nothing_of_a_real_superlink(superlink: int, tmp_path: Path) -> None:
    """Another user of the machine, or a stranger whom a forwarder makes local: no run is submitted, no task taken."""
    here = f"127.0.0.1:{superlink}"
    for secret in (b"", b"guessed"):
        with Control(here, None, secret) as control:
            for ask in (control.nodes, control.unfinished, lambda: control.stop(1), lambda: control.register(b"key", "mine")):
                with pytest.raises(FedtuneError, match="refused: this is for processes of `fedtune server` alone"):
                    ask()
            with pytest.raises(FedtuneError, match="refused: this is for processes of"):
                submit_bare(control, tmp_path / "mine", "client.app:app")
        with Runtime(here, None, secret) as runtime, pytest.raises(UserError, match=r"gives us no task .401."):
            runtime.acquire()
    with httpx.Client(base_url=f"http://{here}", headers={"content-type": PROTOBUF_MEDIA_TYPE}) as client:
        paths = [route.path for route in router.routes]
        answers = {path: client.post(path).status_code for path in paths}
    assert len(answers) > 20
    assert set(answers.values()) == {401}, answers  # each wants a secret, or the token of a task
    with Runtime(here, None, SECRET) as runtime:
        assert runtime.acquire()
