"""One open round: the strategy's asks go out, answers pass the gate, are spooled, folded and handed back to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from fedtune.aggregation import split
from fedtune.envelope import Envelope
from fedtune.errors import MALFORMED, ClientFailed, Refused
from fedtune.strategy import Answer, Answers, Ask, ClientInfo, ServerState
from fedtune.wire import unpack_answer
from fedtune.wire.ledger import Cost
from server import quorum
from server.asking import Asking
from server.gate import Diverged
from server.limits import most_numbers
from server.records import RoundRecord
from server.rollback import computed
from server.run_folder import writing
from server.spool import Spool, SpooledAnswers

Selected = Mapping[str, Mapping[str, float]]


class Round(Asking):
    """Its spool stays until `clear`; `shares` are the clients' in the last fold."""

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
        self._late.excuse()
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
        return RoundRecord(
            self.number, loss, {**figures, **own}, seconds, clients, selected or {}, layers, (*notes, *self._late.notes)
        )

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
        own, wanted = self._own_of(weights), self._quorum(ask, len(cohort))
        if own < wanted:
            raise quorum.too_few(self.number, own, len(cohort), wanted, self.tally.reasons)
        self._close(ask_id, weights)
        self.gate.counted(weights)
        for client in weights:
            self.tally.trained(client, metrics[client])
        return SpooledAnswers(self._spool(ask_id), dict(self._digests), weights, ask.fold, self._decoding(ask))

    def _close(self, ask_id: str, answered: Collection[str]) -> None:
        """From here on these answers count, and no others, however often the round is taken up again."""
        if not self._past_of(ask_id).closed:
            refused, reasons = self.gate.refused, self.tally.reasons
            failed = {client: {"reason": why, "refused": client in refused} for client, why in reasons.items()}
            with writing(self._run.path):
                self._spool(ask_id).settle()
            self._federation.journal.write("closed", ask=ask_id, answered=sorted(answered), failed=failed)

    def _admitted(self, clients: Sequence[str], ask: Ask, ask_id: str) -> Iterator[tuple[str, Answer]]:
        """The answers that pass the gate, as they come; the reasons of the others go into the tally."""
        self._costs, self._digests, self._whole = {}, {}, set()
        self.gate.open(ask, ask_id)
        self._late.open()
        decoded, known = self._decoding(ask), self._federation.clients
        for client, envelope in self._replies(clients, ask, ask_id):
            try:
                answer = self.gate.let_in(
                    envelope, known[client], partial(decoded, client), self._past_of(ask_id).counts(client)
                )
                self.tally.read(client, envelope, answer.payload)
            except Refused as reason:
                if self.gate.blames(reason):
                    self._refused(client, ask_id, envelope, str(reason))
                self._fail(client, ask_id, f"refused: {reason}", has=True, diverged=isinstance(reason, Diverged))
            except ClientFailed as reason:
                self._fail(client, ask_id, str(reason))
            except (*MALFORMED, RuntimeError) as error:
                why = f"it is malformed ({type(error).__name__})"
                self._refused(client, ask_id, envelope, why)
                self._fail(client, ask_id, f"refused: {why}", has=True)
            else:
                self._keep(client, ask_id, envelope)
                yield client, answer

    def _keep(self, client: str, ask_id: str, envelope: Envelope) -> None:
        """In the spool, then in the journal; both are on the disk when the ask is closed, and then it counts."""
        if client in self._digests:
            return  # it lay there
        with writing(self._run.path):
            digest = self._digests[client] = self._spool(ask_id).put(client, envelope)
            about: dict[str, Any] = {"cost": asdict(self._costs.get(client, Cost()))}
            about |= {"whole": True} if client in self._whole else {}
            about |= {"late": self._late.counted[client]} if client in self._late.counted else {}
            self._federation.journal.write("answered", soon=True, ask=ask_id, client=client, digest=digest, **about)

    def _decoding(self, ask: Ask) -> Callable[[str, Envelope], Answer]:
        """How the wire reads a client's answer: no more numbers than it can have been asked for."""
        wire, clients, plan, late = self._federation.wire, self._federation.clients, self._federation.plan, self._late.counted

        def decode(client: str, envelope: Envelope) -> Answer:
            most = most_numbers(ask, clients[client], plan)
            return unpack_answer(envelope) if client in late else wire.answer(envelope, clients[client], most)

        return decode
