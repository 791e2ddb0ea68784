"""A run is begun, or taken up where it stopped: all that its rounds need, and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from flwr.serverapp import Grid

from fedtune.base import blueprint
from fedtune.errors import RunFolderError, StrategyError
from fedtune.job import Job
from fedtune.payload import payload_of
from fedtune.strategy import ClientInfo, ServerState, Strategy
from fedtune.wire.ends import ServerEnd
from fedtune.wire.versions import Known
from server import lock
from server.at_work import AtWork
from server.checkpoint import Checkpoint
from server.exchange import Asks
from server.federation import Federation
from server.gatekeeper import GateMemory
from server.journal import Entry, Journal
from server.late import UnderWay
from server.meeting import meet
from server.past import Asked, asks_in, is_over, started_in
from server.post import Post
from server.records import RoundRecord, Watcher
from server.resuming import require_resumable
from server.roll import Roll, clients_in
from server.rollback import last_evaluated
from server.run_folder import RunFolder, holds_run, require_free
from server.summing import require_buffered

Posts = Callable[[str], Post]  # by the run's name


@dataclass(frozen=True)
class Stand:
    """Between two rounds."""

    next: int  # round
    state: ServerState
    known: Known  # of the wire: which client has what
    records: tuple[RoundRecord, ...] = ()  # with their clients only the last, and the last that was evaluated and counts
    undone: tuple[int, ...] = ()  # rounds that were rolled back
    past: Mapping[str, Asked] = field(default_factory=dict)  # what became of the asks of the next round before
    gate: GateMemory = field(default_factory=GateMemory)  # of clients that were refused, and of norms

    def after(
        self, record: RoundRecord, state: ServerState, known: Known, gate: GateMemory, undone: int | None = None
    ) -> Stand:
        gone = self.undone if undone is None else (*self.undone, undone)
        records = (*self.records, record)
        told = {record.round, getattr(last_evaluated(records), "round", None)}  # others are read by nobody but from the disk
        slim = (one if one.round in told else replace(one, clients={}, selected={}, layer_errors={}) for one in records)
        return Stand(self.next + 1, state, known, tuple(slim), gone, gate=gate)

    def again(self, past: Mapping[str, Asked]) -> Stand:
        return replace(self, past=past)

    def checkpoint(self, run: str) -> Checkpoint:
        notes = {"undone": list(self.undone), "gate": self.gate.as_json()}
        return Checkpoint(run, self.next - 1, self.state, self.known, self.records[-1], notes)


@dataclass(frozen=True)
class Opened:
    federation: Federation
    folder: RunFolder
    stand: Stand
    over: bool = False  # all rounds were played before

    def write(self, what: str, **about: Any) -> None:
        """Into the journal. Raises RunFolderError where the disk is full."""
        self.federation.journal.write(what, **about)

    def notes(self, number: int) -> list[str]:
        """What its record should tell of how the round came about."""
        begun = sum(entry.what == "round" and entry["number"] == number for entry in self.federation.journal.entries)
        return [f"begun {begun} times"] if begun > 1 else []


@contextmanager
def opened(job: Job, grid: Grid, folder: Path, watcher: Watcher, post_of: Posts, resume: bool) -> Iterator[Opened]:
    """Nobody else has the folder while it is open. Raises UserError, RoundFailed."""
    opening = _Opening(job, grid, watcher, post_of)
    if resume and holds_run(folder):
        require_resumable(folder, job)
        with lock.held(folder), opening.journal(RunFolder(folder)):
            yield opening.taken_up(RunFolder(folder))
        return
    require_free(folder)
    begin = opening.introduced()
    made = RunFolder.create(folder, job)
    with lock.held(folder), opening.journal(made):
        yield begin(made)


class _Opening:
    """What both ways need. The run's name is settled, and with it its post, before any client is met."""

    def __init__(self, job: Job, grid: Grid, watcher: Watcher, post_of: Posts) -> None:
        self._job, self._grid, self._watcher, self._post_of = job, grid, watcher, post_of
        self._plan, self._strategy = blueprint(job), job.make_strategy()
        self._journal: Journal

    @contextmanager
    def journal(self, folder: RunFolder) -> Iterator[None]:
        self._journal = folder.journal()
        try:
            yield
        finally:
            self._journal.close()

    def introduced(self) -> Callable[[RunFolder], Opened]:
        """All clients have said hello and suit the job; what is returned begins the run in a folder."""
        name = f"{self._job.name}.{token_hex(8)}"  # no other run is called so
        roll, first = self._met(name), self._first()
        return lambda folder: self._started(Opened(self._federation(name, roll), folder, first))

    def taken_up(self, folder: RunFolder) -> Opened:
        """From its last whole checkpoint; without one, from the start."""
        damaged: list[str] = []
        entries = list(self._journal.entries)
        checkpoint = folder.checkpoints.last(damaged.append)
        if checkpoint is None:
            _require_early(folder, entries, damaged)
        told, stand = started_in(entries), self._stand(folder, checkpoint, entries)
        over = is_over(entries) and stand.next > self._job.rounds.count
        name = told["run"] if told else checkpoint.run if checkpoint else f"{self._job.name}.{token_hex(8)}"
        run = Opened(self._federation(name, self._roll(name, told) if told else self._met(name)), folder, stand, over)
        folder.describe(self._job)
        for reason in damaged:
            run.write("damaged", reason=reason)
        if not told:  # the journal was cut off, or there was a crash before its first line
            self._started(run)
        if not over:
            run.write("resumed", round=stand.next, cut=self._journal.cut)
        return run

    def _started(self, run: Opened) -> Opened:
        run.write("started", run=run.federation.run, **run.federation.roll.as_json())
        return run

    def _federation(self, name: str, roll: Roll) -> Federation:
        job, strategy, plan = self._job, self._strategy, self._plan
        wire = ServerEnd(job.make_wire(), strategy, payload_of(plan.adapter))
        asked = sum(len(entry["clients"]) for entry in self._journal.entries if entry.what == "asked")
        at_work, under_way = AtWork(Asks(self._grid, roll.post), asked), UnderWay(job.wire.versions)
        about = self._journal, name, at_work, roll.post, under_way
        return Federation(job, strategy, plan, self._grid, roll, self._watcher, wire, *about)

    def _met(self, name: str) -> Roll:
        job, plan, post = self._job, self._plan, self._post_of(name)
        clients, nodes = meet(self._grid, job, plan, post, name)
        self._strategy.check(list(clients.values()))
        _require_the_jobs_rank(job, self._strategy, clients)
        require_buffered(job, self._strategy, plan.adapter, list(clients.values()))
        return Roll(self._grid, job, plan, clients, nodes, post, name)

    def _roll(self, name: str, told: Entry) -> Roll:
        """Nobody is greeted again: a client may be at work, and answers nothing meanwhile."""
        clients = clients_in(told.about, self._job, self._plan)
        return Roll(self._grid, self._job, self._plan, clients, told["nodes"], self._post_of(name), name)

    def _first(self) -> Stand:
        """Before any round; round 0 only evaluates."""
        return Stand(0 if self._job.rounds.evaluate_every else 1, self._strategy.start(self._plan.adapter), Known())

    def _stand(self, folder: RunFolder, checkpoint: Checkpoint | None, entries: list[Entry]) -> Stand:
        past = asks_in(entries)
        if checkpoint is None:
            return self._first().again(past)
        lines, record = folder.records(), checkpoint.record
        if record and record.round not in {line.round for line in lines}:
            folder.log(record)  # the crash came between the two
        records = (*(line for line in lines if line.round < checkpoint.round), *([record] if record else []))
        undone, gate = tuple(checkpoint.notes.get("undone", ())), GateMemory.from_json(checkpoint.notes.get("gate"))
        return Stand(checkpoint.round + 1, checkpoint.state, checkpoint.known, records, undone, past, gate)


def _require_early(folder: RunFolder, entries: list[Entry], damaged: list[str]) -> None:
    """Without a checkpoint a run begins anew: nobody wants that once it has come far. Raises RunFolderError."""
    rounds = {entry["round"] for entry in entries if entry.what == "state"}
    if len(rounds) > 1:
        raise RunFolderError(
            f"the run in {folder.path} had come to round {max(rounds)}, and no checkpoint of it can be read "
            f"({'; '.join(damaged) or 'none is there'}): bring its folder `state` back, or begin a new run with another --out"
        )


def _require_the_jobs_rank(job: Job, strategy: Strategy, clients: Mapping[str, ClientInfo]) -> None:
    """Where all train one rank, the adapter that the server starts from must have it."""
    ranks, wanted = {client.rank for client in clients.values()}, job.adapter.rank_for()
    if not strategy.mixed_ranks and ranks != {wanted}:
        raise StrategyError(
            f"all clients train rank {ranks.pop()}, and adapter.rank is {wanted}: type --set adapter.rank=RANK with theirs"
        )
