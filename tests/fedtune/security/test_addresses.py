"""What may be the name of a client, of a machine, an address."""

from __future__ import annotations

import ipaddress
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import KeysError
from fedtune.security.addresses import Address, address, client_name, host_name

ALPHABET = string.ascii_letters + string.digits + "._-"


@given(st.text(ALPHABET, min_size=1, max_size=64).filter(lambda name: name[0] != "."))
def test_names_of_clients(name: str) -> None:
    assert client_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a b", "ä", "a\n", "a" * 65, "a\0"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(KeysError, match="cannot be the name of a client; wanted"):
        client_name(name)


@given(st.ip_addresses().map(str) | st.sampled_from(["a", "fl.example.org", "a_b.c"]), st.integers(1, 65535))
def test_an_address_is_read_as_it_is_written(host: str, port: int) -> None:
    assert address(str(Address(host, port))) == Address(host, port)


def test_one_machine_has_one_spelling() -> None:
    assert host_name("FL.Example.org.") == "fl.example.org"
    assert host_name("0:0:0:0:0:0:0:1") == str(ipaddress.IPv6Address(1)) == "::1"


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":8000", "host:0", "host:65536", "host:-1", "host:٣", "https://host:8000"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(KeysError, match="wanted"):
        address(text)


@pytest.mark.parametrize(
    "text", ["", "-a.org", "a..org", "a/b", "10.0.0.256", "1.2.3", "ä.org", "*.example.org", "a." * 127 + "a"]
)
def test_hosts_that_are_none(text: str) -> None:
    with pytest.raises(KeysError, match="neither the name of a machine nor its IP address"):
        host_name(text)
