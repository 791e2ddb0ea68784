"""What a client has worked for today, kept over restarts: its rounds, and the steps and seconds that each has used."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedtune.errors import UserError


@dataclass(frozen=True)
class Used:
    """By all asks of one round."""

    steps: int = 0
    seconds: float = 0.0


class Diary:
    """Of one day, by UTC; another day begins an empty page. Without a file it lasts as long as the process."""

    def __init__(self, file: Path | None) -> None:
        self._file, self._day, self._rounds = file, "", dict[str, Used]()
        if file and file.is_file():
            self._read(file)

    def rounds(self, now: datetime) -> int:
        """How many this day has had."""
        self._turn(now)
        return len(self._rounds)

    def knows(self, run: str, round: int, now: datetime) -> bool:
        self._turn(now)
        return _key(run, round) in self._rounds

    def used(self, run: str, round: int, now: datetime) -> Used:
        self._turn(now)
        return self._rounds.get(_key(run, round), Used())

    def note(self, run: str, round: int, used: Used, now: datetime) -> None:
        """On disk before anything else is done."""
        self._turn(now)
        self._rounds[_key(run, round)] = used
        if self._file:
            self._write(self._file)

    def _turn(self, now: datetime) -> None:
        day = now.astimezone(UTC).date().isoformat()
        if day != self._day:
            self._day, self._rounds = day, {}

    def _read(self, file: Path) -> None:
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            rounds = {str(key): Used(int(one["steps"]), float(one["seconds"])) for key, one in stored["rounds"].items()}
            self._day, self._rounds = str(stored["day"]), rounds
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} cannot be read ({type(error).__name__}: {error}); without it today's rounds are not known: delete "
                "it to count them from 0"
            ) from error

    def _write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        page = {"day": self._day, "rounds": {key: asdict(used) for key, used in self._rounds.items()}}
        with temporary.open("w", encoding="utf-8") as opened:
            json.dump(page, opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)


def _key(run: str, round: int) -> str:
    """Short, whatever a coordinator calls its run."""
    return f"{hashlib.sha256(run.encode(errors='replace')).hexdigest()[:16]}.{round}"
