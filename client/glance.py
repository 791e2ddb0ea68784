"""A glance at what `fedtune client` was given as --data and --model: what cannot be used is said before anything starts.

Cheap, and without torch: the first row of the data, and whether the model's folder is one. The rest is the trainer's to say.
"""

from __future__ import annotations

from pathlib import Path

from client.data.formats import require_format
from client.data.readers import SUFFIXES, first_row, is_datasets_folder
from fedtune.errors import DataError, ModelError

READ_WHOLE = (".json", ".parquet")  # there is no first row without the others
MOST = 64 << 20  # bytes of such a file, above which it is left to the trainer


def glance_at_data(path: Path, client: str) -> None:
    """Raises DataError where there is no row, or the first one of the client is in no format."""
    if is_datasets_folder(path):  # whole where it is there at all; to read it takes seconds
        return
    if path.is_dir() and any(is_datasets_folder(below) for below in path.iterdir()):
        return
    file = _own_file(path, client) if path.is_dir() else path
    if file.suffix not in SUFFIXES:
        raise DataError(f"--data {path}: '{file.suffix}' files cannot be read; wanted one of {', '.join(SUFFIXES)}")
    if file.suffix not in READ_WHOLE or file.stat().st_size <= MOST:
        require_format(first_row(file), f"--data {file}, row 1")


def _own_file(folder: Path, client: str) -> Path:
    """The client's own, or the first of them."""
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))
    if not found:
        raise DataError(f"--data {folder} is a folder without data; wanted a file of one of {', '.join(SUFFIXES)} in it")
    return next((path for path in found if path.stem == client), found[0])


def glance_at_model(folder: Path) -> None:
    """Raises ModelError."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"--model {folder} holds no config.json; wanted a folder written by save_pretrained")
