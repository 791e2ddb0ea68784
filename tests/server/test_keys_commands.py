"""`fedtune keys` as it is typed: what it says, what it leaves, what Flower makes of its files."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from fedtune.errors import KeysError
from fedtune.security.certificates import days_left, names_in
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.handover import Bundle
from fedtune.security.keyfiles import public_text
from server.keys_commands import add_to
from server.keys_table import COLUMNS, Listing, keys_table

Type = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def type_(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """type_("keys client north"): what it prints. Its error is raised, as the command line's main would print it."""
    app = typer.Typer()
    app.callback()(lambda: None)
    add_to(app)
    monkeypatch.setenv("FEDTUNE_KEYS", str(folder))

    def run(line: str) -> str:
        result = CliRunner().invoke(app, line.split(), catch_exceptions=False)
        if result.exit_code:
            raise typer.BadParameter(result.output)
        return result.output

    return run


@pytest.fixture
def made(type_: Type, folder: Path) -> CoordinatorKeys:
    type_("keys init fl.example.org 10.0.0.5")
    return CoordinatorKeys.load(folder)


def drawn(listing: Listing) -> str:
    page = StringIO()
    Console(width=160, file=page).print(keys_table(listing))
    return page.getvalue()


def test_init_says_where_the_keys_are_and_what_comes_next(type_: Type, folder: Path) -> None:
    said = type_("keys init fl.example.org 10.0.0.5 --days 90")
    assert f"keys of fl.example.org:8000 are in {folder}" in said
    assert "next: `fedtune keys client NAME" in said
    certificate = (folder / "server.pem").read_bytes()
    assert names_in(certificate) == ["fl.example.org", "10.0.0.5", "localhost", "127.0.0.1", "::1"]
    assert days_left(certificate) == 89  # and some hours


@pytest.mark.parametrize(
    ("options", "address"),
    [("::1", "[::1]:8000"), ("a --address b.org:9", "b.org:9"), ("B.org", "b.org:8000")],
)
def test_where_clients_go(type_: Type, folder: Path, options: str, address: str) -> None:
    type_(f"keys init {options}")
    assert CoordinatorKeys.load(folder).address == address


def test_init_again_is_refused(type_: Type, made: CoordinatorKeys) -> None:
    with pytest.raises(KeysError, match="holds keys already"):
        type_("keys init fl.example.org")


def test_a_client_s_bundle_is_where_it_says(type_: Type, made: CoordinatorKeys) -> None:
    said = type_("keys client north --note Ann")
    bundle = made.bundle("north")
    assert f"next: copy it to the client by a private way (`scp -rp {bundle} north:`), then `rm -r {bundle}` here" in said
    assert Bundle.load(bundle, "both").name == "north"
    assert made.registry.client("north").note == "Ann"


def test_a_client_with_keys_of_its_own(type_: Type, made: CoordinatorKeys, tmp_path: Path) -> None:
    asked = type_(f"keys request north --out {tmp_path / 'client'}")
    registered = type_(f"keys register {tmp_path / 'client' / 'north.request.toml'}")
    fingerprint = made.registry.client("north").fingerprint
    assert fingerprint in asked
    assert fingerprint in registered
    shutil.copytree(made.bundle("north"), tmp_path / "client" / "north", dirs_exist_ok=True)
    assert Bundle.load(tmp_path / "client" / "north", "both").name == "north"


def test_revoked_and_let_in_again(type_: Type, made: CoordinatorKeys) -> None:
    type_("keys client north")
    before = made.registry.client("north")
    assert "north is revoked since" in type_("keys revoke north")
    assert made.registry.client("north").revoked
    assert "north was revoked; with its new keys it is let in again" in type_("keys rotate client north")
    after = made.registry.client("north")
    assert not after.revoked
    assert after.node != before.node
    assert "let in again" not in type_("keys rotate client north")


def test_rotated_signing_keys_name_the_clients_that_need_them(type_: Type, made: CoordinatorKeys) -> None:
    assert "no client is registered" in type_("keys rotate signing")
    for name in ("north", "south", "west"):
        type_(f"keys client {name}")
    type_("keys revoke west")
    said = type_("keys rotate signing")
    assert f"send each client its new {made.bundle('NAME') / 'client.toml'}: north, south\n" in said
    renewed = CoordinatorKeys.load(made.folder)
    assert public_text(Bundle.load(made.bundle("north"), "both").verify) == renewed.verify != made.verify


def test_a_rotated_certificate_leaves_the_bundles_alone_unless_the_address_is_new(type_: Type, made: CoordinatorKeys) -> None:
    type_("keys client north")
    before = (made.bundle("north") / "client.toml").read_bytes()
    assert type_("keys rotate server") == "the server has a new certificate; next: start `fedtune server` again\n"
    assert (made.bundle("north") / "client.toml").read_bytes() == before
    said = type_("keys rotate server --address new.example.org:9000")
    assert "clients go to new.example.org:9000 now instead of fl.example.org:8000" in said
    assert Bundle.load(made.bundle("north"), "both").server == "new.example.org:9000"
    assert names_in(made.tls()[1].read_bytes())[:2] == ["new.example.org", "fl.example.org"]


def test_the_list_for_programs(type_: Type, made: CoordinatorKeys) -> None:
    type_("keys client north --note Ann")
    type_("keys client south")
    type_("keys revoke south")
    shutil.rmtree(made.bundle("south"))
    told = json.loads(type_("keys list --json"))
    north, south = made.registry.clients().values()
    assert told["address"] == "fl.example.org:8000"
    assert told["clients"] == [
        {
            "name": "north",
            "registered": north.registered,
            "revoked": None,
            "note": "Ann",
            "fingerprint": north.fingerprint,
            "private_keys_here": True,
        },
        {
            "name": "south",
            "registered": south.registered,
            "revoked": south.revoked,
            "note": "",
            "fingerprint": south.fingerprint,
            "private_keys_here": False,
        },
    ]
    assert {name: date["days_left"] for name, date in told["certificates"].items()} == {"authority": 3649, "server": 396}


@pytest.mark.parametrize(
    ("width", "columns"),
    [(40, ["client", "fingerprint"]), (60, ["client", "registered", "revoked", "fingerprint"]), (100, [*COLUMNS])],
)
def test_a_narrow_list_has_the_whole_fingerprint(width: int, columns: list[str], type_: Type, made: CoordinatorKeys) -> None:
    type_("keys client north --note Ann")
    type_("keys client south")
    type_("keys revoke south")
    page = StringIO()
    Console(width=width, file=page).print(keys_table(Listing.of(made.folder), width))
    head = next(line for line in page.getvalue().splitlines() if "fingerprint" in line)
    assert re.findall(r"\w+", head) == columns
    assert made.registry.client("north").fingerprint in page.getvalue()
    assert ("(revoked)" in page.getvalue()) is (width == 40)


def test_the_list_for_the_eye(type_: Type, made: CoordinatorKeys) -> None:
    assert "no client yet; `fedtune keys client NAME` makes one" in type_("keys list")
    type_("keys client north --note [red]Ann")
    text = drawn(Listing.of(made.folder))
    assert "[red]Ann" in text  # a note is no markup
    assert f"private keys of clients still lie in {made.folder / 'bundles'}: north" in text


@pytest.mark.parametrize(
    ("days", "words"),
    [(10, "days left\n"), (396 - 30, "30 days left\n"), (396 - 29, "29 days left; type `fedtune keys rotate")],
)
def test_a_certificate_warns_in_its_last_month(made: CoordinatorKeys, days: int, words: str) -> None:
    listing = Listing.of(made.folder, datetime.now(UTC) + timedelta(days=days))
    assert words in drawn(listing)


def test_an_expired_certificate_says_so(made: CoordinatorKeys) -> None:
    text = drawn(Listing.of(made.folder, datetime.now(UTC) + timedelta(days=400)))
    assert "expired on" in text
    assert "type `fedtune keys rotate server`" in text


def test_the_list_reads_no_private_key(type_: Type, made: CoordinatorKeys) -> None:
    for name in ("ca.key", "server.key", "signing.key", "sealing.key"):
        (made.folder / name).unlink()
    assert "server (fl.example.org" in type_("keys list")


@pytest.mark.parametrize("line", ["client north", "revoke north", "list", "rotate signing", "rotate server", "rotate client n"])
def test_without_keys_each_command_says_how_to_make_them(type_: Type, line: str) -> None:
    with pytest.raises(KeysError, match="wanted the folder of `fedtune keys init`"):
        type_(f"keys {line}")


def test_flower_reads_the_node_key_and_registers_the_same_public_key(type_: Type, made: CoordinatorKeys) -> None:
    """As `flower-supernode --auth-supernode-private-key` and `flwr supernode register` do."""
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    type_("keys client north")
    bundle = Bundle.load(made.bundle("north"), "network")
    given = argparse.Namespace(auth_supernode_private_key=str(bundle.node_key), auth_supernode_public_key=None)
    pair = _try_setup_client_authentication(given)
    assert pair
    registered = made.registry.client("north").node_pem()
    assert public_key_to_bytes(pair[1]) == registered == try_load_public_key(made.bundle("north") / "network" / "node.pub")
    assert bytes_to_public_key(registered) == pair[0].public_key()


def test_flower_reads_certificates_and_the_authority(type_: Type, made: CoordinatorKeys) -> None:
    """As `flower-superlink --ssl-…` and `flower-supernode --root-certificates` do."""
    from flwr.common.args import try_obtain_root_certificates, try_obtain_server_certificates

    type_("keys client north")
    ca, certificate, key = made.tls()
    served = argparse.Namespace(ssl_ca_certfile=str(ca), ssl_certfile=str(certificate), ssl_keyfile=str(key))
    assert try_obtain_server_certificates(served) == (ca.read_bytes(), certificate.read_bytes(), key.read_bytes())
    bundle = Bundle.load(made.bundle("north"), "network")
    asked = argparse.Namespace(insecure=False, root_certificates=str(bundle.ca))
    assert try_obtain_root_certificates(asked, bundle.server) == ca.read_bytes()
