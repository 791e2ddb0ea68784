"""The plan of `fedtune compare`: one cell for each strategy or variant and each seed, every mistake known before any runs.

A variant is the scenario's own settings with the variant's over them, and `--set` over both. Cells of the same seed see the
same clients, held-out examples and cohorts, which depend on the seed alone.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.data.sources import clients_in
from fedtune.errors import JobError, RunFolderError, StrategyError, nearest
from fedtune.job import Job, checked_job, load_job, set_key
from fedtune.registry import known

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    variant: str
    seed: int
    job: Job
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """What is to be played, and what cannot be: variant -> reason."""

    scenario: str
    seeds: int
    out: Path
    cells: tuple[Cell, ...]
    impossible: Mapping[str, str]


def plan(scenario: Path, names: Sequence[str], seeds: int, overrides: Sequence[str], out: Path | None) -> Plan:
    """All cells, checked. Without `names`, every variant of the scenario, or else every known strategy.

    Raises JobError, StrategyError or DataError. A known strategy that nobody named may be impossible with this job.
    """
    base = load_job(scenario, overrides)
    _require_free_keys(overrides)
    given = tomllib.loads(scenario.read_text(encoding="utf-8"))
    variants = given.pop("variants", {})
    over = [nested(override) for override in overrides]
    jobs, impossible = dict[str, Job](), dict[str, str]()
    for name in dict.fromkeys(names or variants or known()):
        settings = merged(given, _settings(name, variants, scenario))
        for override in over:
            settings = merged(settings, override)
        try:
            jobs[name] = _checked(settings, f"{scenario}, {name}")
        except StrategyError as error:
            if names or variants:
                raise StrategyError(f"{name}: {error}") from error
            impossible[name] = str(error)
    _require_clients(jobs.values())
    out = out or Path("runs") / f"{base.name}-compare"
    _require_folder(out)
    return Plan(base.name, seeds, out, tuple(_cells(jobs, seeds, out)), impossible)


def merged(below: Settings, above: Settings) -> dict[str, Any]:
    """`above` deep over `below`. Another strategy takes none of the settings of the one below it."""
    below, above = _strategy_as_table(below), _strategy_as_table(above)
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        if both and key == "strategy" and value.get("name", under.get("name")) != under.get("name"):
            both = False
        result[key] = merged(under, value) if both else value
    return result


def nested(override: str) -> dict[str, Any]:
    """`train.lr=1e-3` as settings."""
    given: dict[str, Any] = {}
    set_key(given, override)
    return given


def stored(job: Job) -> dict[str, Any]:
    """The job as a cell keeps it: without the threads, which depend on how many cells run beside it."""
    given = job.model_copy(update={"machine": job.machine.model_copy(update={"threads": 0})})
    return dict(json.loads(given.model_dump_json()))


def differences(one: Settings, other: Settings, prefix: str = "") -> list[str]:
    """The dotted keys in which two jobs differ."""
    found: list[str] = []
    for key in sorted({*one, *other}):
        left, right = one.get(key), other.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}")
    return found


def _strategy_as_table(settings: Settings) -> Settings:
    """`strategy = "flora"` is short for `strategy.name = "flora"`."""
    if isinstance(settings.get("strategy"), str):
        return {**settings, "strategy": {"name": settings["strategy"]}}
    return settings


def _settings(name: str, variants: Mapping[str, Settings], scenario: Path) -> Settings:
    """Of a variant, or of a strategy alone. A variant that bears the name of a strategy is of that strategy."""
    if name in variants:
        own = _strategy_as_table(variants[name])
        return merged({"strategy": {"name": name}}, own) if name in known() else own
    if name not in known() and ":" not in name:
        of = f"variants of {scenario} are {', '.join(variants)}; " if variants else ""
        hint = nearest(name, [*variants, *known()])
        raise StrategyError(f"unknown strategy or variant '{name}'{hint}; {of}known strategies are {', '.join(known())}")
    return {"strategy": {"name": name}}


def _checked(settings: Settings, where: str) -> Job:
    """The cells' job: evaluated at its end, and without the baselines of a single run."""
    job = checked_job({**settings, "compare": False}, where)
    every, count = job.rounds.evaluate_every, job.rounds.count
    if job.data.held_out == 0:
        raise JobError(f"{where}: a comparison is made on held-out examples, given data.held_out = 0; set data.held_out = 0.2")
    if every == 0 or count % every:
        job = job.model_copy(update={"rounds": job.rounds.model_copy(update={"evaluate_every": count})})
    return job


def _require_free_keys(overrides: Iterable[str]) -> None:
    """What the plan itself sets cannot be set for all of its cells."""
    instead = {"strategy.name": "--strategies a,b", "strategy": "--strategies a,b", "seed": "--seeds 3"}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in instead:
            raise JobError(f"--set {override} would make all cells alike; name them with {instead[key]}")


def _require_clients(jobs: Iterable[Job]) -> None:
    """Raises DataError where the clients of a job are not there."""
    seen: list[tuple[Any, Any]] = []
    for job in jobs:
        if (job.data, job.clients) not in seen:
            seen.append((job.data, job.clients))
            clients_in(job.data, job.clients)


def _require_folder(out: Path) -> None:
    """Raises RunFolderError where `out` is taken by something else."""
    if (out / "job.toml").exists() or (out.exists() and not out.is_dir()):
        raise RunFolderError(f"{out} is a run or a file; a comparison needs a folder of its own: --out {out}-compare")


def _cells(jobs: Mapping[str, Job], seeds: int, out: Path) -> Iterable[Cell]:
    """By seed, then by variant: the first table that means something is there after one seed of each."""
    folders = {name: out / folder_name(name) for name in jobs}
    if len(set(folders.values())) < len(folders):
        raise JobError(f"two of {', '.join(folders)} would have the same folder in {out}; give one of them another name")
    for seed in range(seeds):
        for name, job in jobs.items():
            yield Cell(name, seed, job.model_copy(update={"seed": seed}), folders[name] / f"seed-{seed}")


def folder_name(variant: str) -> str:
    """`path/my.py:Mine` has no place in a path: all but letters, digits, dots and dashes become dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", variant).strip(".-") or "variant"
