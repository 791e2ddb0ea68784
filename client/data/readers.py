"""Rows of a file or a `datasets` folder. Every fault of the data is a DataError that names the file and the place."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from client.allowance import columns, shown_names
from fedtune.errors import DataError

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """All rows, at least one, with the columns that may be read here. Raises DataError."""
    rows = list(_rows(path))
    if not rows:
        raise _empty(path)
    return rows


def first_row(path: Path) -> Row:
    """Of a file, without the others where its kind lets one. Raises DataError."""
    for row in _rows(path):
        return row
    raise _empty(path)


def _rows(path: Path) -> Iterator[Row]:
    reader = _datasets_folder if path.is_dir() else READERS[path.suffix]
    try:
        for row in reader(path):
            yield _allowed(row, columns())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _empty(path: Path) -> DataError:
    return DataError(f"{path} is empty; wanted at least one row")


def rows_by_client(path: Path, column: str) -> dict[str, list[Row]]:
    """The rows of each client in one file that holds many. The last file stays in memory: every client asks for it."""
    stat = path.stat()
    allowed = columns()
    return _rows_by_client(path, column, stat.st_mtime_ns, stat.st_size, None if allowed is None else tuple(allowed))


def is_datasets_folder(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` made this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


@lru_cache(maxsize=1)
def _rows_by_client(path: Path, column: str, changed: int, size: int, allowed: tuple[str, ...] | None) -> dict[str, list[Row]]:
    clients: dict[str, list[Row]] = {}
    for number, row in enumerate(read(path), 1):
        if row.get(column) in (None, ""):
            raise DataError(
                f"{path}, row {number}: no client in the column '{column}' (data.client_column); columns: {shown_names(row)}"
            )
        clients.setdefault(str(row[column]), []).append(row)
    return clients


def _allowed(row: Row, allowed: Collection[str] | None) -> Row:
    return row if allowed is None else {name: value for name, value in row.items() if name in allowed}


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(path, number, line)


def _object(path: Path, number: int, line: str) -> Row:
    wanted = 'wanted one JSON object per line, such as {"text": "…"}'
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); {wanted}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: a {type(row).__name__}; {wanted}")
    return row


def _json(path: Path) -> Iterator[Row]:
    """A JSON array of objects, or JSON lines under another name."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: a {type(row).__name__}; wanted an object")
        yield row


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of more than 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, line {reader.line_num}: not the {len(reader.fieldnames or ())} fields of the first line "
                        f"({shown_names(reader.fieldnames or ())}); put a text with commas or line breaks in double quotes"
                    )
                yield row
        except csv.Error as error:
            raise DataError(f"{path}: the row that begins on line {reader.line_num + 1} is not CSV ({error})") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet  # large, and few need it

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not Parquet: {error}") from error


def _datasets_folder(path: Path) -> Iterator[Row]:
    import pyarrow
    from datasets import Dataset, load_from_disk  # takes a second, and few jobs need it

    try:
        found = load_from_disk(str(path))
    except (ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a whole `datasets` folder: {error}; save it again with save_to_disk") from error
    if not isinstance(found, Dataset):
        raise DataError(
            f"{path} holds the splits {', '.join(found)}; name one, such as data.path = '{path / next(iter(found))}'"
        )
    yield from found.to_list()


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
SUFFIXES = tuple(READERS)
