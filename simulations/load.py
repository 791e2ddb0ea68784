"""How many clients one coordinator carries: what an answer costs it, whether its memory stays flat, and where it bends.

    python -m simulations.load simulated    # 10,000 scripted clients in one process, 1,000 a round; about ten minutes
    python -m simulations.load sockets      # up to 50 nodes with all their processes on this machine; about fifteen

The clients answer without training (simulations/load_clients.py), so all seconds are those of carrying.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fedtune.signals import stoppable
from simulations.load_simulated import METHODS, PARTS, Moment, measured
from simulations.load_sockets import KINDS, Carried
from simulations.load_sockets import measured as carried

MB = 1e6


def simulated(given: argparse.Namespace, console: Console) -> None:
    for method in given.methods:
        with tempfile.TemporaryDirectory(prefix="ft", dir=given.dir) as folder, alone() as process:
            told = Path(folder), method, given.clients, given.cohort, given.rounds, given.every
            moments = process.submit(measured, *told).result()
        console.print(rounds_table(method, moments), parts_table(method, moments))


def alone() -> ProcessPoolExecutor:
    """A process of its own for each run, so that its memory is that of this run."""
    return ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,))


def rounds_table(method: str, moments: Sequence[Moment]) -> Table:
    """What each round took, and how large process and files are at its end."""
    title = f"{method}, load of the machine {os.getloadavg()[0]:.1f}"
    heads = "round", "answers", "seconds", "of the processor", "fsyncs", "waited for the disk"
    table = Table(*heads, "memory, MB", "journal, MB", "metrics, MB", "checkpoints, MB", title=title)
    for one in moments:
        seconds = one.seconds, sum(one.parts.values())
        sizes = (f"{size / MB:.1f}" for size in (one.resident, one.journal, one.metrics, one.state))
        cost = f"{one.fsyncs:,}", f"{sum(one.waits.values()):.1f}"
        table.add_row(str(one.round), f"{one.answers:,}", *(f"{figure:.1f}" for figure in seconds), *cost, *sizes)
    return table


def parts_table(method: str, moments: Sequence[Moment]) -> Table:
    """Of the rounds that only train, after the first."""
    training = [one for one in moments[1:] if one.answers == min(other.answers for other in moments[1:])]
    answers = sum(one.answers for one in training)
    table = Table("milliseconds an answer", "processor", title=method)
    for part in [*PARTS, "rest"]:
        table.add_row(part, f"{1000 * sum(one.parts.get(part, 0.0) for one in training) / answers:.2f}")
    return table


def sockets(given: argparse.Namespace, console: Console) -> None:
    with tempfile.TemporaryDirectory(prefix="ft", dir=given.dir) as folder:
        done = list[Carried]()
        for one in carried(Path(folder), given.nodes, given.rounds, given.wire):
            done.append(one)
            console.print(nodes_table(done))


def nodes_table(done: Sequence[Carried]) -> Table:
    """Processor: seconds a round, of all processes of one kind together; memory in MB, of each page its share."""
    heads = "nodes", "seconds a round", "from", "to", "cores busy", "load"
    table = Table(*heads, *(f"{kind}: s, MB" for kind in KINDS), title="a deployment; clients answer at once")
    for one in done:
        seconds = one.round, min(one.rounds), max(one.rounds)
        uses = [f"{one.use[kind].processor / len(one.rounds):.2f}, {one.use[kind].resident / MB:.0f}" for kind in KINDS]
        table.add_row(str(one.nodes), *(f"{s:.2f}" for s in seconds), f"{one.busy:.0%}", f"{one.load:.1f}", *uses)
    return table


def main(words: Sequence[str] | None = None) -> int:
    given, console = _parser().parse_args(words), Console()
    try:
        with stoppable():
            given.play(given, console)
    except KeyboardInterrupt as stopped:
        console.print("stopped; all that was started was ended")
        return getattr(stopped, "exit_code", 130)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations.load", description="What one coordinator carries.")
    kinds = parser.add_subparsers(required=True)
    one = kinds.add_parser("simulated", help="scripted clients in one process")
    one.add_argument("--clients", type=int, default=10_000)
    one.add_argument("--cohort", type=int, default=1_000)
    one.add_argument("--every", type=int, default=0, help="rounds between evaluations, which ask all clients")
    one.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    one.set_defaults(play=simulated)
    many = kinds.add_parser("sockets", help="a deployment on this machine")
    many.add_argument("--nodes", nargs="+", type=int, default=[1, 10, 25, 50])
    many.add_argument("--wire", default="balanced", help="preset; plain sends each tensor by itself")
    many.set_defaults(play=sockets)
    for kind in (one, many):
        kind.add_argument("--rounds", type=int, default=6)
        kind.add_argument("--dir", type=Path, help="where files are made; absent is the folder for temporary files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
