"""`fedtune doctor` on the coordinator: what would keep a run from starting, or from ending well."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
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
from fedtune.security.certificates import certificate_problem, days_left, expires, names_in
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.registry import ClientRecord
from server.settings import HERE, require_address
from server.waiting import wanted_of

SOON = 30  # days
PORT = 8000


@dataclass(frozen=True)
class Examined:
    folder: Path  # --dir of the server
    keys: Path
    job: Job | None = None
    port: int | None = None  # absent: that of the address in the keys
    host: str = "0.0.0.0"  # to listen on

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
        pems = ca.read_bytes(), certificate.read_bytes()
        if all(days_left(pem) >= 0 for pem in pems):
            yield self._of_this_server(*pems)

    def _of_this_server(self, ca: bytes, certificate: bytes) -> Finding:
        """Whether clients will take it for the one that they were told of."""
        for host in (HERE.get(self.host, self.host), address(self._keys.address).host):
            if problem := certificate_problem(certificate, ca, host):
                return Finding("keys", "fail", problem)
        names = ", ".join(names_in(certificate))
        return Finding("keys", "ok", f"in {self.keys}, for {self._keys.address}; the certificate names {names}")

    def clients(self) -> Iterator[Finding]:
        known = self._keys.registry.clients()
        active = [name for name, record in known.items() if not record.revoked]
        words = f"{len(active)} registered ({', '.join(active[:8])}{', …' if len(active) > 8 else ''})"
        revoked = len(known) - len(active)
        words += f", {revoked} revoked" if revoked else ""
        wanted = (self.job.clients.count or 1) if self.job else 1
        if problem := self._named(known):
            yield Finding("clients", "fail", words, problem)
        elif len(active) < wanted:
            yield Finding("clients", "fail", f"{words}, the job wants {wanted}", "type `fedtune keys client NAME` for each")
        else:
            yield Finding("clients", "ok", words)

    def _named(self, known: Mapping[str, ClientRecord]) -> str:
        """What is wrong with the clients that the job wants by name."""
        if self.job and self.job.clients.names:
            try:
                wanted_of(self.job, {name: bool(record.revoked) for name, record in known.items()})
            except UserError as error:
                return str(error)
        return ""

    def listening(self) -> Iterator[Finding]:
        """The port is free, or a server of ours has it."""
        port = self.port or (address(self._keys.address).port if self.keys.exists() else PORT)
        try:
            require_address(self.host)
            with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self.host, port))
            yield Finding("port", "ok", f"{port} is free")
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                yield Finding("port", "fail", f"{self.host} is no address of this machine", "--host 0.0.0.0 is all of them")
            elif error.errno != errno.EADDRINUSE:
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
