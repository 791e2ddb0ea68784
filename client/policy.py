"""The policy of a client: what its operator lets a coordinator do, in one TOML file. What it forbids is refused by name.

strategies = ["fedavg", "flora"]
max_steps = 200
hours = ["22:00-06:00"]

A rule that is absent forbids nothing. Three hold without a file: a job brings no code, no path of this machine, and names no
column by which this node's rows would be told apart.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, PositiveFloat, PositiveInt, ValidationError

from client.allowance import NO_FIGURES, forbidden
from client.diary import Diary
from client.hours import Hours, open_at
from fedtune.errors import UserError, nearest
from fedtune.job_sections import Section

if TYPE_CHECKING:
    from client.admission import Own
    from fedtune.job import Job

MOST_ASKS = 16  # in a round: methods take up to four and an evaluation, Fed-SB two more for each of its passes
MOST_TIMES = 5  # that the same is asked: as often as a coordinator asks after a lost connection
Time = Annotated[Hours, PlainValidator(Hours.of), PlainSerializer(str)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Policy(Section):
    """Each rule, with its meaning."""

    strategies: tuple[str, ...] | None = Field(
        None, description="methods that a job may name; absent is all that are installed. Code by path or module only from here"
    )
    stages: tuple[str, ...] | None = Field(None, description="stages of codecs that a job may name; absent is all installed")
    bases: tuple[Hash, ...] | None = Field(None, description="base models, by the hash that `fedtune doctor` prints")
    columns: tuple[str, ...] | None = Field(
        None, description="of the data that may be used; all others are dropped on reading, before anything sees them"
    )
    client_column: str | None = Field(
        None, description="column by which rows of one file belong to several clients; a job must name this one, or none"
    )
    max_rank: PositiveInt | None = Field(None, description="most directions of an adapter")
    max_steps: PositiveInt | None = Field(
        None, description="most local steps in one round; every batch of this client's examples counts, probes too"
    )
    max_seconds: PositiveFloat | None = Field(
        None, description="most work in one round, of all its asks; then it stops, and nothing is sent"
    )
    rounds_per_day: PositiveInt | None = Field(
        None, description="most rounds of work on one day by UTC, of all runs; the evaluation before the first counts as one"
    )
    hours: tuple[Time, ...] | None = Field(None, description="local time in which asks are answered, such as 22:00-06:00")
    least_noise: PositiveFloat | None = Field(None, description="least noise that the job must add to updates")
    evaluation: bool = Field(True, description="whether figures on held-out examples may leave")
    end_to_end: bool = Field(False, description="refuse jobs whose answers are not sealed to the coordinator")

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Raises UserError, with what was wanted."""
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate(given)
        except FileNotFoundError as error:
            raise UserError(f"there is no policy file {path}; leave out --policy, or write one as docs/policy.toml") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the policy file {path} cannot be read: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path} is not TOML: {error}") from error
        except ValidationError as error:
            raise UserError(f"{path}: {_first_problem(error)}") from error

    @property
    def reads(self) -> tuple[str, ...] | None:
        """The columns that are read, with the one that tells clients apart; None is all."""
        return self.columns and (*self.columns, *([self.client_column] if self.client_column else []))

    def admit_job(self, job: Job, own: Own | None = None) -> None:
        """What can be known before code, model or data of the job is touched. Raises Forbidden."""
        from client.admission import admit_job

        admit_job(self, job, own)

    def admit_base(self, base: str) -> None:
        if self.bases is not None and base not in self.bases:
            raise forbidden("bases", f"base model {base}", ", ".join(self.bases), "train one of these")

    def admit_steps(self, steps: int) -> None:
        """In one round of this client, once its examples are counted."""
        if self.max_steps is not None and steps > self.max_steps:
            raise forbidden(
                "max_steps", f"{steps} local steps a round", self.max_steps, f"type --set train.steps={self.max_steps}"
            )

    def admit_rank(self, rank: int) -> None:
        if self.max_rank is not None and rank > self.max_rank:
            raise forbidden("max_rank", f"rank {rank}", self.max_rank, f"type --set adapter.rank={self.max_rank}")

    def admit_time(self, now: datetime) -> None:
        if self.hours is not None and not open_at(self.hours, now):
            hours = ", ".join(map(str, self.hours))
            raise forbidden("hours", f"an ask at {now:%H:%M} (local time)", hours, "ask again then")

    def admit_ask(self, kind: str, run: str, round: int, ask: str, diary: Diary, now: datetime) -> None:
        """Before any work for it. Raises Forbidden."""
        self.admit_time(now)
        if kind == "evaluate" and not self.evaluation:
            raise forbidden("evaluation", "an ask to evaluate", "none", NO_FIGURES)
        most = self.rounds_per_day
        if most is not None and not diary.knows(run, round, now) and diary.rounds(now) >= most:
            raise forbidden("rounds_per_day", f"round {most + 1} of today (UTC)", most, "go on tomorrow")
        if (most, self.max_steps, self.max_seconds) != (None, None, None):
            _admit_again(run, round, ask, diary, now)


def _admit_again(run: str, round: int, ask: str, diary: Diary, now: datetime) -> None:
    """Where work has a limit, a round is no more than a few asks. Raises Forbidden."""
    times, asks = diary.used(run, round, ask, now).times, diary.asks(run, round, now)
    if times >= MOST_TIMES:
        given = f"the same ask {ask[:40]!r} for the {times + 1}th time"
        raise forbidden("asks", given, f"{MOST_TIMES} times", "go on with the next round")
    if times == 0 and asks >= MOST_ASKS:
        given = f"ask {ask[:40]!r}, the {asks + 1}th of round {round}"
        raise forbidden("asks", given, f"{MOST_ASKS} a round", "take a method with fewer steps in a round")


def rules() -> Mapping[str, str]:
    """Each rule with its meaning, for the docs."""
    return {name: info.description or "" for name, info in Policy.model_fields.items()}


def _first_problem(error: ValidationError) -> str:
    problem: Any = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        hint = nearest(key, Policy.model_fields) or f"; rules are {', '.join(Policy.model_fields)}"
        return f"unknown rule '{key}'{hint}"
    wanted = problem["msg"].removeprefix("Value error, ")
    return f"'{key}': {wanted[:1].lower() + wanted[1:]}, given {problem['input']!r}"
