"""The trainer of whichever job there is: made when a run says hello, kept until a hello brings another job."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from client.transport import failure, unknown_run
from fedtune import durable
from fedtune.envelope import Envelope
from fedtune.errors import MALFORMED, FedtuneError, UserError

log = logging.getLogger("fedtune.trainer")


class Answers(Protocol):
    """The trainer of one job."""

    def answer(self, ask: Envelope) -> Envelope: ...


class Resident:
    """The job is kept in `folder` too: a trainer that was started again goes on in the open run."""

    def __init__(self, build: Callable[[dict[str, Any]], Answers], folder: Path | None = None) -> None:
        self._build, self._file = build, folder / "job.json" if folder else None
        self._job: dict[str, Any] | None = None
        self._trainer: Answers | None = None
        self._run: Any = None  # that said hello with the job

    def answer(self, ask: Envelope) -> Envelope:
        try:
            if ask.header.get("kind") == "hello":
                self._forget(ask.header.get("run"))
                self._prepare(ask.header.get("job"), ask.header.get("run"))
                self._keep()
            elif not self._is_ready(ask):
                self._take_up(ask.header.get("run"))
        except FedtuneError as error:
            log.error("refused a job: %s", error)
            return failure(str(error), ask.header)
        if self._trainer is None or not self._is_ready(ask):
            has = f"the job of run {self._run}" if self._trainer else "no job"
            reason = f"this trainer has {has}: the first ask of a run must be 'hello', with the job"
            return unknown_run(reason, ask.header)
        return self._trainer.answer(ask)

    def _is_ready(self, ask: Envelope) -> bool:
        """For this ask: no run is ever answered with the job of another."""
        return self._trainer is not None and self._run == ask.header.get("run")

    def _prepare(self, job: Any, run: Any) -> None:
        if not isinstance(job, dict):
            raise UserError("a 'hello' came without a job: install the same fedtune on both sides")
        if job != self._job:
            self._job = self._trainer = None  # first let the old model go, there may be no room for two
            self._trainer, self._job = self._build(job), job
        self._run = run

    def _forget(self, run: Any) -> None:
        """The run before is over, whatever becomes of this one; one that says hello again, as it goes on, is not."""
        if self._file and self._file.is_file() and self._kept(self._file)[0] != run:
            self._file.unlink()

    def _keep(self) -> None:
        if self._file:
            durable.write(self._file, [json.dumps({"run": self._run, "job": self._job}).encode()])

    def _take_up(self, run: Any) -> None:
        if self._file and self._file.is_file():
            of, job = self._kept(self._file)
            if job is not None and of == run:
                log.info("taking up run %s again", run)
                self._prepare(job, run)

    def _kept(self, file: Path) -> tuple[Any, Any]:
        """The run and its job; nothing of a file that is damaged."""
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            return kept["run"], kept["job"]
        except (OSError, *MALFORMED):
            return None, None
