"""What a client has worked for today, kept over restarts: its rounds, and the steps and seconds that each ask has used."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.errors import MALFORMED, UserError


@dataclass(frozen=True)
class Used:
    """By one ask, or by several; one that came again under the same name has used what it used at most."""

    steps: int = 0
    seconds: float = 0.0
    times: int = 0  # that it came


Page = dict[str, dict[str, Used]]  # round -> ask -> what it has used


class Diary:
    """Of one day, by UTC; another day begins an empty page. Without a file it lasts as long as the process."""

    def __init__(self, file: Path | None) -> None:
        self._file, self._day, self._rounds = file, "", Page()
        if file and file.is_file():
            self._read(file)

    def rounds(self, now: datetime) -> int:
        """How many this day has had."""
        self._turn(now)
        return len(self._rounds)

    def knows(self, run: str, round: int, now: datetime) -> bool:
        self._turn(now)
        return _key(run, round) in self._rounds

    def asks(self, run: str, round: int, now: datetime) -> int:
        """How many different ones the round has had."""
        return len(self._round(run, round, now))

    def used(self, run: str, round: int, ask: str, now: datetime) -> Used:
        return self._round(run, round, now).get(_short(ask), Used())

    def others(self, run: str, round: int, ask: str, now: datetime) -> Used:
        """What all asks of the round but this one have used."""
        found = [used for key, used in self._round(run, round, now).items() if key != _short(ask)]
        return Used(sum(used.steps for used in found), sum(used.seconds for used in found))

    def note(self, run: str, round: int, ask: str, used: Used, now: datetime) -> None:
        """On disk before anything else is done."""
        self._turn(now)
        self._rounds.setdefault(_key(run, round), {})[_short(ask)] = used
        if self._file:
            self._write(self._file)

    def _round(self, run: str, round: int, now: datetime) -> dict[str, Used]:
        self._turn(now)
        return self._rounds.get(_key(run, round), {})

    def _turn(self, now: datetime) -> None:
        day = now.astimezone(UTC).date().isoformat()
        if day != self._day:
            self._day, self._rounds = day, {}

    def _read(self, file: Path) -> None:
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            rounds = {key: {ask: _used(one) for ask, one in asks.items()} for key, asks in stored["rounds"].items()}
            self._day, self._rounds = str(stored["day"]), rounds
        except (OSError, *MALFORMED) as error:
            raise UserError(
                f"{file} cannot be read ({type(error).__name__}: {error}); without it today's rounds are not known: delete "
                "it to count them from 0"
            ) from error

    def _write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        rounds = {key: {ask: asdict(used) for ask, used in asks.items()} for key, asks in self._rounds.items()}
        with temporary.open("w", encoding="utf-8") as opened:
            json.dump({"day": self._day, "rounds": rounds}, opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)


def _used(stored: Any) -> Used:
    return Used(int(stored["steps"]), float(stored["seconds"]), int(stored["times"]))


def _key(run: str, round: int) -> str:
    return f"{_short(run)}.{round}"


def _short(name: str) -> str:
    """Whatever a coordinator calls its runs and asks."""
    return hashlib.sha256(name.encode(errors="replace")).hexdigest()[:16]
