"""A SuperLink that somebody else runs, as `fedtune server --superlink` was given it; and what a ServerApp of ours is told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedtune import durable
from fedtune.errors import KeysError, UserError
from fedtune.job import Job
from fedtune.security.addresses import Address, address
from fedtune.security.certificates import expires
from fedtune.security.keyfiles import read_private, read_public

CONFIG = "serverapp.json"  # of the run, and never sent: it names the keys


@dataclass(frozen=True)
class Foreign:
    at: Address
    ca: Path  # the authority of its certificate
    secret: Path | None = None  # what its operator gave it as --superexec-auth-secret-file


def checked_foreign(superlink: str, ca: Path, secret: Path | None) -> Foreign:
    """Raises UserError with what is to be mended; nothing is asked of the SuperLink yet."""
    ca, secret = ca.absolute(), secret.absolute() if secret else None
    try:
        expires(read_public(ca))
    except KeysError as error:
        raise KeysError(f"--superlink-ca {ca}: {error}; wanted the authority of the SuperLink's certificate, as PEM") from error
    if secret and not read_private(secret):
        raise UserError(
            f"--superlink-secret {secret} is empty; wanted the file that the SuperLink's operator has started it with"
        )
    return Foreign(address(superlink), ca, secret)


def write_config(folder: Path, run: int, job: Job, out: Path, keys: Path | None, resume: bool = False) -> Path:
    """What the ServerApp is told here, where it would otherwise be told by the SuperLink, as all nodes would."""
    config = {"run": run, "job": job.model_dump_json(), "folder": str(out), "keys": str(keys) if keys else ""}
    durable.write(folder / CONFIG, [json.dumps(config | {"resume": "1" if resume else ""}).encode()])
    return folder / CONFIG


def earlier_run(folder: Path) -> int | None:
    """That a server in this folder submitted last."""
    try:
        return int(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
