"""`fedtune up`: a deployment on one machine, to try it: keys, a server, clients; TLS, node keys, signed asks, sealed answers.

Everything is started as on machines of their own, and ended and removed at the end; what stays is the run's folder.
"""

from __future__ import annotations

import os
import shutil
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

    ended = [name for name in names if processes.ended(name) is not None]
    return "".join(f"; {name} ended: {tail(processes.log(name), 300).strip()}" for name in ended)


@contextmanager
def _kept(folder: Path | None) -> Iterator[Path]:
    """The folder that was named; or one that is removed, with a path that is short enough for sockets."""
    if folder is not None:
        yield folder.absolute()
        return
    place = Path(tempfile.mkdtemp(prefix="fedtune-up-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
