"""An open ask of a round: what goes out, to whom, until when, and all that comes in.

A round that is taken up again after a crash runs from its start, with the asks that it had: they are a function of the state
and the answers. What the journal says has come is read from the spool; only the others are asked.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from fedtune.envelope import Envelope
from fedtune.errors import Damaged
from fedtune.strategy import Ask
from fedtune.wire.ledger import Cost
from server import quorum
from server.exchange import AWAY, TOO_LATE, Reply, exchange
from server.federation import Federation
from server.gatekeeper import Gatekeeper, GateMemory
from server.latecomers import Latecomers, LateRefused
from server.meeting import wants_hello
from server.past import NOTHING, Asked, refused_in
from server.report_units import one_line
from server.run_folder import RunFolder
from server.spool import Spool
from server.tally import LONGEST_REASON, Tally

NOTHING_ASKED_BEFORE: Mapping[str, Asked] = MappingProxyType({})
FIRST = GateMemory()
HAS_IT = Envelope({})  # of a client whose answer was refused, and which took the broadcast


class Asking:
    """`past`: what became of the round's asks before it was taken up again, by their ids."""

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
        self.gate.refused |= refused_in(federation.journal.entries, number) & federation.clients.keys()
        self._late = Latecomers(federation, number, self.tally, run.quarantine)
        self._whole = set[str]()  # clients that were sent all of the open ask, as they had another version than was thought

    def _replies(self, clients: Sequence[str], ask: Ask, ask_id: str) -> Iterator[tuple[str, Envelope]]:
        """Clients whose version of the broadcast is not the one that was taken for theirs are asked again, with everything."""
        wire, past = self._federation.wire, self._past_of(ask_id)
        for client in [client for client, line in {**past.answered, **past.failed}.items() if line.get("whole")]:
            wire.forget(client)
        packed = self._packed(clients, ask, ask_id)
        came = yield from self._before(packed, ask, ask_id)
        rest, tries = [client for client in packed if client not in came], quorum.pauses()
        yield from self._tried({client: packed[client] for client in rest}, ask, ask_id, len(clients))
        while rest := self._again(packed, ask, ask_id, tries):
            yield from self._tried({client: packed[client] for client in rest}, ask, ask_id, len(clients))
        wire.settle()

    def _tried(self, asks: Mapping[str, Envelope], ask: Ask, ask_id: str, asked: int) -> Iterator[tuple[str, Envelope]]:
        """Until the deadline. Who takes part in another run by now, or has lost the job, is told it, and asked again."""
        wire, outdated, lost = self._federation.wire, list[str](), dict[str, Envelope]()
        for client in asks if self._over(ask) else ():
            self._fail(client, ask_id, TOO_LATE)
        timeout, began = self._federation.job.rounds.timeout, time.monotonic()
        enough = self._quorum(ask, asked) - self._own
        for client, envelope in self._exchanged({} if self._over(ask) else asks, ask, ask_id, timeout, enough):
            if client not in self._late.counted and wire.arrived(client, envelope):
                outdated.append(client)
            elif envelope is not None and wants_hello(envelope):
                lost[client] = envelope
            elif envelope is not None:
                yield client, envelope
        greeted = self._federation.roll.greet(lost, max(timeout - (time.monotonic() - began), 0.0))
        yield from ((client, lost[client]) for client in sorted(lost.keys() - set(greeted)))
        outdated += greeted
        self._whole |= set(outdated)
        again = self._packed(outdated, ask, ask_id)
        left = max(timeout - (time.monotonic() - began), 0.0)
        for client, envelope in self._exchanged(again, ask, ask_id, left, again=True):
            wire.arrived(client, envelope)
            if envelope is not None:
                yield client, envelope

    def _again(self, packed: Mapping[str, Envelope], ask: Ask, ask_id: str, pauses: Iterator[float]) -> list[str]:
        """Who is asked once more, as too few have answered and the job says to wait; with the same bytes, so that a client that
        is at work need not begin anew."""
        federation, wanted = self._federation, self._quorum(ask, len(packed))
        missing = [client for client in packed if client not in self._digests and client not in self.gate.refused]
        stop = federation.job.rounds.without_quorum == "stop" or self._past_of(ask_id).closed
        if stop or self._own >= wanted or not missing:
            return []
        reasons = "; ".join(f"{client}: {self.tally.reasons.get(client, '')}" for client in missing)
        quorum.pause(next(pauses), reasons, federation.watcher, self._own, wanted, federation.journal.write)
        federation.under_way.again(ask_id)
        for client in missing:
            self.tally.again(client)
        return missing

    def _before(
        self, packed: Mapping[str, Envelope], ask: Ask, ask_id: str
    ) -> Generator[tuple[str, Envelope], None, Collection[str]]:
        """What has become of the ask before this round was taken up again; returns the clients that need not be asked."""
        past, settled = self._past_of(ask_id), set[str]()
        for client in sorted(client for client, line in past.answered.items() if client in packed or "late" in line):
            try:
                envelope = self._spool(ask_id).get(client, past.answered[client].get("digest", ""))
            except Damaged as reason:
                self._federation.journal.write("damaged", reason=str(reason))  # it is asked again, and sends the same
                self._late.damaged(client, past.answered[client], asked=client in packed)
                continue
            line = past.answered[client]
            self._digests[client] = line["digest"]
            if "late" in line:
                self.tally.joins(client)
                self._late.counts(client, line["late"])
            else:
                self.tally.sent(client, packed[client], ask.payload_for(client))
                self._federation.wire.arrived(client, envelope)
                settled.add(client)
            self.tally.came_before(client, Cost(**line["cost"]), envelope)
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

        beside, done = self._late.beside(ask, ask_id, names, partial(self._over, ask)), 0
        for reply in exchange(federation.grid, by_node, timeout, federation.post, sent, enough, beside, federation.roll.gone):
            if reply.to:
                yield from self._came_late(reply, ask, ask_id, names.values())
                continue
            done, client = done + 1, names[reply.node]
            federation.watcher.doing(ask.kind, done, len(asks))
            if reply.carried is not None:
                self._costs[client] = self.tally.came(client, reply.carried, reply.envelope)
            if reply.envelope is None:
                self._fail(client, ask_id, reply.failed)
            yield client, reply.envelope

    def _came_late(self, reply: Reply, ask: Ask, ask_id: str, asked: Collection[str]) -> Iterator[tuple[str, Envelope]]:
        try:
            if made := self._late.made(reply, ask, ask_id, asked):
                if reply.carried is not None:
                    self._costs[made[0]] = self.tally.came(made[0], reply.carried, reply.envelope)
                yield made
        except LateRefused as reason:
            self._refused(reason.client, reason.ask_id, reason.envelope, str(reason))

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

    def _fail(self, client: str, ask_id: str, reason: str, has: bool = False, diverged: bool = False) -> None:
        """`has`: whether the broadcast has come to it all the same."""
        self.tally.failed(client, reason)
        self.diverged |= {client} if diverged else set()
        told = {"reason": self.tally.clients[client].failed, "has": has, "diverged": diverged}
        told |= {"refused": client in self.gate.refused, "whole": client in self._whole}
        self._federation.journal.write("failed", ask=ask_id, client=client, **told)

    def _refused(self, client: str, ask_id: str, envelope: Envelope, reason: str) -> None:
        reason = one_line(reason, LONGEST_REASON)  # it may hold names that the client made up
        file = self.gate.refuse(client, envelope, self.number, reason)
        self._digests.pop(client, None)  # it may have lain in the spool
        self._federation.journal.write("refused", ask=ask_id, client=client, reason=reason, file=file)

    def _past_of(self, ask_id: str) -> Asked:
        return self._past.get(ask_id, NOTHING)

    def _spool(self, ask_id: str) -> Spool:
        return Spool(self._run.spool / ask_id)

    def _quorum(self, ask: Ask, asked: int) -> int:
        """Answers that the round cannot do without."""
        job = self._federation.job
        return 0 if ask.kind == "evaluate" else quorum.quorum(job, quorum.wanted(job, asked))

    @property
    def _own(self) -> int:
        """Answers that are let in, without those that came late from another round."""
        return self._own_of(self._digests)

    def _own_of(self, clients: Collection[str]) -> int:
        return len(set(clients) - self._late.counted.keys())

    def _over(self, ask: Ask) -> bool:
        """Nobody is waited for any more, as enough of those that were asked too many have answered."""
        rounds = self._federation.job.rounds
        return ask.kind != "evaluate" and rounds.clients is not None and rounds.oversample > 1 and self._own >= rounds.clients
