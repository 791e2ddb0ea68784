"""The keys of a coordinator: one folder that `fedtune keys init` makes and that never leaves its machine.

ca.key ca.pem   server.key server.pem   signing.key sealing.key   coordinator.toml   clients/   bundles/
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedtune.errors import KeysError
from fedtune.security.addresses import address as parsed
from fedtune.security.certificates import (
    SERVER_DAYS,
    Issued,
    belongs,
    days_left,
    expires,
    make_authority,
    make_server_certificate,
    names_in,
)
from fedtune.security.keyfiles import (
    OTHERS,
    is_absent,
    load_sealing_key,
    load_signing_key,
    load_tls_key,
    make_folder,
    public_text,
    read_public,
    read_table,
    removed_on_error,
    require_ours,
    save_pem,
    write_public,
    write_table,
)
from fedtune.security.registry import Registry, now_text

PARTS = ("ca.key", "ca.pem", "server.key", "server.pem", "signing.key", "sealing.key", "coordinator.toml")


@dataclass(frozen=True)
class CoordinatorKeys:
    folder: Path
    signing: Ed25519PrivateKey
    sealing: X25519PrivateKey
    address: str  # host:port, where clients find the server

    @classmethod
    def init(cls, folder: Path, names: Iterable[str], address: str, days: int = SERVER_DAYS) -> CoordinatorKeys:
        """New keys in a folder that has none; everything is checked before the first file is written."""
        if folder.exists():
            require_ours(folder, OTHERS)
        there = [part for part in PARTS if (folder / part).exists()]
        if there:
            raise KeysError(
                f"{folder} holds keys already ({', '.join(there)}), which every bundle depends on; nothing was changed. "
                "`fedtune keys rotate` renews them, `--keys` names another folder"
            )
        place, authority = parsed(address), make_authority()
        server = make_server_certificate(authority, [place.host, *names], days)
        keys = cls(folder, Ed25519PrivateKey.generate(), X25519PrivateKey.generate(), str(place))
        make_folder(folder)
        with removed_on_error(*(folder / part for part in PARTS)):
            _save_certificate(folder, "ca", authority)
            _save_certificate(folder, "server", server)
            keys._save_signing()
        return keys

    @classmethod
    def load(cls, folder: Path) -> CoordinatorKeys:
        """Folder and private files are checked, and that the halves belong together. `ca.key` may be kept elsewhere."""
        public = cls.public(folder)
        require_ours(folder, OTHERS)
        signing = load_signing_key(folder / "signing.key")
        sealing = load_sealing_key(folder / "sealing.key")
        if (folder / "ca.key").exists():
            load_tls_key(folder / "ca.key")
        if (public["verify"], public["seal"]) != (public_text(signing.public_key()), public_text(sealing.public_key())):
            raise KeysError(
                f"signing.key or sealing.key in {folder} is not that of coordinator.toml; type `fedtune keys rotate signing`"
            )
        if not belongs(read_public(folder / "server.pem"), load_tls_key(folder / "server.key")):
            raise KeysError(f"server.key in {folder} does not belong to server.pem; type `fedtune keys rotate server`")
        return cls(folder, signing, sealing, public["address"])

    @classmethod
    def public(cls, folder: Path) -> dict[str, str]:
        """coordinator.toml: verify, seal, address, created."""
        try:
            return read_table(folder / "coordinator.toml", ("verify", "seal", "address"))
        except KeysError as error:
            if is_absent(error):
                raise KeysError(f"no keys in {folder}; wanted the folder of `fedtune keys init`, given with --keys") from error
            raise

    @classmethod
    def registry_in(cls, folder: Path) -> Registry:
        """Without reading a private key."""
        cls.public(folder)
        return Registry(folder / "clients")

    @classmethod
    def renew_signing(cls, folder: Path) -> CoordinatorKeys:
        """New keys to sign and to unseal with; every client needs their public halves."""
        address = cls.public(folder)["address"]
        keys = cls(folder, Ed25519PrivateKey.generate(), X25519PrivateKey.generate(), address)
        keys._save_signing()
        return keys

    @classmethod
    def renew_certificate(
        cls, folder: Path, names: Sequence[str] = (), address: str = "", days: int = SERVER_DAYS
    ) -> CoordinatorKeys:
        """A new certificate of the server by the same authority; the names that it has unless others are given."""
        place = parsed(address or cls.public(folder)["address"])
        pem = read_public(folder / "ca.pem")
        if days_left(pem) < 0:
            raise KeysError(
                f"the authority in {folder} expired on {expires(pem):%Y-%m-%d}: type `fedtune keys init` with a new folder "
                "as --keys, and hand over new bundles"
            )
        authority = Issued(pem, load_tls_key(folder / "ca.key"))
        wanted = names or names_in(read_public(folder / "server.pem"))
        server = make_server_certificate(authority, [place.host, *wanted], days)
        _save_certificate(folder, "server", server)
        public = cls.public(folder) | {"address": str(place)}
        write_table(folder / "coordinator.toml", public)
        return cls.load(folder)

    @property
    def registry(self) -> Registry:
        return Registry(self.folder / "clients")

    @property
    def verify(self) -> str:
        return public_text(self.signing.public_key())

    @property
    def seal(self) -> str:
        return public_text(self.sealing.public_key())

    def tls(self) -> tuple[Path, Path, Path]:
        """The files of authority, certificate and its private key, in the order of `flower-superlink`'s options."""
        return self.folder / "ca.pem", self.folder / "server.pem", self.folder / "server.key"

    def bundle(self, name: str) -> Path:
        return self.folder / "bundles" / name

    def _save_signing(self) -> None:
        save_pem(self.folder / "signing.key", self.signing)
        save_pem(self.folder / "sealing.key", self.sealing)
        table = {"verify": self.verify, "seal": self.seal, "address": self.address, "created": now_text()}
        write_table(self.folder / "coordinator.toml", table)


def _save_certificate(folder: Path, name: str, issued: Issued) -> None:
    save_pem(folder / f"{name}.key", issued.key)
    write_public(folder / f"{name}.pem", issued.pem)
