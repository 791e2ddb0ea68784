"""Whether a server can be reached and trusted from here, and how far its clock is from ours: what `fedtune doctor` asks."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from fedtune.security.addresses import Address
from fedtune.security.addresses import address as parsed
from fedtune.security.certificates import certificate_problem, expires
from fedtune.security.keyfiles import read_public

HALF_A_SECOND = 0.5  # a Date header drops the fraction


@dataclass(frozen=True)
class Probe:
    reachable: bool  # something accepts connections there
    problem: str | None = None  # in words that say what to do; None: the server is the right one
    expires: datetime | None = None  # its certificate
    clock: float | None = None  # seconds that its clock is ahead of ours, within a second; None: it does not say
    refused: bool = False  # its machine is there, and nothing listens


def probe(address: str, ca: Path | None, timeout: float = 5.0) -> Probe:
    """Connects, checks the certificate by the authority in `ca` (None: a server without TLS), asks for /health."""
    place = parsed(address)
    try:
        connection = socket.create_connection(place, timeout)
    except OSError as error:
        return Probe(False, _unreachable(place, error, timeout), refused=isinstance(error, ConnectionRefusedError))
    if ca is None:
        with connection:
            return Probe(True, clock=_clock(connection, place))
    trusting = ssl.create_default_context(cadata=read_public(ca).decode())
    try:
        return _over_tls(connection, trusting, place)
    except ssl.SSLCertVerificationError as error:
        return _untrusted(place, read_public(ca), str(error.verify_message), timeout)
    except (OSError, EOFError) as error:
        return Probe(True, _no_tls(place, error))


def _over_tls(connection: socket.socket, context: ssl.SSLContext, place: Address) -> Probe:
    with connection, context.wrap_socket(connection, server_hostname=place.host) as secured:
        return Probe(True, expires=expires(_certificate(secured)), clock=_clock(secured, place))


def _untrusted(place: Address, ca_pem: bytes, refusal: str, timeout: float) -> Probe:
    """Once more without trust, to say what is wrong; nothing is sent but the question for /health."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(place, timeout) as connection,
            context.wrap_socket(connection, server_hostname=place.host) as secured,
        ):
            pem = _certificate(secured)
            problem = certificate_problem(pem, ca_pem, place.host) or f"the server's certificate was refused: {refusal}"
            return Probe(True, problem, expires(pem), _clock(secured, place))
    except OSError:
        return Probe(True, f"the server's certificate was refused: {refusal}")


def _certificate(secured: ssl.SSLSocket) -> bytes:
    der = secured.getpeercert(binary_form=True)
    assert der is not None, "a TLS server has always sent its certificate"
    return ssl.DER_cert_to_PEM_cert(der).encode()


def _clock(connection: socket.socket, place: Address) -> float | None:
    """From the Date header of its answer; ours is taken between question and answer."""
    client = http.client.HTTPConnection(place.host, place.port)
    client.sock = connection
    asked = time.time()
    try:
        client.request("GET", "/health", headers={"Connection": "close"})
        date = client.getresponse().getheader("Date")
        theirs = parsedate_to_datetime(date or "").timestamp()
    except (OSError, ValueError, http.client.HTTPException):
        return None
    return theirs + HALF_A_SECOND - (asked + time.time()) / 2


def _unreachable(place: Address, error: OSError, timeout: float) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name {place.host} cannot be found from here ({error.strerror}); check the address of the server"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens at {place}: is the server started (`fedtune server`), is the port right?"
    if isinstance(error, TimeoutError):
        return f"{place} did not answer within {timeout:g} s: is the machine on, does a firewall stop port {place.port}?"
    return f"{place} cannot be reached: {error.strerror or error}; check the network"


def _no_tls(place: Address, error: OSError | EOFError) -> str:
    why = getattr(error, "reason", None) or error
    return (
        f"{place} answers, but not with TLS ({why}): it is another program's port, or a server that was started with --insecure"
    )
