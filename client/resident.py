"""The trainer of whichever job there is: made when a run says hello, kept until a hello brings another job."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from client.transport import failure
from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, FedtuneError, UserError

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

    def answer(self, ask: Envelope) -> Envelope:
        try:
            if ask.header.get("kind") == "hello":
                self._forget()
                self._prepare(ask.header.get("job"))
                self._keep(ask.header.get("run"))
            elif self._trainer is None:
                self._take_up(ask.header.get("run"))
        except FedtuneError as error:
            log.error("refused a job: %s", error)
            return failure(str(error), ask.header)
        if self._trainer is None:
            return failure("this trainer has no job: the first ask of a run must be 'hello', with the job", ask.header)
        return self._trainer.answer(ask)

    def _prepare(self, job: Any) -> None:
        if not isinstance(job, dict):
            raise UserError("a 'hello' came without a job: install the same fedtune on both sides")
        if job != self._job:
            self._job = self._trainer = None  # first let the old model go, there may be no room for two
            self._trainer, self._job = self._build(job), job

    def _forget(self) -> None:
        """The run before is over, whatever becomes of this one."""
        if self._file:
            self._file.unlink(missing_ok=True)

    def _keep(self, run: Any) -> None:
        if self._file:
            temporary = self._file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"run": run, "job": self._job}), encoding="utf-8")
            os.replace(temporary, self._file)

    def _take_up(self, run: Any) -> None:
        if self._file and self._file.is_file():
            try:
                kept = json.loads(self._file.read_text(encoding="utf-8"))
                job, of = kept["job"], kept["run"]
            except (ValueError, KeyError, TypeError) as error:
                raise ClientFailed(f"{self._file.name} cannot be read ({type(error).__name__}): start the run again") from error
            if of == run:
                log.info("taking up run %s again", run)
                self._prepare(job)
