"""Of one round: the late answers that count in its asks, and who has become late in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.envelope import Envelope
from fedtune.errors import MALFORMED, ClientFailed, Refused
from fedtune.payload import Role
from fedtune.strategy import Answer, Ask
from server.exchange import Beside, Reply
from server.federation import Federation
from server.gatekeeper import Gatekeeper, GateMemory
from server.late import Awaited, as_answer_to, discounted, obstacle
from server.limits import most_numbers
from server.report_units import one_line
from server.tally import LONGEST_REASON, Tally

Line = Mapping[str, Any]


class LateRefused(Refused):
    """By the gate, against its own ask."""

    def __init__(self, one: Awaited, envelope: Envelope, reason: str) -> None:
        super().__init__(reason)
        self.client, self.ask_id, self.envelope = one.client, one.ask_id, envelope


class Latecomers:
    """`counted`: client -> which ask it has answered, and how late; of the open ask alone."""

    def __init__(self, federation: Federation, number: int, tally: Tally, quarantine: Path) -> None:
        self.counted: dict[str, Line] = {}
        self.notes: list[str] = []
        self._federation, self._number, self._tally, self._quarantine = federation, number, tally, quarantine

    def open(self) -> None:
        """From now on answers are to another ask."""
        self.counted = {}

    def beside(self, ask: Ask, ask_id: str, names: Mapping[int, str], over: Callable[[], bool]) -> Beside:
        """For the exchange of this ask; `names` are those of the nodes that are asked."""
        if self._federation.job.rounds.late == "drop" or ask.kind == "evaluate":
            return Beside(over)
        if why := obstacle(ask, self._federation.strategy):
            return Beside(over, left=lambda messages: self._drop(ask_id, [names[node] for node in messages.values()], why))
        under_way, timeout = self._federation.under_way, self._federation.job.rounds.timeout
        before = under_way.like(ask, ask_id)
        return Beside(over, before, lambda messages: self._await(ask, ask_id, messages, names), lasts=timeout)

    def made(self, reply: Reply, ask: Ask, ask_id: str, asked: Collection[str]) -> tuple[str, Envelope] | None:
        """A late answer, as one to the open ask; None of one that does not count. Raises LateRefused."""
        under_way = self._federation.under_way
        if reply.envelope is None:
            under_way.lost(reply.to)
            return None
        if (one := under_way.taken(reply.to)) is None:
            return None
        if one.client in asked or one.client in self.counted:
            self._drop(one.ask_id, [one.client], f"it was asked anew with {ask_id}")
            return None
        try:
            envelope = self.as_answer(reply.envelope, one, ask, ask_id)
        except ClientFailed as reason:
            self._drop(one.ask_id, [one.client], str(reason))
            return None
        except Refused as reason:
            self._drop(one.ask_id, [one.client], f"refused: {reason}")
            raise LateRefused(one, reply.envelope, str(reason)) from reason
        self._federation.journal.write("late", ask=one.ask_id, client=one.client, counts_in=ask_id)
        self.counts(one.client, {"ask": one.ask_id, "rounds": self._number - one.round})
        return one.client, envelope

    def counts(self, client: str, line: Line) -> None:
        self.counted[client] = line
        self.notes.append(f"late: {client} answered ask {line['ask']}, which counts with staleness {line['rounds']}")

    def damaged(self, client: str, line: Line, asked: bool) -> None:
        """Of an answer that lay in the spool, one of before: its ask cannot be made again."""
        if "late" in line and line["late"]["rounds"] and not asked:
            self._drop(line["late"]["ask"], [client], "its file in the spool is damaged or gone")

    def excuse(self) -> None:
        """Who is at work on an ask of before is not asked to evaluate; unless all are."""
        busy = self._federation.under_way.busy
        if set(self._tally.able(self._tally.clients)) - busy.keys():
            for client in self._tally.able(busy.keys() & self._tally.clients.keys()):
                self._tally.failed(client, f"late: at work on ask {busy[client]}")

    def as_answer(self, envelope: Envelope, one: Awaited, ask: Ask, ask_id: str) -> Envelope:
        """Past the gate, against its own ask; then made into an answer to this one. Raises Refused or ClientFailed."""
        federation, late = self._federation, self._number - one.round
        info, header = federation.clients[one.client], envelope.header
        try:
            answer = self._admitted(envelope, one)
            if Role.VECTOR in answer.payload.roles.values():
                raise ClientFailed("it holds more than weights, which means something in its own round alone")
            self._tally.joins(one.client)
            self._tally.read(one.client, envelope, answer.payload)
            weight = discounted(answer.weight, late, federation.job.rounds.staleness)
            about = {**{name: header[name] for name in ("base", "client", "seconds") if name in header}, "ask": ask_id}
            return as_answer_to(ask, answer, one, info, federation.wire, weight, about)
        except (*MALFORMED, RuntimeError) as error:
            raise Refused(f"it is malformed ({type(error).__name__})") from error

    def _admitted(self, envelope: Envelope, one: Awaited) -> Answer:
        federation, info = self._federation, self._federation.clients[one.client]
        gate = Gatekeeper(federation.job, federation.strategy, federation.plan, GateMemory(), self._quarantine)
        gate.open(one.ask, one.ask_id)
        most = most_numbers(one.ask, info, federation.plan)
        return gate.let_in(envelope, info, lambda given: federation.wire.answer(given, info, most, one.asked))

    def _await(self, ask: Ask, ask_id: str, messages: Mapping[str, int], names: Mapping[int, str]) -> None:
        federation = self._federation
        pending = {names[node]: federation.wire.leave(ask_id, names[node]) for node in set(messages.values())}
        for client in pending:  # what it has is noted nowhere after a crash: it is sent everything, with and without one
            federation.wire.forget(client)
        until = time.monotonic() + federation.job.rounds.timeout
        federation.under_way.add(
            {
                id: Awaited(names[node], node, self._number, ask_id, ask, pending[names[node]], until)
                for id, node in messages.items()
            }
        )

    def _drop(self, ask_id: str, clients: Sequence[str], why: str) -> None:
        why = one_line(why, LONGEST_REASON)
        for client in sorted(set(clients)):
            self._federation.journal.write("late", ask=ask_id, client=client, dropped=why)
            self.notes.append(f"late: what {client} answers to ask {ask_id} is dropped: {why}")
