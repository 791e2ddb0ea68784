"""Faults over sockets: every kind of process is killed at every kind of line of the journal, networks are cut, clocks jump."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from server.watchers import Quiet
from simulations.engine import simulate
from simulations.faults_campaign import Campaign, Fault, Tell, bits_of_round, frozen, kill
from simulations.faults_deployment import OF_CLIENT, OF_SERVER, SERVER, Deployment
from simulations.faults_files import flipped, newest_checkpoint
from simulations.faults_job import Place
from simulations.faults_seen import RESUMED, Seen, Whole

SETTINGS = ("wire.preset=tiny", "rounds.timeout=300")  # clients and coordinator both remember between rounds
ASKS = tuple(f"{what}, {kind}" for what in ("asked", "answered", "closed") for kind in ("training", "evaluation"))
LINES = ("started", "round", *ASKS, "published", "state", "resumed", "ended")
AWAY = 20.0  # seconds without network, or frozen
JUMPS = {"an hour ahead": 3600.0, "an hour back": -3600.0}
LIMIT = 120.0  # seconds for a second server to say that it is one too many


def kills(chance: random.Random) -> list[Fault]:
    """Each kind of process at each kind of line, in an order of chance."""
    at = [("server", process, line) for process in OF_SERVER for line in LINES]
    at += [("client", process, line) for process in OF_CLIENT for line in LINES]
    return [kill(process, side, line) for side, process, line in chance.sample(at, len(at))]


def a_few_kills(chance: random.Random) -> list[Fault]:
    """Each kind of process at some line."""
    sides = [("server", process) for process in OF_SERVER] + [("client", process) for process in OF_CLIENT]
    return [kill(process, side, chance.choice(ASKS)) for side, process in sides]


def others(chance: random.Random, times: int) -> list[Fault]:
    made = [fault for _ in range(times) for fault in (*networks(chance), *clocks(chance), *damages(chance), second_server())]
    return chance.sample(made, len(made))


def networks(chance: random.Random) -> Iterator[Fault]:
    def line() -> str:
        return chance.choice(ASKS)

    cut, silent = "network cut for 20 s: connections end", "network cut for 20 s: silence"
    yield Fault(cut, "client", line(), lambda on, owner: on.cut(owner), lambda on, owner: on.heal(owner), AWAY)
    yield Fault(silent, "client", line(), lambda on, owner: on.silence(owner), lambda on, owner: on.heal(owner), AWAY)
    yield frozen("supernode", "SuperNode stands still for 20 s (SIGSTOP)", line(), AWAY)
    yield frozen("trainer", "slow client: its trainer stands still for 20 s (SIGSTOP)", line(), AWAY)


def clocks(chance: random.Random) -> Iterator[Fault]:
    """The coordinator's, and then right again; the last one also at the start of another coordinator."""
    for words, seconds in JUMPS.items():

        def jump(on: Deployment, owner: str, by: float = seconds) -> bool:
            return on.set_clock(by)

        def jump_and_die(on: Deployment, owner: str, by: float = seconds) -> bool:
            return on.send(owner, "serverapp") is not None and on.set_clock(by)

        def right(on: Deployment, owner: str) -> bool:
            return on.set_clock(0.0)

        line = chance.choice(ASKS)
        yield Fault(f"the coordinator's clock jumps {words}", SERVER, line, jump, right, AWAY)
        yield Fault(
            f"the coordinator's clock jumps {words}, and the ServerApp is killed", SERVER, line, jump_and_die, right, AWAY
        )


def second_server() -> Fault:
    """In the folder of the first. It must be refused, with the reason."""

    def refused(on: Deployment, owner: str) -> bool:
        second = subprocess.run(
            on.command(SERVER), env=on.environment, capture_output=True, text=True, check=False, timeout=LIMIT
        )
        return second.returncode == 2 and "already" in second.stderr

    ending = "the second was refused (exit code 2), the first ended by itself"
    return Fault("a second `fedtune server` on the same folder", SERVER, "state", refused, ending=ending)


def damages(chance: random.Random) -> Iterator[Fault]:
    """The server goes back a round, and asks for what its clients have answered before."""
    words = "a machine that hosts the server dies, and its newest checkpoint is damaged"
    for more in ("", ", and so is every answer that clients keep"):

        def damaged(on: Deployment, owner: str, answers: bool = bool(more)) -> bool:
            files = newest_checkpoint(on.run)
            if not files or not on.kill_server():
                return False
            for file in [chance.choice(files), *(on.answers_of_clients() if answers else ())]:
                flipped(file, chance)
            return True

        yield Fault(words + more, SERVER, chance.choice(ASKS), damaged, ending=RESUMED)


class Sockets:
    """One deployment, and the runs on it."""

    def __init__(
        self,
        place: Place,
        folder: Path,
        clients: Sequence[str],
        rounds: int,
        chance: random.Random,
        tell: Tell,
        cuttable: bool = False,
    ) -> None:
        folder.mkdir()
        settings = (*SETTINGS, f"rounds.count={rounds}", f"clients.names={list(clients)}")
        simulate(place.job(*settings, f"clients.count={len(clients)}"), folder / "whole", Quiet())
        self._bits = {round: bits_of_round(folder / "whole", round) for round in range(rounds + 1)}
        self._whole, self._chance, self._tell = Whole.of(folder / "whole"), chance, tell
        self._folder, self.deployment = folder, Deployment(place, folder / "at", clients, settings, cuttable)

    def play(self, faults: list[Fault], runs: int) -> Iterator[Seen]:
        """As many runs as it takes for all faults, and at most that many."""
        campaign = Campaign(self.deployment, self._whole, self._bits, faults, self._chance, self._tell)
        for number in range(runs):
            if campaign.left:
                yield from campaign.play(self._folder / f"run{len(list(self._folder.glob('run*')))}")
                self._tell(f"run {number + 1} is over, {len(campaign.left)} faults are left")
        self.left = campaign.left
