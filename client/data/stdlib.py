"""The default data: the Python standard library on the user's own machine. A client is one of its packages.

It is real text, needs no download, and differs from client to client as the code bases of separate teams do.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

from fedtune.errors import DataError

# In this order, not the alphabet's: `clients.count = 8` takes the first eight, which are the largest that differ most.
# Each is a package of text in every Python from 3.11 to 3.14.
PACKAGES = (
    *("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml"),
    *("concurrent", "ctypes", "html", "json", "urllib", "wsgiref", "xmlrpc"),
)
LEFT_OUT = {"test", "tests", "__pycache__", "_bundled"}
SHORTEST = 200  # characters; shorter files are licence lines and empty packages


def packages() -> dict[str, Path]:
    """The folder of each client. Raises DataError where this Python has no sources."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = {name: library / name for name in PACKAGES if (library / name / "__init__.py").is_file()}
    if not found:
        raise DataError(
            f"data.path = 'builtin:stdlib' reads the sources of Python's standard library, and {library} has none: "
            f"this Python was installed without them. Use another Python, or your own text: --set data.path=FOLDER"
        )
    return found


def read_package(folder: Path) -> list[dict[str, Any]]:
    """A row for each source file below the package: its text, and its path relative to the package."""
    rows = []
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        file = path.relative_to(folder)
        text = "" if LEFT_OUT & set(file.parts) else path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= SHORTEST:
            rows.append({"text": text, "file": file.as_posix()})
    if not rows:
        raise DataError(f"{folder} holds no Python source; choose another client than '{folder.name}' with clients.names")
    return rows


def held_out_files(sizes: dict[str, int], share: float) -> set[str]:
    """Files that together hold about `share` of all bytes: at least one of them, never all.

    They depend on the names and sizes only, so that a run with another seed is measured on the same files. A walk goes
    through the files in the order of their hashes and takes each that brings the sum nearer to the wanted one; of the
    walks that begin at each file the nearest wins.
    """
    if share == 0 or len(sizes) < 2:
        return set()
    order = sorted(sizes, key=lambda file: hashlib.sha256(file.encode()).hexdigest())
    wanted = share * sum(sizes.values())
    walks = [_walk(order[start:] + order[:start], sizes, wanted) for start in range(len(order))]
    return min(walks, key=lambda files: abs(sum(sizes[file] for file in files) - wanted))


def _walk(order: list[str], sizes: dict[str, int], wanted: float) -> set[str]:
    files = {order[0]}
    total = sizes[order[0]]
    for file in order[1:]:
        if abs(total + sizes[file] - wanted) < abs(total - wanted) and len(files) + 1 < len(order):
            files.add(file)
            total += sizes[file]
    return files
