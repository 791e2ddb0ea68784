"""The job: one TOML file, checked before any second of training is spent. Every key has its default and its meaning here.

seed = 0
model.path = "builtin:stdlib"           # or a folder, or a hub id
data.path = "builtin:stdlib"            # or a folder with one file per client
strategy.name = "fedavg"
rounds.count = 10
train.lr = 3e-3
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError, model_validator

from fedtune.errors import JobError, nearest
from fedtune.job_sections import (
    ALL,
    AdapterSettings,
    Clients,
    Data,
    Gate,
    Machine,
    Model,
    Rounds,
    Section,
    Security,
    StrategySettings,
    Train,
)
from fedtune.job_sections import Wire as WireSettings
from fedtune.registry import settings_of, strategy_from
from fedtune.strategy import Strategy
from fedtune.wire.presets import Wire, wire_of

__all__ = ["Clients", "Data", "Job", "Model", "Rounds", "StrategySettings", "Train", "checked_job", "known_keys", "load_job"]
__all__ += ["set_key"]


SHORT = {"strategy": "name", "wire": "preset"}  # tables that a word stands for, and the key that it sets


class Job(Section):
    """Everything that a run depends on."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="of the run and, unless told otherwise, of its folder")
    seed: NonNegativeInt = Field(0, description="of every draw: adapters, cohorts, held-out examples, batches")
    model: Model = Model()
    adapter: AdapterSettings = AdapterSettings()
    data: Data = Data()
    clients: Clients = Clients()
    train: Train = Train()
    rounds: Rounds = Rounds()
    gate: Gate = Gate()
    strategy: StrategySettings = StrategySettings()
    wire: WireSettings = WireSettings()
    security: Security = Security()
    machine: Machine = Machine()
    variants: Mapping[str, Mapping[str, Any]] = Field(
        default_factory=dict, description="other settings under a name, for `fedtune compare`; a run leaves them alone"
    )
    compare: bool = Field(False, description="simulation: also measure the base, each client alone, and central training")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, given: Any) -> Any:
        """`strategy = "flora"` is short for `strategy.name = "flora"`, and `wire = "tiny"` for `wire.preset = "tiny"`."""
        if not isinstance(given, dict):
            return given
        return {**given, **{key: {name: given[key]} for key, name in SHORT.items() if isinstance(given.get(key), str)}}

    def make_strategy(self) -> Strategy:
        """With the job's seed, where the method draws and its settings name no other."""
        drawn = {"seed": self.seed} if "seed" in settings_of(self.strategy.name) else {}
        return strategy_from(self.strategy.name, {**drawn, **self.strategy.settings})

    def make_wire(self) -> Wire:
        """How messages travel. Raises JobError where a codec cannot be, or loses what the method needs."""
        return wire_of(self, self.make_strategy())

    def rank_of(self, client: str) -> int:
        own = self.clients.ranks.get(client)
        return self.adapter.rank_for(self._budget(client)) if own is None else own

    def alpha_of(self, client: str) -> float:
        own = self.clients.alphas.get(client)
        return self.adapter.alpha_for(self._budget(client)) if own is None else own

    def scale_of(self, client: str) -> float:
        return self.adapter.scale(self.rank_of(client), self.alpha_of(client))

    def limits_of(self, client: str) -> dict[str, float]:
        """What a client can afford, of `layers`, `memory` and `seconds`, as far as the job says it."""
        layers = {client: ALL if count == "all" else float(count) for client, count in self.clients.layers.items()}
        named = {"layers": layers, "memory": self.clients.memory, "seconds": self.clients.seconds}
        return {name: float(given[client]) for name, given in named.items() if client in given}

    def _budget(self, client: str) -> float:
        return self.clients.budgets.get(client, 1.0)


def load_job(path: Path, overrides: Iterable[str] = ()) -> Job:
    """Read and check a job file; `overrides` are `key=value` with a dotted key. Raises JobError or StrategyError."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise JobError(
            f"there is no job file {path}; wanted a TOML file or the name of a scenario, such as: fedtune simulate demo"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"the job file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        set_key(given, override)
    return checked_job(given, str(path))


def checked_job(given: Mapping[str, Any], where: str) -> Job:
    try:
        job = Job.model_validate(given)
    except ValidationError as error:
        raise JobError(f"{where}: {_first_problem(error, given)}") from error
    job.make_strategy().check_job(job)
    job.make_wire()
    return job


def known_keys(model: type[BaseModel] = Job, prefix: str = "") -> dict[str, str]:
    """Every key of a job file with its description, dotted."""
    keys: dict[str, str] = {}
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys |= known_keys(inner, f"{prefix}{name}.")
        else:
            keys[prefix + name] = info.description or ""
    return keys


def set_key(given: dict[str, Any], override: str) -> None:
    """Put one `key=value` of `--set` in place; the value is TOML, or a bare word. Raises JobError."""
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise JobError(f"--set {override}: wanted key=value, such as --set train.lr=1e-3")
    for part in parts[:-1]:
        inner = given.setdefault(part, {})
        if isinstance(inner, str) and part in SHORT:
            inner = given[part] = {SHORT[part]: inner}
        if not isinstance(inner, dict):
            raise JobError(f"--set {override}: '{part}' is a value, not a table")
        given = inner
    try:
        wanted = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        wanted = value
    short = SHORT.get(key.strip())
    if short and isinstance(wanted, str) and isinstance(given.get(parts[-1]), dict):
        given[parts[-1]][short] = wanted  # the other keys of the table stay
    else:
        given[parts[-1]] = wanted


def _first_problem(error: ValidationError, given: Any) -> str:
    """In words that name the key as the user wrote it. Of the members of a union the one that came furthest speaks."""
    problems = error.errors()
    same_key = [problem for problem in problems if problem["loc"][:2] == problems[0]["loc"][:2]]
    problem, written = max(same_key, key=lambda one: len(one["loc"])), []
    for part in problem["loc"]:  # some are names of the union's members, which nobody wrote
        if isinstance(given, Mapping) and part in given:
            written.append(str(part))
            given = given[part]
    if problem["type"] == "missing":
        written.append(str(problem["loc"][-1]))
    key = ".".join(written)
    if problem["type"] == "extra_forbidden":
        sections = {known.partition(".")[0] for known in known_keys()}
        hint = nearest(key, sections | known_keys().keys()) or f"; known keys of a job: {', '.join(sorted(known_keys()))}"
        return f"unknown key '{key}'{hint}"
    wanted = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"'{key}': {wanted}, given {problem['input']!r}"
