"""Around the trainer of a node: nothing is done that the policy of its operator forbids, and what is refused is said by name.

    resident = Resident(Admitting(build, policy, own), folder)       jobs, before anything that they name is touched
    door = Obedient(resident, policy, folder)                        asks, and all work for them

It stands behind the signatures (client/signed.py), so that a job and its asks are the coordinator's own.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from client.admission import Own
from client.allowance import Allowance, uncounted, within
from client.diary import Diary, Used
from client.policy import Policy
from client.transport import failure
from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, FedtuneError, UserError
from fedtune.job import Job

log = logging.getLogger("fedtune.trainer")


class Answers(Protocol):
    def answer(self, ask: Envelope) -> Envelope: ...


class Data(Protocol):
    @property
    def train(self) -> Sized: ...


class Resident(Protocol):
    @property
    def base(self) -> str: ...


class Node(Answers, Protocol):
    """The trainer of a job, as far as its admission looks at it."""

    job: Job

    @property
    def resident(self) -> Resident: ...
    @property
    def clients(self) -> tuple[str, ...]: ...
    def data(self, client: str) -> Data: ...


@dataclass(frozen=True)
class Admitting:
    """Builds the trainer of a job that the policy lets in. No refused job is kept, so none is ever taken up again."""

    build: Callable[[dict[str, Any]], Node]
    policy: Policy
    own: Own

    def __call__(self, given: dict[str, Any]) -> Node:
        """Raises Forbidden."""
        self.policy.admit_job(_read(given), self.own)
        with uncounted():  # the time of a round is not that of loading
            node = self.build(given)
            client = node.clients[0]
            self.policy.admit_base(node.resident.base)
            self.policy.admit_rank(node.job.rank_of(client))
            self.policy.admit_steps(node.job.train.steps_for(len(node.data(client).train)))
        return node


class Obedient:
    """What it has worked for, `directory`/diary.json, outlives the process."""

    def __init__(
        self,
        answers: Answers,
        policy: Policy,
        directory: Path | None,
        clock: Callable[[], datetime] = lambda: datetime.now().astimezone(),
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        if policy.rounds_per_day is not None and directory is None:
            raise UserError("policy.rounds_per_day counts over restarts, which takes a folder; start the client with --dir")
        self._answers, self._policy, self._clock, self._ticks = answers, policy, clock, ticks
        self._diary = Diary(directory / "diary.json" if directory else None)

    def answer(self, ask: Envelope) -> Envelope:
        try:
            answer = self._met(ask) if ask.header.get("kind") == "hello" else self._worked(ask)
        except FedtuneError as error:
            answer = failure(str(error), ask.header)
        if "failed" in answer.header:
            log.warning("did not answer: %s", answer.header["failed"])
        return answer

    def may_repeat(self, ask: Envelope) -> None:
        """What was worked for, and counted, may be said again, unless the policy has become stricter. Raises Forbidden."""
        kind, run, name = (str(ask.header.get(key)) for key in ("kind", "run", "ask"))
        self._policy.admit_ask(kind, run, _round(ask), name, Diary(None), self._clock())

    def _met(self, ask: Envelope) -> Envelope:
        self._policy.admit_time(self._clock())
        return self._within(Allowance(max_steps=0, evaluation=False, columns=self._policy.reads), ask)

    def _worked(self, ask: Envelope) -> Envelope:
        """An ask that comes again, after a lost connection, may use again what it has used; it counts once."""
        kind, run, name = (str(ask.header.get(key)) for key in ("kind", "run", "ask"))
        round, when, diary = _round(ask), self._clock(), self._diary
        self._policy.admit_ask(kind, run, round, name, diary, when)
        before, others = diary.used(run, round, name, when), diary.others(run, round, name, when)
        began = replace(before, times=before.times + 1)
        diary.note(run, round, name, began, when)  # whoever is killed at work has worked
        allowance = self._allowance(others)
        try:
            return self._within(allowance, ask)
        finally:
            steps, seconds = allowance.steps - others.steps, allowance.spent - others.seconds
            used = Used(max(before.steps, steps), max(before.seconds, seconds), began.times)
            diary.note(run, round, name, used, self._clock())

    def _within(self, allowance: Allowance, ask: Envelope) -> Envelope:
        with within(allowance):
            answer = self._answers.answer(ask)
        allowance.check()  # what took too long does not leave
        return answer

    def _allowance(self, used: Used) -> Allowance:
        """What the other asks have left of the round."""
        policy = self._policy
        steps, seconds = policy.max_steps or math.inf, policy.max_seconds or math.inf
        return Allowance(steps, seconds, policy.evaluation, policy.reads, used.steps, used.seconds, self._ticks)


def _read(given: Any) -> Job:
    """Checked as far as it goes without importing what it names. Raises ClientFailed."""
    try:
        return Job.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the job"
        raise ClientFailed(f"a 'hello' came whose job cannot be read, at '{where}': {first['msg']}") from error


def _round(ask: Envelope) -> int:
    try:
        return int(ask.header["round"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClientFailed("an ask came without its round: install the same fedtune on both sides") from error
