"""One open round: the strategy's asks go out, answers pass the gate, are spooled, folded and handed back to it.

A round that is taken up again after a crash runs from its start, with the asks that it had: they are a function of the state
and the answers. What the journal says has come is read from the spool; only the others are asked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType

from flwr.serverapp import Grid

from fedtune.aggregation import split
from fedtune.base import Blueprint
from fedtune.envelope import Envelope
from fedtune.errors import MALFORMED, ClientFailed, Damaged, Refused, RoundFailed
from fedtune.job import Job
from fedtune.strategy import Answer, Answers, Ask, ClientInfo, ServerState, Strategy
from fedtune.wire.ends import ServerEnd
from fedtune.wire.ledger import Cost
from server.exchange import AWAY, exchange
from server.gate import Diverged
from server.gatekeeper import Gatekeeper, GateMemory
from server.journal import Journal
from server.limits import most_numbers
from server.past import NOTHING, Asked
from server.post import OPEN, Post
from server.records import RoundRecord, Watcher
from server.roll import Roll
from server.rollback import computed
from server.run_folder import RunFolder, writing
from server.spool import Spool, SpooledAnswers
from server.tally import Tally

Selected = Mapping[str, Mapping[str, float]]
NOTHING_ASKED_BEFORE: Mapping[str, Asked] = MappingProxyType({})
FIRST = GateMemory()
HAS_IT = Envelope({})  # of a client whose answer was refused, and which took the broadcast


@dataclass(frozen=True)
class Federation:
    """What stays the same over all rounds of a run."""

    job: Job
    strategy: Strategy
    plan: Blueprint
    grid: Grid
    roll: Roll
    watcher: Watcher
    wire: ServerEnd
    journal: Journal
    run: str  # its name in every message, and in no other run's
    post: Post = OPEN

    @property
    def clients(self) -> Mapping[str, ClientInfo]:
        return self.roll.clients


class Round:
    """`past`: what became of its asks before it was taken up again, by their ids. Its spool stays until `clear`."""

    def __init__(
        self,
        federation: Federation,
        run: RunFolder,
        number: int,
        clients: Iterable[str],
        past: Mapping[str, Asked] = NOTHING_ASKED_BEFORE,
        undone: Collection[int] = (),
        gate: GateMemory = FIRST,
    ) -> None:
        self.number, self.shares, self.tally = number, dict[str, float](), Tally(clients)
        self.diverged = set[str]()  # clients whose held-out loss was not finite
        self._undone = sorted(undone)  # rounds that were rolled back: clients forget them with the next ask
        self._federation, self._run, self._past, self._began = federation, run, past, time.monotonic()
        self._costs: dict[str, Cost] = {}  # of the answers to the open ask, as they came
        self._digests: dict[str, str] = {}  # and of what lies in its spool
        self.gate = Gatekeeper(federation.job, federation.strategy, federation.plan, gate, run.quarantine)

    def train(self, state: ServerState, cohort: Sequence[ClientInfo]) -> ServerState:
        """Drive the strategy's generator from state to state; `shares` are then the clients' in its last fold."""
        conversation = self._federation.strategy.round(state, cohort)
        try:
            ask, step = computed(lambda: next(conversation)), 0
            while True:
                answers = self._answers(ask, f"{self.number}.{step}", cohort)
                self.shares, step = dict(answers.weights), step + 1
                ask = computed(lambda: conversation.send(answers))  # noqa: B023 -- called at once
        except StopIteration as end:
            after: ServerState = end.value
            return after

    def evaluate(self, state: ServerState) -> ServerState:
        """Every client looks at what is published with its held-out examples; a failure here costs no round."""
        clients, ask_id = self.tally.able(self.tally.clients), f"{self.number}.evaluate"
        ask = computed(lambda: self._federation.strategy.evaluation(state, clients))
        answered = []
        for client, answer in self._admitted(clients, ask, ask_id):
            self.tally.held_out(client, answer)
            answered.append(client)
        self._close(ask_id, answered)
        self.gate.counted(answered)
        return self._federation.strategy.evaluated(state, clients, answered)

    def report(self, own: Mapping[str, float], selected: Selected | None = None, notes: Sequence[str] = ()) -> RoundRecord:
        """The round's record, with the strategy's own metrics."""
        figures = self.tally.figures()
        loss = figures.pop("loss", None)
        if loss is not None and self._federation.job.model.task == "causal":
            figures["perplexity"] = math.exp(min(loss, 700.0))
        seconds, clients = time.monotonic() - self._began, self.tally.clients
        layers, own = split(own)
        return RoundRecord(self.number, loss, {**figures, **own}, seconds, clients, selected or {}, layers, tuple(notes))

    def clear(self) -> None:
        Spool(self._run.spool).clear()

    def _answers(self, ask: Ask, ask_id: str, cohort: Sequence[ClientInfo]) -> Answers:
        """Spool what passes the gate, and give the strategy what it may see of it."""
        weights, metrics = dict[str, float](), {}
        for client, answer in self._admitted(self.tally.able(info.id for info in cohort), ask, ask_id):
            weights[client], metrics[client] = answer.weight, answer.metrics
        for client, reason in ({} if self._past_of(ask_id).closed else self.gate.left_out()).items():
            self._refused(client, ask_id, self._spool(ask_id).get(client, self._digests[client]), reason)
            self.tally.failed(client, f"refused: {reason}")
            del weights[client]
        self._require_quorum(ask, len(weights), len(cohort))
        self._close(ask_id, weights)
        self.gate.counted(weights)
        for client in weights:
            self.tally.trained(client, metrics[client])
        return SpooledAnswers(self._spool(ask_id), dict(self._digests), weights, ask.fold, self._decoding(ask))

    def _close(self, ask_id: str, answered: Collection[str]) -> None:
        """From here on these answers count, and no others, however often the round is taken up again."""
        if not self._past_of(ask_id).closed:
            reasons = {client: record.failed for client, record in self.tally.clients.items() if record.failed}
            failed = {client: {"reason": why, "refused": client in self.gate.refused} for client, why in reasons.items()}
            self._federation.journal.write("closed", ask=ask_id, answered=sorted(answered), failed=failed)

    def _admitted(self, clients: Sequence[str], ask: Ask, ask_id: str) -> Iterator[tuple[str, Answer]]:
        """The answers that pass the gate, as they come; the reasons of the others go into the tally."""
        decoded, known = self._decoding(ask), self._federation.clients
        self._costs, self._digests = {}, {}
        self.gate.open(ask, ask_id)
        for client, envelope in self._replies(clients, ask, ask_id):
            try:
                answer = self.gate.let_in(envelope, known[client], partial(decoded, client))
                self.tally.read(client, envelope, answer.payload)
            except Refused as reason:
                if self.gate.blames(reason):
                    self._refused(client, ask_id, envelope, str(reason))
                self._fail(client, ask_id, f"refused: {reason}", has=True, diverged=isinstance(reason, Diverged))
            except ClientFailed as reason:
                self._fail(client, ask_id, str(reason))
            except (*MALFORMED, RuntimeError) as error:
                reason = f"it is malformed ({type(error).__name__})"
                self._refused(client, ask_id, envelope, reason)
                self._fail(client, ask_id, f"refused: {reason}", has=True)
            else:
                self._keep(client, ask_id, envelope)
                yield client, answer

    def _keep(self, client: str, ask_id: str, envelope: Envelope) -> None:
        """In the spool, then in the journal: then it counts."""
        if client in self._digests:
            return  # it lay there
        with writing(self._run.path):
            digest = self._digests[client] = self._spool(ask_id).put(client, envelope)
            cost = asdict(self._costs.get(client, Cost()))
            self._federation.journal.write("answered", ask=ask_id, client=client, digest=digest, cost=cost)

    def _refused(self, client: str, ask_id: str, envelope: Envelope, reason: str) -> None:
        file = self.gate.refuse(client, envelope, self.number, reason)
        with writing(self._run.path):
            self._federation.journal.write("refused", ask=ask_id, client=client, reason=reason, file=file)

    def _fail(self, client: str, ask_id: str, reason: str, has: bool = False, diverged: bool = False) -> None:
        """`has`: whether the broadcast has come to it all the same."""
        self.tally.failed(client, reason)
        self.diverged |= {client} if diverged else set()
        told = {"reason": self.tally.clients[client].failed, "has": has, "diverged": diverged}
        told |= {"refused": client in self.gate.refused}
        with writing(self._run.path):
            self._federation.journal.write("failed", ask=ask_id, client=client, **told)

    def _decoding(self, ask: Ask) -> Callable[[str, Envelope], Answer]:
        """How the wire reads a client's answer: no more numbers than it can have been asked for."""
        wire, clients, plan = self._federation.wire, self._federation.clients, self._federation.plan
        return lambda client, envelope: wire.answer(envelope, clients[client], most_numbers(ask, clients[client], plan))

    def _replies(self, clients: Sequence[str], ask: Ask, ask_id: str) -> Iterator[tuple[str, Envelope]]:
        """Clients whose version of the broadcast is not the one that was taken for theirs are asked again, with everything."""
        wire, outdated = self._federation.wire, []
        timeout, began = self._federation.job.rounds.timeout, time.monotonic()
        packed = self._packed(clients, ask, ask_id)
        came = yield from self._before(packed, ask, ask_id)
        rest = {client: envelope for client, envelope in packed.items() if client not in came}
        enough = self._quorum(ask, len(clients)) - len(self._digests)
        for client, envelope in self._exchanged(rest, ask, ask_id, timeout, enough):
            if wire.arrived(client, envelope):
                outdated.append(client)
            elif envelope is not None:
                yield client, envelope
        again = self._packed(outdated, ask, ask_id)
        left = max(timeout - (time.monotonic() - began), 0.0)
        for client, envelope in self._exchanged(again, ask, ask_id, left, again=True):
            wire.arrived(client, envelope)
            if envelope is not None:
                yield client, envelope
        wire.settle()

    def _before(
        self, packed: Mapping[str, Envelope], ask: Ask, ask_id: str
    ) -> Generator[tuple[str, Envelope], None, Collection[str]]:
        """What has become of the ask before this round was taken up again; returns the clients that need not be asked."""
        past, settled = self._past_of(ask_id), set[str]()
        for client in sorted(packed.keys() & past.answered.keys()):
            try:
                envelope = self._spool(ask_id).get(client, past.answered[client].get("digest", ""))
            except Damaged as reason:
                self._federation.journal.write("damaged", reason=str(reason))  # it is asked again, and sends the same
                continue
            self._digests[client] = past.answered[client]["digest"]
            self.tally.sent(client, packed[client], ask.payload_for(client))
            self.tally.came_before(client, Cost(**past.answered[client]["cost"]), envelope)
            self._federation.wire.arrived(client, envelope)
            settled.add(client)
            yield client, envelope
        for client in packed.keys() & past.failed.keys():
            self.tally.failed(client, past.failed[client]["reason"])
            self.diverged |= {client} if past.failed[client].get("diverged") else set()
            self.gate.refused |= {client} if past.failed[client].get("refused") else set()
            self._federation.wire.arrived(client, HAS_IT if past.failed[client].get("has") else None)
            settled.add(client)
        return settled

    def _exchanged(
        self, asks: Mapping[str, Envelope], ask: Ask, ask_id: str, timeout: float, enough: int = 0, again: bool = False
    ) -> Iterator[tuple[str, Envelope | None]]:
        """What is sent `again` would not have been, without codecs: it counts as no larger than it is."""
        if not asks:
            return
        federation, names = self._federation, self._nodes(asks, ask_id)
        federation.journal.write("asked", ask=ask_id, clients=sorted(names.values()))
        federation.watcher.doing(ask.kind, 0, len(asks))
        by_node = {node: asks[client] for node, client in names.items()}

        def sent(node: int, envelope: Envelope) -> None:
            self.tally.sent(names[node], envelope, None if again else ask.payload_for(names[node]))

        replies = exchange(federation.grid, by_node, timeout, federation.post, sent, enough)
        for done, reply in enumerate(replies, 1):
            federation.watcher.doing(ask.kind, done, len(asks))
            client = names[reply.node]
            if reply.carried is not None:
                self._costs[client] = self.tally.came(client, reply.carried, reply.envelope)
            if reply.envelope is None:
                self._fail(client, ask_id, reply.failed)
            yield client, reply.envelope

    def _nodes(self, clients: Iterable[str], ask_id: str) -> dict[int, str]:
        """Where they are; a client whose node nobody knows has failed."""
        roll, clients = self._federation.roll, list(clients)
        roll.find(clients)
        for client in clients:
            if client not in roll.nodes:
                self._fail(client, ask_id, AWAY)
        return {roll.nodes[client]: client for client in clients if client in roll.nodes}

    def _packed(self, clients: Sequence[str], ask: Ask, ask_id: str) -> dict[str, Envelope]:
        federation = self._federation
        header = {"ask": ask_id, "run": federation.run, "round": self.number, "base": federation.plan.adapter.base}
        header |= {"undone": self._undone} if self._undone else {}
        return {client: federation.wire.ask(ask, client, header) for client in clients}

    def _past_of(self, ask_id: str) -> Asked:
        return self._past.get(ask_id, NOTHING)

    def _spool(self, ask_id: str) -> Spool:
        return Spool(self._run.spool / ask_id)

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
