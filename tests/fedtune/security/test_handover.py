"""The bundle of a client: whole, private, of one client, and each process needs its own part alone."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from fedtune.errors import KeysError
from fedtune.security import handover
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import Bundle, make_bundle, renew_client_files
from fedtune.security.keyfiles import load_node_key, node_text, public_text

PRIVATE = {"network/node.key", "trainer/client.key"}
FILES = {"client.toml", "network/ca.pem", "network/node.pub"} | PRIVATE


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_in_it_and_who_may_read_it(keys: CoordinatorKeys) -> None:
    folder = make_bundle(keys, "north", note="Ann's")
    assert folder == keys.folder / "bundles" / "north"
    assert set(contents(folder)) == FILES
    for path in (folder, *folder.rglob("*")):
        name = str(path.relative_to(folder))
        wanted = 0o700 if path.is_dir() else 0o600 if name in PRIVATE else 0o644
        assert (name, stat.S_IMODE(path.stat().st_mode)) == (name, wanted)
    assert keys.registry.client("north").note == "Ann's"


def test_both_sides_know_the_same_keys(keys: CoordinatorKeys) -> None:
    bundle, record = Bundle.load(make_bundle(keys, "north"), "both"), keys.registry.client("north")
    assert (bundle.name, bundle.server) == ("north", "fl.example.org:8000")
    assert (public_text(bundle.verify), public_text(bundle.seal)) == (keys.verify, keys.seal)
    assert bundle.signing
    assert public_text(bundle.signing.public_key()) == record.verify
    assert bundle.node_key
    assert node_text(load_node_key(bundle.node_key).public_key()) == record.node
    assert bundle.ca
    assert bundle.ca.read_bytes() == keys.tls()[0].read_bytes()


def test_a_part_needs_nothing_of_the_other(keys: CoordinatorKeys) -> None:
    folder = make_bundle(keys, "north")
    shutil.copytree(folder, folder.with_name("relay"), ignore=shutil.ignore_patterns("trainer"))
    shutil.copytree(folder, folder.with_name("trainer-only"), ignore=shutil.ignore_patterns("network"))
    network = Bundle.load(folder.with_name("relay"), "network")
    trainer = Bundle.load(folder.with_name("trainer-only"), "trainer")
    assert (network.signing, trainer.ca, trainer.node_key) == (None, None, None)
    assert network.node_key
    assert trainer.signing
    for part in ("trainer", "both"):
        with pytest.raises(KeysError, match=r"client\.key cannot be read"):
            Bundle.load(folder.with_name("relay"), part)
    for part in ("network", "both"):
        with pytest.raises(KeysError, match=r"network/\S+ cannot be read"):
            Bundle.load(folder.with_name("trainer-only"), part)


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_a_private_file_that_others_may_read_is_refused(keys: CoordinatorKeys, name: str) -> None:
    folder = make_bundle(keys, "north")
    (folder / name).chmod(0o644)
    with pytest.raises(KeysError, match=f"`chmod 600 {folder / name}`"):
        Bundle.load(folder, "both")


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_files_of_two_bundles_do_not_mix(keys: CoordinatorKeys, name: str) -> None:
    north, south = make_bundle(keys, "north"), make_bundle(keys, "south")
    shutil.copy2(south / name, north / name)
    with pytest.raises(KeysError, match=f"{name} is not the key that the coordinator has registered for north"):
        Bundle.load(north, "both")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[coordinator]", "[other]", "is not of a bundle"),
        ('server = "', 'server = 3 # "', "a value is missing or no text"),
        ('name = "north"', 'name = "../x"', "cannot be the name of a client"),
        ("8000", "", "is no address"),
        ("=", "", "is not of a bundle"),
    ],
)
def test_a_spoilt_client_toml_is_refused(keys: CoordinatorKeys, old: str, new: str, words: str) -> None:
    file = make_bundle(keys, "north") / "client.toml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(KeysError, match=words):
        Bundle.load(file.parent, "both")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=r"client\.toml cannot be read: No such file"):
        Bundle.load(tmp_path, "both")


def test_a_name_that_is_taken_changes_nothing(keys: CoordinatorKeys) -> None:
    folder = make_bundle(keys, "north")
    before, record = contents(folder), keys.registry.client("north")
    with pytest.raises(KeysError, match="north is registered since"):
        make_bundle(keys, "north")
    assert contents(folder) == before
    assert keys.registry.client("north") == record


@pytest.mark.parametrize("renew", [False, True])
def test_a_bad_name_makes_nothing(keys: CoordinatorKeys, renew: bool) -> None:
    before = contents(keys.folder)
    with pytest.raises(KeysError):
        make_bundle(keys, "../north", renew)
    assert contents(keys.folder) == before


def test_new_keys_replace_the_old_ones_and_let_a_revoked_client_in_again(keys: CoordinatorKeys) -> None:
    old = contents(make_bundle(keys, "north", note="Ann's"))
    keys.registry.revoke("north")
    new = contents(make_bundle(keys, "north", renew=True))
    assert {name for name in FILES if old[name] != new[name]} == FILES - {"network/ca.pem"}
    record = keys.registry.client("north")
    assert (record.revoked, record.note) == ("", "Ann's")
    assert f"{record.node}\n".encode() == new["network/node.pub"]


def test_a_bundle_that_cannot_be_finished_leaves_the_old_one(keys: CoordinatorKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(make_bundle(keys, "north"))
    record = keys.registry.client("north")

    def fails(*_: object) -> None:
        raise KeysError("no space")

    monkeypatch.setattr(handover, "write_client_file", fails)
    with pytest.raises(KeysError, match="no space"):
        make_bundle(keys, "north", renew=True)
    assert contents(keys.folder / "bundles") == {f"north/{name}": data for name, data in before.items()}
    assert keys.registry.client("north") == record


def test_new_signing_keys_reach_every_client_that_is_not_revoked(keys: CoordinatorKeys) -> None:
    north, south, west = (make_bundle(keys, name) for name in ("north", "south", "west"))
    shutil.copytree(south, south.with_name("handed-over"))
    shutil.rmtree(south)
    keys.registry.revoke("west")
    renewed = CoordinatorKeys.renew_signing(keys.folder)
    assert renew_client_files(renewed) == ["north", "south"]
    shutil.copy(south / "client.toml", south.with_name("handed-over"))
    for folder in (north, south.with_name("handed-over")):
        assert public_text(Bundle.load(folder, "both").verify) == renewed.verify
    assert public_text(Bundle.load(west, "both").verify) == keys.verify
    assert set(contents(south)) == {"client.toml"}
