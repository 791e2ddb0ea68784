"""`fedtune client`: one node of a coordinator's jobs, until it is stopped.

Exit codes: 0 stopped with SIGTERM, 1 what was not foreseen, 2 something that the user must mend, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import signal
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Half(StrEnum):
    trainer = "trainer"
    network = "network"


def add_to(app: typer.Typer) -> None:
    app.command()(client)


def client(
    folder: Annotated[Path, typer.Option("--dir", help="Its folder: state, logs, what it keeps between rounds.")],
    bundle: Annotated[Path | None, typer.Option(help="What the coordinator's operator made: fedtune keys client NAME.")] = None,
    data: Annotated[str | None, typer.Option(help="Its data, in place of the job's.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder of the base model, in place of the job's.")] = None,
    server: Annotated[str, typer.Option(help="host:port, in place of the bundle's.")] = "",
    policy: Annotated[Path | None, typer.Option(help="TOML file of what this client allows.")] = None,
    only: Annotated[Half | None, typer.Option(help="One half alone, under a user of its own.")] = None,
    socket: Annotated[Path | None, typer.Option(help="Where the halves meet; absent is trainer.sock in --dir.")] = None,
    relay_user: Annotated[str | None, typer.Option(help="User of the other half, where it has its own.")] = None,
    layers: Annotated[str | None, typer.Option(help="How many this node trains, or all.")] = None,
    memory: Annotated[str | None, typer.Option(help="That a training step may take, such as 2GB.")] = None,
    seconds: Annotated[float | None, typer.Option(help="That a training step may take.")] = None,
    budget: Annotated[float | None, typer.Option(help="What this node can afford; 1 is usual.")] = None,
    name: Annotated[str, typer.Option(help="Its name, where there is no bundle.")] = "",
    insecure: Annotated[bool, typer.Option(help="No TLS, no keys: to a server on this machine only.")] = False,
    insecure_anywhere: Annotated[bool, typer.Option(help="The same to any address: who is on the way reads it all.")] = False,
) -> None:
    """Take part in a coordinator's jobs with the data of this machine, until stopped."""
    from client.settings import checked
    from client.supervisor import serve
    from fedtune.security.keyfiles import for_owner_alone
    from fedtune.signals import until_stopped

    trainer = {"data": data, "model": model, "policy": policy, "relay_user": relay_user, "layers": layers, "memory": memory}
    part = only.value if only else None
    options = {**trainer, "seconds": seconds, "budget": budget}
    given = checked(folder, bundle, server, name, part, socket, insecure, insecure_anywhere, **options)
    if given.without:
        say(given.without)
    with until_stopped() as stop, for_owner_alone():
        serve(given, say, stop.event)
    say("stopped")
    if stop.number == signal.SIGINT:
        raise typer.Exit(130)


def say(words: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')} {words}")
