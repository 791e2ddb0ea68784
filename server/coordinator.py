"""The coordinator: one job from the first hello to the last adapter. It works on any Grid and does not know which.

A round: draw the cohort, run the strategy's generator, and for each ask that it yields: push, gate, spool, fold, hand back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedtune import __version__
from fedtune.base import blueprint
from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, Refused, RoundFailed
from fedtune.job import Job
from fedtune.seeds import seed_of
from fedtune.strategy import Answers, Ask, ClientInfo, Fold, ServerState
from fedtune.wire import pack_ask
from server.exchange import Reply, exchange
from server.gate import admit, misfits, schema_of
from server.records import RoundRecord, Watcher
from server.run_folder import RunFolder, require_free, writing
from server.spool import Spool, SpooledAnswers
from server.tally import Tally


@dataclass(frozen=True)
class RunResult:
    """Where a finished run lies, and what it was: the records of its rounds, the first of them round 0."""

    folder: Path
    state: ServerState
    records: tuple[RoundRecord, ...]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def run_job(job: Job, grid: Grid, folder: Path, watcher: Watcher) -> RunResult:
    """Play all rounds of the job. Raises UserError for what the user must mend, RoundFailed when too few answer."""
    require_free(folder)
    return Coordinator(job, grid, watcher).run(folder)


class Coordinator:
    def __init__(self, job: Job, grid: Grid, watcher: Watcher) -> None:
        self.job, self.grid, self.watcher = job, grid, watcher
        self.strategy = job.make_strategy()
        self.blueprint = blueprint(job)
        self.clients: dict[str, ClientInfo] = {}
        self.nodes: dict[str, int] = {}

    def run(self, folder: Path) -> RunResult:
        self._meet_clients()
        self.strategy.check(list(self.clients.values()))
        state = self.strategy.start(self.blueprint.adapter)
        run = RunFolder.create(folder, self.job)
        self.watcher.started(self.job, {client.id: client.examples for client in self.clients.values()})
        try:
            records = [self._before_training(run, state)] if self.job.rounds.evaluate_every else []
            for number in range(1, self.job.rounds.count + 1):
                state, record = self._round(run, state, number)
                records.append(record)
        finally:
            Spool(run.spool).clear()
        return RunResult(folder, state, tuple(records))

    # one round

    def _before_training(self, run: RunFolder, state: ServerState) -> RoundRecord:
        """Round 0: the base model on everybody's held-out examples."""
        began, tally = time.monotonic(), Tally(self.clients)
        self._evaluate(run, state, 0, tally)
        return self._report(run, tally, 0, began, {})

    def _round(self, run: RunFolder, state: ServerState, number: int) -> tuple[ServerState, RoundRecord]:
        began = time.monotonic()
        cohort = self._cohort(number)
        evaluating = bool(self.job.rounds.evaluate_every) and number % self.job.rounds.evaluate_every == 0
        tally = Tally(self.clients if evaluating else [client.id for client in cohort])
        state, shares = self._play(run, state, number, cohort, tally)
        run.publish(number, self.strategy.published(state), self.job, self.blueprint, self._provenance(number, shares))
        if evaluating:
            self._evaluate(run, state, number, tally)
        return state, self._report(run, tally, number, began, state.metrics)

    def _cohort(self, number: int) -> list[ClientInfo]:
        """The clients of a round, by id: drawn without replacement by a generator of (seed, round)."""
        everyone = [self.clients[client] for client in sorted(self.clients)]
        size = min(self.job.rounds.clients or len(everyone), len(everyone))
        drawn = sorted(everyone, key=lambda client: seed_of(self.job.seed, number, "cohort", client.id))[:size]
        return sorted(drawn, key=lambda client: client.id)

    def _play(
        self, run: RunFolder, state: ServerState, number: int, cohort: Sequence[ClientInfo], tally: Tally
    ) -> tuple[ServerState, Mapping[str, float]]:
        """Drive the strategy's generator to its end; the next state and each client's share in the last fold."""
        conversation = self.strategy.round(state, cohort)
        shares: Mapping[str, float] = {}
        try:
            ask = next(conversation)
            step = 0
            while True:
                answers = self._fold(run, ask, f"{number}.{step}", number, cohort, tally)
                shares, step = answers.weights, step + 1
                ask = conversation.send(answers)
        except StopIteration as end:
            return end.value, shares

    def _fold(self, run: RunFolder, ask: Ask, ask_id: str, number: int, cohort: Sequence[ClientInfo], tally: Tally) -> Answers:
        """Ask the cohort, let in what passes the gate, and hand back what the strategy may see of it."""
        spool, weights, schemas = Spool(run.spool / ask_id), {}, {}
        asked = [client.id for client in cohort if tally.clients[client.id].failed is None]
        for client, reply in self._ask(asked, ask, ask_id, number, tally, "training"):
            try:
                answer = admit(reply, ask_id, self.clients[client], self.blueprint.adapter, self.job.rounds.max_weight)
            except (Refused, ClientFailed) as reason:
                tally.failed(client, f"refused: {reason}" if isinstance(reason, Refused) else str(reason))
                continue
            with writing(run.path):
                spool.put(client, reply)
            weights[client], schemas[client] = answer.weight, schema_of(answer)
            tally.trained(client, answer)
        for client, reason in misfits(schemas).items() if ask.fold is Fold.SUM else ():
            tally.failed(client, f"refused: {reason}")
            del weights[client]
        self._require_quorum(weights, cohort, tally, number)
        return SpooledAnswers(spool, weights, ask.fold)

    def _require_quorum(self, answered: Mapping[str, float], cohort: Sequence[ClientInfo], tally: Tally, number: int) -> None:
        wanted = max(1, math.ceil(self.job.rounds.quorum * len(cohort)))
        if len(answered) < wanted:
            reasons = "; ".join(f"{client}: {record.failed}" for client, record in tally.clients.items() if record.failed)
            raise RoundFailed(
                f"round {number}: {len(answered)} of {len(cohort)} clients answered, wanted {wanted} (rounds.quorum). {reasons}"
            )

    def _evaluate(self, run: RunFolder, state: ServerState, number: int, tally: Tally) -> None:
        """Every client looks at the published adapter with its own held-out examples; a failure here costs no round."""
        ask, ask_id = Ask("evaluate", self.strategy.broadcast(state)), f"{number}.evaluate"
        able = [client for client in self.clients if tally.clients[client].failed is None]
        for client, reply in self._ask(able, ask, ask_id, number, tally, "evaluating"):
            try:
                tally.held_out(client, admit(reply, ask_id, self.clients[client], self.blueprint.adapter, math.inf))
            except (Refused, ClientFailed) as reason:
                tally.failed(client, f"evaluation: {reason}")

    def _report(self, run: RunFolder, tally: Tally, number: int, began: float, own: Mapping[str, float]) -> RoundRecord:
        figures = tally.figures()
        loss = figures.pop("loss", None)
        if loss is not None and self.job.model.task == "causal":
            figures["perplexity"] = math.exp(min(loss, 700.0))
        record = RoundRecord(number, loss, {**figures, **own}, time.monotonic() - began, tally.clients)
        run.log(record)
        self.watcher.round_ended(record)
        return record

    # messages

    def _meet_clients(self) -> None:
        """Say hello to every node. Those that cannot take part, or have another base model, are left out."""
        hello = pack_ask(Ask("hello"), "", {"ask": "hello", "run": self.job.name, "job": self.job.model_dump(mode="json")})
        left_out = []
        for reply in exchange(self.grid, dict.fromkeys(self.grid.get_node_ids(), hello), self.job.rounds.timeout):
            try:
                info = self._introduced(reply)
            except ClientFailed as reason:
                left_out.append(str(reason))
                continue
            self.clients[info.id], self.nodes[info.id] = info, reply.node
        wanted = self.job.clients.count or 1
        if len(self.clients) < wanted:
            reasons = f": {'; '.join(left_out)}" if left_out else ""
            raise RoundFailed(f"{len(self.clients)} clients can take part, wanted {wanted} (clients.count){reasons}")
        self.clients = dict(sorted(self.clients.items()))

    def _introduced(self, reply: Reply) -> ClientInfo:
        if reply.envelope is None:
            raise ClientFailed(f"node {reply.node}: {reply.failed}")
        header = reply.envelope.header
        if "failed" in header:
            raise ClientFailed(f"{header.get('client', reply.node)}: {header['failed']}")
        base = self.blueprint.adapter.base
        if header.get("base") != base:
            raise ClientFailed(
                f"{header.get('client')}: its base model is {header.get('base')}, wanted {base}: give it the same files"
            )
        client = str(header["client"])
        if client in self.clients:
            raise ClientFailed(f"node {reply.node}: a client named '{client}' is already here, names must differ")
        return ClientInfo(client, int(header["examples"]), int(header["rank"]), float(header["scale"]))

    def _ask(
        self, clients: Sequence[str], ask: Ask, ask_id: str, number: int, tally: Tally, doing: str
    ) -> Iterator[tuple[str, Envelope]]:
        """One answer for each client that gave one; failures go into the tally."""
        header = {"ask": ask_id, "run": self.job.name, "round": number, "base": self.blueprint.adapter.base}
        asks = {self.nodes[client]: pack_ask(ask, client, header) for client in clients}
        names = {self.nodes[client]: client for client in clients}
        for client in clients:
            tally.sent(client, asks[self.nodes[client]])
        self.watcher.doing(doing, 0, len(clients))
        for done, reply in enumerate(exchange(self.grid, asks, self.job.rounds.timeout), 1):
            self.watcher.doing(doing, done, len(clients))
            client = names[reply.node]
            if reply.envelope is None:
                tally.failed(client, reply.failed)
                continue
            tally.came(client, reply.envelope)
            yield client, reply.envelope

    def _provenance(self, number: int, shares: Mapping[str, float]) -> dict[str, Any]:
        strategy = asdict(self.strategy) if hasattr(self.strategy, "__dataclass_fields__") else {}  # type: ignore[call-overload]
        return {
            "fedtune": __version__,
            "base": self.blueprint.adapter.base,
            "base_path": self.job.model.path,
            "strategy": {"name": self.job.strategy.name, **strategy},
            "round": number,
            "rounds": self.job.rounds.count,
            "weights": dict(shares),
            "seed": self.job.seed,
            "privacy": None,
        }
