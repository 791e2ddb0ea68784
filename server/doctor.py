"""`fedtune doctor` on the coordinator: what would keep a run from starting, or from ending well."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedtune.base import base_hash, model_folder
from fedtune.checks import Finding, Look, disk, ram, versions
from fedtune.daemon import State
from fedtune.errors import UserError
from fedtune.job import Job
from fedtune.needs import Needs
from fedtune.security.addresses import address
from fedtune.security.certificates import days_left, expires, names_in
from fedtune.security.coordinator_keys import CoordinatorKeys

SOON = 30  # days
PORT = 8000


@dataclass(frozen=True)
class Examined:
    folder: Path  # --dir of the server
    keys: Path
    job: Job | None = None
    port: int | None = None  # absent: that of the address in the keys

    def checks(self) -> dict[str, Look]:
        always: dict[str, Look] = {"versions": versions, "keys": self.keyed, "clients": self.clients, "port": self.listening}
        of_a_job: dict[str, Look] = {"base": self.base, "memory": self.memory, "disk": self.room}
        return always | (of_a_job if self.job else {})

    @cached_property
    def _keys(self) -> CoordinatorKeys:
        return CoordinatorKeys.load(self.keys)

    @cached_property
    def _needs(self) -> Needs:
        assert self.job is not None
        return Needs.of(self.job)

    def keyed(self) -> Iterator[Finding]:
        """Their modes were looked at when they were read."""
        ca, certificate, _ = self._keys.tls()
        for what, file, mend in (
            ("the authority", ca, "type `fedtune keys init` with a new folder, and hand over new bundles"),
            ("the server's certificate", certificate, "type `fedtune keys rotate server`"),
        ):
            pem = file.read_bytes()
            left, until = days_left(pem), f"{what} holds until {expires(pem):%Y-%m-%d}"
            result = "fail" if left < 0 else "warn" if left < SOON else "ok"
            yield Finding("keys", result, f"{until}, {left} days", "" if result == "ok" else mend)
        names = ", ".join(names_in(certificate.read_bytes()))
        yield Finding("keys", "ok", f"in {self.keys}, for {self._keys.address}; the certificate names {names}")

    def clients(self) -> Iterator[Finding]:
        known = self._keys.registry.clients()
        active = [name for name, record in known.items() if not record.revoked]
        words = f"{len(active)} registered ({', '.join(active[:8])}{', …' if len(active) > 8 else ''})"
        revoked = len(known) - len(active)
        words += f", {revoked} revoked" if revoked else ""
        wanted = (self.job.clients.count or 1) if self.job else 1
        if len(active) < wanted:
            yield Finding("clients", "fail", f"{words}, the job wants {wanted}", "type `fedtune keys client NAME` for each")
        else:
            yield Finding("clients", "ok", words)

    def listening(self) -> Iterator[Finding]:
        """The port is free, or a server of ours has it."""
        port = self.port or (address(self._keys.address).port if self.keys.exists() else PORT)
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("0.0.0.0", port))
            yield Finding("port", "ok", f"{port} is free")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                yield Finding("port", "fail", f"{port} cannot be listened on: {error.strerror}", "take another: --port")
            elif self._ours(port):
                yield Finding("port", "ok", f"{port} is that of the server in {self.folder}")
            else:
                yield Finding("port", "fail", f"{port} is taken by another program", "end it, or take another: --port")

    def _ours(self, port: int) -> bool:
        try:
            state = State.read(self.folder)
            return state.role == "server" and state.alive and address(state.address).port == port
        except UserError:
            return False

    def base(self) -> Iterator[Finding]:
        assert self.job is not None
        folder = model_folder(self.job.model)
        yield Finding("base", "ok", f"{base_hash(folder)} of {self.job.model.path}; clients must have the same")

    def memory(self) -> Iterator[Finding]:
        yield ram(self._needs.coordinator(), "the run")

    def room(self) -> Iterator[Finding]:
        yield disk(self.folder, self._needs.run_folder(), "the run")
