"""The relay's process: takes the tasks of the node's SuperNode and answers each with `client.app`, in this one process.

    python -m client.relay --runtime 127.0.0.1:PORT --trainer SOCKET

Flower would start a process for each message, and unpack and import there what came with the run (its FAB). Here nothing
starts, and nothing that came is ever unpacked: what runs on a node is what its operator installed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import ErrorCode

from client.app import SOCKET, app
from client.runtime import Runtime, Task
from client.told import Answers, plain
from client.transport import checked
from client.unanswered import Left, Unanswered
from client.waits import Waits
from fedtune.errors import ClientFailed, FedtuneError, UserError
from fedtune.logs import about, configure
from fedtune.messages import from_record
from fedtune.security.sealing import UNANSWERED

log = logging.getLogger("fedtune.relay")
SEALED_REASON = "the trainer's log says why"
SHORTEST, LONGEST = 0.05, 0.5  # seconds between looks for a task
LOST, RAISED = ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.CLIENT_APP_RAISED_EXCEPTION  # the first is asked again
MOST = 3  # times that the same task is taken to the trainer
GONE = 1.0  # seconds before a SuperNode that did not answer is asked again


class Relay:
    """`serve()` for ever; `step()` looks once."""

    def __init__(self, runtime: Runtime, trainer: Path, answers: Answers, unanswered: Unanswered | None = None) -> None:
        self._runtime, self._trainer, self._answers = runtime, trainer, answers
        self._unanswered = unanswered or Unanswered()
        self._waits, self._trouble = Waits(SHORTEST, LONGEST), ""

    def serve(self, sleep: Callable[[float], None] = time.sleep) -> NoReturn:
        while True:
            sleep(self.step())

    def step(self) -> float:
        """Answer a task if there is one, first the one that was left. Seconds until the next look; no trouble ends this."""
        try:
            if left := self._unanswered.left():
                self._settle(left, again=True)
            elif acquired := self._acquired():
                self._settle(acquired)
            else:
                return self._waits.next()
        except (httpx.HTTPError, ValueError) as error:
            self._say(f"the SuperNode gives no tasks: {error}")
            return GONE
        self._waits.busy()
        return 0.0

    def _acquired(self) -> Left | None:
        token = self._runtime.acquire()
        self._say("")
        if not token:
            return None
        left = Left(token)
        self._unanswered.keep(left)
        return left

    def _settle(self, left: Left, again: bool = False) -> None:
        """Answered, given up, or known to nobody any more. Raises httpx.TransportError, and then the task is still ours."""
        try:
            with self._runtime.task(left.token) as task:
                task.keep = self._unanswered.brought
                self._answer(task, left, again)
        except httpx.TransportError:
            raise
        except Exception as error:  # the SuperNode was started again, or the run is over: nobody waits for this answer
            log.warning("an answer could not be given back: %s", error)
        self._unanswered.forget()

    def _answer(self, task: Task, left: Left, again: bool) -> None:
        try:
            if left.came:
                task.came_before(bytes.fromhex(left.came))
                self._unanswered.brought()
            if left.brought >= MOST:
                raise ClientFailed(f"{left.brought} times a relay ended while it was answered")
            if again:
                log.warning("takes up an ask that was left open")
            reply = self._carried(task.pull(again))
        except httpx.TransportError:
            raise
        except Exception as error:
            log.exception("a message could not be answered")
            task.fail(f"{type(error).__name__}: {error}", LOST if again else RAISED)
        else:
            task.reply(reply)

    def _carried(self, message: Message) -> Message:
        began, metadata = time.monotonic(), message.metadata
        node_config = {SOCKET: str(self._trainer)}
        reply = app(message, Context(metadata.run_id, metadata.dst_node_id, node_config, RecordDict(), {}))
        self._tell(message, reply, time.monotonic() - began)
        return reply

    def _tell(self, message: Message, reply: Message, seconds: float) -> None:
        try:
            asked, answer = from_record(message.content).header, from_record(reply.content).header
        except FedtuneError:
            return  # it was no message of ours, and was answered as such
        failed = plain(answer.get("failed", SEALED_REASON if UNANSWERED in answer else ""))
        what = f"{plain(asked.get('kind'))} {plain(asked.get('ask'))} of run {plain(asked.get('run'))}"
        with about(run=plain(asked.get("run")), round=plain(asked.get("round"))):
            log.info("%s: %s", what, f"failed: {failed}" if failed else f"answered in {seconds:.2f} s")
        self._answers.tell(asked, seconds, failed)

    def _say(self, trouble: str) -> None:
        """Once for each change."""
        if trouble != self._trouble:
            self._trouble = trouble
            log.warning("%s", trouble or "the SuperNode is there again")


def main(arguments: Sequence[str] | None = None) -> int:
    configure("relay")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each look
    given = _parser().parse_args(arguments)
    try:
        runtime, trainer = Runtime(given.runtime, _secret(given.secret)), checked(given.trainer)
        relay = Relay(runtime, trainer, Answers(given.answers), Unanswered(given.unanswered))
    except UserError as error:
        log.error("%s", error)
        return 2
    log.info("takes the tasks of %s to %s", given.runtime, given.trainer)
    return relay.serve()


def _secret(file: Path | None) -> bytes | None:
    try:
        return file.read_bytes() if file else None
    except OSError as error:
        raise UserError(f"--secret {file} cannot be read: {error}; wanted the file that the SuperNode was given") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m client.relay", description="Carry messages between SuperNode and trainer.")
    parser.add_argument("--runtime", required=True, help="host:port of the SuperNode's Runtime API")
    parser.add_argument("--trainer", required=True, type=Path, help="the trainer's socket")
    parser.add_argument("--secret", type=Path, help="file that the SuperNode was given as --superexec-auth-secret-file")
    parser.add_argument("--answers", type=Path, help="file for a line about each answer")
    parser.add_argument("--unanswered", type=Path, help="file for the task that is open")
    return parser


if __name__ == "__main__":
    sys.exit(main())
