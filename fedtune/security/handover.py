"""The bundle of a client: what a coordinator hands over once, in two parts that two processes of the client read.

NAME/client.toml      name, server, coordinator.verify, coordinator.seal, created
NAME/network/         ca.pem  node.key  node.pub      for SuperNode and relay
NAME/trainer/         client.key                      for the trainer alone: signs answers
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from fedtune.errors import KeysError
from fedtune.security.addresses import address, client_name
from fedtune.security.certificates import expires
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.keyfiles import (
    is_absent,
    load_node_key,
    load_signing_key,
    make_folder,
    new_node_key,
    node_text,
    public_text,
    read_public,
    save_node_key,
    save_pem,
    seal_key,
    verify_key,
    write_public,
)
from fedtune.security.registry import ClientRecord, now_text

Part = Literal["network", "trainer", "both"]
SECTIONS = (("coordinator", "verify"), ("coordinator", "seal"), ("client", "node"), ("client", "verify"))


@dataclass(frozen=True)
class Bundle:
    """What is not of the asked part is None."""

    folder: Path
    name: str
    server: str  # host:port
    verify: Ed25519PublicKey  # of the coordinator: checks its asks
    seal: X25519PublicKey  # of the coordinator: seals answers to it
    ca: Path | None = None
    node_key: Path | None = None
    signing: Ed25519PrivateKey | None = None

    @classmethod
    def load(cls, folder: Path, part: Part) -> Bundle:
        """Only files of the part are touched: the other process's need not be readable."""
        table = _client_table(folder)
        bundle = cls(
            folder,
            client_name(table["name"]),
            str(address(table["server"])),
            verify_key(table["coordinator.verify"]),
            seal_key(table["coordinator.seal"]),
        )
        if part != "trainer":
            bundle = bundle._with_network(table["client.node"])
        return bundle if part == "network" else bundle._with_trainer(table["client.verify"])

    def _with_network(self, registered: str) -> Bundle:
        ca, key = self.folder / "network" / "ca.pem", self.folder / "network" / "node.key"
        expires(read_public(ca))
        if node_text(load_node_key(key).public_key()) != registered:
            raise _foreign(key, self.name)
        return replace(self, ca=ca, node_key=key)

    def _with_trainer(self, registered: str) -> Bundle:
        path = self.folder / "trainer" / "client.key"
        key = load_signing_key(path)
        if public_text(key.public_key()) != registered:
            raise _foreign(path, self.name)
        return replace(self, signing=key)


def make_bundle(keys: CoordinatorKeys, name: str, renew: bool = False, note: str = "") -> Path:
    """New keys of a client, registered; the folder to hand over, and then to delete here."""
    if renew:
        note = note or keys.registry.client(name).note
    else:
        keys.registry.require_free(name)
    with new_bundle(keys.bundle(name)) as folder:
        record = replace(make_client_keys(folder, name), note=note)
        write_coordinator_part(keys, record, folder)
    keys.registry.add(record, replace=renew)
    return keys.bundle(name)


@contextmanager
def new_bundle(folder: Path) -> Iterator[Path]:
    """A folder to write into, for its owner alone; it takes the place of `folder` when it is whole."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_client_keys(folder: Path, name: str) -> ClientRecord:
    """The private half of a bundle; what it returns is public."""
    node, signing = new_node_key(), Ed25519PrivateKey.generate()
    make_folder(folder / "network")
    make_folder(folder / "trainer")
    save_node_key(folder / "network" / "node.key", node)
    save_pem(folder / "trainer" / "client.key", signing)
    return ClientRecord(client_name(name), node_text(node.public_key()), public_text(signing.public_key()))


def write_coordinator_part(keys: CoordinatorKeys, record: ClientRecord, folder: Path) -> None:
    """What a client has from its coordinator; nothing of it is private."""
    make_folder(folder / "network")
    write_public(folder / "network" / "ca.pem", read_public(keys.folder / "ca.pem"))
    write_client_file(keys, record, folder)


def write_client_file(keys: CoordinatorKeys, record: ClientRecord, folder: Path) -> None:
    table = {
        "name": record.name,
        "server": keys.address,
        "created": now_text(),
        "coordinator": {"verify": keys.verify, "seal": keys.seal},
        "client": {"node": record.node, "verify": record.verify},
    }
    make_folder(folder)
    write_public(folder / "client.toml", tomli_w.dumps(table).encode())


def renew_client_files(keys: CoordinatorKeys) -> list[str]:
    """A new client.toml in bundles/NAME of every client that is not revoked, for what has changed at the coordinator."""
    records = [record for record in keys.registry.clients().values() if not record.revoked]
    for record in records:
        write_client_file(keys, record, keys.bundle(record.name))
    return [record.name for record in records]


def _client_table(folder: Path) -> dict[str, str]:
    """Flat: a key of a section has the section's name before it."""
    path = folder / "client.toml"
    try:
        table = tomllib.loads(_client_file(path).decode())
        sections = {f"{section}.{key}": table[section][key] for section, key in SECTIONS}
    except (ValueError, KeyError, TypeError) as error:
        raise KeysError(f"{path} is not of a bundle ({error!r}); wanted the folder from `fedtune keys client NAME`") from error
    found = {"name": table.get("name"), "server": table.get("server")} | sections
    texts = {key: value for key, value in found.items() if isinstance(value, str)}
    if texts.keys() != found.keys():
        raise KeysError(f"{path} is not of a bundle: a value is missing or no text; take the file from the coordinator again")
    return texts


def _client_file(path: Path) -> bytes:
    try:
        return read_public(path)
    except KeysError as error:
        if is_absent(error) and (path.parent / "network").is_dir():
            name = path.parent.name
            raise KeysError(
                f"{path.parent} has no client.toml: the coordinator's half is missing. After `fedtune keys register "
                f"{name}.request.toml` there, copy its bundles/{name} over {path.parent}"
            ) from error
        raise


def _foreign(path: Path, name: str) -> KeysError:
    return KeysError(
        f"{path} is not the key that the coordinator has registered for {name}: files of two bundles are mixed; "
        f"take the whole folder from the coordinator again (`fedtune keys rotate client {name}`)"
    )
