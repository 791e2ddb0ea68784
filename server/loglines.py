"""The logs of a server's or client's processes as lines of text: the last ones, and those that come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedtune.daemon import State, closed
from fedtune.errors import UserError, nearest
from fedtune.growing import Growing
from fedtune.logs import as_text
from fedtune.processes import tail

POLL = 0.3  # seconds
LONGEST = 400  # bytes that one line is reckoned with at first, to find the last ones of a large file


def logs_in(folder: Path, process: str | None) -> dict[str, Path]:
    """Process -> its log; of one alone where it is named."""
    try:
        found = {file.stem: file for file in sorted((folder / "logs").iterdir()) if file.suffix == ".log"}
    except PermissionError as error:
        raise closed(folder) from error
    except OSError:
        found = {}
    if not found:
        raise UserError(f"{folder} holds no logs; wanted the --dir of a `fedtune server` or `fedtune client`")
    if process is None:
        return found
    if process not in found:
        raise UserError(f"{folder} holds no log of '{process}'{nearest(process, found)}; there are: {', '.join(found)}")
    return {process: found[process]}


def wanted_lines(logs: dict[str, Path], folder: Path, last: int, follow: bool) -> Iterator[tuple[str, str]]:
    """Process and line: the last ones of each; then, where they are followed, those that come while `folder` is alive."""
    for name, log in logs.items():
        for line in last_lines(log, last):
            yield name, line
    if follow:
        yield from coming_lines(logs, lambda: State.read(folder).alive)


def last_lines(log: Path, count: int) -> list[str]:
    """Of a log that may not exist. A line of JSON counts as one, also where it is shown in several."""
    size = log.stat().st_size if log.is_file() else 0
    reach, lines = LONGEST * (count + 1), list[str]()
    while count and len(lines) < count:
        lines = tail(log, reach).removesuffix("\n").split("\n")[1 if reach < size else 0 :]
        if reach >= size:
            break
        reach *= 4
    return [shown for line in lines[-count:] for shown in shown_lines(line)] if count and size else []


def shown_lines(line: str) -> list[str]:
    """What continues a line stands below it and further in, so that it is not taken for another."""
    first, *others = as_text(line).split("\n")
    return [first, *(f"    {other}" for other in others)]


def coming_lines(logs: dict[str, Path], alive: Callable[[], bool]) -> Iterator[tuple[str, str]]:
    """Process and line, as they are written, until nothing is alive that would write."""
    growing = {name: Growing(log, log.stat().st_size) for name, log in logs.items()}
    going = True
    while going:
        going = alive()  # looked at first, so that its last words are read
        for name, log in growing.items():
            for line in log.new():
                for shown in shown_lines(line.decode(errors="replace").rstrip("\n")):
                    yield name, shown
        if going:
            time.sleep(POLL)
