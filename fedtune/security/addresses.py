"""Names of clients and addresses of servers, checked where they are typed."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from fedtune.errors import KeysError

CLIENT_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}")
DNS_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


class Address(NamedTuple):
    host: str  # a name, or an IP address without brackets
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str) -> Address:
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not (colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise KeysError(f"{text!r} is no address; wanted host:port, such as fl.example.org:8000 or 10.0.0.5:8000")
    return Address(host_name(host), int(port))


def host_name(text: str) -> str:
    """A DNS name in ASCII or an IP address, as a certificate has it."""
    if as_ip(text) is not None:
        return str(as_ip(text))
    labels = text.removesuffix(".").split(".")
    if len(text) > 253 or labels[-1].isdigit() or not all(DNS_LABEL.fullmatch(label) for label in labels):
        raise KeysError(f"{text!r} is neither the name of a machine nor its IP address; wanted fl.example.org or 10.0.0.5")
    return text.removesuffix(".").lower()


def as_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def client_name(text: str) -> str:
    if not CLIENT_NAME.fullmatch(text):
        raise KeysError(
            f"{text!r} cannot be the name of a client; wanted at most 64 of A-Z a-z 0-9 . _ - that do not begin with a dot"
        )
    return text
