"""Where each client's rows are: a package of the standard library, a file, a datasets folder, or a part of one.

Where the job says so (`data.partition`), new clients stand in their place, who share what all of these have.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from client.data import readers, stdlib
from client.data.partition import Pool
from fedtune.errors import DataError, JobError, nearest
from fedtune.job import Clients, Data

BUILTIN = "builtin:"


@dataclass(frozen=True)
class Source:
    """One client and where its rows are."""

    name: str
    path: Path
    kind: Literal["stdlib", "file", "folder", "part"] = "file"
    column: str | None = None  # where one file holds many clients: the rows whose `column` is `name`
    pool: Pool | None = None  # of which a new client gets its part


def clients_in(data: Data, clients: Clients) -> dict[str, Source]:
    """The clients that the job asks for, sorted by name; those of `builtin:stdlib` in the order of its list.

    Raises DataError where nothing is found, or not what was asked for, and JobError for a partition without a count.
    """
    if data.path.startswith(BUILTIN):
        _without_column(data, "the standard library, whose clients are its packages")
        found = _builtin(data.path.removeprefix(BUILTIN))
    else:
        found = _on_disk(data)
    by_name = {source.name: source for source in found}
    if data.partition == "natural":
        return _chosen(by_name, data, clients)
    return _new(_chosen(by_name, data, clients.model_copy(update={"count": None})), data, clients.count)


def in_the_data(sources: Mapping[str, Source]) -> Collection[Source]:
    """The clients themselves, or those whose data the new clients share."""
    pool = next(iter(sources.values())).pool
    return pool.sources if pool else sources.values()


def rows_of(source: Source) -> list[readers.Row]:
    """All rows of one client. Raises DataError where there is none or one cannot be read."""
    if source.kind == "stdlib":
        return stdlib.read_package(source.path)
    if source.column is not None:
        return readers.rows_by_client(source.path, source.column)[source.name]
    return readers.read(source.path)


def _builtin(name: str) -> list[Source]:
    library, slash, package = name.partition("/")
    if library != "stdlib":
        raise DataError(f"data.path = '{BUILTIN}{name}' is unknown; the one built-in data set is '{BUILTIN}stdlib'")
    found = stdlib.packages()
    if slash and package not in found:
        raise DataError(
            f"data.path = '{BUILTIN}{name}': there is no client '{package}'{nearest(package, found)}; known: {', '.join(found)}"
        )
    return [Source(name, path, "stdlib") for name, path in found.items() if not slash or name == package]


def _on_disk(data: Data) -> list[Source]:
    path = Path(data.path).expanduser()
    if not path.exists():
        raise DataError(
            f"data.path = '{data.path}' does not exist; wanted a folder with a file per client, one file, or {BUILTIN}stdlib"
        )
    if path.is_file() or readers.is_datasets_folder(path):
        return _in_one(path, data.client_column)
    _without_column(data, f"a folder, {data.path}, where each file is a client")
    return _in_folder(path)


def _in_one(path: Path, column: str | None) -> list[Source]:
    kind: Literal["file", "folder"] = "file" if path.is_file() else "folder"
    if path.is_file() and path.suffix not in readers.SUFFIXES:
        raise DataError(f"{path}: '{path.suffix}' files cannot be read; wanted one of {', '.join(readers.SUFFIXES)}")
    if column is None:
        return [Source(path.stem if kind == "file" else path.name, path, kind)]
    return [Source(name, path, kind, column) for name in sorted(readers.rows_by_client(path, column))]


def _in_folder(folder: Path) -> list[Source]:
    found: dict[str, Source] = {}
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if not (path.is_file() and path.suffix in readers.SUFFIXES) and not readers.is_datasets_folder(path):
            continue
        [source] = _in_one(path, None)
        if source.name in found:
            raise DataError(f"two files for the client '{source.name}': {found[source.name].path} and {path}; rename one")
        found[source.name] = source
    if not found:
        raise DataError(
            f"the folder {folder} holds no data; wanted one file per client ({', '.join(readers.SUFFIXES)}) "
            f"or one `datasets` folder (save_to_disk) per client"
        )
    return [found[name] for name in sorted(found)]


def _chosen(found: dict[str, Source], data: Data, clients: Clients) -> dict[str, Source]:
    for name in clients.names or ():
        if name not in found:
            raise DataError(
                f"clients.names: there is no client '{name}' in {data.path}{nearest(name, found)}; found: {_some(found)}"
            )
    names = [name for name in found if clients.names is None or name in clients.names]
    if not names:
        raise DataError(f"clients.names is empty; name some of: {_some(found)}, or leave it out for all")
    if clients.count is not None and clients.count > len(names):
        raise DataError(
            f"clients.count = {clients.count}, but there are {len(names)} clients ({_some(names)}) in {data.path}; "
            f"type --set clients.count={len(names)}, or add data"
        )
    return {name: found[name] for name in names[: clients.count]}


def _new(pooled: Mapping[str, Source], data: Data, count: int | None) -> dict[str, Source]:
    if count is None:
        raise JobError(
            f"data.partition = '{data.partition}' makes new clients, and clients.count does not say how many; "
            f"type --set clients.count={len(pooled)}"
        )
    pool = Pool(tuple(pooled.values()), count)
    return {name: Source(name, Path(data.path), "part", pool=pool) for name in pool.clients}


def _without_column(data: Data, what: str) -> None:
    if data.client_column is not None:
        raise DataError(
            f"data.client_column = '{data.client_column}' is for one file that holds many clients, "
            f"and data.path is {what}; leave data.client_column out"
        )


def _some(names: dict[str, Source] | list[str]) -> str:
    """At most ten of the names."""
    return ", ".join(list(names)[:10]) + (", …" if len(names) > 10 else "")
