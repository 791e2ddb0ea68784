"""Simulations that are killed and taken up again: each life of a run is a process of its own, forked with all imported."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.job import Job
from server.journal import Entry, Journal, line_of
from server.watchers import Quiet
from simulations.engine import simulate
from simulations.faults_seen import BY_ITSELF, RESUMED, Seen, Whole, seen_in

Prepare = Callable[[], None]  # called first in a life
Moment = Literal["before", "within", "after"]
FILE_CALLS = ("fsync", "replace", "unlink", "link", "mkdir")  # of os: a run's whole way through the file system


@dataclass(frozen=True)
class Life:
    """How it ended: killed, with an exit code, with an error; `said` is what it wrote."""

    killed: bool
    code: int
    said: str = ""


def lived(work: Callable[[], object]) -> Life:
    """Exit code 0 where `work` came to its end, 70 with the error where it raised."""
    with tempfile.TemporaryFile() as paper:
        child = os.fork()
        if child == 0:
            _live(work, paper.fileno())
        status = os.waitpid(child, 0)[1]
        paper.seek(0)
        said = paper.read().decode(errors="replace")
    return Life(os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status), said)


def _live(work: Callable[[], object], paper: int) -> None:
    code = 70
    os.dup2(paper, 1)
    os.dup2(paper, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 -- whatever they were
    try:
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def commanded(*words: str) -> None:
    """`fedtune ...`, as its process would run it."""
    from simulations.commands import main

    sys.argv = ["fedtune", *words]
    main()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_line(number: int, moment: Moment) -> Prepare:
    """Of those that this life writes into the journal, from 0 on; `within` leaves half of the line."""
    write, written = Journal.write, [-1]

    def and_die(self: Journal, what: str, soon: bool = False, **about: Any) -> None:
        written[0] += 1
        if written[0] == number and moment != "after":
            if moment == "within":
                line = line_of(Entry(what, about), self._clock())
                os.write(self._file, line[: len(line) // 2])
            die()
        write(self, what, soon, **about)
        if written[0] == number:
            die()

    def prepare() -> None:
        Journal.write = and_die  # type: ignore[method-assign]

    return prepare


def killed_at_file_call(number: int) -> Prepare:
    """Before that one of the calls by which anything reaches the disk."""
    made = [-1]

    def or_die(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            made[0] += 1
            if made[0] == number:
                die()
            return call(*given, **named)

        return called

    def prepare() -> None:
        for name in FILE_CALLS:
            setattr(os, name, or_die(getattr(os, name)))

    return prepare


def file_calls(work: Callable[[], object]) -> int:
    """How many of them `work` makes."""
    made = [0]

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            made[0] += 1
            return call(*given, **named)

        return called

    def counted() -> None:
        for name in FILE_CALLS:
            setattr(os, name, counting(getattr(os, name)))
        work()
        os.write(1, f"\n{made[0]}".encode())

    return int(lived(counted).said.split()[-1])


@dataclass(frozen=True)
class Simulated:
    """One job, its run that nobody disturbed, and a folder for others of it."""

    name: str
    job: Job
    folder: Path
    whole: Whole

    @classmethod
    def of(cls, name: str, job: Job, folder: Path) -> Simulated:
        """It is played in this process: all that it imports is there for those that are forked."""
        folder.mkdir()
        simulate(job, folder / "whole", Quiet())
        return cls(name, job, folder, Whole.of(folder / "whole"))

    def play(self, run: Path) -> None:
        simulate(self.job, run, Quiet(), resume=True)

    @contextmanager
    def run(self) -> Iterator[Path]:
        """The folder of one more run; it is gone afterwards."""
        run = Path(tempfile.mkdtemp(dir=self.folder), "run")
        try:
            yield run
        finally:
            shutil.rmtree(run.parent)

    def seen(
        self, fault: str, lives: Sequence[Prepare], where: str, between: Callable[[Path], bool] | None = None
    ) -> Seen | None:
        """Each life but the last begins with its `Prepare`; `between` does the fault itself before the last one, and says
        whether it could. None where nothing hit."""
        with self.run() as run:
            hits = sum(self.life(run, prepare).killed for prepare in lives)
            if (between and not between(run)) or not hits:
                return None
            last = lived(lambda: self.play(run))
            ending, times = (RESUMED if hits else BY_ITSELF), 1 if between else hits
            return seen_in(run, self.whole, fault, ending if not last.code else _words(last), not last.code, times, where)

    def life(self, run: Path, prepare: Prepare) -> Life:
        def begin() -> None:
            prepare()
            self.play(run)

        return lived(begin)


def _words(life: Life) -> str:
    return f"ended with {life.said.strip().splitlines()[-1][:200] if life.said.strip() else f'exit code {life.code}'}"
