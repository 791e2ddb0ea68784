"""Faults of what comes to the coordinator: answers twice, in another order, and those of rounds before once more."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from flwr.app import Message

from client.trainer import Trainer
from simulations import engine
from simulations.faults_kills import Trial
from simulations.faults_lives import Simulated, lived
from simulations.faults_seen import BY_ITSELF, Seen, seen_in
from simulations.grid import InProcessGrid

KINDS = ("each answer comes twice", "answers come in another order", "answers of before come once more, among the new ones")


class Unruly(InProcessGrid):
    """Delivers all at once that there is, as its kind says."""

    def __init__(self, trainer: Trainer, kind: str, chance: random.Random) -> None:
        super().__init__(trainer)
        self._kind, self._chance, self._before = kind, chance, list[Message]()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ids = list(message_ids)
        came = [message for id in ids for message in super(Unruly, self).pull_messages([id])]
        before, self._before = self._before, [*self._before, *came]
        if self._kind == KINDS[0]:
            return [message for message in came for _ in range(2)]
        if self._kind == KINDS[2]:
            came += before
        return self._chance.sample(came, len(came))


def trials(simulated: Simulated, chance: random.Random, full: bool) -> list[Trial]:
    times = 3 if full else 1
    return [partial(unruly, simulated, kind, chance.randrange(1 << 30)) for kind in KINDS for _ in range(times)]


def unruly(simulated: Simulated, kind: str, seed: int) -> Seen | None:
    with simulated.run() as run:
        life = lived(partial(_play, simulated, run, kind, seed))
        ending = BY_ITSELF if not life.code else f"ended with {life.said[-200:]}"
        return seen_in(run, simulated.whole, kind, ending, not life.code, where=f"{simulated.name}: seed {seed}")


def _play(simulated: Simulated, run: Path, kind: str, seed: int) -> None:
    setattr(engine, "InProcessGrid", partial(Unruly, kind=kind, chance=random.Random(seed)))  # noqa: B010
    simulated.play(run)
