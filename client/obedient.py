"""Around the trainer of a node: nothing is done that the policy of its operator forbids, and what is refused is said by name.

It stands behind the signatures (client/signed.py), so that a job and its asks are the coordinator's, and before anything that
imports, opens or loads what a job names.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from client.admission import Own
from client.allowance import Allowance, within
from client.diary import Diary, Used
from client.policy import Policy
from client.transport import failure
from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, FedtuneError, UserError
from fedtune.job import Job

log = logging.getLogger("fedtune.trainer")
NO_JOB = "this trainer has admitted no job: the first ask of a run must be 'hello', with the job"


class Answers(Protocol):
    def answer(self, ask: Envelope) -> Envelope: ...


def now() -> datetime:
    """With the zone of this machine."""
    return datetime.now().astimezone()


class Obedient:
    """`own` says what this node brings itself. The diary, `directory`/diary.json, outlives the process."""

    def __init__(
        self,
        answers: Answers,
        policy: Policy,
        directory: Path | None,
        clock: Callable[[], datetime] = now,
        own: Own | None = None,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        if policy.rounds_per_day is not None and directory is None:
            raise UserError("policy.rounds_per_day counts over restarts, which takes a folder; start the client with --dir")
        self._answers, self._policy, self._own = answers, policy, own or Own()
        self._diary = Diary(directory / "diary.json" if directory else None)
        self._clock, self._ticks = clock, ticks
        self._refusal: str | None = NO_JOB  # why no ask is answered; None where a job was admitted

    def answer(self, ask: Envelope) -> Envelope:
        try:
            return self._met(ask) if ask.header.get("kind") == "hello" else self._worked(ask)
        except FedtuneError as error:
            log.warning("refused: %s", error)
            return failure(str(error), {**ask.header, "client": self._own.name})

    def _met(self, ask: Envelope) -> Envelope:
        """Who may not take part learns why; asks of that run are not answered, whatever was admitted before."""
        try:
            self._refusal = NO_JOB
            job = _read(ask.header.get("job"))
            self._policy.admit_time(self._clock())
            self._policy.admit_job(job, self._own)
            answer = self._within(self._allowance(), ask)
            if "failed" not in answer.header:
                self._admit_client(job, answer)
                self._refusal = None
            return answer
        except FedtuneError as error:
            self._refusal = str(error)
            raise

    def _admit_client(self, job: Job, hello: Envelope) -> None:
        """What is known only when model and data are there."""
        self._policy.admit_base(str(hello.header["base"]))
        self._policy.admit_rank(int(hello.header["rank"]))
        self._policy.admit_steps(job.train.steps_for(int(hello.header["examples"])))

    def _worked(self, ask: Envelope) -> Envelope:
        if self._refusal is not None:
            raise ClientFailed(self._refusal)
        run, round, when = str(ask.header.get("run")), _round(ask), self._clock()
        self._policy.admit_ask(str(ask.header.get("kind")), run, round, self._diary, when)
        used = self._diary.used(run, round, when)
        self._diary.note(run, round, used, when)  # whoever is killed at work has worked
        allowance = self._allowance(used)
        try:
            return self._within(allowance, ask)
        finally:
            self._diary.note(run, round, Used(allowance.steps, allowance.spent), self._clock())

    def _within(self, allowance: Allowance, ask: Envelope) -> Envelope:
        with within(allowance):
            answer = self._answers.answer(ask)
        allowance.check()  # what took too long does not leave
        if "failed" in answer.header:
            log.warning("could not answer: %s", answer.header["failed"])
        return answer

    def _allowance(self, used: Used | None = None) -> Allowance:
        """Without `used`, that of a hello, which is of no round."""
        policy, none = self._policy, math.inf
        seconds = none if used is None else policy.max_seconds or none
        already = (0, 0.0) if used is None else (used.steps, used.seconds)
        return Allowance(policy.max_steps or none, seconds, policy.evaluation, policy.reads, *already, self._ticks)


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
    except (KeyError, TypeError, ValueError) as error:
        raise ClientFailed("an ask came without its round: install the same fedtune on both sides") from error
