"""Faults of files: a run is killed, something of it on the disk is damaged, and it is taken up again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from client.kept import HOME, SHARED
from server.run_folder import JOURNAL
from simulations.engine import MEMORY
from simulations.faults_kills import Trial
from simulations.faults_lives import Prepare, Simulated, killed_at_line
from simulations.faults_seen import Seen

Damage = Callable[[Path, random.Random], None]
NOWHERE_ELSE = "memory of a client, which nobody else has"
SLOTS = 3  # moments of the kill, for each file and damage


def flipped(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    replaced(file, bytes(data))


def cut_short(file: Path, chance: random.Random) -> None:
    data = file.read_bytes()
    replaced(file, data[: chance.randrange(len(data))])


def removed(file: Path, chance: random.Random) -> None:
    file.unlink()


def replaced(file: Path, data: bytes) -> None:
    """Another file: of one that several clients share as links, only this client's is damaged."""
    file.unlink()
    file.write_bytes(data)


DAMAGES: dict[str, Damage] = {"a bit flipped": flipped, "cut short": cut_short, "removed": removed}


def spooled(run: Path) -> list[Path]:
    return sorted((run / "spool").rglob("*.answer"))


def journal(run: Path) -> list[Path]:
    return [run / JOURNAL]


def newest_checkpoint(run: Path) -> list[Path]:
    """Where there is an older one to go back to."""
    folders = sorted(path for path in (run / "state").glob("[0-9]*") if path.is_dir())
    return sorted(folders[-1].iterdir()) if len(folders) > 1 else []


def memories(run: Path) -> list[Path]:
    """What clients remember: errors of their codec."""
    return [file for file in sorted((run / MEMORY / HOME).rglob("*")) if file.is_file() and SHARED not in file.parts]


FILES: dict[str, tuple[Callable[[Path], list[Path]], Sequence[str]]] = {
    "spooled answer": (spooled, ("answered", "closed", "published")),
    "journal": (journal, ("asked", "answered", "closed", "published", "state")),
    "newest checkpoint": (newest_checkpoint, ("round", "answered", "closed", "published", "state")),
    NOWHERE_ELSE: (memories, ("asked", "answered", "closed", "state")),
}


def trials(simulated: Simulated, chance: random.Random, full: bool) -> list[Trial]:
    made = [trial for what in FILES for how in DAMAGES for trial in damaged(simulated, what, how, chance)]
    return made if full else chance.sample(made, 4)


def damaged(simulated: Simulated, what: str, how: str, chance: random.Random) -> Iterator[Trial]:
    """Killed at lines of the last round, when there is something to damage."""
    files, at = FILES[what]
    entries = list(enumerate(simulated.whole.entries))
    last = max(number for number, entry in entries if entry.what == "round")
    numbers = [number for number, entry in entries if number >= last and entry.what in at and entry.what != "ended"]
    for number in chance.choices(numbers, k=SLOTS):
        seed = chance.randrange(1 << 30)

        def damage(run: Path, seed: int = seed) -> bool:
            found, own = files(run), random.Random(seed)
            if found:
                DAMAGES[how](own.choice(found), own)
            return bool(found)

        where = f"{simulated.name}: killed after line {number}, seed {seed}"
        yield partial(_seen, simulated, what, how, killed_at_line(number, "after"), where, damage)


def _seen(simulated: Simulated, what: str, how: str, kill: Prepare, where: str, damage: Callable[[Path], bool]) -> Seen | None:
    seen = simulated.seen(f"{what}: {how}", [kill], where, damage)
    return seen and replace(seen, mendable=what != NOWHERE_ELSE)
