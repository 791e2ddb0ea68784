"""A disk that is full, and a second coordinator: `fedtune simulate` ends with one line, and goes on when it can."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from server.journal import Journal
from simulations.faults_job import Place
from simulations.faults_kills import Trial
from simulations.faults_lives import Life, Simulated, commanded, lived
from simulations.faults_seen import Seen, seen_in

SIZE = 64 << 20  # bytes of the disk that is filled
ONE_LINE = "stopped with its one line (exit code {}), ended after `--resume`"
REFUSED = "the second was refused (exit code 2), the first ended by itself"


def why_no_disk() -> str:
    """Why this machine lets nobody make a small disk; empty if it does."""
    return "" if os.geteuid() == 0 and shutil.which("mount") else "not root: cannot mount a small disk to fill"


def trials(simulated: Simulated, place: Place, overrides: tuple[str, ...], chance: random.Random, full: bool) -> list[Trial]:
    words = (str(place.job_file), *(word for key in overrides for word in ("--set", key)))
    lines = chance.sample(range(2, len(simulated.whole.entries) - 1), 6 if full else 1)
    made: list[Trial] = [partial(two_coordinators, simulated, words, line) for line in lines]
    if not why_no_disk():
        needs = size_of(simulated)
        made += [partial(full_disk, simulated, words, chance.randrange(needs)) for _ in range(20 if full else 2)]
    return made


def size_of(simulated: Simulated) -> int:
    """Bytes that a run takes when it is over; while it goes on, somewhat more."""
    return sum(path.stat().st_size for path in (simulated.folder / "whole").rglob("*") if path.is_file())


def full_disk(simulated: Simulated, words: tuple[str, ...], room: int) -> Seen | None:
    """So much room was left. None where that was enough."""
    with simulated.run() as run, small_disk(run.parent) as disk:
        run, ballast = disk / "run", disk / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - room)
        first = command(words, run)
        if first.code == 0:
            return None
        ballast.unlink()
        second = command(words, run)
        ending, well = ONE_LINE.format(first.code), first.code in (1, 2) and is_one_line(first) and second.code == 0
        if not well:
            ending = f"exit code {first.code}: {first.said[-300:]}; then exit code {second.code}: {second.said[-300:]}"
        return seen_in(run, simulated.whole, "disk full", " ".join(ending.split()), well, where=f"{room} bytes free")


def two_coordinators(simulated: Simulated, words: tuple[str, ...], line: int) -> Seen:
    """The first stands still after that line of its journal, while the second tries."""
    with simulated.run() as run:
        first = os.fork()
        if first == 0:
            _stand_still(simulated, run, line)
        os.waitpid(first, os.WUNTRACED)
        second = command(words, run)
        os.kill(first, signal.SIGCONT)
        code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        well = code == 0 and second.code == 2 and is_one_line(second) and "another process (pid" in second.said
        ending = REFUSED if well else f"exit codes {code} and {second.code}: {second.said[-300:]}"
        return seen_in(run, simulated.whole, "two coordinators on one run folder", ending, well, where=f"at line {line}")


def command(words: tuple[str, ...], run: Path) -> Life:
    return lived(lambda: commanded("simulate", *words, "--out", str(run), "--resume"))


def is_one_line(life: Life) -> bool:
    """What it complains of, without a traceback."""
    complaints = [line for line in life.said.splitlines() if line.startswith("fedtune: ")]
    return len(complaints) == 1 and "Traceback" not in life.said


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "faults", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _stand_still(simulated: Simulated, run: Path, line: int) -> None:
    """In a process that was forked for it."""
    write, written = Journal.write, [-1]

    def and_wait(self: Journal, what: str, soon: bool = False, **about: Any) -> None:
        write(self, what, soon, **about)
        written[0] += 1
        if written[0] == line:
            os.kill(os.getpid(), signal.SIGSTOP)

    Journal.write = and_wait  # type: ignore[method-assign]
    code = 1
    try:
        simulated.play(run)
        code = 0
    finally:
        os._exit(code)
