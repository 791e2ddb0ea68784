"""`fedtune keys`: who is who in a federation. Made once, handed over once, renewed, revoked, listed.

Everything is a file below one folder, which `--keys` or FEDTUNE_KEYS names; each command says what to do next.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.security.certificates import SERVER_DAYS

if TYPE_CHECKING:
    from fedtune.security.coordinator_keys import CoordinatorKeys

keys_app = typer.Typer(
    no_args_is_help=True, suggest_commands=False, help="Make, hand over, renew, revoke and list keys and certificates."
)
rotate_app = typer.Typer(
    no_args_is_help=True, suggest_commands=False, help="Renew keys: of the server, of the coordinator's signature, of a client."
)
keys_app.add_typer(rotate_app, name="rotate")

Keys = Annotated[Path, typer.Option("--keys", envvar="FEDTUNE_KEYS", help="Folder of the coordinator's keys.")]
Days = Annotated[int, typer.Option("--days", min=1, max=3650, help="How long the server's certificate is valid.")]
Note = Annotated[str, typer.Option("--note", help="For your own list: whose machine, whom to call.")]
Name = Annotated[str, typer.Argument(help="Of the client: A-Z a-z 0-9 . _ -")]
HERE = Path("keys")


def add_to(app: typer.Typer) -> None:
    app.add_typer(keys_app, name="keys")


@keys_app.command()
def init(
    names: Annotated[list[str], typer.Argument(help="Names and IP addresses of the server, as clients will type them.")],
    address: Annotated[str, typer.Option(help="host:port that clients go to; absent is the first name and port 8000.")] = "",
    keys: Keys = HERE,
    days: Days = SERVER_DAYS,
) -> None:
    """Make the keys of a new coordinator: an authority, the server's certificate, keys to sign and to unseal with."""
    from fedtune.security.addresses import Address, host_name
    from fedtune.security.coordinator_keys import CoordinatorKeys

    made = CoordinatorKeys.init(keys, names, address or str(Address(host_name(names[0]), 8000)), days)
    typer.echo(f"keys of {made.address} are in {keys}; they stay on this machine, keep a copy of them offline")
    typer.echo(
        f"next: `fedtune keys client NAME --keys {keys}` for each client, then `fedtune server JOB --dir DIR --keys {keys}`"
    )


@keys_app.command()
def client(name: Name, keys: Keys = HERE, note: Note = "") -> None:
    """Make the keys of a client, register it, and write the bundle to hand over."""
    from fedtune.security.handover import make_bundle

    _hand_over(make_bundle(_load(keys), name, note=note))


@keys_app.command()
def request(
    name: Name,
    out: Annotated[Path, typer.Option(help="Folder for the client's keys (in NAME/) and the request.")] = Path(),
) -> None:
    """On a client: make its keys here, so that no private key ever travels, and a request for the coordinator."""
    from fedtune.security.request import make_request

    record, file = make_request(name, out)
    typer.echo(f"private keys are in {out / name} and stay here; {file} is public, fingerprint {record.fingerprint}")
    typer.echo(f"next: send {file.name} to the coordinator for `fedtune keys register {file.name}`, compare the fingerprint")


@keys_app.command()
def register(
    file: Annotated[Path, typer.Argument(help="NAME.request.toml, from `fedtune keys request` on the client.")],
    keys: Keys = HERE,
    note: Note = "",
    replace: Annotated[bool, typer.Option("--replace", help="New keys for a client that is registered.")] = False,
) -> None:
    """Register a client that made its own keys, and write the coordinator's half of its bundle."""
    from fedtune.security.request import register_request

    loaded = _load(keys)
    record = register_request(loaded, file, replace, note)
    typer.echo(f"{record.name} is registered, fingerprint {record.fingerprint}: is it the one that the client was shown?")
    typer.echo(f"next: send {loaded.bundle(record.name)} (nothing in it is private), to be copied over the client's own folder")


@keys_app.command()
def revoke(name: Name, keys: Keys = HERE) -> None:
    """Shut a client out, from now on."""
    from fedtune.security.coordinator_keys import CoordinatorKeys

    record = CoordinatorKeys.registry_in(keys).revoke(name)
    typer.echo(f"{name} is revoked since {record.revoked}; a running server shuts it out within seconds")


@keys_app.command(name="list")
def list_(
    keys: Keys = HERE,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the clients, and how long the certificates are valid."""
    import json as codec

    from rich.console import Console

    from server.keys_table import Listing, keys_table

    listing = Listing.of(keys)
    if json:
        typer.echo(codec.dumps(listing.as_json(), indent=1))
    else:
        console = Console()
        console.print(keys_table(listing, console.width))


@rotate_app.command()
def server(
    names: Annotated[list[str] | None, typer.Argument(help="All its names and addresses; absent is those it has.")] = None,
    address: Annotated[str, typer.Option(help="host:port, where clients go to another than before.")] = "",
    keys: Keys = HERE,
    days: Days = SERVER_DAYS,
) -> None:
    """A new certificate of the server, by the same authority: bundles stay as they are."""
    from fedtune.security.coordinator_keys import CoordinatorKeys

    before = CoordinatorKeys.public(keys)["address"]
    renewed = CoordinatorKeys.renew_certificate(keys, names or [], address, days)
    typer.echo("the server has a new certificate; next: start `fedtune server` again")
    if renewed.address != before:
        typer.echo(f"clients go to {renewed.address} now instead of {before}, so:")
        _send_client_files(renewed)


@rotate_app.command()
def signing(keys: Keys = HERE) -> None:
    """New keys to sign asks and unseal answers with: every client needs the public halves."""
    from fedtune.security.coordinator_keys import CoordinatorKeys

    renewed = CoordinatorKeys.renew_signing(keys)
    typer.echo("the coordinator has new signing and sealing keys; clients refuse its asks until they have the public halves")
    _send_client_files(renewed)
    typer.echo("then start `fedtune server` again")


@rotate_app.command(name="client")
def rotate_client(name: Name, keys: Keys = HERE, note: Note = "") -> None:
    """New keys of a client; its old ones, lost or stolen, are shut out. A revoked client is let in again."""
    from fedtune.security.handover import make_bundle

    loaded = _load(keys)
    if loaded.registry.client(name).revoked:
        typer.echo(f"{name} was revoked; with its new keys it is let in again")
    _hand_over(make_bundle(loaded, name, renew=True, note=note))


def _load(keys: Path) -> CoordinatorKeys:
    from fedtune.security.coordinator_keys import CoordinatorKeys

    return CoordinatorKeys.load(keys)


def _hand_over(bundle: Path) -> None:
    typer.echo(f"{bundle.name} is registered; its bundle with its private keys: {bundle}")
    typer.echo(f"next: copy it to the client by a private way (`scp -rp {bundle} {bundle.name}:`), then `rm -r {bundle}` here")


def _send_client_files(keys: CoordinatorKeys) -> None:
    from fedtune.security.handover import renew_client_files

    names = renew_client_files(keys)
    if names:
        typer.echo(f"next: send each client its new {keys.bundle('NAME') / 'client.toml'}: {', '.join(names)}")
    else:
        typer.echo("no client is registered, so nobody needs a new client.toml")
