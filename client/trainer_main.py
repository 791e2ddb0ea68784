"""The trainer's process: holds model and data, and answers the asks that the relay brings over a unix socket.

It starts before there is a job. The first ask of a run, `hello`, brings the job; model and data are loaded then, and kept.
An ask comes through three doors: it must be the coordinator's own (client/signed.py), the policy must allow it
(client/obedient.py), and there must be a job (client/resident.py).
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from client.resident import Answers, Resident
from client.service import serve
from client.signed import Signed
from client.trainer_options import parser
from fedtune.errors import UserError
from fedtune.security.handover import Bundle

log = logging.getLogger("fedtune.trainer")


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    given = parser().parse_args(arguments)
    try:
        doors = doors_of(given)
        server = serve(doors.answer, given.socket)
    except UserError as error:
        log.error("%s", error)
        return 2
    log.info("client %s listens on %s", given.client, given.socket)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop(grace=None))
    server.wait_for_termination()
    return 0


def doors_of(given: argparse.Namespace) -> Answers:
    """Raises UserError, before anything listens."""
    bundle = Bundle.load(given.bundle, "trainer") if given.bundle else None
    given.client = given.client or (bundle.name if bundle else None)
    if not given.client:
        raise UserError("--insecure needs the client's name too: --client NAME")
    if bundle and given.client != bundle.name:
        raise UserError(f"--client {given.client} was given, and {given.bundle} is the bundle of '{bundle.name}'")
    resident = Resident(builder(given), given.dir)
    return Signed(resident, bundle, given.dir) if bundle else resident


def builder(given: argparse.Namespace) -> Callable[[dict[str, Any]], Answers]:
    def build(job: dict[str, Any]) -> Answers:
        from client.trainer import Trainer
        from fedtune.job import checked_job

        resolved = checked_job(job, "the coordinator's job")
        limits = {name: getattr(given, name) for name in ("layers", "memory", "seconds") if getattr(given, name)}
        own = {"model": given.model, "data": given.data, "directory": given.dir, "budget": given.budget}
        return Trainer.for_node(given.client, resolved, **own, limits=limits)

    return build


if __name__ == "__main__":
    sys.exit(main())
