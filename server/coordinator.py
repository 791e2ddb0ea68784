"""The coordinator: one job from the first hello to what is published last. It works on any Grid and does not know which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedtune import __version__
from fedtune.base import blueprint
from fedtune.errors import StrategyError
from fedtune.job import Job
from fedtune.payload import payload_of
from fedtune.recipe import Recipe
from fedtune.seeds import seed_of
from fedtune.strategy import ClientInfo, ServerState, Strategy
from fedtune.wire.ends import ServerEnd
from server.meeting import meet
from server.post import OPEN, Post
from server.records import RoundRecord, Watcher
from server.round import Federation, Round
from server.run_folder import RunFolder, require_free


@dataclass(frozen=True)
class RunResult:
    """Where a finished run lies, and what it was: the records of its rounds, the first of them round 0.

    There is an `adapter`; or, of a method that trains the model itself, a `recipe` and the `model` that it makes, or `weights`.
    """

    folder: Path
    state: ServerState
    records: tuple[RoundRecord, ...]

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


def run_job(job: Job, grid: Grid, folder: Path, watcher: Watcher, write_model: bool = True, post: Post = OPEN) -> RunResult:
    """Play all rounds of the job. Raises UserError for what the user must mend, RoundFailed when too few answer.

    Nothing is written before model, clients and strategy are known to fit each other. Where a recipe was published, its model
    is written at the end, unless `write_model` is False.
    """
    require_free(folder)
    strategy, plan = job.make_strategy(), blueprint(job)
    clients, nodes = meet(grid, job, plan, post)
    strategy.check(list(clients.values()))
    _require_the_jobs_rank(job, strategy, clients)
    state = strategy.start(plan.adapter)
    wire = ServerEnd(job.make_wire(), strategy, payload_of(plan.adapter))
    federation = Federation(job, strategy, plan, grid, clients, nodes, watcher, wire, post)
    run = RunFolder.create(folder, job)
    watcher.started(job, {client.id: client.examples for client in clients.values()})
    records = []
    if job.rounds.evaluate_every:
        state, record = before_training(federation, run, state)
        records.append(record)
    for number in range(1, job.rounds.count + 1):
        state, record = play(federation, run, state, number)
        records.append(record)
    if write_model and isinstance(strategy.published(state), Recipe):
        watcher.doing("writing the model", 0, 1)
        run.write_model(job, plan)
    return RunResult(folder, state, tuple(records))


def _require_the_jobs_rank(job: Job, strategy: Strategy, clients: Mapping[str, ClientInfo]) -> None:
    """Where all train one rank, the adapter that the server starts from must have it."""
    ranks, wanted = {client.rank for client in clients.values()}, job.adapter.rank_for()
    if not strategy.mixed_ranks and ranks != {wanted}:
        raise StrategyError(
            f"all clients train rank {ranks.pop()}, and adapter.rank is {wanted}: type --set adapter.rank=RANK with theirs"
        )


def before_training(federation: Federation, run: RunFolder, state: ServerState) -> tuple[ServerState, RoundRecord]:
    """Round 0: what the strategy starts from, on everybody's held-out examples."""
    with Round(federation, run, 0, federation.clients) as round:
        state = round.evaluate(state)
        return state, round.report({})


def play(federation: Federation, run: RunFolder, state: ServerState, number: int) -> tuple[ServerState, RoundRecord]:
    """One round: train with a cohort, publish, and evaluate where it is due."""
    every, cohort = federation.job.rounds.evaluate_every, draw_cohort(federation.job, federation.clients, number)
    due = every > 0 and number % every == 0
    with Round(federation, run, number, federation.clients if due else [client.id for client in cohort]) as round:
        state = round.train(state, cohort)
        published = federation.strategy.published(state)
        run.publish(number, published, federation.job, federation.plan, provenance(federation, round))
        if due:
            state = round.evaluate(state)
        return state, round.report(state.metrics, state.selected)


def draw_cohort(job: Job, clients: Mapping[str, ClientInfo], number: int) -> list[ClientInfo]:
    """The clients of a round, by id: drawn without replacement, in an order that depends on (seed, round) alone."""
    seed, wanted = job.seed, job.rounds.clients or len(clients)
    drawn = sorted(clients.values(), key=lambda client: seed_of(seed, number, "cohort", client.id))[:wanted]
    return sorted(drawn, key=lambda client: client.id)


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
