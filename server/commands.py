"""`fedtune server`, and what looks at a running server or client from outside: `status`, `stop`, `logs`.

Exit codes: 0 done, 1 the run failed or nothing is alive, 2 something that the user must mend, 130 and 143 stopped.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.settings import Settings

Folder = Annotated[Path, typer.Option("--dir", help="Its folder: state, logs, database.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder; begin one where there is none.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]

EVERYWHERE, PORT = "0.0.0.0", 8000


def add_to(app: typer.Typer) -> None:
    for command in (server, status, stop, logs):
        app.command()(command)


def server(
    job: Annotated[str, typer.Argument(help="A job file, or the name of a scenario that is shipped: demo.")],
    folder: Folder,
    host: Annotated[str, typer.Option(help="IP address to listen on.")] = EVERYWHERE,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = PORT,
    keys: Annotated[
        Path | None, typer.Option(envvar="FEDTUNE_KEYS", help="What `fedtune keys init` made; absent is keys in --dir.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; absent is runs/<name of the job> in --dir.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for any key of the job, as often as needed.")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="No TLS, no keys, no signatures: on loopback only.")] = False,
    insecure_anywhere: Annotated[bool, typer.Option(help="The same on any address: whoever reaches it can do all.")] = False,
    wait: Annotated[float | None, typer.Option(min=0, help="Seconds to wait for clients; absent is for ever.")] = None,
    superlink: Annotated[str, typer.Option(help="host:port of a SuperLink that somebody else runs; none is started.")] = "",
    superlink_ca: Annotated[Path | None, typer.Option(help="Authority of its certificate; absent is ca.pem in --keys.")] = None,
    superlink_secret: Annotated[
        Path | None, typer.Option(help="What its operator gave it as --superexec-auth-secret-file.")
    ] = None,
    resume: Resume = False,
    health: Annotated[str, typer.Option(help="host:port where gRPC's health service tells how the server is.")] = "",
    metrics: Annotated[str, typer.Option(help="host:port where Prometheus finds figures, at /metrics.")] = "",
    metrics_clients: Annotated[bool, typer.Option("--metrics-clients", help="Name clients there.")] = False,
) -> None:
    """Run a job with clients on other machines: wait for them, show the rounds, end with the run."""
    from rich.console import Console

    from fedtune.security.keyfiles import for_owner_alone
    from fedtune.signals import stoppable
    from server.attempts import resumable
    from server.guest import Guest
    from server.outside import told
    from server.settings import checked, checked_guest
    from server.supervisor import Server, serve

    if superlink:
        _require_guest(host, port, insecure or insecure_anywhere)
        given = checked_guest(job, folder, superlink, superlink_ca, superlink_secret, keys, out, set_ or [], wait, resume)
    else:
        given = checked(job, folder, host, port, keys, out, set_ or [], insecure, insecure_anywhere, wait, resume)
    if said_as_finished(given):
        return
    try:
        watched = told(given.folder, given.here, health, metrics, metrics_clients)
        with stoppable(), for_owner_alone(), watched as looked:
            serve(given, Console(), Guest if given.foreign else Server, looked)
    except KeyboardInterrupt as stopped:
        typer.echo(f"fedtune: stopped; logs in {given.folder / 'logs'}{resumable(given.run)}", err=True)
        raise typer.Exit(getattr(stopped, "exit_code", 130)) from stopped
    say_where(given.run)


def _require_guest(host: str, port: int, insecure: bool) -> None:
    from fedtune.errors import UserError

    if insecure:
        raise UserError("--superlink and --insecure were both given; a SuperLink of somebody else wants TLS and keys")
    if (host, port) != (EVERYWHERE, PORT):
        raise UserError("--superlink starts nothing that listens; leave --host and --port out")


def said_as_finished(given: Settings) -> bool:
    """Says where a run that was to go on lies, if it has all its rounds."""
    from server.attempts import is_finished

    if not (given.resume and is_finished(given.run, given.job.rounds.count)):
        return False
    typer.echo(f"the run in {given.run} has finished already")
    say_where(given.run)
    return True


def say_where(run: Path) -> None:
    """Writes the report of a finished run, and says where everything is and how to load it."""
    from server.report import loading_lines, write_report
    from server.report_folder import read_run

    report, found = write_report(run), read_run(run)
    typer.echo(f"report:  {report}\n{found.published + ':':<8} {run / found.published}, loaded with:\n")
    typer.echo(loading_lines(found, run))


def status(folder: Folder, json_: Json = False) -> None:
    """Say how a server or client stands: phase, round, loss, who is connected. Exit code 1 where nothing is alive."""
    from server.standing import Standing

    standing = Standing.read(folder)
    typer.echo(json.dumps(standing.as_json(), indent=1) if json_ else "\n".join(standing.lines()))
    if not standing.well:
        raise typer.Exit(1)


def stop(folder: Folder, json_: Json = False) -> None:
    """End a server or client and everything that it has started, and wait until it is gone."""
    from server.stopping import stop_in

    done = stop_in(folder)
    typer.echo(json.dumps(done.as_json()) if json_ else done.words)


def logs(
    folder: Folder,
    process: Annotated[str | None, typer.Argument(help="Such as superlink, serverapp, trainer; absent is all.")] = None,
    follow: Annotated[bool, typer.Option(help="Go on with what comes, until its server or client ends.")] = False,
    lines: Annotated[int, typer.Option(min=0, help="How many of the last lines of each.")] = 50,
    json_: Json = False,
) -> None:
    """Show what the processes of a server or client have written."""
    from server.loglines import logs_in, wanted_lines

    found = logs_in(folder, process)
    try:
        for name, line in wanted_lines(found, folder, lines, follow):
            typer.echo(json.dumps({"process": name, "line": line}) if json_ else line if process else f"{name}: {line}")
    except KeyboardInterrupt as stopped:
        raise typer.Exit(130) from stopped
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
