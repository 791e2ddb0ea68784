"""The ServerApp's process: it takes the task of one run, ours, at a SuperLink of ours or of somebody else, and plays it here.

    python -m server.serverapp --superlink HOST:PORT --config FILE [--ca FILE] [--secret FILE]

Flower's own SuperExec would take the task of any run, and execute what the SuperLink sends as its code (its FAB), beside our
keys. Here nothing that comes from there is executed, nor believed: what is run is `server.app`, its job, folder and keys come
from a file of this machine, and the log stays here.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.app import Context, RecordDict
from flwr.common.constant import SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from fedtune.errors import FedtuneError, RoundFailed, UserError
from fedtune.logs import configure
from fedtune.security.coordinator_keys import CoordinatorKeys
from fedtune.starting import start
from server.flower_control import Control, NoSuperLink
from server.own_grid import OwnGrid
from server.runtime import Runtime

log = logging.getLogger("fedtune.serverapp")
POLL = 0.5  # seconds between looks for the task
PATIENCE = 300.0  # seconds for the task to be had: for runs of others that were submitted before ours
NOT_OURS = "this executor plays one run of its own and executes no other; start one for yours"
FAILED, TO_MEND, CRASHED = 1, 2, 70  # exit codes: a verdict on the run, something that the user must mend, all else
KEPT = "the ServerApp failed; the reason is in the coordinator's log"  # all that the SuperLink is told


@dataclass(frozen=True)
class Given:
    """Of one run."""

    run: int
    config: Mapping[str, str]  # as `server.app` wants it: job, folder, keys

    @classmethod
    def read(cls, file: Path) -> Given:
        config = json.loads(file.read_text(encoding="utf-8"))
        return cls(int(config.pop("run")), config)


def take(
    run: int, control: Control, runtime: Runtime, sleep: Callable[[float], None] = time.sleep, patience: float = PATIENCE
) -> str:
    """The token of that run's task. Others' tasks are not asked for; one that comes all the same is given back as failed.

    The SuperLink hands out the oldest task that waits, so we ask only when ours is that. Raises RoundFailed.
    """
    before: list[int] = []
    for _ in range(round(patience / POLL)):
        try:
            status, _details = control.status(run)
            if status != "pending":
                raise RoundFailed(
                    f"another executor than this one took the run (it is {status}): the SuperLink must be started with "
                    "`--isolation process`, and with a secret (--superlink-secret) that no other executor has"
                )
            before = control.waiting_before(run)
            if not before and (found := runtime.acquire()):
                if found.run == run:
                    return found.token
                runtime.give_back(found.token, NOT_OURS)
        except (NoSuperLink, httpx.TransportError) as error:
            log.warning("%s", error)
        sleep(POLL)
    raise RoundFailed(f"in {patience:.0f} s the SuperLink gave us no task of our run{_in_line(before)}")


def _in_line(before: Sequence[int]) -> str:
    if not before:
        return ""
    return f": {len(before)} runs of others wait before it, and nothing executes them; ask its operator (`flwr run list`)"


def play(given: Given, grid: OwnGrid) -> None:
    """From the task's start to its end, which the SuperLink is told. Raises what the ServerApp raises."""
    with beating(grid):
        outcome, details = SubStatus.FAILED, KEPT
        try:
            from server.app import app  # here, since torch takes seconds to import

            app(grid, opened(given, grid))
            outcome, details = SubStatus.COMPLETED, ""
        finally:
            grid.finish(outcome, details)


def opened(given: Given, grid: OwnGrid) -> Context:
    """Of what the SuperLink says of the run, only its number is used, which must be ours."""
    said = grid.runtime.PullTaskInput(PullTaskInputRequest())
    if said.run.run_id != given.run:
        raise RoundFailed(f"the SuperLink gives the task of another run than {given.run}; nothing of it was executed")
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = said.task_id, given.run, said.context.node_id
    grid.set_run(run_from_proto(said.run))
    return Context(given.run, said.context.node_id, {}, RecordDict(), dict(given.config))


@contextmanager
def beating(grid: OwnGrid) -> Iterator[None]:
    """Without heartbeats the SuperLink gives the task up after a minute or two."""
    sender = HeartbeatSender(make_task_heartbeat_fn_http(grid.runtime))
    sender.start()
    try:
        yield
    finally:
        if sender.is_running:
            sender.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """The last line of the log says why. What ends with CRASHED can be taken up again."""
    start()
    configure("serverapp", sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each look
    words = _parser().parse_args(arguments)
    try:
        _play_once(words)
    except (KeyboardInterrupt, RunNotRunningException):  # so Flower's client tells that its token is not known any more
        return _failed(
            "the SuperLink has ended the run's task: the run was stopped there, or heartbeats did not reach it", CRASHED
        )
    except NoSuperLink as error:
        return _failed(str(error), CRASHED)
    except UserError as error:
        return _failed(str(error), TO_MEND)
    except FedtuneError as error:
        return _failed(str(error), FAILED)
    except Exception as error:
        log.exception("the ServerApp ended")
        return _failed(f"{type(error).__name__}: {error}", CRASHED)
    return 0


def _play_once(words: argparse.Namespace) -> None:
    given, ca = Given.read(words.config), words.ca.read_bytes() if words.ca else None
    secret = words.secret.read_bytes() if words.secret else b""
    with Control(words.superlink, words.ca, secret) as control, Runtime(words.superlink, ca, secret) as runtime:
        token = take(given.run, control, runtime)
    log.info("run %d is played here", given.run)
    with OwnGrid(words.superlink, ca, token, welcome_by(given.config["keys"])) as grid:
        play(given, grid)


def welcome_by(keys: str) -> Set[bytes] | None:
    """Node keys of the clients that are registered in that folder; None, without one, is everybody."""
    if not keys:
        return None
    records = CoordinatorKeys.registry_in(Path(keys)).clients().values()
    return {record.node_pem() for record in records if not record.revoked}


def _failed(why: str, code: int) -> int:
    log.error("%s", " ".join(why.split()))
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server.serverapp", description="Play one run of a SuperLink here.")
    parser.add_argument("--superlink", required=True, help="host:port")
    parser.add_argument("--ca", type=Path, help="authority of its certificate, PEM; absent: no TLS")
    parser.add_argument("--config", required=True, type=Path, help="JSON: run, job, folder, keys")
    parser.add_argument("--secret", type=Path, help="file that the SuperLink was given as --superexec-auth-secret-file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
