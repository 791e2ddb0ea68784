"""Private keys that never leave the client's machine: the request goes one way, the coordinator's half the other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedtune.errors import KeysError
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import Bundle, make_bundle
from fedtune.security.keyfiles import public_text
from fedtune.security.request import make_request, read_request, register_request


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_is_whole_when_the_coordinator_s_half_is_copied_over(keys: CoordinatorKeys, tmp_path: Path) -> None:
    asked, file = make_request("north", tmp_path / "client")
    folder = tmp_path / "client" / "north"
    assert names(tmp_path / "client") == {
        "north.request.toml",
        "north/network/node.key",
        "north/network/node.pub",
        "north/trainer/client.key",
    }
    with pytest.raises(KeysError, match=r"After `fedtune keys register north.request.toml` there, copy its bundles/north"):
        Bundle.load(folder, "both")
    registered = register_request(keys, file, note="Ann's")
    assert registered.fingerprint == asked.fingerprint
    assert keys.registry.client("north") == registered
    assert names(keys.bundle("north")) == {"client.toml", "network/ca.pem"}
    shutil.copytree(keys.bundle("north"), folder, dirs_exist_ok=True)
    signing = Bundle.load(folder, "both").signing
    assert signing
    assert public_text(signing.public_key()) == registered.verify


def test_nothing_in_the_request_is_private(tmp_path: Path) -> None:
    _, file = make_request("north", tmp_path)
    assert "PRIVATE" in (tmp_path / "north/network/node.key").read_text()
    assert "PRIVATE" not in file.read_text()


def test_keys_that_are_there_are_kept(tmp_path: Path) -> None:
    _, file = make_request("north", tmp_path)
    before = file.read_bytes()
    with pytest.raises(KeysError, match="is there already, perhaps with keys in use"):
        make_request("north", tmp_path)
    assert file.read_bytes() == before


def test_a_request_that_was_changed_on_its_way_has_another_fingerprint(tmp_path: Path) -> None:
    asked, file = make_request("north", tmp_path / "a")
    _, forged = make_request("north", tmp_path / "b")
    assert read_request(file).fingerprint == asked.fingerprint
    assert read_request(forged).fingerprint != asked.fingerprint


def test_a_client_that_is_registered_is_replaced_only_when_told(keys: CoordinatorKeys, tmp_path: Path) -> None:
    make_bundle(keys, "north", note="Ann's")
    before = keys.registry.client("north")
    asked, file = make_request("north", tmp_path / "client")
    with pytest.raises(KeysError, match="`fedtune keys register … --replace`"):
        register_request(keys, file)
    assert keys.registry.client("north") == before
    assert (keys.bundle("north") / "trainer").is_dir()
    register_request(keys, file, renew=True)
    after = keys.registry.client("north")
    assert (after.node, after.note) == (asked.node, "Ann's")
    assert not (keys.bundle("north") / "trainer").exists()  # the old private keys are of no use


@pytest.mark.parametrize(("old", "new"), [("north", "../north"), ("ecdsa", "rsa"), ("verify", "other"), ("=", "")])
def test_a_bad_request_registers_nobody(keys: CoordinatorKeys, tmp_path: Path, old: str, new: str) -> None:
    _, file = make_request("north", tmp_path / "client")
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(KeysError):
        register_request(keys, file)
    assert keys.registry.clients() == {}
    assert not keys.bundle("north").exists()
