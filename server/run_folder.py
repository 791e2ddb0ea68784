"""The folder of a run: what the job was, what happened, and an adapter per finished round that stock PEFT loads.

job.toml   metrics.jsonl   events/   comparison.json   report.html   clients/ (own adapters, where a method gives each its own)
rounds/0007/adapter/   adapter -> rounds/0007/adapter

quarantine/   answers that were refused, the newest of them

What lets a run go on after a crash: journal.jsonl   state/ (the last checkpoints)   spool/ (while a round is open)   lock

Methods that move the whole model by seeds leave a recipe of it in each round, and at the end the model, for stock transformers:
rounds/0007/recipe/   recipe -> rounds/0007/recipe   model/

Methods that train some of the model's own weights leave the new values of those. They may be as many as the model has, so the
last round's alone are kept: the link moves to them first, then those before go. While a round ends there are both.
rounds/0007/weights/   weights -> rounds/0007/weights
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from fedtune import durable
from fedtune.adapter import Adapter
from fedtune.changed_weights import ChangedWeights
from fedtune.errors import RunFolderError, UserError
from fedtune.job import Job
from fedtune.recipe import Recipe
from fedtune.recipe_file import read_recipe
from server.checkpoint import Checkpoints
from server.journal import Journal
from server.records import Comparison, RoundRecord

if TYPE_CHECKING:
    from fedtune.base import Blueprint

JOURNAL, METRICS = "journal.jsonl", "metrics.jsonl"
BEGUN = ".job.toml.writing"  # all that a coordinator leaves which was killed before its run began
KINDS = {Adapter: "adapter", Recipe: "recipe", ChangedWeights: "weights"}


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @classmethod
    def create(cls, path: Path, job: Job) -> RunFolder:
        """Raises RunFolderError where a run already lies there or nothing can be written."""
        require_free(path)
        with writing(path), _whole_or_gone(path):
            path.mkdir(parents=True, exist_ok=True)
            cls(path).describe(job)
            durable.sync(path.parent)
        return cls(path)

    def describe(self, job: Job) -> None:
        """`job.toml`, also where the run goes on with other settings than it began with."""
        with writing(self.path):
            _write(self.path / "job.toml", tomli_w.dumps(without_none(job.model_dump(mode="json"))))

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def journal(self) -> Journal:
        """Opened where it ends. It and all that it is asked to write raise RunFolderError."""
        with writing(self.path):
            return Journal(self.path / JOURNAL, writing=partial(writing, self.path))

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path / "state")

    def records(self) -> list[RoundRecord]:
        """Of the rounds in `metrics.jsonl`, in order; of one that was written twice the later."""
        found = (_record(line) for line in _lines(self.path / METRICS))
        return [record for _, record in sorted({record.round: record for record in found if record}.items())]

    def log(self, record: RoundRecord) -> None:
        """One more line of `metrics.jsonl`. One that a crash has left half written stays behind, alone in its line."""
        with writing(self.path), (self.path / METRICS).open("ab+") as file:
            file.seek(max(file.tell() - 1, 0))
            whole = file.read(1) in (b"", b"\n")
            file.write((b"" if whole else b"\n") + json.dumps(record.as_json()).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def publish(
        self,
        round: int,
        published: Adapter | Recipe | ChangedWeights,
        job: Job,
        blueprint: Blueprint,
        provenance: Mapping[str, Any],
    ) -> None:
        """Write the round's adapter, recipe or weights, then point a link to it: at every moment it leads to a whole one."""
        from server.published import write_published  # here, since peft takes seconds to import

        kind = KINDS[type(published)]
        with writing(self.path):
            target = self.path / "rounds" / f"{round:04d}" / kind
            with _whole_or_gone(target.parent):
                write_published(target, published, job, blueprint, provenance)
            self._point_to(target)

    def prune(self, round: int, keep: int | None) -> None:
        """Once this round counts: weights of the model itself are kept of the last round alone, all else of the last `keep`."""
        if (last := self.path / "rounds" / f"{round:04d}" / "weights").exists():
            self._drop_weights_but(last)
        elif keep:
            self._keep_last(keep, round)

    def roll_back(self, round: int) -> None:
        """What that round published is taken back: the link leads to the last one before it, if there is one."""
        for kind in KINDS.values():
            bad = self.path / "rounds" / f"{round:04d}" / kind
            if not bad.exists():
                continue
            before = [found for found in self.path.glob(f"rounds/*/{kind}") if _round_of(found.parent) < round]
            with writing(self.path):
                if before:
                    self._point_to(max(before, key=lambda found: _round_of(found.parent)))
                else:
                    (self.path / kind).unlink(missing_ok=True)
                shutil.rmtree(bad.parent)

    def _point_to(self, target: Path) -> None:
        link = self.path / f".{target.name}"
        link.unlink(missing_ok=True)
        link.symlink_to(target.relative_to(self.path), target_is_directory=True)
        os.replace(link, self.path / target.name)
        durable.sync(self.path)

    def _keep_last(self, count: int, round: int) -> None:
        for folder in self.path.glob("rounds/*"):
            if folder.name.isdigit() and int(folder.name) <= round - count:
                shutil.rmtree(folder, ignore_errors=True)

    def _drop_weights_but(self, last: Path) -> None:
        """Also those that a crash has left. What cannot be taken away now is tried again in the next round."""
        for folder in self.path.glob("rounds/*/weights"):
            if folder != last:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):
                    folder.parent.rmdir()

    def write_model(self, job: Job, blueprint: Blueprint) -> None:
        """`model`: the whole model, of the last recipe."""
        from fedtune.model_folder import write_model

        recipe, provenance = read_recipe(self.recipe)
        try:
            with writing(self.path):
                write_model(self.model, job, blueprint, recipe, provenance)
        except UserError as error:
            kept = f"the recipes of all rounds are kept; for the model type: fedtune export {self.path} --out FOLDER"
            raise type(error)(f"{error}; {kept}") from error

    def compared(self, comparison: Comparison) -> None:
        with writing(self.path):
            _write(self.path / "comparison.json", json.dumps(comparison.as_json(), indent=2) + "\n")


def holds_run(path: Path) -> bool:
    return (path / "job.toml").exists()


def require_free(path: Path) -> None:
    """Raises RunFolderError where the folder holds a run, or anything else."""
    if holds_run(path):
        raise RunFolderError(f"{path} already holds a run; go on with it: --resume, or name another folder: --out {path}-2")
    if path.exists() and (not path.is_dir() or any(found.name != BEGUN for found in path.iterdir())):
        raise RunFolderError(f"{path} exists and is no empty folder; name another: --out {path}-2")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the disk says into one line: RunFolderError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(path)).free
            raise RunFolderError(
                f"no space left on the disk of {path} ({free:,} bytes free): make room, then go on with --resume"
            ) from error
        raise RunFolderError(f"{path} cannot be written: {error}; name another folder with --out") from error


@contextmanager
def _whole_or_gone(folder: Path) -> Iterator[None]:
    """Takes a folder that was begun here away again when its writing was cut short."""
    begun = not folder.exists()
    try:
        yield
    except BaseException:
        if begun:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def without_none(value: Any) -> Any:
    """TOML has no null: absent keys mean their default."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return value


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _write(path: Path, text: str) -> None:
    durable.write(path, [text.encode()])


def _round_of(folder: Path) -> int:
    return int(folder.name) if folder.name.isdigit() else -1


def _lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines() if file.exists() else []


def _record(line: bytes) -> RoundRecord | None:
    """None of a line that a crash has left half written."""
    try:
        return RoundRecord.from_json(json.loads(line))
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
