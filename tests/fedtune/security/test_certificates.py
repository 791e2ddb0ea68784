"""Certificates that TLS accepts, and where it does not, words that say why and what to do."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import KeysError
from fedtune.security.certificates import (
    ALWAYS,
    SLACK,
    Issued,
    belongs,
    certificate_problem,
    days_left,
    expires,
    make_authority,
    make_server_certificate,
    names_in,
)

NOW = datetime.now(UTC).replace(microsecond=0)
AUTHORITY = make_authority(now=NOW)
OTHER = make_authority(now=NOW)
EARLIER = NOW - timedelta(days=20)
LATER = NOW + timedelta(days=20)
OLD_AUTHORITY = make_authority(10, EARLIER)
NAMES = ["fl.example.org", "10.0.0.5"]

CASES = {  # certificate, the authority that the client trusts, host; None where it is well, otherwise words of ours
    "right name": (make_server_certificate(AUTHORITY, NAMES), AUTHORITY, "fl.example.org", None),
    "right address": (make_server_certificate(AUTHORITY, NAMES), AUTHORITY, "10.0.0.5", None),
    "this machine": (make_server_certificate(AUTHORITY, NAMES), AUTHORITY, "127.0.0.1", None),
    "this machine, IPv6": (make_server_certificate(AUTHORITY, NAMES), AUTHORITY, "::1", None),
    "wrong name": (
        make_server_certificate(AUTHORITY, NAMES),
        AUTHORITY,
        "x.example.org",
        "not for x.example.org but for fl.example.org.*`fedtune keys rotate server x.example.org fl.example.org 10.0.0.5`",
    ),
    "wrong address": (make_server_certificate(AUTHORITY, NAMES), AUTHORITY, "10.0.0.6", "not for 10.0.0.6"),
    "other authority": (
        make_server_certificate(AUTHORITY, NAMES),
        OTHER,
        "fl.example.org",
        "not by the authority in ca.pem.*`fedtune keys rotate client NAME`",
    ),
    "expired": (
        make_server_certificate(AUTHORITY, NAMES, 1, EARLIER),
        AUTHORITY,
        "fl.example.org",
        f"expired on {EARLIER + timedelta(days=1):%Y-%m-%d}; type `fedtune keys rotate server`",
    ),
    "not yet valid": (
        make_server_certificate(AUTHORITY, NAMES, 1, LATER),
        AUTHORITY,
        "fl.example.org",
        f"valid from {LATER - SLACK:%Y-%m-%d %H:%M} UTC, and this machine's clock says {NOW:%Y-%m-%d}.*set the clock",
    ),
    "authority expired": (
        make_server_certificate(OLD_AUTHORITY, NAMES, 1, EARLIER),
        OLD_AUTHORITY,
        "fl.example.org",
        "the authority's certificate expired on .*`fedtune keys init` in a new folder",
    ),
}


def refusal(port: int, authority: Issued, host: str) -> str | None:
    """Why OpenSSL's own check refuses the server."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT  # the default from Python 3.13 on
    try:
        with (
            socket.create_connection(("127.0.0.1", port), 5) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return None
    except ssl.SSLCertVerificationError as error:
        return str(error.verify_message)


@pytest.mark.parametrize(("certificate", "trusted", "host", "words"), CASES.values(), ids=CASES)
def test_our_words_and_a_real_handshake_agree(
    serve: Callable[..., int], certificate: Issued, trusted: Issued, host: str, words: str | None
) -> None:
    refused = refusal(serve(certificate), trusted, host)
    problem = certificate_problem(certificate.pem, trusted.pem, host, NOW)
    if words is None:
        assert (refused, problem) == (None, None)
    else:
        assert refused
        assert problem
        assert_matches(problem, words)


def assert_matches(text: str, pattern: str) -> None:
    with pytest.raises(KeysError, match=pattern):
        raise KeysError(text)


@given(st.integers(-40, 40), st.integers(1, 30))
def test_it_is_valid_from_half_a_day_before_to_its_last_day(hours: int, days: int) -> None:
    certificate = make_server_certificate(AUTHORITY, NAMES, days, NOW)
    end = timedelta(days=days)
    for moment in (timedelta(hours=hours), end + timedelta(hours=hours)):
        problem = certificate_problem(certificate.pem, AUTHORITY.pem, "localhost", NOW + moment)
        assert (problem is None) == (timedelta(hours=-12) <= moment <= end)


def test_days_left_are_whole_and_negative_when_over() -> None:
    pem = make_server_certificate(AUTHORITY, NAMES, 30, NOW).pem
    assert expires(pem) == NOW + timedelta(days=30)
    left = [days_left(pem, NOW + timedelta(days=days)) for days in (0, 0.5, 30, 30.5)]
    assert left == [30, 29, 0, -1]


def test_no_certificate_outlives_its_authority() -> None:
    authority = make_authority(10, NOW)
    assert expires(make_server_certificate(authority, NAMES, 397, NOW).pem) == NOW + timedelta(days=10)


def test_names_are_said_once_and_this_machine_s_are_always_in() -> None:
    certificate = make_server_certificate(AUTHORITY, ["B.org", "b.org", "localhost", "0:0::1"])
    assert names_in(certificate.pem) == ["b.org", "localhost", "::1", "127.0.0.1"]
    assert set(ALWAYS) <= set(names_in(certificate.pem))


def test_a_certificate_belongs_to_its_key_alone() -> None:
    certificate, other = make_server_certificate(AUTHORITY, NAMES), make_server_certificate(AUTHORITY, NAMES)
    assert belongs(certificate.pem, certificate.key)
    assert not belongs(certificate.pem, other.key)


def test_rubbish_is_no_certificate() -> None:
    with pytest.raises(KeysError, match="not a certificate in PEM form"):
        expires(b"rubbish")


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
class TestOpenSSL:
    def verify(self, folder: Path, certificate: Issued, *options: str, between: bytes = b"") -> bool:
        for name, pem in (("ca", AUTHORITY.pem), ("shown", certificate.pem), ("between", between)):
            (folder / f"{name}.pem").write_bytes(pem)
        command = ["openssl", "verify", "-x509_strict", "-no-CApath", "-CAfile", "ca.pem", *options, "shown.pem"]
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0

    def test_it_is_strictly_a_server_s_and_no_client_s(self, tmp_path: Path) -> None:
        certificate = make_server_certificate(AUTHORITY, NAMES)
        assert self.verify(tmp_path, certificate, "-purpose", "sslserver", "-verify_hostname", "fl.example.org")
        assert self.verify(tmp_path, certificate, "-purpose", "sslserver", "-verify_ip", "::1")
        assert not self.verify(tmp_path, certificate, "-purpose", "sslclient")

    def test_a_server_s_key_signs_no_certificates(self, tmp_path: Path) -> None:
        """Who steals it from the server cannot make one for another name."""
        certificate = make_server_certificate(AUTHORITY, NAMES)
        forged = make_server_certificate(certificate, ["evil.example.org"])
        assert not self.verify(tmp_path, forged, "-untrusted", "between.pem", between=certificate.pem)
        assert self.verify(tmp_path, certificate, "-untrusted", "between.pem", between=certificate.pem)
