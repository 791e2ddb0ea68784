"""Flower's processes on loopback without encryption, for simulation and tests: a SuperLink, its nodes, their trainers."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import tomli_w

from fedtune.processes import POLL, ProcessDied, Processes, end, free_port, started_in

__all__ = ["CONNECTION", "POLL", "FlowerProcesses", "ProcessDied", "end", "free_port", "started_in"]

CONNECTION = "fedtune"


class FlowerProcesses(Processes):
    """Nothing of the user's own Flower home is read or changed."""

    def superlink(self, *options: str) -> str:
        """Its address, once it answers."""
        address = f"127.0.0.1:{free_port()}"
        port = address.rpartition(":")[2]
        self.start("superlink", ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port, *options])
        config = {"superlink": {"default": CONNECTION, CONNECTION: {"address": address, "insecure": True}}}
        (self.folder / "home" / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        self.until(lambda: _answers(f"http://{address}/health"), f"the SuperLink to answer on {address}")
        return address

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


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False
