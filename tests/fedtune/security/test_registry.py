"""The clients that a coordinator knows: no name and no key twice, and nobody is forgotten silently."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedtune.errors import KeysError
from fedtune.security.keyfiles import new_node_key, node_public, node_text, public_text
from fedtune.security.registry import ClientRecord, Registry


def record(name: str) -> ClientRecord:
    verify = public_text(Ed25519PrivateKey.generate().public_key())
    return ClientRecord(name, node_text(new_node_key().public_key()), verify, note='"quoted" \n[north]')


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "clients")


def test_what_is_added_is_read_again_in_the_order_of_names(registry: Registry) -> None:
    assert registry.clients() == {}
    records = [record(name) for name in ("south", "north", "a.toml", "..a".lstrip("."))]
    for one in records:
        registry.add(one)
    assert list(registry.clients().items()) == sorted((one.name, one) for one in records)
    assert registry.client("north") == records[1]


def test_a_name_is_given_once_unless_it_is_to_be_replaced(registry: Registry) -> None:
    first, second = record("north"), record("north")
    registry.add(first)
    with pytest.raises(KeysError, match=r"`fedtune keys rotate client north`.*`fedtune keys revoke north`"):
        registry.add(second)
    assert registry.clients() == {"north": first}
    registry.add(second, replace=True)
    assert registry.clients() == {"north": second}


@pytest.mark.parametrize("key", ["node", "verify"])
def test_no_two_clients_share_a_key(registry: Registry, key: str) -> None:
    north = record("north")
    registry.add(north)
    with pytest.raises(KeysError, match="the keys of south are those of north"):
        registry.add(replace(record("south"), **{key: getattr(north, key)}))
    assert list(registry.clients()) == ["north"]


@pytest.mark.parametrize("key", ["node", "verify"])
def test_a_revoked_client_does_not_come_back_with_a_key_that_was_revoked(registry: Registry, key: str) -> None:
    registry.add(record("north"))
    north = registry.revoke("north")
    for name in ("north", "south"):
        stolen = replace(record(name), **{key: getattr(north, key)})
        with pytest.raises(KeysError, match=f"the keys of {name} are those of north, revoked since .*; make new ones"):
            registry.add(stolen, replace=True)
    assert registry.client("north").revoked
    registry.add(record("north"), replace=True)
    assert not registry.client("north").revoked


def test_a_comment_hides_no_key_that_is_there_already(registry: Registry) -> None:
    north = record("north")
    registry.add(north)
    with pytest.raises(KeysError, match="those of north"):
        registry.add(replace(record("south"), node=f"{north.node} south@example.org"))


def test_a_client_is_revoked_once_and_stays_in_the_list(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.add(record("north"))
    monkeypatch.setattr("fedtune.security.registry.now_text", lambda: "2030-01-01T00:00:00+00:00")
    assert registry.revoke("north").revoked == "2030-01-01T00:00:00+00:00"
    monkeypatch.setattr("fedtune.security.registry.now_text", lambda: "2031-01-01T00:00:00+00:00")
    registry.revoke("north")
    assert registry.client("north").revoked == "2030-01-01T00:00:00+00:00"
    with pytest.raises(KeysError, match="is revoked since 2030"):
        registry.require_free("north")


def test_a_client_that_is_removed_is_gone(registry: Registry) -> None:
    registry.add(record("north"))
    registry.remove("north")
    assert registry.clients() == {}


def test_an_unknown_client_is_refused_with_the_nearest(registry: Registry) -> None:
    registry.add(record("north"))
    for act in (registry.client, registry.revoke, registry.remove):
        with pytest.raises(KeysError, match="'nort' is registered, did you mean 'north'"):
            act("nort")


def test_a_file_under_another_name_is_refused(registry: Registry) -> None:
    """A copied file would give two names to one client."""
    registry.add(record("north"))
    (registry.folder / "south.toml").write_bytes((registry.folder / "north.toml").read_bytes())
    with pytest.raises(KeysError, match="is of the client 'north'"):
        registry.clients()


@pytest.mark.parametrize(("old", "new"), [("ecdsa-sha2-nistp384", "ssh-rsa"), ("verify", "verified"), ('"', "")])
def test_a_spoilt_file_is_an_error_and_no_missing_client(registry: Registry, old: str, new: str) -> None:
    registry.add(record("north"))
    file = registry.folder / "north.toml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(KeysError, match=r"wanted|needs text|not TOML"):
        registry.clients()


def test_a_registry_that_cannot_be_read_is_not_an_empty_one(registry: Registry) -> None:
    registry.folder.write_text("a file where the folder should be")
    with pytest.raises(KeysError, match="clients cannot be read"):
        registry.clients()


def test_the_fingerprint_is_of_name_and_keys(registry: Registry) -> None:
    north = record("north")
    others = [
        replace(record("north"), node=north.node),
        replace(record("north"), verify=north.verify),
        replace(north, name="n"),
    ]
    assert replace(north, registered="", note="").fingerprint == north.fingerprint
    assert north.fingerprint not in {other.fingerprint for other in others}
    assert [len(group) for group in north.fingerprint.split("-")] == [4, 4, 4, 4]


def test_the_node_key_in_pem_is_the_same_key() -> None:
    north = record("north")
    assert load_pem_public_key(north.node_pem()) == node_public(north.node)
