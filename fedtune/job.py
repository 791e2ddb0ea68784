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
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from fedtune.errors import JobError, nearest
from fedtune.registry import strategy_from
from fedtune.strategy import Strategy


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    """The base model, which nobody changes."""

    path: str = Field("builtin:stdlib", description="folder, hub id, or builtin:stdlib")
    revision: str | None = Field(None, description="of a hub id")
    task: Literal["causal", "classification"] = Field("causal", description="next token, or one label for a text")
    labels: Annotated[int, Field(ge=2)] | tuple[str, ...] | None = Field(
        None, description="classes: how many, or their names in order; a simulation finds them in the data"
    )
    quantize: Literal["none", "8bit", "4bit"] = Field("none", description="through bitsandbytes")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the base weights; auto: float32 on a CPU, bfloat16 on a GPU"
    )

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return self.labels if isinstance(self.labels, tuple) else None

    @property
    def classes(self) -> int | None:
        return self.labels if self.labels is None or isinstance(self.labels, int) else len(self.labels)


class RankRule(Section):
    """A rank for each client by what it can afford: its budget times `default`, from 1 to `max`."""

    default: PositiveInt
    by: Literal["budget"]
    max: PositiveInt

    def value(self, budget: float) -> int:
        return min(max(round(self.default * budget), 1), self.max)


class AlphaRule(Section):
    """An alpha for each client by what it can afford: its budget times `default`, at most `max`."""

    default: PositiveFloat
    by: Literal["budget"]
    max: PositiveFloat

    def value(self, budget: float) -> float:
        return min(self.default * budget, self.max)


class AdapterSettings(Section):
    """The LoRA pairs that train."""

    rank: PositiveInt | RankRule = Field(8, description="directions in which each adapted matrix can change")
    alpha: PositiveFloat | AlphaRule = Field(16.0, description="the product of a pair is scaled by alpha/rank")
    rank_pattern: Mapping[str, PositiveInt] = Field(
        default_factory=dict, description="modules, by name or PEFT pattern, of another rank than the rest, for every client"
    )
    alpha_pattern: Mapping[str, PositiveFloat] = Field(
        default_factory=dict, description="modules of another alpha than the rest, for every client"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of a pair's inputs that a training step leaves out")
    targets: str | tuple[str, ...] = Field("all-linear", description="names of modules, or all-linear")
    rslora: bool = Field(False, description="scale alpha/sqrt(rank) in place of alpha/rank")

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / rank**0.5 if self.rslora else alpha / rank

    def rank_for(self, budget: float = 1.0) -> int:
        return self.rank if isinstance(self.rank, int) else self.rank.value(budget)

    def alpha_for(self, budget: float = 1.0) -> float:
        return self.alpha.value(budget) if isinstance(self.alpha, AlphaRule) else self.alpha


class Data(Section):
    """Each client's own text. In deployment every node names its own path."""

    path: str = Field("builtin:stdlib", description="folder with a file per client, one file, or builtin:stdlib")
    client_column: str | None = Field(None, description="column that names the client, for one file that holds many")
    held_out: float = Field(0.2, ge=0, lt=1, description="share of each client's examples that is only evaluated")
    max_length: int = Field(128, ge=8, description="tokens in one example")
    packing: bool = Field(True, description="several short texts in one example")
    max_held_out: NonNegativeInt = Field(0, description="examples of a client that an evaluation looks at; 0 is all")
    partition: Literal["natural", "iid", "dirichlet"] = Field(
        "natural", description="simulation: clients as the data has them, or clients.count new ones drawn from all of its rows"
    )
    concentration: PositiveFloat = Field(0.1, description="of dirichlet: the smaller, the fewer topics or labels a client has")


class Clients(Section):
    """Who takes part, in simulation."""

    count: PositiveInt | None = Field(None, description="how many of the clients in the data; absent is all")
    names: tuple[str, ...] | None = Field(None, description="which clients; absent is the first `count` by name")
    ranks: Mapping[str, PositiveInt] = Field(
        default_factory=dict, description="rank of a client that differs from adapter.rank"
    )
    alphas: Mapping[str, PositiveFloat] = Field(
        default_factory=dict, description="alpha of a client that differs from adapter.alpha"
    )
    budgets: Mapping[str, PositiveFloat] = Field(
        default_factory=dict, description="what a client can afford, where adapter.rank or adapter.alpha go by it; absent is 1"
    )


class Train(Section):
    """Local training in one round. The optimiser starts afresh each round."""

    steps: NonNegativeInt = Field(10, description="gradient steps a round; 0 means by epochs")
    epochs: NonNegativeFloat = Field(1.0, description="passes over the client's examples, where steps = 0")
    batch: PositiveInt = Field(4, description="examples in one gradient step")
    micro_batch: PositiveInt | None = Field(None, description="examples in memory at a time; absent is the whole batch")
    lr: PositiveFloat = Field(3e-3, description="peak learning rate")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="of the gradient steps; its state is not kept")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of adamw")
    weight_decay: NonNegativeFloat = Field(0.0, description="of what trains, towards zero")
    schedule: Literal["constant", "cosine"] = Field("constant", description="of the learning rate within a round")
    round_schedule: Literal["constant", "cosine"] = Field("constant", description="of its peak over the rounds")
    min_lr: float = Field(0.1, ge=0, le=1, description="where a cosine ends, as a share of lr")
    warmup: NonNegativeInt = Field(0, description="steps of linear warm-up in a round")
    clip: NonNegativeFloat = Field(1.0, description="norm of the gradient; 0 is no clipping")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 autocast where the machine has it")
    checkpointing: bool = Field(False, description="recompute activations: less memory, more time")


class Rounds(Section):
    count: PositiveInt = Field(10, description="how many")
    clients: PositiveInt | None = Field(None, description="clients drawn for a round; absent is all")
    evaluate_every: NonNegativeInt = Field(1, description="rounds between evaluations on held-out examples; 0 is never")
    quorum: float = Field(0.5, gt=0, le=1, description="share of the cohort that must answer, else the run stops")
    timeout: PositiveFloat = Field(3600.0, description="seconds to wait for the answers of a round")
    max_weight: PositiveFloat = Field(1e9, description="an answer that claims a larger weight is refused")


class StrategySettings(BaseModel):
    """The method, and its own settings beside its name."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("fedavg", description="as `fedtune strategies` lists it, file.py:Class, or package.module:Class")

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class Machine(Section):
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: NonNegativeInt = Field(0, description="of torch on the CPU; 0 leaves its default")


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
    strategy: StrategySettings = StrategySettings()
    machine: Machine = Machine()
    variants: Mapping[str, Mapping[str, Any]] = Field(
        default_factory=dict, description="other settings under a name, for `fedtune compare`; a run leaves them alone"
    )
    compare: bool = Field(False, description="simulation: also measure the base, each client alone, and central training")

    @model_validator(mode="before")
    @classmethod
    def _strategy_by_name(cls, given: Any) -> Any:
        """`strategy = "flora"` is short for `strategy.name = "flora"`."""
        if isinstance(given, dict) and isinstance(given.get("strategy"), str):
            return {**given, "strategy": {"name": given["strategy"]}}
        return given

    def make_strategy(self) -> Strategy:
        return strategy_from(self.strategy.name, self.strategy.settings)

    def rank_of(self, client: str) -> int:
        own = self.clients.ranks.get(client)
        return self.adapter.rank_for(self._budget(client)) if own is None else own

    def alpha_of(self, client: str) -> float:
        own = self.clients.alphas.get(client)
        return self.adapter.alpha_for(self._budget(client)) if own is None else own

    def scale_of(self, client: str) -> float:
        return self.adapter.scale(self.rank_of(client), self.alpha_of(client))

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
        _set(given, override)
    return checked_job(given, str(path))


def checked_job(given: Mapping[str, Any], where: str) -> Job:
    try:
        job = Job.model_validate(given)
    except ValidationError as error:
        raise JobError(f"{where}: {_first_problem(error, given)}") from error
    job.make_strategy().check_job(job)
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


def _set(given: dict[str, Any], override: str) -> None:
    """Put one `key=value` in place; the value is TOML, or a bare word."""
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise JobError(f"--set {override}: wanted key=value, such as --set train.lr=1e-3")
    for part in parts[:-1]:
        inner = given.setdefault(part, {})
        if isinstance(inner, str) and part == "strategy":
            inner = given[part] = {"name": inner}
        if not isinstance(inner, dict):
            raise JobError(f"--set {override}: '{part}' is a value, not a table")
        given = inner
    try:
        given[parts[-1]] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        given[parts[-1]] = value


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
