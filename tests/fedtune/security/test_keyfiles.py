"""Private files are never readable by others, not for a moment; what is read is the kind of key that was asked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedtune.errors import KeysError
from fedtune.security import keyfiles

LOADERS = {
    "signing": keyfiles.load_signing_key,
    "sealing": keyfiles.load_sealing_key,
    "tls": keyfiles.load_tls_key,
    "node": keyfiles.load_node_key,
}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask() -> Iterator[None]:
    """The worst that a shell can have: new files are open to all unless the program says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Path]:
    """A private key of each kind."""
    files = {kind: tmp_path / f"{kind}.key" for kind in LOADERS}
    keyfiles.save_pem(files["signing"], Ed25519PrivateKey.generate())
    keyfiles.save_pem(files["sealing"], X25519PrivateKey.generate())
    keyfiles.save_pem(files["tls"], keyfiles.new_tls_key())
    keyfiles.save_node_key(files["node"], keyfiles.new_node_key())
    return files


def test_a_private_file_is_closed_before_its_first_byte(
    tmp_path: Path, open_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []  # mode and size when the file is opened to be written
    opened = os.fdopen

    def spy(descriptor: int, *args: str) -> object:
        state = os.fstat(descriptor)
        seen.append((stat.S_IMODE(state.st_mode), state.st_size))
        return opened(descriptor, *args)

    monkeypatch.setattr(keyfiles.os, "fdopen", spy)
    keyfiles.write_private(tmp_path / "a.key", b"secret")
    assert seen == [(0o600, 0)]
    assert mode(tmp_path / "a.key") == 0o600
    assert keyfiles.read_private(tmp_path / "a.key") == b"secret"


def test_a_new_folder_and_those_above_it_are_closed_and_others_stay_as_they_are(tmp_path: Path, open_umask: None) -> None:
    (tmp_path / "there").mkdir(mode=0o755)
    keyfiles.make_folder(tmp_path / "there" / "a" / "b")
    assert [mode(tmp_path / path) for path in ("there", "there/a", "there/a/b")] == [0o755, 0o700, 0o700]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyfiles.write_private(tmp_path / "a.key", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keyfiles.os, "fsync", full)
    with pytest.raises(KeysError, match=r"a\.key cannot be written: No space left"):
        keyfiles.write_private(tmp_path / "a.key", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.key": b"old"}


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_private_file_that_others_can_reach_is_refused_with_the_remedy(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "a.key"
    keyfiles.write_private(path, b"secret")
    path.chmod(bits)
    with pytest.raises(KeysError, match=f"mode {bits:04o}.*`chmod 600 {path}`"):
        keyfiles.read_private(path)
    path.chmod(0o400)  # stricter than ours is well
    assert keyfiles.read_private(path) == b"secret"


@pytest.mark.parametrize("wanted", LOADERS)
def test_a_loader_takes_its_own_kind_and_no_other(saved: dict[str, Path], wanted: str) -> None:
    LOADERS[wanted](saved[wanted])
    for kind in LOADERS.keys() - {wanted}:
        with pytest.raises(KeysError, match=r"another kind of key|not a private key"):
            LOADERS[wanted](saved[kind])


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_rubbish_and_absence_are_refused_by_name(tmp_path: Path, load: Callable[[Path], object]) -> None:
    keyfiles.write_private(tmp_path / "rubbish.key", b"-----BEGIN")
    with pytest.raises(KeysError, match=r"rubbish\.key is not a private key"):
        load(tmp_path / "rubbish.key")
    with pytest.raises(KeysError, match=r"absent\.key cannot be read: No such file") as error:
        load(tmp_path / "absent.key")
    assert keyfiles.is_absent(error.value)


def test_the_public_half_of_a_node_key_stands_beside_it(saved: dict[str, Path]) -> None:
    text = saved["node"].with_suffix(".pub").read_text().strip()
    assert text.startswith("ecdsa-sha2-nistp384 ")
    assert keyfiles.node_public(text) == keyfiles.load_node_key(saved["node"]).public_key()


def test_a_node_key_is_the_same_with_and_without_a_comment() -> None:
    text = keyfiles.node_text(keyfiles.new_node_key().public_key())
    assert keyfiles.node_text(keyfiles.node_public(f"{text} ann@laptop")) == text


@pytest.mark.parametrize(
    "key", [generate_private_key(SECP256R1()).public_key(), Ed25519PrivateKey.generate().public_key()], ids=["P-256", "Ed25519"]
)
def test_other_keys_in_openssh_s_form_are_no_node_keys(key: Ed25519PrivateKey) -> None:
    with pytest.raises(KeysError, match="another kind of key; wanted `ecdsa-sha2-nistp384"):
        keyfiles.node_public(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())


def test_public_keys_go_through_text() -> None:
    signing, sealing = Ed25519PrivateKey.generate().public_key(), X25519PrivateKey.generate().public_key()
    assert keyfiles.verify_key(keyfiles.public_text(signing)) == signing
    assert keyfiles.seal_key(keyfiles.public_text(sealing)) == sealing


@pytest.mark.parametrize(("text", "why"), [("?" * 44, "not base64"), ("AAAA", "has 3 bytes"), ("", "has 0 bytes")])
def test_text_that_is_no_public_key_is_refused(text: str, why: str) -> None:
    for read in (keyfiles.verify_key, keyfiles.seal_key):
        with pytest.raises(KeysError, match=why):
            read(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name = ", "is not TOML"),
        ("other = 'x'", "needs text for name"),
        ("name = ''", "for name"),
        ("name = 'x'\nb = 3", "for b"),
    ],
)
def test_a_table_without_the_wanted_text_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(KeysError, match=why):
        keyfiles.read_table(tmp_path / "a.toml", ["name"])


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o720, 0o702])
def test_a_folder_that_others_could_write_to_is_not_taken(tmp_path: Path, bits: int) -> None:
    (folder := tmp_path / "there").mkdir()
    folder.chmod(bits)
    with pytest.raises(KeysError, match=f"open to others .mode 0{bits:o}.*chmod 700 {folder}"):
        keyfiles.make_folder(folder)
    folder.chmod(0o755)
    keyfiles.make_folder(folder)
    with pytest.raises(KeysError, match="mode 0755"):
        keyfiles.require_ours(folder, keyfiles.OTHERS)


def test_a_folder_of_somebody_else_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    owner = tmp_path.stat().st_uid
    if owner == 0:  # who could change it anyway
        keyfiles.make_folder(tmp_path)
        os.chown(tmp_path, 4711, -1)
        owner = 4711
    with pytest.raises(KeysError, match=f"belongs to another user .number {owner}."):
        keyfiles.make_folder(tmp_path)


def test_for_its_owner_alone_is_all_that_is_made_meanwhile(tmp_path: Path, open_umask: None) -> None:
    with keyfiles.for_owner_alone():
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
    (tmp_path / "after").mkdir()
    assert [mode(tmp_path / name) for name in ("file", "folder", "after")] == [0o600, 0o700, 0o777]
