"""`fedtune doctor`: what would go wrong, before any GPU second. Exit code 0: nothing; 1: something must be mended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.errors import UserError
from server.commands import EVERYWHERE

if TYPE_CHECKING:
    from fedtune.checks import Look
    from fedtune.job import Job

STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def add_to(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    job: Annotated[str | None, typer.Argument(help="A job file, or the name of a scenario: more can be looked at.")] = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="Folder of the server, or of the client.")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="Coordinator: what `fedtune keys init` made; absent is keys in --dir.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Coordinator: absent is that of its address.")] = None,
    host: Annotated[str | None, typer.Option(help="Coordinator: IP address to listen on; absent is all.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Client: the folder that the coordinator handed over.")] = None,
    data: Annotated[str | None, typer.Option(help="Client: its data.")] = None,
    model: Annotated[str | None, typer.Option(help="Client: its base model.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Client: what it allows.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value for any key of the job.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Look at versions, keys, clocks, ports, disk, memory, model, data and policy of this side. Nothing trains."""
    from fedtune.checks import looked

    resolved = _job(job, set_ or [])
    if any((bundle, data, model, policy)):
        if keys or port or host:
            raise UserError(
                "--keys, --host and --port are the coordinator's, the other options a client's: give those of one side"
            )
        checks = _of_a_client(bundle, data, model, policy, resolved, folder)
    else:
        checks = _of_a_coordinator(folder, keys, resolved, port, host or EVERYWHERE)
    findings = list(looked(checks))
    if json_:
        typer.echo(json.dumps([finding.as_json() for finding in findings], indent=1))
    else:
        for finding in findings:
            typer.secho(str(finding), fg=STYLES[finding.result])
    if any(finding.result == "fail" for finding in findings):
        raise typer.Exit(1)


def _job(job: str | None, overrides: list[str]) -> Job | None:
    from fedtune.job import load_job
    from fedtune.paths import job_file

    return load_job(job_file(job), overrides) if job else None


def _of_a_client(
    bundle: Path | None, data: str | None, model: str | None, policy: Path | None, job: Job | None, folder: Path | None
) -> dict[str, Look]:
    from client.doctor import Examined

    return Examined(bundle, data, model, policy, job, folder).checks()


def _of_a_coordinator(folder: Path | None, keys: Path | None, job: Job | None, port: int | None, host: str) -> dict[str, Look]:
    from server.doctor import Examined

    if folder is None and keys is None:
        raise UserError("wanted --dir or --keys of a coordinator, or --bundle, --data and --model of a client")
    place = folder or Path.cwd()
    return Examined(place, keys or place / "keys", job, port, host).checks()
