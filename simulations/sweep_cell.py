"""One cell of a comparison: play its run, take its figures, keep them in `cell.json`, and find them there again."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from client.trainer import Trainer
from fedtune.errors import FedtuneError, RunFolderError, StrategyError
from fedtune.job import Job
from server.coordinator import RunResult
from server.records import RoundRecord
from server.report import write_report
from server.report_figures import bytes_per_client, ratio
from server.run_folder import writing
from server.watchers import Quiet
from simulations.compare import everybodys_loss
from simulations.engine import resident_trainer, run_simulation
from simulations.sweep import Cell, differences, stored

NAME = "cell.json"
Tell = Callable[[str], None]  # what a cell is doing now, in a few words


@dataclass(frozen=True)
class Point:
    """After one evaluated round."""

    round: int
    loss: float  # as the round's record has it: on everybody's examples, or of personal models each on its own
    bytes_up: float  # of a client on average, in all rounds so far


@dataclass(frozen=True)
class Figures:
    """Losses are held-out, in nats per token, after the last round. Bytes are of training and evaluation both."""

    loss: float  # on everybody's examples
    own: float  # on one's own, mean over clients
    base: float  # the base model, on everybody's
    base_own: float
    bytes_up: float  # per client and round
    bytes_down: float
    seconds: float
    aggregation_error: float | None
    exact: bool
    personal: bool
    curve: tuple[Point, ...]
    ratio: float | None = None  # how many times as large both directions were, were every number sent as it is


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    variant: str
    seed: int
    strategy: str
    state: Literal["done", "cannot", "failed"]
    reason: str = ""
    figures: Figures | None = None
    memory: int = 0  # peak of the process that played it, bytes
    job: Mapping[str, Any] | None = None


_OUTCOME = TypeAdapter(Outcome)


def play(cell: Cell, tell: Tell = lambda what: None) -> Outcome:
    """Run the cell from its beginning; whatever goes wrong in it is its outcome, not the end of the others."""
    _clear(cell.folder)
    outcome = Outcome(cell.variant, cell.seed, cell.job.strategy.name, "done", job=stored(cell.job))
    try:
        watcher = _Told(tell)
        trainer = resident_trainer(cell.job, watcher)
        result = run_simulation(trainer, cell.folder, watcher, write_model=False)  # many cells of gigabytes would fill disks
        tell("everybody's examples")
        outcome = replace(outcome, figures=figures_of(trainer, result))
        write_report(cell.folder)
    except StrategyError as error:
        outcome = replace(outcome, state="cannot", reason=str(error))
    except Exception as error:  # a plug-in may raise anything
        reason = str(error) if isinstance(error, FedtuneError) else f"{type(error).__name__}: {error}"
        outcome = replace(outcome, state="failed", reason=reason)
    return keep(cell, replace(outcome, memory=_peak_memory()))


def keep(cell: Cell, outcome: Outcome) -> Outcome:
    """Write `cell.json`: all of it or nothing."""
    with writing(cell.folder):
        cell.folder.mkdir(parents=True, exist_ok=True)
        temporary = cell.folder / f".{NAME}.writing"
        temporary.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, cell.folder / NAME)
    return outcome


def finished(cell: Cell) -> Outcome | None:
    """The outcome of a cell that was played to its end before. Raises RunFolderError where it was of another job."""
    try:
        outcome = _OUTCOME.validate_json((cell.folder / NAME).read_bytes())
        job = Job.model_validate(outcome.job)  # keys that are newer than the file have their defaults
    except FileNotFoundError:
        _require_ours(cell.folder)
        return None
    except (OSError, ValidationError) as error:
        raise RunFolderError(f"{cell.folder / NAME} cannot be read; remove {cell.folder}, or type --out another") from error
    if keys := differences(stored(job), stored(cell.job)):
        differing = ", ".join(keys[:4]) + ", …" * (len(keys) > 4)
        raise RunFolderError(f"{cell.folder} holds a cell of another job (it differs in {differing}); type --out another")
    return outcome if outcome.state == "done" else None


def figures_of(trainer: Trainer, result: RunResult) -> Figures:
    records, strategy, last = result.records, trainer.strategy, result.records[-1]
    down, up = bytes_per_client(records) or (0.0, 0.0)
    return Figures(
        loss=everybodys_loss_of_personal(trainer, result) if strategy.personal else _measured(last),
        own=own_loss(last),
        base=_measured(records[0]),
        base_own=own_loss(records[0]),
        bytes_up=up,
        bytes_down=down,
        seconds=sum(record.seconds for record in records),
        aggregation_error=last.metrics.get("aggregation_error"),
        exact=strategy.exact,
        personal=strategy.personal,
        curve=tuple(curve(records)),
        ratio=ratio(records),
    )


def everybodys_loss_of_personal(trainer: Trainer, result: RunResult) -> float:
    """Each client's own model on everybody's examples, mean over the clients."""
    payload, losses = trainer.strategy.broadcast(result.state), []
    for client in trainer.clients:
        trainer.strategy.use(payload, trainer.local(client, 0), trainer.memory(client))
        losses.append(everybodys_loss(trainer))
    return fmean(losses)


def own_loss(record: RoundRecord) -> float:
    """Of each client that evaluated on its own held-out examples, however many it has."""
    return fmean(client.loss for client in record.clients.values() if client.loss is not None)


def curve(records: tuple[RoundRecord, ...]) -> list[Point]:
    points, so_far = list[Point](), 0.0
    clients = len({client for record in records for client in record.clients})
    for record in records:
        so_far += record.bytes_up / clients
        if record.loss is not None:
            points.append(Point(record.round, record.loss, so_far))
    return points


class _Told(Quiet):
    """A Watcher that passes on the round and what is done in it."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._round, self._rounds = tell, 0, 0

    def started(self, job: Job, clients: Mapping[str, int]) -> None:
        self._rounds = job.rounds.count

    def doing(self, what: str, done: int, total: int) -> None:
        self._tell(f"round {self._round} of {self._rounds}: {what}, {done} of {total}" if self._rounds else what)

    def round_ended(self, record: RoundRecord) -> None:
        self._round = record.round + 1


def _measured(record: RoundRecord) -> float:
    if record.loss is None:
        raise FedtuneError(f"round {record.round} was not evaluated: no client has held-out examples, or none answered")
    return record.loss


def _clear(folder: Path) -> None:
    _require_ours(folder)
    with writing(folder):
        if folder.exists():
            shutil.rmtree(folder)


def _require_ours(folder: Path) -> None:
    """Only what a comparison left there is ever removed."""
    ours = not folder.exists() or any((folder / name).exists() for name in (NAME, "job.toml"))
    if not ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunFolderError(f"{folder} exists and is no cell of a comparison; type --out another")


def _peak_memory() -> int:
    """Of this process since it began, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
