"""What the processes of the network half tell their supervisor, in small files of its folder.

link.json     the supernode: what the server answered last
answers.jsonl the relay: a line for each ask that was answered
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedtune.growing import Growing

LINK, ANSWERS = "link.json", "answers.jsonl"
LONGEST = 500  # characters of a word
LINE = 1 << 14  # bytes of one line, at most
LATEST = 1e12  # seconds, in 30 000 years
MOST = 1 << 20  # bytes of answers.jsonl, after which it begins anew


@dataclass(frozen=True)
class Link:
    """What the server answered to the node's last request. Times are seconds since the epoch; 0: not yet."""

    path: str = ""  # of the request, such as /v1/fleet/activate-node
    status: int = 0  # HTTP's; 0: no answer yet
    at: float = 0.0
    well: float = 0.0  # the last answer that was none of an error
    warned: float = 0.0  # the last warning of the SuperNode itself, such as of an attempt that failed

    def write(self, file: Path) -> None:
        """Atomic: who reads sees the old one or the new one."""
        temporary = file.with_name(f".{file.name}.writing")
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(temporary, file)

    @classmethod
    def read(cls, file: Path) -> Link | None:
        """None before the server has answered anything."""
        try:
            given = cls(**json.loads(file.read_text(encoding="utf-8")))
            times = (number(given.at), number(given.well), number(given.warned))
            return cls(str(plain(given.path)), int(number(given.status)), *times)
        except (OSError, ValueError, TypeError, RecursionError):
            return None


def plain(given: Any) -> Any:
    """A word of a message whose signature nobody has looked at yet, fit for a terminal: short, no control characters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(given)[:LONGEST])
    return given if given is None or isinstance(given, int) else text


def number(given: Any) -> float:
    """0 where it is none that a clock could show."""
    return float(given) if isinstance(given, int | float) and 0 <= given < LATEST else 0.0


class Answers:
    """Of the relay, as lines of JSON that the supervisor follows."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def tell(self, asked: Mapping[str, Any], seconds: float, failed: str = "") -> None:
        """`asked` is the header of the ask; only what a line for people needs is kept."""
        if self._file is None:
            return
        mode = "w" if self._file.exists() and self._file.stat().st_size > MOST else "a"
        line = {key: plain(asked.get(key)) for key in ("kind", "run", "round")}
        line |= {"seconds": round(seconds, 3), "failed": plain(failed)}
        with self._file.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Follow:
    """Reads the lines that were added to a file since the last look; what was there before the first is old.

    Who has taken the relay over writes what he likes, so a line that is none of ours is passed over.
    """

    def __init__(self, file: Path) -> None:
        self._lines = Growing(file, file.stat().st_size if file.exists() else 0, LINE)

    def new(self) -> Iterator[dict[str, Any]]:
        try:
            for line in self._lines.new():
                if told := understood(line):
                    yield told
        except OSError:
            return


def understood(line: bytes) -> dict[str, Any]:
    """What a line of the relay's says, fit for a terminal; nothing where it is none."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(given, dict):
        return {}
    told = {key: plain(given[key]) for key in ("kind", "run", "round", "failed") if key in given}
    return told | ({"seconds": number(given["seconds"])} if "seconds" in given else {})
