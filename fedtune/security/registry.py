"""The clients that a coordinator knows: one small file each, `clients/NAME.toml`, public keys and dates."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedtune.errors import KeysError, nearest
from fedtune.security.addresses import client_name
from fedtune.security.keyfiles import make_folder, node_public, node_text, read_table, verify_key, write_table


def now_text() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class ClientRecord:
    name: str
    node: str  # OpenSSH public key of its SuperNode
    verify: str  # base64 of the Ed25519 public key that its answers are checked with
    registered: str = field(default_factory=now_text)
    revoked: str = ""  # since when; empty: it is not
    note: str = ""

    def node_pem(self) -> bytes:
        """The node key as the SuperLink registers it."""
        return node_public(self.node).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def fingerprint(self) -> str:
        """Four groups of four, to be compared by telephone: 80 bits of name and keys."""
        digest = hashlib.sha256("\n".join((self.name, self.node, self.verify)).encode()).digest()
        text = base64.b32encode(digest[:10]).decode()
        return "-".join(text[start : start + 4] for start in range(0, 16, 4))

    def checked(self) -> ClientRecord:
        """The same with keys that can be read, and the node key without a comment."""
        verify_key(self.verify)
        return replace(self, name=client_name(self.name), node=node_text(node_public(self.node)))


class Registry:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clients(self) -> dict[str, ClientRecord]:
        """By name, sorted; the revoked ones too."""
        try:
            files = sorted(self.folder.iterdir())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise KeysError(f"{self.folder} cannot be read: {error.strerror}; wanted the keys of this coordinator") from error
        return {path.stem: self._read(path) for path in files if path.suffix == ".toml" and not path.name.startswith(".")}

    def client(self, name: str) -> ClientRecord:
        clients = self.clients()
        if name not in clients:
            raise KeysError(f"no client {name!r} is registered{nearest(name, clients)}; `fedtune keys list` shows all")
        return clients[name]

    def require_free(self, name: str) -> None:
        if (other := self.clients().get(client_name(name))) is not None:
            raise KeysError(_taken(other))

    def add(self, record: ClientRecord, replace: bool = False) -> None:
        """Two clients never share a key: who has it could answer for both. Nor does one come back with a revoked key."""
        record = record.checked()
        if not replace:
            self.require_free(record.name)
        for other in self.clients().values():
            if other.node != record.node and other.verify != record.verify:
                continue
            if other.revoked:
                raise KeysError(
                    f"the keys of {record.name} are those of {other.name}, revoked since {other.revoked}: they may be stolen; "
                    f"make new ones, here with `fedtune keys rotate client {record.name}` or there with `fedtune keys request`"
                )
            if other.name != record.name:
                raise KeysError(f"the keys of {record.name} are those of {other.name} already; every client needs its own")
        self._write(record)

    def revoke(self, name: str) -> ClientRecord:
        """From now on; revoking it again changes nothing."""
        record = self.client(name)
        if not record.revoked:
            record = replace(record, revoked=now_text())
            self._write(record)
        return record

    def remove(self, name: str) -> None:
        self.client(name)
        (self.folder / f"{name}.toml").unlink()

    def _read(self, path: Path) -> ClientRecord:
        table = read_table(path, ("name", "node", "verify", "registered"))
        known = {key: table[key] for key in ClientRecord.__dataclass_fields__ if key in table}
        if table["name"] != path.stem:
            raise KeysError(f"{path} is of the client {table['name']!r}; the name and the file's name must be the same")
        return ClientRecord(**known).checked()

    def _write(self, record: ClientRecord) -> None:
        make_folder(self.folder)
        write_table(self.folder / f"{record.name}.toml", asdict(record))


def _taken(record: ClientRecord) -> str:
    state = f"is revoked since {record.revoked}" if record.revoked else f"is registered since {record.registered}"
    return (
        f"{record.name} {state}; for new keys type `fedtune keys rotate client {record.name}` "
        f"(with a request: `fedtune keys register … --replace`), to shut it out `fedtune keys revoke {record.name}`"
    )
