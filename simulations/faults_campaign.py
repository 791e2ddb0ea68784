"""A deployed run and what is done to it, at lines of its journal as they come; and what becomes of it.

Who is killed is started again by its supervisor, and supervisors by us, as a service would be. A client is left alone from one
fault of its own to its next answer, the server to the end of the next ask: otherwise nothing would ever come further.
"""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.journal import Entry
from server.past import is_over
from server.run_folder import RunFolder
from simulations.faults_deployment import SERVER, SUPERVISOR, Deployment, Following
from simulations.faults_seen import BY_ITSELF, RESUMED, Seen, Whole, begun_again, bits_of, entries_of, lost_in

LOOK = 0.005  # seconds between looks at the journal
STUCK = 400.0  # seconds without a line, after which a run is given up
TIMES = 3  # that a server which ended for another reason than a kill is started again
IN_A_ROW = 3  # faults of the server without a step of the run: at five crashes it gives up, as it should
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Fault:
    """To be done at a line of that kind, to a client or the server."""

    words: str  # of its row
    side: str  # server or client
    line: str
    do: Callable[[Deployment, str], bool]  # to whom; whether it hit
    undo: Callable[[Deployment, str], object] | None = None
    seconds: float = 0.0  # until it is undone
    ending: str = BY_ITSELF  # that the run should have then


@dataclass
class Hit:
    fault: Fault
    owner: str
    round: int
    line: str
    resumed: bool = False  # a server that was not killed had to be started again after it
    until: float = 0.0


def kill(process: str, side: str, line: str) -> Fault:
    ending = RESUMED if (side, process) == (SERVER, SUPERVISOR) else BY_ITSELF
    named = {SUPERVISOR: f"`fedtune {side}`", "superlink": "SuperLink", "serverapp": "ServerApp", "supernode": "SuperNode"}
    words = f"SIGKILL to {named.get(process, process)}"
    return Fault(words, side, line, lambda deployment, owner: deployment.send(owner, process) is not None, ending=ending)


def frozen(process: str, words: str, line: str, seconds: float) -> Fault:
    def thaw(deployment: Deployment, owner: str) -> None:
        deployment.send(owner, process, signal.SIGCONT)

    return Fault(words, "client", line, lambda on, owner: on.send(owner, process, signal.SIGSTOP) is not None, thaw, seconds)


def line_of(entry: Entry) -> str:
    """Its kind."""
    ask = str(entry.about.get("ask", ""))
    return f"{entry.what}, {'evaluation' if ask.endswith('evaluate') else 'training'}" if ask else entry.what


@dataclass
class Campaign:
    """`left` are the faults that are still to be done; `hits` those that were, in the run that is played."""

    deployment: Deployment
    whole: Whole
    rounds: Mapping[int, str]  # the bits of each round of the undisturbed run
    left: list[Fault]
    chance: random.Random
    tell: Tell
    hits: list[Hit] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)  # why a server ended that was not killed

    def __post_init__(self) -> None:
        self._begin_anew()

    def play(self, run: Path) -> list[Seen]:
        """To the run's end, or until it is given up."""
        self._begin_anew()
        self.deployment.begin(run)
        following = Following(run)
        try:
            while self._goes_on():
                for entry in following.new():
                    self._moved = time.monotonic()
                    self._at(entry)
                time.sleep(LOOK)
            for entry in following.new():
                self._at(entry)
        finally:
            self._undo(everything=True)
        return list(self._seen(run))

    def _begin_anew(self) -> None:
        self.hits, self.trouble = [], []
        self._spared, self._in_a_row, self._round, self._moved = set[str](), 0, 0, time.monotonic()

    def _at(self, entry: Entry) -> None:
        self._round = int(entry["number"]) if entry.what == "round" else self._round
        if entry.what == "answered":
            self._spared.discard(entry["client"])
        if entry.what in ("closed", "state"):
            self._spared.discard(SERVER)
            self._in_a_row = 0
        if entry.what == "resumed" and self._in_a_row < IN_A_ROW:
            self._spared.discard(SERVER)
        line = line_of(entry)
        for fault in [fault for fault in self.left if fault.line in (line, "any")]:
            self._do(fault, line)

    def _do(self, fault: Fault, line: str) -> None:
        able = [SERVER] if fault.side == SERVER else self.chance.sample(self.deployment.clients, len(self.deployment.clients))
        for owner in able:
            if owner not in self._spared and fault.do(self.deployment, owner):
                self.left.remove(fault)
                self._spared.add(owner)
                self._in_a_row += owner == SERVER
                self.hits.append(Hit(fault, owner, self._round, line, until=time.monotonic() + fault.seconds))
                self.tell(f"{fault.words} ({owner}) at '{line}' of round {self._round}")
                return

    def _goes_on(self) -> bool:
        """Supervisors that are gone come back. False at the run's end."""
        self._undo()
        for client in self.deployment.clients:
            if self.deployment.ended(client) is not None:
                self.deployment.start(client)
        code = self.deployment.ended(SERVER)
        if code is None:
            if time.monotonic() - self._moved > STUCK:
                self.trouble.append(f"no line in the journal for {STUCK:.0f} s")
                self.deployment.send(SERVER, SUPERVISOR)
                return False
            return True
        if code == 0:
            return False
        if code != -signal.SIGKILL:
            self._mourn(code)
            if len(self.trouble) > TIMES:
                return False
        self._moved = time.monotonic()
        self.deployment.start(SERVER)
        return True

    def _mourn(self, code: int) -> None:
        words = " ".join(self.deployment.said(SERVER).strip().splitlines()[-1:])
        self.trouble.append(f"exit code {code}: {words}")
        self.tell(f"the server ended with {self.trouble[-1]}")
        for hit in self.hits[-1:]:
            hit.resumed = True

    def _undo(self, everything: bool = False) -> None:
        for hit in self.hits:
            if hit.fault.undo and hit.until and (everything or time.monotonic() >= hit.until):
                hit.fault.undo(self.deployment, hit.owner)
                hit.until = 0.0
                self._moved = time.monotonic()

    def _seen(self, run: Path) -> Iterator[Seen]:
        again, lost = begun_again(entries_of(run)), lost_in(run, self.whole)
        other = self._first_other(run)
        ended = is_over(entries_of(run)) and len(self.trouble) <= TIMES
        self._tell_what_differs(run, lost, other)
        for hit in self.hits:
            rounds = [round for round in self.rounds if self._to_blame(round) is hit]
            bits = False if other in rounds else True if hit.round < other else None
            ending, well = self._ending(hit, ended)
            repeated, gone = sum(again[round] for round in rounds), sum(len(lost.get(round, ())) for round in rounds)
            yield Seen(
                hit.fault.words, ending, well, repeated, gone, bits, where=f"{hit.owner} at '{hit.line}', round {hit.round}"
            )

    def _first_other(self, run: Path) -> float:
        """The first round whose bits are others; then those after it are, too, whatever was done to them."""
        other = [round for round, bits in self.rounds.items() if bits != bits_of_round(run, round)]
        last = [] if bits_of(run) == self.whole.bits else [max(self.rounds)]
        return min([*other, *last], default=math.inf)

    def _tell_what_differs(self, run: Path, lost: Mapping[int, Collection[str]], other: float) -> None:
        if other < math.inf:
            self.tell(f"other bits from round {other} on")
        for record in RunFolder(run).records():
            for client in lost.get(record.round, ()):
                self.tell(f"lost in round {record.round}: {client}: {record.clients[client].failed}")

    def _to_blame(self, round: int) -> Hit:
        """For what became of a round: the first fault in it or after it, or the last of all."""
        return next((hit for hit in self.hits if hit.round >= round), self.hits[-1])

    def _ending(self, hit: Hit, ended: bool) -> tuple[str, bool]:
        if not ended:
            return f"given up: {'; '.join(self.trouble)[-300:]}", False
        if hit.resumed:
            return f"stopped ({self.trouble[-1][:200]}), ended after `--resume`", False
        return hit.fault.ending, True


def bits_of_round(run: Path, round: int) -> str:
    """Of what one round published; empty of round 0, which publishes nothing."""
    return bits_of(run / "rounds" / f"{round:04d}")
