"""`fedtune up`: a deployment on one machine, to try it: keys, a server, clients; TLS, node keys, signed asks, sealed answers.

Everything is started as on machines of their own, and ended and removed at the end; what stays is the run's folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedtune.job import Job
    from fedtune.processes import Processes

HOST = "127.0.0.1"
PATIENCE = 180.0  # seconds for the clients to come: each loads torch before it listens
FAREWELL = 20.0  # seconds for a client to end its own processes
REMOVE = "--remove"


def add_to(app: typer.Typer) -> None:
    app.command()(up)


def up(
    job: Annotated[str, typer.Argument(help="A job file, or the name of a scenario that is shipped.")] = "demo",
    clients: Annotated[int, typer.Option(min=1, help="How many of the job's clients, each with its own processes.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Run folder; absent is runs/up.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value for any key of the job.")] = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="Keep keys, logs and databases here.")] = None,
) -> None:
    """Deploy a job on this machine: make keys, start a server and clients over TLS, run, clean up."""
    from fedtune.security.keyfiles import for_owner_alone
    from fedtune.signals import stoppable
    from server.commands import say_where

    run = (out or Path("runs") / "up").absolute()
    overrides = ["compare=false", f"clients.count={clients}", *(set_ or [])]
    try:
        with stoppable(), for_owner_alone(), _kept(folder) as place:
            deploy(job, clients, place, run, overrides)
    except KeyboardInterrupt as stopped:
        typer.echo("fedtune: stopped; everything was ended", err=True)
        raise typer.Exit(getattr(stopped, "exit_code", 130)) from stopped
    say_where(run)


def deploy(job: str, clients: int, place: Path, run: Path, overrides: Sequence[str]) -> None:
    """Raises RoundFailed with the last words of clients that ended, where the run did not complete."""
    from rich.console import Console

    from fedtune.errors import RoundFailed
    from fedtune.processes import Processes, free_port
    from fedtune.security.coordinator_keys import CoordinatorKeys
    from fedtune.security.handover import make_bundle
    from server.settings import checked
    from server.supervisor import serve

    port = free_port()
    keys = CoordinatorKeys.init(place / "keys", [], f"{HOST}:{port}")
    chosen = _job(job, overrides)
    names = _names(chosen, clients)
    bundles = {name: make_bundle(keys, name) for name in names}
    named = [*overrides, f"clients.names={list(names)}", *_threads(chosen, clients)]
    settings = checked(job, place / "server", HOST, port, keys.folder, run, named, patience=PATIENCE)
    with Processes(place / "clients", patience=FAREWELL) as processes:
        for number, name in enumerate(names):
            processes.start(name, _client(chosen, bundles[name], place / str(number)))
        try:
            serve(settings, Console())
        except RoundFailed as error:
            raise RoundFailed(f"{error}{_last_words(processes, names)}") from error


def _client(job: Job, bundle: Path, folder: Path) -> list[str]:
    """Of model and data it has its own say, as on a machine of its own."""
    own = ["--model", str(_here(job.model.path)), "--data", str(_here(job.data.path))]
    return [sys.executable, "-m", "fedtune.cli", "client", "--bundle", str(bundle), "--dir", str(folder), *own]


def _here(path: str) -> str:
    """The client runs in another folder."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def _job(job: str, overrides: Sequence[str]) -> Job:
    from fedtune.job import load_job
    from fedtune.paths import job_file

    return load_job(job_file(job), overrides)


def _names(job: Job, clients: int) -> list[str]:
    """The first of the job's clients. Raises UserError where it has fewer."""
    from client.data.sources import clients_in

    return list(clients_in(job.data, job.clients))[:clients]


def _threads(job: Job, clients: int) -> list[str]:
    """All clients train at the same time: with more threads than cores each would wait for the others."""
    return [] if job.machine.threads else [f"machine.threads={max((os.cpu_count() or 1) // clients, 1)}"]


def _last_words(processes: Processes, names: Sequence[str]) -> str:
    from fedtune.processes import tail
    from fedtune.tending import last_words

    ended = [name for name in names if processes.ended(name) is not None]
    return "".join(f"; {name} ended: {last_words(tail(processes.log(name), 2000))}" for name in ended)


@contextmanager
def _kept(folder: Path | None) -> Iterator[Path]:
    """The folder that was named; or one that is removed, with a path that is short enough for sockets."""
    from fedtune.folders import require_folder

    if folder is not None:
        require_folder(folder.absolute())
        with guarded(folder.absolute()):
            yield folder.absolute()
        return
    place = Path(tempfile.mkdtemp(prefix="fedtune-up-"))
    try:
        with guarded(place, REMOVE):
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def guarded(place: Path, *options: str) -> Iterator[None]:
    """What is started in `place` ends also where we are killed: another process waits for our end, then runs `clean_up`."""
    from fedtune.paths import app_root

    command = [sys.executable, "-m", "simulations.up", str(place), *options]
    environment = os.environ | {"PYTHONPATH": str(app_root())}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True):
        yield  # its input ends with us; otherwise when this block is left


def clean_up(place: Path, remove: bool) -> None:
    """The clients end what they have started; then what is left is ended: a server's processes, those of a killed client."""
    from fedtune.processes import end, started_in

    end(started_in(place / "clients"), FAREWELL)
    for folder in place.iterdir() if place.is_dir() else ():
        end(started_in(folder))
    if remove:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.read()
    clean_up(Path(sys.argv[1]), REMOVE in sys.argv[2:])
