"""Files of keys: private ones only their owner can read, public ones are text that can be sent by mail.

Ed25519    signs (coordinator and client)            X25519     opens what is sealed
P-256      TLS (authority and server)                P-384      the node key of a SuperNode, in OpenSSH's form
"""

from __future__ import annotations

import base64
import os
import stat
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import tomli_w
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedtune.errors import KeysError

PrivateKey = Ed25519PrivateKey | X25519PrivateKey | EllipticCurvePrivateKey
OTHERS = stat.S_IRWXG | stat.S_IRWXO
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm)


def make_folder(folder: Path) -> None:
    """For its owner alone, and so are the folders that are made above it. One that is there must be ours."""
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir(mode=0o700)
        require_ours(folder)
    except OSError as error:
        raise KeysError(f"{folder} cannot be made: {error.strerror}") from error


def require_ours(folder: Path, closed_to: int = stat.S_IWGRP | stat.S_IWOTH) -> None:
    """Raises KeysError where others could put files of their own into it; with OTHERS, where they could enter it."""
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise KeysError(f"{folder} belongs to another user (number {found.st_uid}), who could change what is in it")
    if found.st_mode & closed_to:
        mode = stat.S_IMODE(found.st_mode)
        raise KeysError(f"{folder} is open to others (mode {mode:04o}); wanted its owner alone: type `chmod 700 {folder}`")


@contextmanager
def for_owner_alone() -> Iterator[None]:
    """Whatever is made meanwhile, here or by a process that is started, is closed to everybody else."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def write_private(path: Path, data: bytes) -> None:
    """Readable by its owner alone from its first moment; who reads sees the old file or the new one."""
    _write(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    _write(path, data, 0o644)


def _write(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # O_EXCL and 0600
        with removed_on_error(Path(temporary)), os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise KeysError(f"{path} cannot be written: {error.strerror}") from error


@contextmanager
def removed_on_error(*paths: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def read_private(path: Path) -> bytes:
    """Raises KeysError also when the group or others may read it: then it is no longer known who has."""
    with _opened(path) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & OTHERS:
            raise KeysError(f"{path} is private but others may read it (mode {mode:04o}); type `chmod 600 {path}`")
        return file.read()


def read_public(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:  # kept as the cause: who asks for the file may know more about its absence
        raise KeysError(f"{path} cannot be read: {error.strerror}") from error


def is_absent(error: KeysError) -> bool:
    return isinstance(error.__cause__, FileNotFoundError)


def read_table(path: Path, wanted: Iterable[str]) -> dict[str, str]:
    """A TOML file of strings that has at least the wanted keys."""
    try:
        table = tomllib.loads(read_public(path).decode())
    except ValueError as error:
        raise KeysError(f"{path} is not TOML: {error}") from error
    wrong = [key for key in wanted if not table.get(key)] + [k for k, v in table.items() if not isinstance(v, str)]
    if wrong:
        raise KeysError(f"{path} needs text for {', '.join(wrong)}; it was written by `fedtune keys`, take it from there again")
    return table


def write_table(path: Path, table: dict[str, str]) -> None:
    write_public(path, tomli_w.dumps({key: value for key, value in table.items() if value}).encode())


def new_tls_key() -> EllipticCurvePrivateKey:
    return generate_private_key(SECP256R1())


def new_node_key() -> EllipticCurvePrivateKey:
    return generate_private_key(SECP384R1())


def save_pem(path: Path, key: PrivateKey) -> None:
    write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def save_node_key(path: Path, key: EllipticCurvePrivateKey) -> None:
    """The private key to `path`, the public one beside it with the suffix `.pub`."""
    write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    write_public(path.with_suffix(".pub"), f"{node_text(key.public_key())}\n".encode())


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    key = _private(path, load_pem_private_key)
    if not isinstance(key, Ed25519PrivateKey):
        raise _other_kind(path, "an Ed25519 key")
    return key


def load_sealing_key(path: Path) -> X25519PrivateKey:
    key = _private(path, load_pem_private_key)
    if not isinstance(key, X25519PrivateKey):
        raise _other_kind(path, "an X25519 key")
    return key


def load_tls_key(path: Path) -> EllipticCurvePrivateKey:
    key = _private(path, load_pem_private_key)
    if not (isinstance(key, EllipticCurvePrivateKey) and isinstance(key.curve, SECP256R1)):
        raise _other_kind(path, "a P-256 key")
    return key


def load_node_key(path: Path) -> EllipticCurvePrivateKey:
    key = _private(path, load_ssh_private_key)
    if not (isinstance(key, EllipticCurvePrivateKey) and isinstance(key.curve, SECP384R1)):
        raise _other_kind(path, "a P-384 key")
    return key


def _private(path: Path, load: Callable[[bytes, None], object]) -> object:
    data = read_private(path)
    try:
        return load(data, None)
    except UNREADABLE as error:
        raise KeysError(f"{path} is not a private key as `fedtune keys` writes it: {error}") from error


def _other_kind(path: Path, wanted: str) -> KeysError:
    return KeysError(f"{path} is another kind of key; wanted {wanted}, as `fedtune keys` writes it")


def node_text(key: EllipticCurvePublicKey) -> str:
    """One line, `ecdsa-sha2-nistp384 …`, without comment, so that equal keys are equal texts."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def node_public(text: str) -> EllipticCurvePublicKey:
    try:
        key = load_ssh_public_key(text.encode())
    except UNREADABLE as error:
        raise KeysError(f"{text[:40]!r} is not a public key in OpenSSH's form; wanted `ecdsa-sha2-nistp384 …`") from error
    if not (isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP384R1)):
        raise KeysError(f"{text[:40]!r} is another kind of key; wanted `ecdsa-sha2-nistp384 …`")
    return key


def public_text(key: Ed25519PublicKey | X25519PublicKey) -> str:
    """Its 32 bytes in base64."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def verify_key(text: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(_raw(text))


def seal_key(text: str) -> X25519PublicKey:
    return X25519PublicKey.from_public_bytes(_raw(text))


def _raw(text: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise KeysError(f"{text[:50]!r} is not base64; wanted the 32 bytes of a public key in base64") from error
    if len(raw) != 32:
        raise KeysError(f"{text[:50]!r} has {len(raw)} bytes; wanted the 32 bytes of a public key in base64")
    return raw
