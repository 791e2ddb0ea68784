"""Taking up a run again: is it the same job, and where does it stand?"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.errors import JobError, RunFolderError
from fedtune.job import Job, checked_job
from server.run_folder import holds_run

MAY_DIFFER = (
    "machine.",
    "gate.",
    "compare",
    "variants",
    *(f"rounds.{key}" for key in ("count", "timeout", "quorum", "without_quorum", "keep", "max_rise")),
)
PATHS = ("model.path", "data.path", "strategy.name")  # of two ways to write one, the later part is the same
SHOWN = 5


def require_resumable(folder: Path, job: Job) -> None:
    """A run with this job, or no run yet. Raises RunFolderError with the keys in which the run's own differs."""
    if not holds_run(folder):
        return
    differ = differing(_job_of(folder), job)
    if differ:
        shown = "; ".join(f"{key} = {was!r}, now {now!r}" for key, (was, now) in list(differ.items())[:SHOWN])
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise RunFolderError(
            f"{folder} holds the run of another job ({shown}{more}): give --resume the same job, or name another --out"
        )


def differing(one: Job, other: Job) -> dict[str, tuple[Any, Any]]:
    """Keys, dotted, in which a run could come out otherwise."""
    was, now = _flat(one.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
    return {key: (was.get(key), now.get(key)) for key in sorted(was.keys() | now.keys()) if _matters(key, was, now)}


def _matters(key: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    one, other = was.get(key), now.get(key)
    if one == other:
        return False
    if key == "rounds.count" and was.get("train.round_schedule") != "constant":
        return True  # rates of the rounds before would have been others
    if key.startswith(MAY_DIFFER):
        return False
    if key == "clients.count":  # a server writes down how many came
        return other is not None
    if key in PATHS:  # and absolute paths
        return Path(str(one)).absolute() != Path(str(other)).absolute()
    return key != "model.labels" or other is not None  # which a simulation finds in the data


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    inner = (_flat(one, f"{prefix}.{name}" if prefix else str(name)) for name, one in value.items())
    return {key: found for part in inner for key, found in part.items()}


def _job_of(folder: Path) -> Job:
    try:
        return checked_job(tomllib.loads((folder / "job.toml").read_text(encoding="utf-8")), f"{folder}/job.toml")
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{folder}/job.toml cannot be read, so the run cannot go on: {error}; name another --out"
        ) from error
    except JobError as error:
        raise RunFolderError(
            f"{folder}/job.toml is no job of this version of fedtune, so the run cannot go on: {error}"
        ) from error
