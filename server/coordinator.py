"""The coordinator: one job from the first hello to what is published last. It works on any Grid and does not know which."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedtune import __version__
from fedtune.errors import Damaged, RoundFailed, RunFolderError
from fedtune.job import Job
from fedtune.logs import about
from fedtune.recipe import Recipe
from fedtune.seeds import seed_of
from fedtune.strategy import ClientInfo, ServerState
from server import quorum
from server.buffered import BufferedRound
from server.conduct import require_enough, told
from server.federation import Federation
from server.gatekeeper import GateMemory
from server.journal import read
from server.opening import Opened, Stand, opened
from server.past import asks_in, cohort_in, is_over
from server.post import OPEN, Post
from server.records import RoundRecord, Watcher
from server.rollback import MOST_IN_A_ROW, Trouble, computed, in_a_row, trouble
from server.round import Round
from server.run_folder import JOURNAL, RunFolder, holds_run, writing

REPAIRS = 3  # times that a round is begun again, in one process, as a file of its was damaged


@dataclass(frozen=True)
class RunResult:
    """Where a finished run lies, and what it was: the records of its rounds, the first of them round 0.

    There is an `adapter`; or, of a method that trains the model itself, a `recipe` and the `model` that it makes, or `weights`.
    """

    folder: Path
    state: ServerState

    @cached_property
    def records(self) -> tuple[RoundRecord, ...]:
        """As they were written down: a run does not hold them all, each has every client of its round."""
        return tuple(RunFolder(self.folder).records())

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe"

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    @property
    def model(self) -> Path:
        return self.folder / "model"


def run_job(
    job: Job,
    grid: Grid,
    folder: Path,
    watcher: Watcher,
    write_model: bool = True,
    post_of: Callable[[str], Post] = lambda run: OPEN,
    resume: bool = False,
) -> RunResult:
    """Play all rounds of the job. Raises UserError for what the user must mend, RoundFailed when too few answer.

    Nothing is written before model, clients and strategy are known to fit each other. Where a recipe was published, its model
    is written at the end, unless `write_model` is False. With `resume` the run in the folder goes on where it stopped; one that
    is not there begins. `post_of` makes the post of a run, by its name.
    """
    with opened(job, grid, folder, watcher, post_of, resume) as run:
        stand = run.stand
        watcher.started(job, {client.id: client.examples for client in run.federation.clients.values()})
        for record in stand.records:
            watcher.round_ended(record)
        try:
            while stand.next <= job.rounds.count:
                stand = _played(run, stand)
            _finish(run, stand, write_model)
        except RoundFailed as error:
            run.write("stopped", reason=str(error))
            raise
        return RunResult(folder, stand.state)


def finished(job: Job, folder: Path) -> RunResult | None:
    """A run of which all rounds are played; None of one that is not there, or goes on."""
    if not (holds_run(folder) and is_over(read(folder / JOURNAL)[0])):
        return None
    last = RunFolder(folder).checkpoints.last()
    return RunResult(folder, last.state) if last and last.round >= job.rounds.count else None


def _finish(run: Opened, stand: Stand, write_model: bool) -> None:
    federation = run.federation
    _require_progress(stand)
    if len(stand.undone) >= stand.next - 1:
        raise RoundFailed("all rounds were rolled back, so nothing was published; try a smaller train.lr, or more rounds")
    if write_model and isinstance(federation.strategy.published(stand.state), Recipe) and not run.over:
        federation.watcher.doing("writing the model", 0, 1)
        run.folder.write_model(federation.job, federation.plan)
    if not run.over:
        run.write("ended")


def _played(run: Opened, stand: Stand) -> Stand:
    """The next round. An answer that was damaged in the spool is asked for again, in the same round from its start."""
    repairs = 0
    while True:
        try:
            with about(run=run.federation.run, round=stand.next):
                return play(run, stand)
        except Damaged as reason:
            run.write("damaged", reason=str(reason))
            if (repairs := repairs + 1) > REPAIRS:
                raise RoundFailed(f"round {stand.next}: {reason}; the disk of {run.folder.path} cannot be trusted") from reason
            stand = stand.again(asks_in(run.federation.journal.entries))


def play(run: Opened, stand: Stand) -> Stand:
    """One round: train with a cohort, publish, evaluate where it is due; then the checkpoint, and only then it counts."""
    federation, number = run.federation, stand.next
    job, out = federation.job, stand.gate.conduct.out(number, federation.job.gate)
    cohort = _cohort(run, number, out)
    require_enough(job, federation.clients, out, number)
    due = is_due(job, number)
    federation.wire.known = stand.known
    begun_with = {client.id for client in cohort}  # also who sits out by now, where `gate` was another then
    taking_part = [id for id in federation.clients if id in begun_with or (due and id not in out)]
    begun = Round if job.rounds.mode == "synchronous" else BufferedRound
    round = begun(federation, run.folder, number, taking_part, stand.past, stand.undone, stand.gate)
    run.write("round", number=number, cohort=[client.id for client in cohort] if number else [])
    try:
        state = _trained(run, stand, round, cohort) if number else stand.state
        why = trouble(state)
        if due and not why:
            state = round.evaluate(state)
            why = trouble(state, round, stand.records, job.rounds.max_rise)
    except Trouble as reason:
        why = str(reason)
    gate, notes = _judged(run, stand, round, out)
    if why:
        return _rolled_back(run, stand, round, why, gate, notes)
    record = round.report(state.metrics if number else {}, state.selected if number else {}, notes)
    return _settled(run, round, stand.after(record, state, federation.wire.known, gate))


def _cohort(run: Opened, number: int, out: Collection[str]) -> list[ClientInfo]:
    """As it was drawn before, where the round has begun: who was busy or sat out then is noted nowhere else."""
    federation = run.federation
    federation.under_way.begins(number)
    if before := cohort_in(federation.journal.entries, number):
        if strangers := set(before) - federation.clients.keys():
            raise RunFolderError(
                f"the journal of {run.folder.path} has clients in round {number} that are not of this run: "
                f"{', '.join(map(repr, sorted(strangers)))}; bring back the journal that was written, or name another --out"
            )
        return [federation.clients[client] for client in before]
    if federation.job.rounds.mode == "buffered":
        return [client for id, client in sorted(federation.clients.items()) if id not in out]
    return draw_cohort(federation.job, federation.clients, number, out, federation.under_way.busy)


def _judged(run: Opened, stand: Stand, round: Round, out: Mapping[str, int]) -> tuple[GateMemory, list[str]]:
    """What the gate remembers from now on, and what is to be told of the round."""
    gate = round.gate.after(round.number)
    sent_out = gate.conduct.sent_out(stand.gate.conduct)
    for client, last in sent_out.items():
        run.write("sits_out", client=client, after=round.number, until=last)
    return gate, [*run.notes(round.number), *told({**out, **sent_out})]


def _trained(run: Opened, stand: Stand, round: Round, cohort: list[ClientInfo]) -> ServerState:
    federation = run.federation
    state = round.train(stand.state, cohort)
    if not trouble(state):
        published = computed(lambda: federation.strategy.published(state))
        run.folder.publish(round.number, published, federation.job, federation.plan, provenance(federation, round))
        run.write("published", round=round.number)
    return state


def _rolled_back(run: Opened, stand: Stand, round: Round, why: str, gate: GateMemory, notes: list[str]) -> Stand:
    """As if the round had not been, save for its record, and who was refused: clients are told with the next ask to forget it
    too."""
    number, federation = round.number, run.federation
    run.write("rolled_back", round=number, reason=why)
    run.folder.roll_back(number)
    record = round.report({}, {}, [*notes, f"rolled back: {why}"])
    gate = replace(gate, norms=stand.gate.norms)
    after = _settled(run, round, stand.after(record, stand.state, stand.known, gate, undone=number))
    _require_progress(after, f", the last as {why}")
    federation.wire.known = after.known
    return after


def _require_progress(stand: Stand, why: str = "") -> None:
    """Raises RoundFailed where the last rounds were all rolled back."""
    if in_a_row(stand.undone, stand.next - 1) >= MOST_IN_A_ROW:
        raise RoundFailed(
            f"{MOST_IN_A_ROW} rounds in a row were rolled back{why}; `adapter` leads to the last sound one, if there is one. "
            "Try a smaller train.lr; or, if that is as it should be, a larger rounds.max_rise, with --resume"
        )


def _settled(run: Opened, round: Round, after: Stand) -> Stand:
    """On the disk, in this order: the checkpoint, its line in the journal, the round's line; then the spool may go."""
    with writing(run.folder.path):
        run.folder.checkpoints.write(after.checkpoint(run.federation.run))
    run.write("state", round=round.number)
    run.federation.journal.forget(round.number)
    record = after.records[-1]
    run.folder.log(record)
    run.federation.watcher.round_ended(record)
    round.clear()
    if round.number not in after.undone:
        run.folder.prune(round.number, run.federation.job.rounds.keep)
    return after


def is_due(job: Job, number: int) -> bool:
    """Whether held-out examples are looked at after this round."""
    return job.rounds.evaluate_every > 0 and number % job.rounds.evaluate_every == 0


def draw_cohort(
    job: Job, clients: Mapping[str, ClientInfo], number: int, out: Collection[str] = (), busy: Collection[str] = ()
) -> list[ClientInfo]:
    """The clients of a round, by id: drawn without replacement, in an order that depends on (seed, round) alone, from those who
    do not sit out. Who is busy with an ask of before is drawn only where there would be no quorum without."""
    able = [client for id, client in clients.items() if id not in out]
    drawn = sorted(able, key=lambda client: seed_of(job.seed, number, "cohort", client.id))
    free = [client for client in drawn if client.id not in busy][: quorum.asked(job, len(clients))]
    lacking = max(quorum.quorum(job, quorum.wanted(job, len(clients))) - len(free), 0)
    rest = [client for client in drawn if client.id in busy][:lacking]
    return sorted([*free, *rest], key=lambda client: client.id)


def provenance(federation: Federation, round: Round) -> dict[str, Any]:
    """Where what is published came from: what becomes its `fedtune.json`."""
    job = federation.job
    return {
        "fedtune": __version__,
        "base": federation.plan.adapter.base,
        "base_path": job.model.path,
        "strategy": {"name": job.strategy.name, **asdict(federation.strategy)},  # type: ignore[call-overload]
        "personal": federation.strategy.personal,
        "round": round.number,
        "rounds": job.rounds.count,
        "weights": dict(round.shares),
        "bytes_down": {client: record.bytes_down for client, record in round.tally.clients.items()},
        "bytes_up": {client: record.bytes_up for client, record in round.tally.clients.items()},
        "seed": job.seed,
        "privacy": None,
    }
