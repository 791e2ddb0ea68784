"""What a probe says of servers on loopback: the right one, and each way in which it can be the wrong one."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.security.certificates import Issued, expires, make_authority, make_server_certificate
from fedtune.security.probe import probe

AUTHORITY, OTHER = make_authority(), make_authority()
EARLIER = datetime.now(UTC) - timedelta(days=20)
RIGHT = make_server_certificate(AUTHORITY, [])
SECOND = 1.5  # a Date header is to the second, and the answer takes a moment


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    (tmp_path / "trusted.pem").write_bytes(AUTHORITY.pem)
    return tmp_path / "trusted.pem"


@pytest.fixture
def loopback_dns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name leads to this machine."""
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda place, timeout: connect(("127.0.0.1", place[1]), timeout))


@pytest.mark.parametrize("ahead", [0.0, 90.0, -3600.0])
def test_the_right_server_and_its_clock(serve: Callable[..., int], ca: Path, ahead: float) -> None:
    found = probe(f"localhost:{serve(RIGHT, ahead)}", ca)
    assert (found.reachable, found.problem, found.expires) == (True, None, expires(RIGHT.pem))
    assert found.clock == pytest.approx(ahead, abs=SECOND)


@pytest.mark.parametrize(
    ("certificate", "host", "words"),
    [
        (make_server_certificate(OTHER, []), "localhost", "not by the authority in ca.pem: this bundle is for another server"),
        (
            make_server_certificate(AUTHORITY, [], 1, EARLIER),
            "localhost",
            "expired on .*`fedtune keys rotate server` on the coord",
        ),
        (RIGHT, "x.org", "not for x.org but for localhost.*`fedtune keys rotate server x.org` on the coordinator"),
    ],
    ids=["other authority", "expired", "other name"],
)
def test_the_wrong_certificate(
    serve: Callable[..., int], ca: Path, loopback_dns: None, certificate: Issued, host: str, words: str
) -> None:
    """Its clock is read all the same: it may be the reason."""
    port = serve(certificate, 90.0)
    found = probe(f"{host}:{port}", ca)
    assert found.reachable
    assert re.search(words, found.problem or "")
    assert found.expires == expires(certificate.pem)
    assert found.clock == pytest.approx(90.0, abs=SECOND)


def test_nothing_listens(ca: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but it does not listen
        found = probe(f"127.0.0.1:{free.getsockname()[1]}", ca)
    assert not found.reachable
    assert "nothing listens at 127.0.0.1:" in (found.problem or "")
    assert "is the server started (`fedtune server`)" in (found.problem or "")


def test_a_server_without_tls(serve: Callable[..., int], ca: Path) -> None:
    port = serve(None)
    assert "not with TLS" in (probe(f"127.0.0.1:{port}", ca).problem or "")
    plain = probe(f"127.0.0.1:{port}", None)
    assert (plain.reachable, plain.problem, plain.expires) == (True, None, None)
    assert plain.clock == pytest.approx(0.0, abs=SECOND)


def test_a_port_that_accepts_and_says_nothing(ca: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert "not with TLS" in (probe(address, ca, timeout=0.2).problem or "")
        assert probe(address, None, timeout=0.2).clock is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "the name fl.example.org cannot be found from here"),
        (TimeoutError("timed out"), r"did not answer within 5 s: .* does a firewall stop port 8000\?"),
        (OSError(101, "Network is unreachable"), "cannot be reached: Network is unreachable"),
    ],
)
def test_a_network_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch, ca: Path, error: OSError, words: str) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", fails)
    found = probe("fl.example.org:8000", ca)
    assert not found.reachable
    assert re.search(words, found.problem or "")
