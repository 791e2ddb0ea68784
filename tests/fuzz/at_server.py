"""Answers at the coordinator's door: through its exchange, its post, the wire and the gate, into spool, journal and quarantine.

What is let in must keep to every rule of the gate, looked at here by other means; what is not must have changed nothing but the
journal's lines that say so, the quarantine, and what is known of its own sender.
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch

from fedtune.envelope import Envelope
from fedtune.payload import payload_of
from fedtune.strategy import Answer, ServerState
from fedtune.wire.ends import ServerEnd
from fedtune.wire.versions import Known
from server import exchange
from server.federation import Federation
from server.journal import Journal
from server.post import Post
from server.roll import Roll
from server.rollback import Trouble, not_finite
from server.round import Round
from server.run_folder import RunFolder
from server.spool import Spool
from server.watchers import Quiet
from tests.fuzz.mutations import mutated
from tests.fuzz.postbox import MODES, NODES, Clock, Postbox, post_for, replying, twisting
from tests.fuzz.recorded import CLIENTS, OpenAsk, Recorded, tree
from tests.fuzz.watch import Broken

TOLD = {"asked", "failed", "refused"}  # lines of the journal that a refusal may leave
OFTEN = 200  # cases after which it is looked at whether anything was left behind


class AtServer:
    """`answers` is one message to one open ask, `rounds` a whole round of which one client sends what is mutated."""

    def __init__(self, runs: Sequence[Recorded], folder: Path) -> None:
        self._runs, self._folder, self._grid, self._cases = runs, folder, Postbox(), 0
        self._folder.mkdir(parents=True)
        self._journal = Journal(folder / "journal.jsonl", clock=lambda: 1.8e9)
        self._digest = _digest(runs)
        self._others = [envelope for run in runs for message in run.messages for envelope in (message.answer, message.ask)]
        self._states: dict[tuple[str, str, tuple[str, ...]], ServerState] = {}

    def answers(self, draw: Random) -> str:
        run = draw.choice(self._runs)
        about, client = draw.choice(run.asks), draw.choice(sorted(CLIENTS))
        mode = draw.choice(MODES)
        envelope = self._mutated(draw, run, client, about.id)
        with self._open(run, about, mode) as round:
            self._grid.reply = replying(draw, mode, {client: envelope}, client)
            self._grid.twist = twisting(draw, self._grid)
            return self._judged(run, about, round, client)

    def rounds(self, draw: Random) -> str:
        run, mode = draw.choice(self._runs), draw.choice(MODES[:5])
        about = draw.choice([one for one in run.asks if one.ask.kind != "evaluate"])
        client = draw.choice(sorted(CLIENTS))
        own = {name: run.message(name, about.id).answer for name in CLIENTS if name != client}
        with self._open(run, about, mode) as round:
            return self._played(draw, run, about, round, client, mode, own)

    def _played(
        self, draw: Random, run: Recorded, about: OpenAsk, round: Round, client: str, mode: str, own: Mapping[str, Envelope]
    ) -> str:
        """The others count as if it had not answered, or the state after the round is sound."""
        envelope = self._mutated(draw, run, client, about.id)
        self._grid.reply = replying(draw, mode, {**own, client: envelope}, client)
        cohort = [run.federation.clients[name] for name in about.clients]
        try:
            state = round.train(about.state, cohort)
        except Trouble as trouble:
            return f"rolled back: {trouble}"
        reasons = round.tally.reasons
        if reasons.keys() - {client}:
            raise Broken(f"{client} sent what is wrong, and the answers of others are refused: {reasons}")
        if name := not_finite(state):
            raise Broken(f"'{name}' is not finite in the state after the round")
        if reasons and not _same(state, self._without(run, about, client)):
            raise Broken("it is refused, and the state is not that of the others")
        return reasons.get(client, "let in")

    def _without(self, run: Recorded, about: OpenAsk, client: str) -> ServerState:
        """The state after the round of the other two."""
        others = tuple(name for name in about.clients if name != client)
        key = run.name, about.id, others
        if key not in self._states:
            own = {name: run.message(name, about.id).answer for name in others}
            with self._open(run, about, "open") as round:
                self._grid.reply = replying(Random(0), "open", own)
                self._states[key] = round.train(about.state, [run.federation.clients[name] for name in about.clients])
        return self._states[key]

    def _mutated(self, draw: Random, run: Recorded, client: str, id: str) -> Envelope:
        """Of what this client answered then; now and then what it answered, which must be let in."""
        envelope = run.message(client, id).answer
        return mutated(draw, envelope, self._others) if draw.random() < 0.98 else envelope

    def _judged(self, run: Recorded, about: OpenAsk, round: Round, client: str) -> str:
        wire, before = round._federation.wire, about.stand.known
        came = list(round._admitted([client], about.ask, about.id))
        odd = round.gate.left_out()
        _require_others_known(before, wire.known, client)
        reason = round.tally.reasons.get(client, "")
        if not came:
            if not reason:
                raise Broken("it is neither let in nor refused")
            self._require_nothing_kept(client)
            return reason
        [(name, answer)] = came
        if reason or name != client:
            raise Broken(f"it is let in, and has failed: {reason}")
        honest = round._decoding(about.ask)(client, run.message(client, about.id).answer)
        _require_sound(answer, honest, about, run, client)
        self._require_kept(about, client)
        if odd:
            return f"left out: {odd[client]}"
        _require_near(answer, about, run, client)
        return "let in"

    def _require_nothing_kept(self, client: str) -> None:
        told = [entry.what for entry in self._journal.entries]
        if set(told) - TOLD or any(entry.about.get("client", client) != client for entry in self._journal.entries):
            raise Broken(f"it is refused, and the journal says {self._journal.entries}")
        if (self._folder / "spool").exists():
            raise Broken("it is refused, and lies in the spool")

    def _require_kept(self, about: OpenAsk, client: str) -> None:
        [line] = [entry for entry in self._journal.entries if entry.what == "answered"]
        Spool(self._folder / "spool" / about.id).get(client, line["digest"])

    @contextmanager
    def _open(self, run: Recorded, about: OpenAsk, mode: str) -> Iterator[Round]:
        """The coordinator as it was when it asked, its folder empty; afterwards it is so again."""
        federation = self._federation(run, post_for(mode, run.federation.run))
        federation.wire.known = about.stand.known
        made = self._round(federation, about)
        try:
            with patch.object(exchange, "time", Clock()):
                yield made
        finally:
            self._clean()

    def _round(self, federation: Federation, about: OpenAsk) -> Round:
        number, stand = about.stand.next, about.stand
        return Round(federation, RunFolder(self._folder), number, sorted(CLIENTS), {}, stand.undone, stand.gate)

    def _federation(self, run: Recorded, post: Post) -> Federation:
        was, grid = run.federation, self._grid
        roll = Roll(grid, was.job, was.plan, was.clients, NODES, post, was.run)
        wire = ServerEnd(was.wire._wire, was.strategy, payload_of(was.plan.adapter))
        changed: dict[str, Any] = {"grid": grid, "roll": roll, "wire": wire, "post": post, "journal": self._journal}
        return replace(was, watcher=Quiet(), **changed)

    def _clean(self) -> None:
        os.ftruncate(self._journal._file, 0)
        self._journal.entries.clear()
        self._grid.forget()
        Spool(self._folder / "spool").clear()
        self._cases += 1
        if self._cases % OFTEN == 0:
            self._require_nothing_left()

    def _require_nothing_left(self) -> None:
        Spool(self._folder / "quarantine").clear()
        if left := [name for name in tree(self._folder) if name != "journal.jsonl"]:
            raise Broken(f"{', '.join(left)} are left behind")
        if self._digest != _digest(self._runs):
            raise Broken("the state that the coordinator had when it asked has changed, in this case or one of those before")


def _require_others_known(before: Known, after: Known, client: str) -> None:
    versions = [{name: held.version for name, held in known.held.items() if name != client} for known in (before, after)]
    if versions[0] != versions[1]:
        raise Broken(f"what {client} sent changed what is known of others")


def _require_sound(answer: Answer, honest: Answer, about: OpenAsk, run: Recorded, client: str) -> None:
    """The gate's rules, looked at by other means."""
    most = min(run.federation.clients[client].examples, run.job.rounds.max_weight)
    if not 0 < answer.weight <= most:
        raise Broken(f"a weight of {answer.weight} is let in")
    if not all(math.isfinite(value) for value in (*answer.metrics.values(), *answer.payload.scalars.values())):
        raise Broken(f"figures are let in that are not finite: {answer.metrics}, {answer.payload.scalars}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in answer.payload.tensors.values()):
        raise Broken("numbers are let in that are not finite")
    if about.ask.kind == "evaluate":
        return  # of which nothing but figures is ever used
    if answer.payload.tensors.keys() != honest.payload.tensors.keys():
        raise Broken(f"tensors {sorted(answer.payload.tensors)} are let in")
    for name, tensor in answer.payload.tensors.items():
        _require_shape(name, tensor, honest.payload.tensors[name], about)


def _require_shape(name: str, tensor: torch.Tensor, honest: torch.Tensor, about: OpenAsk) -> None:
    """As the client's own was; a vector may hold more or fewer numbers, within its limits."""
    limits = about.ask.vectors.get(name)
    if limits is None:
        fits = tensor.shape == honest.shape and tensor.dtype.is_floating_point
    else:
        within = not len(tensor) or (tensor.min().item() >= limits.least and tensor.max().item() <= limits.most)
        fits = tensor.ndim == 1 and limits.shortest <= len(tensor) <= limits.longest and within
    if not fits:
        raise Broken(f"'{name}' of shape {tuple(tensor.shape)}, {tensor.dtype}, is let in")


def _require_near(answer: Answer, about: OpenAsk, run: Recorded, client: str) -> None:
    norm, norms = _norm(answer, about, client), about.stand.gate.norms.get(about.ask.kind, ())
    known = [norm, *norms]
    if len(known) >= 3 and norm > 1.001 * run.job.gate.max_ratio * statistics.median(known):
        raise Broken(f"a norm of {norm} is let in, beside {norms}")


def _norm(answer: Answer, about: OpenAsk, client: str) -> float:
    sent, squares = about.ask.payload_for(client).tensors, 0.0
    for name, tensor in answer.payload.tensors.items():
        if tensor.dtype.is_floating_point:
            began = sent.get(name, torch.zeros(()))
            squares += float((tensor.double() - began.double()).square().sum())
    return math.sqrt(squares)


def _same(one: ServerState, other: ServerState) -> bool:
    return bits(one) == bits(other)


def bits(state: ServerState) -> str:
    digest = hashlib.sha256()
    factors = [(path + part, getattr(pair, part)) for path, pair in state.adapter.lora.items() for part in "AB"]
    for name, tensor in sorted([*factors, *state.adapter.dense.items(), *state.tensors.items()], key=lambda named: named[0]):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest(runs: Sequence[Recorded]) -> list[str]:
    """Of all that is known at the asks, which cases share."""
    asks = [about for run in runs for about in run.asks]
    held = [tensor for about in asks for held in about.stand.known.held.values() for tensor in held.payload.tensors.values()]
    sent = [tensor for about in asks for tensor in about.ask.payload.tensors.values()]
    digests = [hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for tensor in (*held, *sent)]
    return [*digests, *(bits(about.state) for about in asks)]
