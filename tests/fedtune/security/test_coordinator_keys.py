"""The folder of a coordinator's keys: made whole or not at all, never overwritten, its halves belong together."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.errors import KeysError
from fedtune.security import keyfiles
from fedtune.security.certificates import certificate_problem, days_left, make_authority, names_in
from fedtune.security.coordinator_keys import PARTS, CoordinatorKeys
from fedtune.security.keyfiles import public_text, save_pem

PRIVATE = {"ca.key", "server.key", "signing.key", "sealing.key"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def server_problem(keys: CoordinatorKeys, host: str) -> str | None:
    ca, certificate, _ = keys.tls()
    return certificate_problem(certificate.read_bytes(), ca.read_bytes(), host)


def test_what_is_made_and_who_may_read_it(keys: CoordinatorKeys) -> None:
    assert set(contents(keys.folder)) == set(PARTS)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in keys.folder.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == PRIVATE
    assert {name for name, mode in modes.items() if mode == 0o644} == set(PARTS) - PRIVATE
    assert stat.S_IMODE(keys.folder.stat().st_mode) == 0o700


def test_what_is_loaded_is_what_was_made(keys: CoordinatorKeys) -> None:
    loaded = CoordinatorKeys.load(keys.folder)
    assert (loaded.verify, loaded.seal, loaded.address) == (keys.verify, keys.seal, "fl.example.org:8000")
    assert CoordinatorKeys.public(keys.folder)["verify"] == public_text(loaded.signing.public_key())


def test_the_certificate_is_for_the_names_the_address_and_this_machine(tmp_path: Path) -> None:
    keys = CoordinatorKeys.init(tmp_path / "keys", ["10.0.0.5"], "fl.example.org:8000", days=50)
    assert names_in(keys.tls()[1].read_bytes()) == ["fl.example.org", "10.0.0.5", "localhost", "127.0.0.1", "::1"]
    assert [days_left(path.read_bytes()) for path in keys.tls()[:2]] == [3649, 49]  # and some hours
    assert server_problem(keys, "10.0.0.5") is None


def test_keys_are_never_overwritten(keys: CoordinatorKeys) -> None:
    before = contents(keys.folder)
    with pytest.raises(KeysError, match=r"holds keys already.*nothing was changed"):
        CoordinatorKeys.init(keys.folder, ["a"], "a:8000")
    for part in set(PARTS) - {"ca.key"}:
        (keys.folder / part).unlink()
    with pytest.raises(KeysError, match=r"holds keys already \(ca.key\)"):
        CoordinatorKeys.init(keys.folder, ["a"], "a:8000")
    assert contents(keys.folder) == {"ca.key": before["ca.key"]}


@pytest.mark.parametrize(("names", "address"), [(["a b"], "a:8000"), (["a"], "a"), (["a"], "a b:1")])
def test_a_bad_name_makes_nothing(tmp_path: Path, names: list[str], address: str) -> None:
    with pytest.raises(KeysError, match="wanted"):
        CoordinatorKeys.init(tmp_path / "keys", names, address)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(KeysError, match=f"`chmod 700 {tmp_path}`"):
        CoordinatorKeys.init(tmp_path, ["a"], "a:8000")
    tmp_path.chmod(0o700)
    CoordinatorKeys.init(tmp_path, ["a"], "a:8000")


def test_a_full_disk_leaves_no_half_of_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = iter(range(3))

    def full_after_three(descriptor: int) -> None:
        if next(written, None) is None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(keyfiles.os, "fsync", full_after_three)
        with pytest.raises(KeysError, match="No space left"):
            CoordinatorKeys.init(tmp_path / "keys", ["a"], "a:8000")
    assert contents(tmp_path / "keys") == {}
    CoordinatorKeys.init(tmp_path / "keys", ["a"], "a:8000")


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_loading_checks_every_private_file(keys: CoordinatorKeys, name: str) -> None:
    (keys.folder / name).chmod(0o640)
    with pytest.raises(KeysError, match=f"chmod 600 .*{name}"):
        CoordinatorKeys.load(keys.folder)


def test_the_authority_s_key_may_be_kept_elsewhere(keys: CoordinatorKeys) -> None:
    (keys.folder / "ca.key").unlink()
    CoordinatorKeys.load(keys.folder)
    with pytest.raises(KeysError, match=r"ca\.key cannot be read"):
        CoordinatorKeys.renew_certificate(keys.folder)


@pytest.mark.parametrize(("name", "remedy"), [("signing.key", "signing"), ("sealing.key", "signing"), ("server.key", "server")])
def test_a_foreign_half_is_refused_and_the_command_named_mends_it(
    keys: CoordinatorKeys, tmp_path: Path, name: str, remedy: str
) -> None:
    """As after a rotation that was cut off between two files."""
    other = CoordinatorKeys.init(tmp_path / "other", ["a"], "a:8000")
    (keys.folder / name).write_bytes((other.folder / name).read_bytes())
    with pytest.raises(KeysError, match=f"`fedtune keys rotate {remedy}`"):
        CoordinatorKeys.load(keys.folder)
    {"signing": CoordinatorKeys.renew_signing, "server": CoordinatorKeys.renew_certificate}[remedy](keys.folder)
    assert CoordinatorKeys.load(keys.folder).address == keys.address


def test_a_folder_without_keys_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=r"no keys in .*; wanted the folder of `fedtune keys init`"):
        CoordinatorKeys.load(tmp_path)


def test_new_signing_keys_change_nothing_else(keys: CoordinatorKeys) -> None:
    before = contents(keys.folder)
    renewed = CoordinatorKeys.renew_signing(keys.folder)
    after = contents(keys.folder)
    assert {name for name in PARTS if before[name] != after[name]} == {"signing.key", "sealing.key", "coordinator.toml"}
    assert (renewed.verify, renewed.seal) != (keys.verify, keys.seal)
    assert CoordinatorKeys.load(keys.folder).verify == renewed.verify


def test_a_new_certificate_has_the_same_names_by_the_same_authority(keys: CoordinatorKeys) -> None:
    before = contents(keys.folder)
    CoordinatorKeys.renew_certificate(keys.folder)
    after = contents(keys.folder)
    assert {name for name in PARTS if before[name] != after[name]} == {"server.key", "server.pem"}
    assert names_in(before["server.pem"]) == names_in(after["server.pem"])
    assert server_problem(keys, "fl.example.org") is None


def test_a_new_certificate_for_other_names_and_a_new_address(keys: CoordinatorKeys) -> None:
    renewed = CoordinatorKeys.renew_certificate(keys.folder, ["10.0.0.9"], "new.example.org:9000")
    assert renewed.address == "new.example.org:9000"
    assert server_problem(keys, "10.0.0.9") is server_problem(keys, "new.example.org") is None
    assert server_problem(keys, "fl.example.org") is not None


def test_an_authority_that_expired_signs_nothing(keys: CoordinatorKeys) -> None:
    old = make_authority(10, datetime.now(UTC) - timedelta(days=20))
    (keys.folder / "ca.pem").write_bytes(old.pem)
    save_pem(keys.folder / "ca.key", old.key)
    before = contents(keys.folder)
    with pytest.raises(KeysError, match=r"expired on .*: type `fedtune keys init` with a new folder"):
        CoordinatorKeys.renew_certificate(keys.folder)
    assert contents(keys.folder) == before
