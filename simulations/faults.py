"""Runs that are killed, starved and lied to, beside the same runs undisturbed: is an answer lost, is a bit wrong?

    python -m simulations.faults                    # a few of each kind but networks, about two minutes
    python -m simulations.faults --full             # all of them
    python -m simulations.faults --only sockets     # one of: kills, files, messages, disk, sockets, networks

What is done, and when, is drawn from --seed. The exit code is 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedtune.signals import stoppable
from simulations import faults_disk, faults_files, faults_kills, faults_messages
from simulations.faults_campaign import Tell
from simulations.faults_job import METHODS, Place
from simulations.faults_kills import Trial
from simulations.faults_lives import Simulated
from simulations.faults_page import Outcome, show, write
from simulations.faults_seen import Seen
from simulations.faults_sockets import Sockets, a_few_kills, kills, others

FIRST = next(iter(METHODS))  # on which all is tried that is not tried on all
TITLES = {
    "kills": "Simulation: killed",
    "files": "Simulation: killed, and a file damaged",
    "messages": "Simulation: answers twice, late, in another order",
    "disk": "Simulation: the disk, and the folder",
    "sockets": "Deployment: killed",
    "networks": "Deployment: networks, clocks, slow clients",
}


@dataclass
class Faults:
    """One pass. `full`: all of it, and not a few of each kind."""

    folder: Path
    seed: int
    full: bool
    console: Console
    at: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "tried").mkdir()
        self.place, self._simulated = Place.make(self.folder / "tried"), dict[str, Simulated]()

    def family(self, name: str, progress: Progress) -> list[Seen]:
        chance = random.Random(f"{self.seed} {name}")
        if name in ("sockets", "networks"):
            return sorted(self._deployed(name, chance, progress), key=lambda seen: seen.fault)
        trials = [trial for method in (METHODS if name == "kills" else [FIRST]) for trial in self._trials(name, method, chance)]
        bar = progress.add_task(TITLES[name], total=len(trials))
        seen = list[Seen]()
        for trial in trials:
            seen += filter(None, [trial()])
            progress.advance(bar)
        return seen

    def _trials(self, name: str, method: str, chance: random.Random) -> Sequence[Trial]:
        simulated = self._of(method)
        if name == "disk":
            self.left_out += filter(None, [faults_disk.why_no_disk()])
            return faults_disk.trials(simulated, self.place, METHODS[method], chance, self.full)
        made: Mapping[str, Callable[[Simulated, random.Random, bool], list[Trial]]] = {
            "kills": faults_kills.trials,
            "files": faults_files.trials,
            "messages": faults_messages.trials,
        }
        return made[name](simulated, chance, self.full)

    def _of(self, method: str) -> Simulated:
        if method not in self._simulated:
            self._simulated[method] = Simulated.of(
                method, self.place.job(*METHODS[method]), self.folder / method.partition(",")[0]
            )
        return self._simulated[method]

    def _deployed(self, name: str, chance: random.Random, progress: Progress) -> Iterator[Seen]:
        killing = name == "sockets"
        faults = (kills(chance) if self.full else a_few_kills(chance)) if killing else others(chance, 3 if self.full else 1)
        bar = progress.add_task(TITLES[name], total=len(faults))
        tell: Tell = lambda words: progress.console.print(f"  {words}", style="dim", markup=False, highlight=False)  # noqa: E731
        runs, rounds, clients = (4, 9, ["ann", "bob", "cy"]) if self.full else (2, 2, ["ann", "bob"])
        sockets = Sockets(self.place, self.folder / name, clients, rounds, chance, tell, cuttable=not killing)
        with sockets.deployment:
            for seen in sockets.play(faults, runs):
                progress.advance(bar, seen.times)
                self.at.update([(seen.fault.removeprefix("SIGKILL to "), seen.where.split("'")[1])] if killing else [])
                yield seen
        if sockets.left:
            self.left_out.append(f"{len(sockets.left)} faults of '{TITLES[name]}', for which no run was left")
        if living := sockets.deployment.left():
            raise RuntimeError(f"still running: {living}")


def faults(folder: Path, names: Sequence[str], seed: int, full: bool, console: Console) -> Outcome:
    began, done = time.monotonic(), Faults(folder, seed, full, console)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        seen = {TITLES[name]: done.family(name, progress) for name in names}
    return Outcome(seed, time.monotonic() - began, seen, done.at, done.left_out)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.faults", description="Disturb runs, and compare what they make."
    )
    parser.add_argument("--full", action="store_true", help="all of it; a few of each kind otherwise")
    parser.add_argument("--seed", type=int, default=0, help="what is done, and when")
    parser.add_argument("--only", nargs="+", choices=TITLES, help="these kinds alone")
    parser.add_argument("--keep", type=Path, help="new folder in which all runs are kept, to look at them")
    parser.add_argument("--write", type=Path, help="page between whose marks the tables go")
    given, console = parser.parse_args(words), Console()
    torch.set_num_threads(1)
    try:
        with stoppable(), _folder(given.keep) as folder:
            outcome = faults(folder, given.only or _names(given.full), given.seed, given.full, console)
    except KeyboardInterrupt as stopped:
        console.print("stopped; all that was started was ended")
        return getattr(stopped, "exit_code", 130)
    show(outcome, console)
    if given.write:
        write(given.write, outcome)
    return 0 if outcome.faultless else 1


def _names(full: bool) -> list[str]:
    """Networks that are cut take 20 s each."""
    return [name for name in TITLES if full or name != "networks"]


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
