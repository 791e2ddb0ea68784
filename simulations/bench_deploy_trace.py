"""Where the seconds of a round go: the way of the slowest client's answer, by the lines that `simulations/tracing` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

PARTS = (
    "coordinator: folds, publishes, packs and signs",
    "ServerApp -> SuperLink: the asks",
    "SuperNode: until it looks (0.2 s, then a tenth of the time that nothing came)",
    "SuperLink -> SuperNode: the ask",
    "relay: until it looks (0.05 s, growing likewise)",
    "SuperNode -> relay: the ask",
    "relay -> trainer, over the unix socket",
    "trainer: checks, loads the adapter, packs, signs and seals",
    "trainer: the gradient steps",
    "trainer -> relay -> SuperNode: the answer",
    "SuperNode: until it looks for the answer (0.05 s), sends it",
    "ServerApp: until it looks (0.05 s to 0.5 s), fetches the answer",
)
STEPS = 8  # the place of the gradient steps among them
HOPS = ("_pull_and_store_message", "acquire", "pull", "Answer", "fit", "reply")  # on a client's machine


@dataclass(frozen=True)
class Call:
    """One call of a function that is timed; seconds of a clock that all processes share."""

    what: str
    node: str  # the Flower home of its process, one for each server and client
    began: float
    ended: float


def read(folder: Path) -> list[Call]:
    """In the order of their ends."""
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted((Call(**line) for line in lines), key=lambda call: call.ended)


def breakdown(calls: Sequence[Call]) -> list[list[float]]:
    """For each round with one exchange, as training alone has it, the seconds of each part; together they are the round."""
    return [parts(play, calls) for play in calls if play.what == "play"]


def parts(play: Call, calls: Sequence[Call]) -> list[float]:
    within = [call for call in calls if play.began <= call.ended <= play.ended]
    sent, fetched = last(within, "push_messages"), last(within, "pull_messages")
    slowest = last(within, "_push_messages", before=fetched.ended)
    way = [call for call in within if call.node == slowest.node]
    asked, found, taken, answered, fit, given = (last(way, what, before=slowest.ended) for what in HOPS)
    looked = max(asked.began, sent.ended)  # a look that began before the ask was there waited for nothing
    times = [sent.began, sent.ended, looked, asked.ended, found.ended, taken.ended, answered.began]
    times += [answered.ended, given.ended, slowest.ended, fetched.ended]
    steps = fit.ended - fit.began
    times = list(accumulate(reversed(times), min))[
        ::-1
    ]  # the SuperNode may be at work on an ask that is with the trainer already
    between = [after - before for before, after in pairwise(times)]
    between[STEPS - 2 : STEPS - 1] = [between[STEPS - 2] - steps, steps]  # within the trainer's part
    return [play.ended - play.began - sum(between), *between]


def last(calls: Sequence[Call], what: str, before: float = math.inf) -> Call:
    return [call for call in calls if call.what == what and call.ended <= before][-1]
