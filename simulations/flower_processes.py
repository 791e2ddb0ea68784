"""Flower's processes on loopback: a SuperLink, its nodes, their trainers, and a run that is followed to its end.

Each process has its log in one folder and a Flower home of its own there, so nothing of the user's is read or changed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import tomli_w

from fedtune.errors import FedtuneError
from fedtune.paths import app_root

CONNECTION = "fedtune"
POLL = 0.1  # seconds


class ProcessDied(FedtuneError):
    """A process that the run needs has ended; the message has the last lines of its log."""


class FlowerProcesses:
    """Leaving the `with` ends every process, also those that Flower and Ray have started themselves."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder.absolute()
        self.environment = flower_environment(self.folder) | (environment or {})
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> FlowerProcesses:
        (self.folder / "home").mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in reversed(self._processes.values()):
            process.terminate()
        end(started_in(self.folder))
        for process in self._processes.values():
            process.wait()

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """In a session of its own, so that Ctrl-C reaches only us, and outside any checkout: Ray imports from its folder."""
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                list(command),
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[name] = process
        return process

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
        command = [sys.executable, "-m", "client.trainer_main", "--client", client, "--socket", str(path), *options]
        self.start(f"trainer-{client}", command)
        self.until(path.is_socket, f"the trainer of {client} to listen")
        return path

    def supernode(self, client: str, superlink: str, trainer: Path) -> None:
        command = ["flower-supernode", "--insecure", "--superlink", superlink, "--port", str(free_port())]
        self.start(f"supernode-{client}", [*command, "--node-config", f'trainer-socket="{trainer}"'])

    def until(self, ready: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
        """Polls. Raises ProcessDied when a process ends meanwhile, or when the time is over."""
        deadline = time.monotonic() + timeout
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise ProcessDied(f"waited {timeout:.0f} s in vain for {what}; the logs:\n{self.logs()}")
            time.sleep(POLL)

    def check(self) -> None:
        """Raises ProcessDied when one that serves has ended."""
        for name, process in self._processes.items():
            if process.poll() not in (None, 0):
                raise ProcessDied(
                    f"{name} ended with exit code {process.returncode}; its log:\n{self.log(name).read_text()[-2000:]}"
                )

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def logs(self, last: int = 3000) -> str:
        """The last characters of every log."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-last:]}" for file in files)


def flower_environment(folder: Path) -> dict[str, str]:
    """What all of them run with: our modules, no telemetry, no installing, no waits that can be avoided."""
    programs = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(app_root()), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def started_in(folder: Path) -> list[psutil.Process]:
    """Every process whose environment names this folder's Flower home: ours, and all that they have started."""
    home, found = str(folder / "home"), []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == home:
                found.append(process)
        except psutil.Error:  # gone, or somebody else's
            continue
    return found


def end(processes: Sequence[psutil.Process], patience: float = 5.0) -> None:
    """Asked first, then killed."""
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    _, stubborn = psutil.wait_procs(processes, timeout=patience)
    for process in stubborn:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(stubborn, timeout=patience)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False
