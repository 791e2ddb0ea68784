"""A run at a SuperLink: submitted, followed through its `metrics.jsonl`, its log kept, and its end read from Flower."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.errors import MALFORMED, FedtuneError, RoundFailed
from fedtune.growing import Growing
from fedtune.job import Job
from server.bundle import make_bundle
from server.flower_control import COMPLETED, Control, NoSuperLink
from server.journal import entry_of
from server.records import RoundRecord, Watcher

POLL = 0.1  # seconds between looks at the metrics
STATUS_POLL = 2.0  # seconds between questions to the SuperLink


def submit(
    control: Control, job: Job, folder: Path, at: Path, clientapp: str, federation: str = "", resume: bool = False
) -> int:
    """The job as a run of `server.app` that writes `folder`; the bundle is made in `at`. Returns the run's id.

    All that it is told goes to every node, so only simulations tell it so.
    """
    bundle = make_bundle(at / "bundle", "server.app:app", clientapp)
    config = {"job": job.model_dump_json(), "folder": str(folder.absolute()), "keys": "", "resume": "1" if resume else ""}
    return control.submit(bundle, config, federation)


def submit_bare(control: Control, at: Path, clientapp: str) -> int:
    """A run that tells SuperLink and nodes nothing; its ServerApp is told here. Executed elsewhere, it ends at once."""
    return control.submit(make_bundle(at / "bundle", "server.app:app", clientapp), {})


def as_seen_anywhere(job: Job, clients: int) -> Job:
    """The job with its number of clients, and absolute paths: Flower's processes run in another folder."""
    strategy, colon, attribute = job.strategy.name.rpartition(":")
    changes = {
        "clients": {"count": clients},
        "data": {"path": _absolute(job.data.path)},
        "model": {"path": _absolute(job.model.path)},
        "strategy": {"name": f"{_absolute(strategy)}{colon}{attribute}"},
    }
    return job.model_copy(update={name: getattr(job, name).model_copy(update=keys) for name, keys in changes.items()})


def _absolute(path: str) -> str:
    """Names that are no path here, such as a hub id or a module, stay as they are."""
    there = Path(path).expanduser()
    return str(there.absolute()) if path and there.exists() else path


def follow(control: Control, run: int, progress: Progress, between: Callable[[], None]) -> tuple[str, str]:
    """Status and details of the run once it has ended. `between` is called at every look; it raises when there is no hope."""
    asked = -STATUS_POLL
    while True:
        between()
        if time.monotonic() - asked >= STATUS_POLL:
            asked = time.monotonic()
            status = ended(control, run)
            if status is not None:
                progress.show()
                return status
        progress.show()
        time.sleep(POLL)


def ended(control: Control, run: int) -> tuple[str, str] | None:
    """Status and details; None while it runs, or while the SuperLink does not answer."""
    try:
        status = control.status(run)
    except NoSuperLink:
        return None
    return status if status[0].startswith("finished") else None


def require_completed(status: str, details: str, log: str = "") -> None:
    """Raises RoundFailed with Flower's reason, or the end of the log where it gives none."""
    if status != COMPLETED:
        raise RoundFailed(f"the run through Flower ended as {status}: {details or log[-2000:]}")


class Progress:
    """Tells a watcher of each round as its line appears in `metrics.jsonl`; of one that a crash had played again, once."""

    def __init__(self, metrics: Path, watcher: Watcher) -> None:
        self._metrics, self._watcher = Growing(metrics), watcher
        self._shown = dict[int, tuple[Any, ...]]()

    def show(self) -> None:
        for line in self._metrics.new():
            record = _record(line)
            if record and self._shown.get(record.round) != (record.loss, record.metrics):
                self._shown[record.round] = record.loss, record.metrics
                self._watcher.round_ended(record)


def _record(line: bytes) -> RoundRecord | None:
    """None of a line that a crash has left half written."""
    try:
        return RoundRecord.from_json(json.loads(line))
    except MALFORMED:
        return None


class Waiting:
    """Tells why a run waits, as its journal says it, and that it no longer does: with an empty reason."""

    def __init__(self, journal: Path, tell: Callable[[str], object]) -> None:
        """What was in it before is old."""
        self._lines, self._tell = Growing(journal, journal.stat().st_size if journal.exists() else 0), tell

    def look(self) -> None:
        entries = [entry for line in self._lines.new() if (entry := entry_of(line))]
        if entries:
            last = entries[-1]
            self._tell(str(last.about.get("reason", "")) if last.what == "waiting" else "")


def keep_log(address: str, ca: Path | None, run: int, file: Path) -> threading.Thread:
    """Flower keeps the log of a ServerApp in the SuperLink alone: a thread writes it here, to the end of either."""

    def write() -> None:
        try:
            with Control(address, ca) as control, file.open("a", encoding="utf-8") as log:
                for text in control.log(run):
                    log.write(text)
                    log.flush()
        except (FedtuneError, OSError, ValueError):
            return  # the SuperLink has ended, in the midst of a frame perhaps

    thread = threading.Thread(target=write, name="run-log", daemon=True)
    thread.start()
    return thread
