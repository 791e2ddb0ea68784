"""Seconds a round of a deployment beyond local compute, side by side in one run: a stock Flower app, and fedtune.

    python -m simulations.bench_deploy             # about five minutes on two cores
    python -m simulations.bench_deploy training    # one of: training, evaluation (each round, beside training)

Two nodes on one machine, each with half of its cores: the shipped model of 3.28 M parameters, LoRA of rank 8, 5 steps of
4 x 128 tokens, in float32. Stock: `simulations/stock_app` on Flower's processes as they come; its examples are tokenized
before. Ours: what `fedtune server` and `fedtune client` start, with TLS, node keys, signed asks and sealed answers. Local
compute: the stock app's steps in two processes that hold model and data and work at the same time; a round takes as long as the
slower. It is measured before, between and after the two, so that a slow minute of the machine falls on it too. The first round
is apart; of the others the mean counts.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.table import Table

from server.signals import stoppable
from simulations.bench import row
from simulations.bench_algebra import Ratio
from simulations.bench_deploy_sides import Local, ours, stock, write_tokens
from simulations.bench_deploy_trace import PARTS, STEPS, breakdown, read

ROUNDS = {"training": 5, "evaluation": 3}
LOCAL_ROUNDS = 5  # at a time; one more before them warms up
GOAL = 5.0  # seconds


def measure(what: str, console: Console) -> list[Ratio]:
    with tempfile.TemporaryDirectory(prefix="ft") as name:
        folder, evaluate = Path(name), what == "evaluation"
        write_tokens(folder)
        with Local(folder) as local:
            alone = local.rounds(LOCAL_ROUNDS, evaluate)
            theirs = stock(folder / "stock", folder, ROUNDS[what], evaluate)
            alone += local.rounds(LOCAL_ROUNDS, evaluate)
            own = ours(folder / "ours", ROUNDS[what], evaluate)
            alone += local.rounds(LOCAL_ROUNDS, evaluate)
        console.print(rounds_table(what, alone, theirs, own))
        if not evaluate:
            console.print(parts_table(breakdown(read(folder / "ours" / "trace"))[1:], median(alone)))
    return ratios(what, median(alone), mean(theirs[1:]), mean(own[1:]))


def ratios(what: str, alone: float, theirs: float, own: float) -> list[Ratio]:
    beyond = f"{what}: seconds a round beyond local compute"
    return [
        (f"{beyond}, ours / goal", own - alone, GOAL, "<= 1"),
        (f"{beyond}, stock app / ours", theirs - alone, own - alone, ">= 3"),
        (f"{what}: seconds a round, stock app / local compute", theirs, alone, ">= 0"),
        (f"{what}: seconds a round, ours / local compute", own, alone, ">= 0"),
    ]


def rounds_table(what: str, alone: list[float], theirs: list[float], own: list[float]) -> Table:
    load = " ".join(f"{figure:.2f}" for figure in os.getloadavg())
    table = Table("seconds a round", "first", "others", "from", "to", "beyond", title=f"{what}, load of the machine {load}")
    table.add_row("local compute", "", *figures([median(alone), min(alone), max(alone)]), "")
    for side, seconds in (("stock Flower app", theirs), ("ours", own)):
        others = seconds[1:]
        table.add_row(side, *figures([seconds[0], mean(others), min(others), max(others), mean(others) - median(alone)]))
    return table


def parts_table(rounds: list[list[float]], alone: float) -> Table:
    """The mean of the rounds."""
    table = Table("ours: where the seconds of a round go", "mean", "from", "to", title="the way of the slowest answer")
    for number, (part, seconds) in enumerate(zip(PARTS, zip(*rounds, strict=True), strict=True)):
        beyond = f", {mean(seconds) - alone:+.2f} beyond local compute" if number == STEPS else ""
        table.add_row(part + beyond, *figures([mean(seconds), min(seconds), max(seconds)]))
    sums = [sum(seconds) for seconds in rounds]
    table.add_row("together", *figures([mean(sums), min(sums), max(sums)]))
    return table


def figures(seconds: list[float]) -> list[str]:
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
