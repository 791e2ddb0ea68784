"""Buffered rounds (FedBuff; Nguyen et al., AISTATS 2022): nobody waits for the slowest.

`rounds.clients` clients are at work at any time; who has answered is replaced at once. When `rounds.buffer` answers lie in the
spool they are one round: each is made into an answer to what is sent now (server/late.py), with a smaller weight the more
rounds have ended since it was asked for, and they are folded in the order of client ids.

A client's answers count once in a round: while one of its lies in the buffer, a second is left where it is until the next.
Nobody is asked the same ask twice. Clients that are at work when a round ends are not asked to evaluate, save after the last.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, Refused
from fedtune.seeds import seed_of
from fedtune.strategy import Ask, ServerState
from server import quorum
from server.asking import FIRST, NOTHING_ASKED_BEFORE
from server.at_work import AtWork
from server.exchange import Reply
from server.federation import Federation
from server.gatekeeper import GateMemory
from server.late import Awaited
from server.meeting import wants_hello
from server.past import Asked
from server.records import RoundRecord
from server.roll import PATIENCE
from server.round import Round, Selected
from server.run_folder import RunFolder


class BufferedRound(Round):
    """Ends when the buffer is full; who is at work then works on."""

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
        super().__init__(federation, run, number, (), past, undone, gate)
        self._able, self._asked = list(clients), set[str]()  # who may be asked, and who was asked what is open
        self._hailed = set[str]()  # clients that were told the job again
        self._staleness = dict[str, int]()  # of what was folded, by client

    def evaluate(self, state: ServerState) -> ServerState:
        last = self.number == self._federation.job.rounds.count
        for client in self._able:
            self.tally.joins(client)
            if last and client in self._at_work.on:
                self.tally.again(client)
        self._mark_busy(() if last else self._at_work.on)
        return super().evaluate(state)

    def report(self, own: Mapping[str, float], selected: Selected | None = None, notes: Sequence[str] = ()) -> RoundRecord:
        late = self._staleness.values()
        staleness = {"staleness": sum(late) / len(late)} if late else {}
        return super().report({**own, **staleness}, selected, notes)

    def _replies(self, clients: Sequence[str], ask: Ask, ask_id: str) -> Iterator[tuple[str, Envelope]]:
        if ask.kind == "evaluate":
            yield from super()._replies(clients, ask, ask_id)
            return
        yield from self._before({}, ask, ask_id)
        self._asked = {client for client, line in self._late.counted.items() if not line["rounds"]}
        for client in self._late.counted:  # it has had more than the last checkpoint knows of
            self._federation.wire.forget(client)
        self._at_work.drop_away()
        self._lost_again(ask, ask_id)
        pauses = quorum.pauses()
        while not self._over(ask) and not self._past_of(ask_id).closed:
            self._employ(clients, ask, ask_id)
            if not self._at_work.others(self._digests) and not self._waited(pauses):
                break
            if found := self._at_work.look(self._digests):
                yield from self._taken(*found, ask, ask_id)
        self._staleness = {client: line["rounds"] for client, line in self._late.counted.items()}
        self._federation.wire.settle()

    def _lost_again(self, ask: Ask, ask_id: str) -> None:
        """Of a closed ask some answers may be damaged, or gone with the spool of a round that is repeated: it is open again,
        and who answered this very ask is asked first, for it sends the same."""
        past = self._past_of(ask_id)
        lost = {client: line for client, line in past.answered.items() if client not in self._digests}  # each has a `late`
        if past.closed and lost:
            self._past = {**self._past, ask_id: replace(past, closed=False)}
            if first := sorted(client for client, line in lost.items() if line["late"]["rounds"] == 0):
                self._send(first, ask, ask_id)

    def _employ(self, clients: Sequence[str], ask: Ask, ask_id: str) -> None:
        """As many are at work as can be: drawn from those who have not been asked this yet, in an order that depends on (seed,
        asks so far) alone."""
        at_work, job = self._at_work, self._federation.job
        free = [client for client in clients if client not in at_work.on and client not in self._asked]
        hands = quorum.wanted(job, len(self._federation.clients)) - at_work.hands
        if free and hands > 0:
            drawn = sorted(free, key=lambda client: seed_of(job.seed, "buffered", at_work.drawn, client))[:hands]
            at_work.drawn += len(drawn)
            self._send(drawn, ask, ask_id)

    def _send(self, clients: Sequence[str], ask: Ask, ask_id: str) -> None:
        federation, timeout = self._federation, self._federation.job.rounds.timeout
        self._asked |= set(clients)
        for client in clients:
            self.tally.joins(client)
            self.tally.again(client)
        packed = self._packed(clients, ask, ask_id)
        names = self._nodes(clients, ask_id)
        federation.journal.write("asked", ask=ask_id, clients=sorted(names.values()))
        until = time.monotonic() + timeout
        ones = [
            Awaited(client, node, self.number, ask_id, ask, federation.wire.leave(ask_id, client), until)
            for node, client in names.items()
        ]

        def sent(node: int, envelope: Envelope) -> None:
            self.tally.sent(names[node], envelope, ask.payload_for(names[node]))

        self._at_work.begin(ones, {node: packed[client] for node, client in names.items()}, timeout, sent)

    def _taken(self, one: Awaited, reply: Reply, ask: Ask, ask_id: str) -> Iterator[tuple[str, Envelope]]:
        federation, client = self._federation, one.client
        self.tally.joins(client)
        if reply.carried is not None:
            self._costs[client] = self.tally.came(client, reply.carried, reply.envelope)
        if federation.wire.arrived(client, reply.envelope, one.pending) or self._greeted(client, reply.envelope):
            self._send([client], ask, ask_id)  # it has another version than was thought: it is sent everything
            return
        if reply.envelope is None:
            self._fail(client, ask_id, reply.failed)
            return
        try:
            envelope = self._late.as_answer(reply.envelope, one, ask, ask_id)
        except Refused as reason:
            self._refused(client, one.ask_id, reply.envelope, str(reason))
            self._fail(client, ask_id, f"refused: {reason}")
        except ClientFailed as reason:
            self._fail(client, ask_id, str(reason))
        else:
            self._late.counted[client] = {"ask": one.ask_id, "rounds": self.number - one.round}
            federation.watcher.doing(ask.kind, self._own + 1, self._size)
            yield client, envelope

    def _greeted(self, client: str, envelope: Envelope | None) -> bool:
        """Whether it has heard another run since, or lost its job, and was told this one; once in a round."""
        if envelope is None or not wants_hello(envelope) or client in self._hailed:
            return False
        self._hailed.add(client)
        return bool(self._federation.roll.greet([client], PATIENCE))

    def _waited(self, pauses: Iterator[float]) -> bool:
        """Nobody is at work who could fill the buffer: whether those who failed are to be asked again."""
        federation, reasons = self._federation, self.tally.reasons
        again = [client for client in reasons if client in self._asked and client not in self.gate.refused]
        wanted = quorum.quorum(federation.job, self._size)
        if federation.job.rounds.without_quorum == "stop" or self._own >= wanted or not again:
            return False
        told = "; ".join(f"{client}: {reasons[client]}" for client in again)
        quorum.pause(next(pauses), told, federation.watcher, self._own, wanted, federation.journal.write)
        self._asked -= set(again)
        return True

    def _close(self, ask_id: str, answered: Collection[str]) -> None:
        self._mark_busy(self._at_work.on.keys() - set(answered))
        super()._close(ask_id, answered)

    def _mark_busy(self, clients: Collection[str]) -> None:
        for client in self.tally.able(self.tally.clients.keys() & set(clients)):
            self.tally.failed(client, f"at work on ask {self._at_work.on[client].ask_id}")

    @property
    def _at_work(self) -> AtWork:
        return self._federation.at_work

    @property
    def _size(self) -> int:
        """Of the buffer."""
        return quorum.buffered(self._federation.job, len(self._federation.clients))

    def _own_of(self, clients: Collection[str]) -> int:
        return len(clients)

    def _quorum(self, ask: Ask, asked: int) -> int:
        return 0 if ask.kind == "evaluate" else quorum.quorum(self._federation.job, self._size)

    def _over(self, ask: Ask) -> bool:
        return ask.kind != "evaluate" and self._own >= self._size
