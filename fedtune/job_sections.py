"""The tables of a job file: every key with its default, its check and its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

PositiveBytes = Annotated[ByteSize, Field(gt=0)]
ALL = 1e6  # layers; no model has more


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
    layers: Mapping[str, PositiveInt | Literal["all"]] = Field(
        default_factory=dict, description="how many layers a client trains, for methods that select them"
    )
    memory: Mapping[str, PositiveBytes] = Field(
        default_factory=dict, description="that a training step of a client may take: fewer layers fit"
    )
    seconds: Mapping[str, PositiveFloat] = Field(
        default_factory=dict, description="that a training step of a client may take: fewer layers fit"
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

    def steps_for(self, examples: int) -> int:
        """Local steps of one round for a client with so many examples: as given, or from epochs, rounded up."""
        return self.steps or max(1, round(self.epochs * examples / self.batch + 0.499999))


class Rounds(Section):
    count: PositiveInt = Field(10, description="how many")
    clients: PositiveInt | None = Field(None, description="clients drawn for a round; absent is all")
    evaluate_every: NonNegativeInt = Field(1, description="rounds between evaluations on held-out examples; 0 is never")
    quorum: float = Field(0.5, gt=0, le=1, description="share of the cohort that must answer, else the run stops")
    timeout: PositiveFloat = Field(3600.0, description="seconds to wait for the answers of a round")
    max_weight: PositiveFloat = Field(1e9, description="an answer that claims a larger weight is refused")
    without_quorum: Literal["stop", "wait"] = Field(
        "stop", description="at the deadline with too few answers: end the run, or ask those who failed again until enough came"
    )
    oversample: float = Field(1.0, ge=1, description="clients asked for each one wanted; who comes after enough is late")
    late: Literal["drop", "next_round"] = Field(
        "drop", description="of answers that come after their round; next_round: they count there, by staleness"
    )
    staleness: float = Field(
        0.5, ge=0, description="a late answer's weight is divided by (1 + rounds that it is late) to this power"
    )
    mode: Literal["synchronous", "buffered"] = Field(
        "synchronous", description="buffered: a round is over when rounds.buffer answers have come, and nobody waits for others"
    )
    buffer: PositiveInt | None = Field(None, description="answers of a buffered round; absent is half of rounds.clients")
    keep: PositiveInt | None = Field(None, description="rounds whose adapters stay on disk; absent is all")
    max_rise: PositiveFloat | None = Field(
        1.0, description="nats by which the held-out loss may rise in a round; beyond it, or NaN, the round is rolled back"
    )


class Gate(Section):
    """What an answer must keep to beside its shape. What is refused lies in the run folder's `quarantine`, with its reason."""

    max_norm: PositiveFloat | None = Field(None, description="norm of a client's update, beyond which it is refused")
    max_ratio: NonNegativeFloat = Field(
        30.0, description="norm of an update over the median of the cohort's, beyond which it is refused; 0 is no limit"
    )
    refusals: PositiveInt = Field(3, description="refused answers in a row after which a client sits out")
    sits_out: NonNegativeInt = Field(5, description="rounds that such a client sits out; 0 is none")
    quarantine: NonNegativeInt = Field(20, description="refused answers that are kept; the oldest go first")


class StrategySettings(BaseModel):
    """The method, and its own settings beside its name."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("fedavg", description="as `fedtune strategies` lists it, file.py:Class, or package.module:Class")

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class Wire(Section):
    """How small messages are. A codec is a row of stages: `topk(0.1) | int8 | entropy`."""

    preset: Literal["plain", "lossless", "balanced", "tiny"] = Field(
        "balanced", description="codecs for what is not named here"
    )
    up: str | None = Field(None, description="codec of updates, as differences to what the client was sent")
    down: str | None = Field(None, description="codec of broadcasts, as differences to what the client has")
    first: str | None = Field(None, description="codec of tensors of which the other side has no version")
    feedback: Literal["auto", "always", "never"] = Field(
        "auto", description="clients send later what their codec lost; auto: where its mean is not right by itself"
    )
    decay: float = Field(0.9, ge=0, le=1, description="what a round without the client leaves of what its codec lost")
    versions: PositiveInt = Field(16, description="broadcasts that the server remembers; older clients are sent everything")


class Security(Section):
    """Deployment. What a client itself demands stands in its policy."""

    end_to_end: bool = Field(True, description="deployment: the coordinator alone can read answers, not the SuperLink between")


class Machine(Section):
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: NonNegativeInt = Field(0, description="of torch on the CPU; 0 leaves its default")
