"""What `fedtune server` was given, checked before anything is started."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryFile

from fedtune.daemon import State
from fedtune.errors import KeysError, ModelError, UserError
from fedtune.folders import require_folder
from fedtune.job import Job, load_job
from fedtune.paths import job_file
from fedtune.processes import started_in
from fedtune.security.addresses import Address, address
from fedtune.security.certificates import certificate_problem
from fedtune.security.coordinator_keys import CoordinatorKeys
from server.following import as_seen_anywhere
from server.foreign import Foreign, checked_foreign
from server.journal import read
from server.past import started_in as started_in_run
from server.resuming import require_resumable
from server.run_folder import JOURNAL, holds_run, require_free, writing
from server.waiting import Wanted, wanted_again, wanted_of

SECRET = "server.secret"  # between a SuperLink of ours and this server's other processes, new at each start
HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # how the machine itself reaches what listens everywhere


@dataclass(frozen=True)
class Settings:
    job: Job
    folder: Path  # of the server: database, logs, state
    run: Path  # of what the run makes
    listens: Address
    keys: CoordinatorKeys | None  # None: neither TLS nor identities nor signatures
    patience: float | None = None  # seconds to wait for clients; None is for ever
    foreign: Foreign | None = None  # the SuperLink, where somebody else runs it
    resume: bool = False  # the run that is in the folder, if there is one, goes on

    @property
    def here(self) -> str:
        """The SuperLink as this machine reaches it."""
        if self.foreign:
            return str(self.foreign.at)
        return str(Address(HERE.get(self.listens.host, self.listens.host), self.listens.port))

    @property
    def ca(self) -> Path | None:
        if self.foreign:
            return self.foreign.ca
        return self.keys.tls()[0] if self.keys else None

    @property
    def secret(self) -> Path | None:
        """Who has it, may execute runs of the SuperLink."""
        return self.foreign.secret if self.foreign else self.folder / SECRET

    def registered(self) -> dict[str, bool] | None:
        """Client -> whether it is revoked; None where nobody is known by name."""
        if self.keys is None:
            return None
        return {name: bool(record.revoked) for name, record in self.keys.registry.clients().items()}

    def wanted(self) -> Wanted:
        """The clients that the run waits for. Raises UserError where they cannot come."""
        told = started_in_run(read(self.run / JOURNAL)[0]) if self.resume and holds_run(self.run) else None
        if told is None:
            return wanted_of(self.job, self.registered())
        return wanted_again(self.job, self.registered(), sorted(told["clients"]))

    def superlink(self) -> list[str]:
        """The command that starts it."""
        options = ["--host", self.listens.host, "--port", str(self.listens.port)]
        options += ["--database", str(self.folder / "superlink.db")]
        options += ["--isolation", "process", "--superexec-auth-secret-file", str(self.folder / SECRET)]
        if self.keys is None:
            return [sys.executable, "-m", "server.superlink", *options, "--insecure"]
        ca, certificate, key = map(str, self.keys.tls())
        tls = ["--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key]
        return [sys.executable, "-m", "server.superlink", *options, *tls, "--enable-supernode-auth"]

    def serverapp(self, config: Path) -> list[str]:
        """The command that plays the run of that config. A token, on a command line, could be read by every local user."""
        given = {"--superlink": self.here, "--config": config, "--ca": self.ca, "--secret": self.secret}
        words = [str(word) for option, value in given.items() if value for word in (option, value)]
        return [sys.executable, "-m", "server.serverapp", *words]


def checked(
    job: str,
    folder: Path,
    host: str,
    port: int,
    keys: Path | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    insecure: bool = False,
    anywhere: bool = False,
    patience: float | None = None,
    resume: bool = False,
) -> Settings:
    """Raises UserError with what is to be mended; then nothing was written and nothing runs."""
    folder = folder.absolute()
    checked_job, run = checked_run(job, folder, out, overrides, resume)
    require_address(host)
    if insecure or anywhere:
        require_loopback(host, anywhere)
    own = None if insecure or anywhere else checked_keys(keys or folder / "keys", HERE.get(host, host))
    if not started_in(folder):  # the SuperLink that a killed server has left may hold it, and is ended first
        require_port(host, port)
    require_folder(folder)
    return Settings(checked_job, folder, run, Address(host, port), own, patience, None, resume)


def checked_guest(
    job: str,
    folder: Path,
    superlink: str,
    ca: Path | None = None,
    secret: Path | None = None,
    keys: Path | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    patience: float | None = None,
    resume: bool = False,
) -> Settings:
    """The same for a SuperLink that somebody else runs at `superlink`. There is no way to go there without keys."""
    folder = folder.absolute()
    checked_job, run = checked_run(job, folder, out, overrides, resume)
    own = CoordinatorKeys.load((keys or folder / "keys").absolute())
    foreign = checked_foreign(superlink, ca or own.tls()[0], secret)
    require_folder(folder)
    return Settings(checked_job, folder, run, foreign.at, own, patience, foreign, resume)


def checked_run(job: str, folder: Path, out: Path | None, overrides: Sequence[str], resume: bool = False) -> tuple[Job, Path]:
    """The job, and the folder of its run: free, or with a run that goes on."""
    require_nobody(folder)
    checked_job = load_job(job_file(job), overrides)
    run = (out or folder / "runs" / checked_job.name).absolute()
    if resume and holds_run(run):
        checked_job = as_it_began(checked_job, run)
    else:
        require_free(run)
    if out is not None:  # otherwise it lies in --dir
        require_writable(run)
    require_model(checked_job.model.path)
    return checked_job, run


def as_it_began(job: Job, run: Path) -> Job:
    """The job for as many clients as the run began with. Raises UserError where it is another than that of the run."""
    began = load_job(run / "job.toml").clients.count
    job = as_seen_anywhere(job, began) if began else job
    require_resumable(run, job)
    return job


def require_writable(run: Path) -> None:
    """Raises RunFolderError where the run could not be written; what is made to find out is taken away again."""
    missing = [path for path in (run, *run.parents) if not os.path.lexists(path)]
    try:
        with writing(run):
            run.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=run):
                pass
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def require_model(path: str) -> None:
    """Raises ModelError for a folder without a model, before clients are waited for. A hub id is fetched later."""
    folder = Path(path).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; wanted in model.path a folder written by save_pretrained")
    if not folder.exists() and (folder.is_absolute() or path.startswith(".")):
        raise ModelError(
            f"there is no model folder {path}; wanted in model.path a folder, a hub id (owner/name) or builtin:stdlib"
        )


def require_nobody(folder: Path) -> None:
    """The folder is new, or that of a server that has ended."""
    if os.path.lexists(folder):
        require_folder(folder)
    if not os.path.lexists(folder / "state.json"):
        return
    state = State.read(folder)
    if state.alive:
        raise UserError(
            f"a fedtune {state.role} runs in {folder} already (pid {state.pid}); `fedtune stop --dir {folder}` ends it"
        )
    if state.role != "server":
        raise UserError(f"{folder} is the folder of a fedtune {state.role}; give this server another --dir")


def require_address(host: str) -> None:
    try:
        ip_address(host)
    except ValueError as error:
        raise UserError(f"--host {host} is no IP address; wanted 0.0.0.0 for all, or one of this machine") from error


def require_loopback(host: str, anywhere: bool) -> None:
    if not anywhere and not ip_address(host).is_loopback:
        raise UserError(
            f"--insecure on {host} would let everybody who reaches it read and change the run; type --host 127.0.0.1, "
            "leave --insecure out (`fedtune keys init` makes keys), or write out --insecure-anywhere"
        )


def checked_keys(folder: Path, host: str) -> CoordinatorKeys:
    """Keys that clients will trust: the certificate holds now, for this machine and for the address in their bundles."""
    keys = CoordinatorKeys.load(folder.absolute())
    ca, certificate, _ = keys.tls()
    for name in (host, address(keys.address).host):
        if problem := certificate_problem(certificate.read_bytes(), ca.read_bytes(), name):
            raise KeysError(f"{certificate}: {problem}")
    return keys


def require_port(host: str, port: int) -> None:
    """Raises UserError where nothing could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"nothing can listen on {Address(host, port)}: {error.strerror}; name another with --port"
            ) from error
