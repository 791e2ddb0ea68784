"""Keys that never leave the client's machine: it makes them, and sends only their public halves.

client        fedtune keys request north          north/ with its private keys, north.request.toml to send
coordinator   fedtune keys register north.request.toml      bundles/north without private keys, to send back
client        copies that folder over its own: the bundle is whole
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedtune.errors import KeysError
from fedtune.security.addresses import client_name
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import make_client_keys, new_bundle, write_coordinator_part
from fedtune.security.keyfiles import read_table, write_table
from fedtune.security.registry import ClientRecord


def make_request(name: str, out: Path) -> tuple[ClientRecord, Path]:
    """Private keys in out/NAME, and the file to send beside it."""
    folder, file = out / client_name(name), out / f"{name}.request.toml"
    if folder.exists():
        raise KeysError(f"{folder} is there already, perhaps with keys in use; name another folder with --out, or remove it")
    with new_bundle(folder) as temporary:
        record = make_client_keys(temporary, name)
    write_table(file, {"name": name, "node": record.node, "verify": record.verify, "created": record.registered})
    return record, file


def read_request(path: Path) -> ClientRecord:
    table = read_table(path, ("name", "node", "verify"))
    return ClientRecord(table["name"], table["node"], table["verify"]).checked()


def register_request(keys: CoordinatorKeys, path: Path, renew: bool = False, note: str = "") -> ClientRecord:
    """Registered, and the coordinator's half of the bundle written for it."""
    record = replace(read_request(path), note=note)
    if renew:
        record = replace(record, note=note or keys.registry.client(record.name).note)
    keys.registry.add(record, replace=renew)
    with new_bundle(keys.bundle(record.name)) as folder:
        write_coordinator_part(keys, record, folder)
    return record
