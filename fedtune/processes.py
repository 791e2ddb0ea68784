"""Processes that one of ours starts, watches and ends: each with a log, all with one environment and one Flower home.

Whatever they start themselves is found by that home, and ends with them.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from fedtune.errors import FedtuneError
from fedtune.paths import app_root

POLL, PATIENCE = 0.1, 5.0  # seconds
CONTROL = re.compile(
    r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)  # a log holds words of others: no terminal codes


class ProcessDied(FedtuneError):
    """A process that is needed has ended; the message has the last lines of its log."""


class Processes:
    """Leaving the `with` ends every process, also those that Flower and Ray have started themselves."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        logs: Path | None = None,
        patience: float = PATIENCE,
    ) -> None:
        """`patience`: seconds that a process has to end when it is asked to; then it is killed."""
        self._patience = patience
        self.folder = folder.absolute()
        self.log_folder = (logs or folder).absolute()
        self.environment = flower_environment(self.folder) | dict(environment or {})
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        (self.folder / "home").mkdir(parents=True, exist_ok=True)
        self.log_folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in reversed(self._processes.values()):
            process.terminate()
        end(started_in(self.folder), self._patience)
        for process in self._processes.values():
            process.wait()

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """In a session of its own, so that Ctrl-C reaches only us, and outside any checkout: Ray imports from its folder."""
        with self.log(name).open("ab") as log:
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

    def ended(self, name: str) -> int | None:
        """Its exit code; None while it runs."""
        return self._processes[name].poll()

    def pids(self) -> dict[str, int]:
        """Of those that run."""
        return {name: process.pid for name, process in self._processes.items() if process.poll() is None}

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
                raise ProcessDied(f"{name} ended with exit code {process.returncode}; its log:\n{tail(self.log(name), 2000)}")

    def log(self, name: str) -> Path:
        return self.log_folder / f"{name}.log"

    def logs(self, last: int = 3000) -> str:
        """The last characters of every log."""
        return "\n".join(f"--- {file.name}\n{tail(file, last)}" for file in sorted(self.log_folder.glob("*.log")))


def tail(log: Path, last: int) -> str:
    """Its last bytes as text; nothing where there is no such file."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - last, 0))
        return file.read().decode(errors="replace")


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


def past_proxies(*hosts: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What has this machine, and these hosts, reached directly, whatever proxy there is for the world outside."""
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    direct = ",".join(dict.fromkeys([*filter(None, given.split(",")), "127.0.0.1", "::1", "localhost", *hosts]))
    return {"no_proxy": direct, "NO_PROXY": direct}


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


def end(processes: Sequence[psutil.Process], patience: float = PATIENCE) -> None:
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


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
