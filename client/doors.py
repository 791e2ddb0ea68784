"""The doors of the trainer that an ask comes through, one behind the other.

It must be the coordinator's own (client/signed.py), and a new one (client/remembering.py); the policy must allow it
(client/obedient.py), and there must be a job (client/resident.py).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from client.admission import Own
from client.health import saying, trainer_health
from client.obedient import Admitting, Obedient
from client.policy import Policy
from client.remembering import Remembering
from client.resident import Answers, Resident
from client.signed import Signed
from fedtune.errors import UserError
from fedtune.health import Health
from fedtune.job import Job
from fedtune.security.handover import Bundle


def doors_of(given: argparse.Namespace, health: Health | None = None) -> Answers:
    """`health` is told whether there is a job. Raises UserError, before anything listens."""
    bundle = Bundle.load(given.bundle, "trainer") if given.bundle else None
    given.client = given.client or (bundle.name if bundle else None)
    if not given.client:
        raise UserError("--insecure needs the client's name too: --client NAME")
    if bundle and given.client != bundle.name:
        raise UserError(f"--client {given.client} was given, and {given.bundle} is the bundle of '{bundle.name}'")
    policy = Policy.load(given.policy) if given.policy else Policy()
    if policy.end_to_end and not bundle:
        raise UserError(f"policy.end_to_end = true in {given.policy} needs --bundle: with --insecure no answer is sealed")
    own = Own(given.client, model=bool(given.model), data=bool(given.data))
    build = saying(Admitting(builder(given), policy, own), health or trainer_health())
    obedient = Obedient(Resident(build, given.dir), policy, given.dir)
    door = Remembering(obedient, given.dir, given.client, obedient.may_repeat) if given.dir else obedient
    return Signed(door, bundle, given.dir, must_seal=policy.end_to_end) if bundle else door


def builder(given: argparse.Namespace) -> Callable[[dict[str, Any]], Answers]:
    def build(job: dict[str, Any]) -> Answers:
        from client.trainer import Trainer
        from fedtune.job import checked_job

        resolved = _on_this_machine(checked_job(job, "the coordinator's job"))
        limits = {name: getattr(given, name) for name in ("layers", "memory", "seconds") if getattr(given, name)}
        own = {"model": given.model, "data": given.data, "directory": given.dir, "budget": given.budget}
        return Trainer.for_node(given.client, resolved, **own, limits=limits)

    return build


def _on_this_machine(job: Job) -> Job:
    """No more threads than cores, however many the job asks for."""
    threads = min(job.machine.threads, os.cpu_count() or 1)
    return job.model_copy(update={"machine": job.machine.model_copy(update={"threads": threads})})
