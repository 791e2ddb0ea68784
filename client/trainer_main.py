"""The trainer's process: holds model and data, and answers the asks that the relay brings over a unix socket.

It starts before there is a job. The first ask of a run, `hello`, brings the job; model and data are loaded then, and kept.
Before anything else, and before libraries start their threads, it gives up what it does not need (client/guards.py).
"""

from __future__ import annotations

import grp
import json
import logging
import os
import pwd
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from client.guards import Guard, raise_guards
from client.trainer_options import parser
from fedtune.errors import UserError
from fedtune.logs import always, configure
from fedtune.starting import start

log = logging.getLogger("fedtune.trainer")


def main(arguments: Sequence[str] | None = None) -> int:
    start()
    os.umask(0o077)  # what it keeps tells of its data
    configure("trainer")
    given = parser().parse_args(arguments)
    tell_guards(raise_guards(other_users=given.relay_user is not None), given.dir)
    from client.doors import doors_of
    from client.health import trainer_health
    from client.service import serve

    health = trainer_health()
    try:
        doors = doors_of(given, health)
        always(client=given.client)
        server = serve(doors.answer, given.socket, *peers_of(given.relay_user), health)
    except UserError as error:
        log.error("%s", error)
        return 2
    log.info("client %s listens on %s", given.client, given.socket)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop(grace=None))
    server.wait_for_termination()
    if given.dir:
        given_up_on_purpose(given.dir)
    return 0


def given_up_on_purpose(folder: Path) -> None:
    """Who is told to stop in the midst of an ask has not died over it."""
    from client.remembering import BEGUN, Begun

    Begun(folder / BEGUN).clear()


def tell_guards(guards: Sequence[Guard], folder: Path | None) -> None:
    """In the log, and for `fedtune status`."""
    for guard in guards:
        log.log(logging.INFO if guard.on else logging.WARNING, "guard %s", guard)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "guards.json").write_text(json.dumps([asdict(guard) for guard in guards]), encoding="utf-8")


def peers_of(user: str | None) -> tuple[set[int], str | None]:
    """Who may connect to the socket, and the group that must reach it for that. Raises UserError."""
    if user is None:
        return {os.geteuid()}, None
    try:
        entry = pwd.getpwnam(user)
    except KeyError as error:
        raise UserError(f"--relay-user {user}: there is no such user; wanted the one that the network half runs as") from error
    return {entry.pw_uid}, grp.getgrgid(entry.pw_gid).gr_name


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # a thread that still trains would keep the process until its ask is done
