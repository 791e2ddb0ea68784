"""The bundle of a client: what a coordinator hands over once, in two parts that two processes of the client read.

NAME/client.toml      name, server, coordinator.verify, coordinator.seal, created
NAME/network/         ca.pem  node.key  node.pub      for SuperNode and relay
NAME/trainer/         client.key                      for the trainer alone: signs answers
"""

from __future__ import annotations

import shutil
import tomllib
from dataclasses import dataclass
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
        table = _client_table(folder / "client.toml")
        network, trainer = part in ("network", "both"), part in ("trainer", "both")
        if network:
            load_node_key(folder / "network" / "node.key")
            expires(read_public(folder / "network" / "ca.pem"))
        return cls(
            folder,
            client_name(table["name"]),
            str(address(table["server"])),
            verify_key(table["verify"]),
            seal_key(table["seal"]),
            folder / "network" / "ca.pem" if network else None,
            folder / "network" / "node.key" if network else None,
            load_signing_key(folder / "trainer" / "client.key") if trainer else None,
        )


def make_bundle(keys: CoordinatorKeys, name: str, replace: bool = False) -> Path:
    """New keys of a client, registered; the folder to hand over, and then to delete here."""
    if not replace and client_name(name) in keys.registry.clients():
        keys.registry.add(keys.registry.client(name))  # refuses, and says what to type
    folder = keys.bundle(name)
    temporary = folder.with_name(f".{name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    record = make_client_keys(temporary, name)
    write_coordinator_part(keys, name, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    keys.registry.add(record, replace)
    return folder


def make_client_keys(folder: Path, name: str) -> ClientRecord:
    """The private half of a bundle; what it returns is public."""
    node, signing = new_node_key(), Ed25519PrivateKey.generate()
    make_folder(folder / "network")
    make_folder(folder / "trainer")
    save_node_key(folder / "network" / "node.key", node)
    save_pem(folder / "trainer" / "client.key", signing)
    return ClientRecord(client_name(name), node_text(node.public_key()), public_text(signing.public_key()))


def write_coordinator_part(keys: CoordinatorKeys, name: str, folder: Path) -> None:
    """What a client has from its coordinator; nothing of it is private."""
    make_folder(folder / "network")
    write_public(folder / "network" / "ca.pem", read_public(keys.folder / "ca.pem"))
    table = {
        "name": name,
        "server": keys.address,
        "created": now_text(),
        "coordinator": {"verify": keys.verify, "seal": keys.seal},
    }
    write_public(folder / "client.toml", tomli_w.dumps(table).encode())


def _client_table(path: Path) -> dict[str, str]:
    """Flat, as far as it is used."""
    try:
        table = tomllib.loads(read_public(path).decode())
        coordinator = table["coordinator"]
        found = {"name": table["name"], "server": table["server"], "verify": coordinator["verify"], "seal": coordinator["seal"]}
    except (ValueError, KeyError, TypeError) as error:
        raise KeysError(f"{path} is not of a bundle ({error!r}); wanted the folder from `fedtune keys client NAME`") from error
    if not all(isinstance(value, str) for value in found.values()):
        raise KeysError(f"{path} is not of a bundle: its values must be text; take the file from the coordinator again")
    return found
