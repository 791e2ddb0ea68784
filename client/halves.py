"""The processes of a client: how each is started, and what of the bundle each of them has read when it started."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from client.settings import Settings
from client.told import ANSWERS, LINK
from client.unanswered import OPEN
from fedtune.security.handover import Bundle

MARK = "node.mark"  # there while the SuperNode is connected
SECRET = "runtime.secret"  # between SuperNode and relay, new at each start


@dataclass(frozen=True)
class Planned:
    """One process: `read` changes when the bundle brings something that it has to read again."""

    command: list[str]
    read: tuple[object, ...] = ()


def processes(settings: Settings, bundle: Bundle | None, port: int) -> Mapping[str, Planned]:
    """By name, in the order in which they start. `port` is the SuperNode's on loopback."""
    planned = {}
    if settings.training:
        planned["trainer"] = Planned(_trainer(settings), _read_by_trainer(bundle))
    if settings.network:
        planned["supernode"] = Planned(_supernode(settings, bundle, port), _read_by_supernode(settings, bundle))
        planned["relay"] = Planned(_relay(settings, port))
    return planned


def server_of(settings: Settings, bundle: Bundle | None) -> str:
    return settings.server or (bundle.server if bundle else "")


def _trainer(settings: Settings) -> list[str]:
    trust = ["--bundle", str(settings.bundle)] if settings.bundle else ["--insecure"]
    own = {"client": settings.name, "socket": str(settings.socket), "dir": str(settings.folder), **settings.trainer}
    return _module("client.trainer_main", *trust, *_options(own))


def _supernode(settings: Settings, bundle: Bundle | None, port: int) -> list[str]:
    trust = ["--insecure"]
    if bundle:
        trust = ["--root-certificates", str(bundle.ca), "--auth-supernode-private-key", str(bundle.node_key)]
    runtime = {"isolation": "process", "host": "127.0.0.1", "port": str(port)}
    secret = {"superexec-auth-secret-file": str(settings.folder / SECRET)}
    own = {"link": str(settings.folder / LINK), "mark": str(settings.folder / MARK), "superlink": server_of(settings, bundle)}
    return _module("client.supernode", *_options({**own, **runtime, **secret}), *trust)


def _relay(settings: Settings, port: int) -> list[str]:
    names = {"secret": SECRET, "answers": ANSWERS, "unanswered": OPEN}
    files = {option: str(settings.folder / name) for option, name in names.items()}
    return _module("client.relay", *_options({"runtime": f"127.0.0.1:{port}", "trainer": str(settings.socket), **files}))


def _module(name: str, *options: str) -> list[str]:
    return [sys.executable, "-m", name, *options]


def _options(given: Mapping[str, str]) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name}", value)]


def _read_by_trainer(bundle: Bundle | None) -> tuple[object, ...]:
    if bundle is None:
        return ()
    public = [key.public_bytes(Encoding.Raw, PublicFormat.Raw) for key in (bundle.verify, bundle.seal)]
    private = bundle.signing.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()) if bundle.signing else b""
    return (*public, private)


def _read_by_supernode(settings: Settings, bundle: Bundle | None) -> tuple[object, ...]:
    files = [bundle.ca, bundle.node_key] if bundle else []
    return (server_of(settings, bundle), *(_content(file) for file in files))


def _content(file: Path | None) -> bytes:
    return file.read_bytes() if file else b""
