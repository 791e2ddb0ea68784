"""Flower's processes on loopback without encryption, for simulation and tests: a SuperLink, its nodes, their trainers."""

from __future__ import annotations

import sys
from pathlib import Path

from fedtune.processes import POLL, ProcessDied, Processes, end, free_port, started_in
from server.flower_control import Control

__all__ = ["POLL", "FlowerProcesses", "ProcessDied", "end", "free_port", "started_in"]


class FlowerProcesses(Processes):
    """Nothing of the user's own Flower home is read or changed."""

    address = ""  # of its SuperLink

    def superlink(self, *options: str) -> str:
        """Its address, once it answers."""
        self.address = f"127.0.0.1:{free_port()}"
        port = self.address.rpartition(":")[2]
        self.start("superlink", ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port, *options])
        with Control(self.address) as control:
            self.until(control.answers, f"the SuperLink to answer on {self.address}")
        return self.address

    def trainer(self, client: str, *options: str) -> Path:
        """Its socket, once it listens."""
        path = self.folder / f"{len(self._processes)}.sock"
        command = [
            sys.executable,
            "-m",
            "client.trainer_main",
            "--insecure",
            "--client",
            client,
            "--socket",
            str(path),
            *options,
        ]
        self.start(f"trainer-{client}", command)
        self.until(path.is_socket, f"the trainer of {client} to listen")
        return path

    def supernode(self, client: str, superlink: str, trainer: Path) -> None:
        command = ["flower-supernode", "--insecure", "--superlink", superlink, "--port", str(free_port())]
        self.start(f"supernode-{client}", [*command, "--node-config", f'trainer-socket="{trainer}"'])
