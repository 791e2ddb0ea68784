"""The coordinator's health over a real socket: a loop that is stuck, a SuperLink that is gone, an address that is taken."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import pytest

from fedtune.daemon import State
from fedtune.errors import UserError
from fedtune.health import status
from fedtune.processes import free_port
from fedtune.security.addresses import Address
from server.health import COORDINATOR, CoordinatorHealth, health_of, is_ready, told_at
from server.outside import told

HERE = Address("127.0.0.1", 0)


def test_it_lives_while_its_loop_comes_round_and_is_ready_as_it_says() -> None:
    now, ready = [100.0], [False]
    health = CoordinatorHealth(lambda: ready[0], clock=lambda: now[0])
    with told_at(HERE, health) as port:

        def asked() -> tuple[str, str]:
            return status(f"127.0.0.1:{port}"), status(f"127.0.0.1:{port}", COORDINATOR)

        assert asked() == ("SERVING", "NOT_SERVING")
        ready[0], now[0] = True, 129.0
        assert asked() == ("SERVING", "SERVING")
        now[0] = 130.0
        assert asked() == ("NOT_SERVING", "SERVING")
        health.looked()
        assert asked() == ("SERVING", "SERVING")
    assert status(f"127.0.0.1:{port}", patience=1) == "UNREACHABLE"


def test_ready_is_at_work_with_a_superlink_that_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as superlink:
        at = f"127.0.0.1:{superlink.getsockname()[1]}"
        assert not is_ready(tmp_path, at)  # nothing was started
        found = {}
        for phase in ("starting", "waiting", "running", "finished", "failed", "stopped"):
            State("server", phase=phase).write(tmp_path)
            found[phase] = is_ready(tmp_path, at)
    assert [phase for phase, ready in found.items() if ready] == ["waiting", "running"]
    State("server", phase="running").write(tmp_path)
    assert not is_ready(tmp_path, at)  # it listens no more
    assert not is_ready(tmp_path, "nonsense")


def test_an_address_that_is_taken_is_a_user_s_mistake(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(UserError, match=f"--health {at}"), told_at(at, health_of(tmp_path, "127.0.0.1:1")):
            pass


def test_only_what_was_asked_for_is_told(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    health, metrics = (f"127.0.0.1:{port}" for port in ports)
    with told(tmp_path, "127.0.0.1:1") as looked:
        looked()
        assert [status(at, patience=1) for at in (health, metrics)] == ["UNREACHABLE"] * 2
    State("server", phase="waiting").write(tmp_path)
    with told(tmp_path, "127.0.0.1:1", health, metrics) as looked:
        looked()
        assert status(health) == "SERVING"
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=5) as answer:
            assert b'fedtune_phase{phase="waiting"} 1.0' in answer.read()
    with pytest.raises(UserError, match="wanted host:port"), told(tmp_path, "127.0.0.1:1", metrics="9100"):
        pass
