"""One open round: the strategy's asks go out, answers pass the gate, are spooled, folded and handed back to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from flwr.serverapp import Grid

from fedtune.aggregation import split
from fedtune.base import Blueprint
from fedtune.envelope import Envelope
from fedtune.errors import MALFORMED, ClientFailed, Refused, RoundFailed
from fedtune.job import Job
from fedtune.strategy import Answer, Answers, Ask, ClientInfo, Fold, ServerState, Strategy
from fedtune.wire.ends import ServerEnd
from server.exchange import exchange
from server.gate import admit, misfits, schema_of
from server.limits import most_numbers
from server.post import OPEN, Post
from server.records import RoundRecord, Watcher
from server.run_folder import RunFolder, writing
from server.spool import Spool, SpooledAnswers
from server.tally import Tally

Selected = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Federation:
    """What stays the same over all rounds of a run."""

    job: Job
    strategy: Strategy
    plan: Blueprint
    grid: Grid
    clients: Mapping[str, ClientInfo]
    nodes: Mapping[str, int]  # client id -> node of the grid
    watcher: Watcher
    wire: ServerEnd
    post: Post = OPEN


class Round:
    """`with Round(...) as round`: the spool is there while it is open, and gone afterwards, however it ended."""

    def __init__(self, federation: Federation, run: RunFolder, number: int, clients: Iterable[str]) -> None:
        self.number, self.shares, self.tally = number, dict[str, float](), Tally(clients)
        self._federation, self._run, self._began = federation, run, time.monotonic()

    def __enter__(self) -> Round:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        Spool(self._run.spool).clear()

    def train(self, state: ServerState, cohort: Sequence[ClientInfo]) -> ServerState:
        """Drive the strategy's generator from state to state; `shares` are then the clients' in its last fold."""
        conversation = self._federation.strategy.round(state, cohort)
        try:
            ask, step = next(conversation), 0
            while True:
                answers = self._answers(ask, f"{self.number}.{step}", cohort)
                self.shares, step = dict(answers.weights), step + 1
                ask = conversation.send(answers)
        except StopIteration as end:
            after: ServerState = end.value
            return after

    def evaluate(self, state: ServerState) -> ServerState:
        """Every client looks at what is published with its held-out examples; a failure here costs no round."""
        clients = self.tally.able(self._federation.clients)
        ask = self._federation.strategy.evaluation(state, clients)
        answered = []
        for client, answer, _ in self._admitted(clients, ask, f"{self.number}.evaluate"):
            self.tally.held_out(client, answer)
            answered.append(client)
        return self._federation.strategy.evaluated(state, clients, answered)

    def report(self, own: Mapping[str, float], selected: Selected | None = None) -> RoundRecord:
        """Log the round's record, with the strategy's own metrics, and tell the watcher."""
        figures = self.tally.figures()
        loss = figures.pop("loss", None)
        if loss is not None and self._federation.job.model.task == "causal":
            figures["perplexity"] = math.exp(min(loss, 700.0))
        seconds = time.monotonic() - self._began
        layers, own = split(own)
        record = RoundRecord(self.number, loss, {**figures, **own}, seconds, self.tally.clients, selected or {}, layers)
        self._run.log(record)
        self._federation.watcher.round_ended(record)
        return record

    def _answers(self, ask: Ask, ask_id: str, cohort: Sequence[ClientInfo]) -> Answers:
        """Spool what passes the gate, and give the strategy what it may see of it."""
        spool, weights, schemas, metrics = Spool(self._run.spool / ask_id), dict[str, float](), {}, {}
        for client, answer, envelope in self._admitted(self.tally.able(info.id for info in cohort), ask, ask_id):
            with writing(self._run.path):
                spool.put(client, envelope)
            weights[client], schemas[client], metrics[client] = answer.weight, schema_of(answer, ask.fold), answer.metrics
        for client, reason in ({} if ask.tensors else misfits(schemas)).items():
            self.tally.failed(client, f"refused: {reason}")
            del weights[client]
        for client in weights:
            self.tally.trained(client, metrics[client])
        self._require_quorum(ask, len(weights), len(cohort))
        return SpooledAnswers(spool, weights, ask.fold, self._decoding(ask))

    def _admitted(self, clients: Sequence[str], ask: Ask, ask_id: str) -> Iterator[tuple[str, Answer, Envelope]]:
        """The answers that pass the gate, as they come; the reasons of the others go into the tally."""
        federation = self._federation
        lower_rank, decoded = ask.fold is Fold.EACH and federation.strategy.mixed_ranks, self._decoding(ask)
        for client, envelope in self._replies(clients, ask, ask_id):
            try:
                info, like, decode = federation.clients[client], federation.plan.adapter, partial(decoded, client)
                shapes = federation.plan.shapes
                answer = admit(envelope, ask_id, info, like, self._most, lower_rank, ask, shapes, decode)
                self.tally.read(client, envelope, answer.payload)
                yield client, answer, envelope
            except Refused as reason:
                self.tally.failed(client, f"refused: {reason}")
            except ClientFailed as reason:
                self.tally.failed(client, str(reason))
            except MALFORMED as error:
                self.tally.failed(client, f"refused: it is malformed ({type(error).__name__})")

    def _decoding(self, ask: Ask) -> Callable[[str, Envelope], Answer]:
        """How the wire reads a client's answer: no more numbers than it can have been asked for."""
        wire, clients, plan = self._federation.wire, self._federation.clients, self._federation.plan
        return lambda client, envelope: wire.answer(envelope, clients[client], most_numbers(ask, clients[client], plan))

    def _replies(self, clients: Sequence[str], ask: Ask, ask_id: str) -> Iterator[tuple[str, Envelope]]:
        """Clients whose version of the broadcast is not the one that was taken for theirs are asked again, with everything."""
        wire, outdated = self._federation.wire, []
        timeout, began = self._federation.job.rounds.timeout, time.monotonic()
        for client, envelope in self._exchanged(
            self._packed(clients, ask, ask_id), ask, timeout, self._quorum(ask, len(clients))
        ):
            if wire.arrived(client, envelope):
                outdated.append(client)
            elif envelope is not None:
                yield client, envelope
        again = self._packed(outdated, ask, ask_id)
        left = max(timeout - (time.monotonic() - began), 0.0)
        for client, envelope in self._exchanged(again, ask, left, again=True) if outdated else ():
            wire.arrived(client, envelope)
            if envelope is not None:
                yield client, envelope
        wire.settle()

    def _exchanged(
        self, asks: Mapping[str, Envelope], ask: Ask, timeout: float, enough: int = 0, again: bool = False
    ) -> Iterator[tuple[str, Envelope | None]]:
        """What is sent `again` would not have been, without codecs: it counts as no larger than it is."""
        federation = self._federation
        names = {federation.nodes[client]: client for client in asks}
        federation.watcher.doing(ask.kind, 0, len(asks))
        by_node = {federation.nodes[client]: envelope for client, envelope in asks.items()}

        def sent(node: int, envelope: Envelope) -> None:
            self.tally.sent(names[node], envelope, None if again else ask.payload_for(names[node]))

        replies = exchange(federation.grid, by_node, timeout, federation.post, sent, enough)
        for done, reply in enumerate(replies, 1):
            federation.watcher.doing(ask.kind, done, len(asks))
            client = names[reply.node]
            if reply.carried is not None:
                self.tally.came(client, reply.carried, reply.envelope)
            if reply.envelope is None:
                self.tally.failed(client, reply.failed)
            yield client, reply.envelope

    def _packed(self, clients: Sequence[str], ask: Ask, ask_id: str) -> dict[str, Envelope]:
        federation = self._federation
        header = {"ask": ask_id, "run": federation.job.name, "round": self.number, "base": federation.plan.adapter.base}
        return {client: federation.wire.ask(ask, client, header) for client in clients}

    def _quorum(self, ask: Ask, asked: int) -> int:
        """Answers that the round cannot do without."""
        return 0 if ask.kind == "evaluate" else max(1, math.ceil(self._federation.job.rounds.quorum * asked))

    def _require_quorum(self, ask: Ask, answered: int, asked: int) -> None:
        wanted = self._quorum(ask, asked)
        if answered < wanted:
            reasons = "; ".join(f"{client}: {record.failed}" for client, record in self.tally.clients.items() if record.failed)
            raise RoundFailed(
                f"round {self.number}: {answered} of {asked} clients answered, wanted {wanted} (rounds.quorum). {reasons}"
            )

    @property
    def _most(self) -> float:
        return self._federation.job.rounds.max_weight
