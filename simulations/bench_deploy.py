"""Seconds a round of a deployment beyond local compute, side by side in one run: a stock Flower app, and fedtune.

    python -m simulations.bench_deploy             # about six minutes on two quiet cores
    python -m simulations.bench_deploy training    # one of: training, evaluation (each round, beside training)

Two nodes on one machine, each with half of its cores: the shipped model of 3.28 M parameters, LoRA of rank 8, 5 steps of
4 x 128 tokens, in float32. Stock: `simulations/stock_app` on Flower's processes as they come; its examples are tokenized
before. Ours: what `fedtune server` and `fedtune client` start, with TLS, node keys, signed asks and sealed answers. Local
compute: the stock app's steps in two processes that hold model and data and work at the same time; a round takes as long as the
slower. It is measured before and after each of the two, so that a slow minute of the machine falls on it too. The first round
is apart; of the others the mean counts. Ours loads its models before that, when the coordinator says hello.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.table import Table

from fedtune.signals import stoppable
from simulations.bench import row
from simulations.bench_algebra import Ratio
from simulations.bench_deploy_sides import Local, ours, stock, write_tokens
from simulations.bench_deploy_trace import PARTS, STEPS, breakdown, read

ROUNDS = {"training": 5, "evaluation": 3}
LOCAL_ROUNDS = 5  # at a time; one more before them warms up
GOAL = 5.0  # seconds


@dataclass(frozen=True)
class Side:
    name: str
    rounds: Sequence[float]  # seconds
    alone: Sequence[float] = ()  # seconds of the steps alone, before and after

    @property
    def round(self) -> float:
        return mean(self.rounds[1:])

    @property
    def local(self) -> float:
        return median(self.alone)

    @property
    def beyond(self) -> float:
        return self.round - self.local


def measure(what: str, console: Console) -> list[Ratio]:
    with tempfile.TemporaryDirectory(prefix="ft") as name:
        folder, evaluate = Path(name), what == "evaluation"
        write_tokens(folder)
        with Local(folder) as local:
            before = local.rounds(LOCAL_ROUNDS, evaluate)
            theirs = Side("stock Flower app", stock(folder / "stock", folder, ROUNDS[what], evaluate))
            between = local.rounds(LOCAL_ROUNDS, evaluate)
            own = Side("ours", ours(folder / "ours", ROUNDS[what], evaluate))
            after = local.rounds(LOCAL_ROUNDS, evaluate)
        theirs, own = replace(theirs, alone=before + between), replace(own, alone=between + after)
        console.print(rounds_table(what, theirs, own))
        if not evaluate:
            console.print(parts_table(breakdown(read(folder / "ours" / "trace"))[1:]))
    return ratios(what, theirs, own)


def ratios(what: str, theirs: Side, own: Side) -> list[Ratio]:
    beyond = f"{what}: seconds a round beyond local compute"
    return [
        (f"{beyond}, ours / goal", own.beyond, GOAL, "<= 1"),
        (f"{beyond}, stock app / ours", theirs.beyond, own.beyond, ">= 3"),
        (f"{what}: seconds a round, stock app / local compute", theirs.round, theirs.local, ">= 0"),
        (f"{what}: seconds a round, ours / local compute", own.round, own.local, ">= 0"),
    ]


def rounds_table(what: str, *sides: Side) -> Table:
    load = " ".join(f"{figure:.2f}" for figure in os.getloadavg())
    table = Table("seconds a round", "first", "others", "from", "to", "beyond", title=f"{what}, load of the machine {load}")
    for side in sides:
        table.add_row(side.name, *figures(side.rounds[0], side.round, min(side.rounds[1:]), max(side.rounds[1:]), side.beyond))
        table.add_row("  local compute beside it", "", *figures(side.local, min(side.alone), max(side.alone)), "")
    return table


def parts_table(rounds: list[list[float]]) -> Table:
    """The mean of the rounds, of the gradient steps and of all the rest too."""
    table = Table("ours: where the seconds of a round go", "mean", "from", "to", title="the way of the slowest answer")
    rest = [sum(seconds) - seconds[STEPS] for seconds in rounds]
    for part, seconds in (*zip(PARTS, zip(*rounds, strict=True), strict=True), ("all but the gradient steps", rest)):
        table.add_row(part, *figures(mean(seconds), min(seconds), max(seconds)))
    return table


def figures(*seconds: float) -> list[str]:
    return [f"{figure:.2f}" for figure in seconds]


def main(names: list[str]) -> None:
    console, table = Console(), Table("measured", "above", "below", "ratio", "goal", "reached")
    with stoppable():  # so that what was started ends with us
        for name in names or ROUNDS:
            for ratio in measure(name, console):
                table.add_row(*row(*ratio))
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
