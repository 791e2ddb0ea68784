"""What `fedtune keys list` shows: the clients and the dates of the certificates, for the eye and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedtune.security.certificates import days_left, expires, names_in
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.security.keyfiles import read_public
from fedtune.security.registry import ClientRecord

WIDE = 100  # columns of a terminal
COLUMNS = {"client": 0, "registered": 60, "revoked": 60, "fingerprint": 0, "note": WIDE}  # shown from this width on
SOON = 30  # days: warn from here on
RENEWAL = {"authority": "`fedtune keys init` in a new folder, and new bundles", "server": "`fedtune keys rotate server`"}


@dataclass(frozen=True)
class Dates:
    """Of one certificate."""

    expires: datetime
    days_left: int
    names: list[str]

    @classmethod
    def of(cls, file: Path, now: datetime) -> Dates:
        pem = read_public(file)
        return cls(expires(pem), days_left(pem, now), names_in(pem))


@dataclass(frozen=True)
class Listing:
    folder: Path
    address: str
    clients: Mapping[str, ClientRecord]
    certificates: Mapping[str, Dates]
    here: frozenset[str]  # clients whose private keys still lie in bundles/

    @classmethod
    def of(cls, folder: Path, now: datetime | None = None) -> Listing:
        """Public files only: a list can be had while a private one is missing."""
        now = now or datetime.now(UTC)
        address, clients = CoordinatorKeys.public(folder)["address"], CoordinatorKeys.registry_in(folder).clients()
        files = {"authority": folder / "ca.pem", "server": folder / "server.pem"}
        here = {name for name in clients if (folder / "bundles" / name / "trainer" / "client.key").exists()}
        dates = {name: Dates.of(file, now) for name, file in files.items()}
        return cls(folder, address, clients, dates, frozenset(here))

    def as_json(self) -> dict[str, Any]:
        clients = [
            {
                "name": record.name,
                "registered": record.registered,
                "revoked": record.revoked or None,
                "note": record.note,
                "fingerprint": record.fingerprint,
                "private_keys_here": record.name in self.here,
            }
            for record in self.clients.values()
        ]
        dates = {
            name: {"expires": date.expires.isoformat(), "days_left": date.days_left, "names": date.names}
            for name, date in self.certificates.items()
        }
        return {"folder": str(self.folder), "address": self.address, "clients": clients, "certificates": dates}


def keys_table(listing: Listing, width: int = WIDE) -> RenderableType:
    """In a narrow terminal without the notes, then without the dates; the fingerprint, to compare, is always whole."""
    parts: list[RenderableType] = [_clients(listing, width), *(_line(*item) for item in listing.certificates.items())]
    if listing.here:
        still = ", ".join(sorted(listing.here))
        parts.append(
            Text(f"private keys of clients still lie in {listing.folder / 'bundles'}: {still}; hand over, then delete")
        )
    return Group(*parts)


def _clients(listing: Listing, width: int) -> RenderableType:
    if not listing.clients:
        return Text(f"{listing.address}: no client yet; `fedtune keys client NAME` makes one")
    table = Table(title=f"clients of {listing.address}", title_justify="left")
    shown = [name for name, least in COLUMNS.items() if width >= least]
    for column in shown:
        table.add_column(column, overflow="fold", no_wrap=column == "fingerprint")
    for record in listing.clients.values():
        cells = _cells(record, dated="revoked" in shown)
        table.add_row(*(Text(cells[column]) for column in shown), style="dim" if record.revoked else "")
    return table


def _cells(record: ClientRecord, dated: bool) -> dict[str, str]:
    return {
        "client": record.name if dated or not record.revoked else f"{record.name} (revoked)",
        "registered": _day(record.registered),
        "revoked": _day(record.revoked),
        "fingerprint": record.fingerprint,
        "note": record.note,
    }


def _day(moment: str) -> str:
    return moment.partition("T")[0]


def _line(name: str, date: Dates) -> Text:
    what = {"authority": "authority", "server": f"server ({', '.join(date.names)})"}[name]
    when = f"{date.expires:%Y-%m-%d}"
    if date.days_left < 0:
        return Text(f"{what}: expired on {when}; type {RENEWAL[name]}", style="bold red")
    line = f"{what}: valid until {when}, {date.days_left} days left"
    return Text(f"{line}; type {RENEWAL[name]}", style="yellow") if date.days_left < SOON else Text(line)
