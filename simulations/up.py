"""`fedtune up`: a deployment on one machine, to try it: keys, a server, clients; TLS, node keys, signed asks, sealed answers.

Everything is started as on machines of their own, and ended and removed at the end; what stays is the run's folder.
With --dir all of it stays, so that a run that was killed can go on.
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

from server.commands import Resume

if TYPE_CHECKING:
    from rich.console import Console

    from fedtune.job import Job
    from fedtune.processes import Processes
    from fedtune.security.coordinator_keys import CoordinatorKeys
    from fedtune.tending import Tending

HOST = "127.0.0.1"
PATIENCE = 180.0  # seconds for the clients to come: each loads torch before it listens
FAREWELL = 20.0  # seconds for a client to end its own processes
TO_MEND = 2  # exit code of a client whose user has to mend something


def add_to(app: typer.Typer) -> None:
    app.command()(up)


def up(
    job: Annotated[str, typer.Argument(help="A job file, or the name of a scenario that is shipped.")] = "demo",
    clients: Annotated[int, typer.Option(min=1, help="How many of the job's clients, each with its own processes.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Run folder; absent is runs/up.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value for any key of the job.")] = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="Keep keys, logs and databases here.")] = None,
    resume: Resume = False,
) -> None:
    """Deploy a job on this machine: make keys, start a server and clients over TLS, run, clean up."""
    from fedtune.errors import UserError
    from fedtune.security.keyfiles import for_owner_alone
    from fedtune.signals import stoppable
    from server.attempts import resumable
    from server.commands import say_where

    if resume and folder is None:
        raise UserError("--resume needs the keys and the clients' folders of the run: type the --dir that it was begun with")
    run = (out or Path("runs") / "up").absolute()
    overrides = ["compare=false", f"clients.count={clients}", *(set_ or [])]
    try:
        with stoppable(), for_owner_alone(), _kept(folder) as place:
            deploy(job, clients, place, run, overrides, resume)
    except KeyboardInterrupt as stopped:
        typer.echo(f"fedtune: stopped; everything was ended{resumable(run) if folder else ''}", err=True)
        raise typer.Exit(getattr(stopped, "exit_code", 130)) from stopped
    say_where(run)


def deploy(job: str, clients: int, place: Path, run: Path, overrides: Sequence[str], resume: bool = False) -> None:
    """Raises RoundFailed with the last words of clients that ended, where the run did not complete."""
    from rich.console import Console

    from fedtune.errors import RoundFailed
    from fedtune.processes import Processes
    from fedtune.security.addresses import address
    from fedtune.tending import Tending
    from server.attempts import is_finished
    from server.settings import checked
    from server.supervisor import serve

    keys, chosen, console = _keys(place / "keys", resume), _job(job, overrides), Console()
    names = _names(chosen, clients)
    bundles = {name: _bundle(keys, name) for name in names}
    named = [*overrides, f"clients.names={list(names)}", *_threads(chosen, clients)]
    port = address(keys.address).port
    settings = checked(job, place / "server", HOST, port, keys.folder, run, named, patience=PATIENCE, resume=resume)
    if resume and is_finished(run, settings.job.rounds.count):
        typer.echo(f"the run in {run} has finished already")
        return
    with Processes(place / "clients", patience=FAREWELL) as processes:
        tending = Tending(processes)
        for number, name in enumerate(names):
            tending.keep(name, _client(chosen, bundles[name], place / str(number)))
        try:
            serve(settings, console, beside=lambda: _tend(tending, console))
        except RoundFailed as error:
            raise RoundFailed(f"{error}{_last_words(processes, names)}") from error


def _keys(folder: Path, resume: bool) -> CoordinatorKeys:
    """New ones for a new deployment; the port is part of them."""
    from fedtune.errors import UserError
    from fedtune.processes import free_port
    from fedtune.security.coordinator_keys import CoordinatorKeys

    if folder.is_dir() and resume:
        return CoordinatorKeys.load(folder)
    if folder.is_dir():
        raise UserError(f"{folder.parent} holds a deployment already; go on with it: --resume, or name another --dir")
    return CoordinatorKeys.init(folder, [], f"{HOST}:{free_port()}")


def _bundle(keys: CoordinatorKeys, name: str) -> Path:
    from fedtune.security.handover import make_bundle

    return keys.bundle(name) if name in keys.registry.clients() else make_bundle(keys, name)


def _tend(clients: Tending, console: Console) -> None:
    """Raises UserError where a client says that the user has to mend something: started again it would say the same."""
    from fedtune.errors import UserError

    for name in clients.tend():
        if clients.exit_code(name) == TO_MEND:
            raise UserError(f"{name}: {clients.last_words(name)}")
        words = f"client {name} {clients.how_it_ended(name)}; it is started again"
        console.print(words, markup=False, highlight=False, soft_wrap=True)


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
    from simulations.guard import REMOVE, guarded

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
