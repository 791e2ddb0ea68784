"""Which jobs a policy lets in: looked at before anything that the job names is imported, opened or loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from client.allowance import forbidden
from client.data.formats import FORMATS
from client.patterns import admit_adapter
from fedtune.job import Job
from fedtune.registry import known as known_strategies
from fedtune.wire.codec import ENTROPY, STAGE
from fedtune.wire.stages import known as known_stages

if TYPE_CHECKING:
    from client.policy import Policy

BUILT_IN = "builtin:"
LONGEST_CODEC = 200  # characters; a long row of spaces takes long to read
LONGEST_TEXT, MOST_AT_A_TIME, MOST_CLASSES = 10**6, 2**16, 2**16  # tokens; examples; more than any machine has room for
FASTEST = 1e-5  # seconds; no machine takes a step in less


@dataclass(frozen=True)
class Own:
    """The node's name, and what it brings itself in place of what a job names."""

    name: str = ""
    model: bool = False
    data: bool = False


def admit_job(policy: Policy, job: Job, own: Own | None) -> None:
    """Raises Forbidden with the rule, what was given and what is allowed."""
    _admit_strategy(policy, job)
    _admit_stages(policy, job)
    _admit_paths(job, own or Own())
    _admit_columns(policy, job)
    admit_adapter(job.adapter)
    _admit_sizes(job)
    _admit_work(policy, job, own or Own())
    _admit_privacy(policy, job)


def _admit_strategy(policy: Policy, job: Job) -> None:
    name, listed = job.strategy.name, policy.strategies
    known = known_strategies() if listed is None else listed
    if name not in known:
        raise forbidden("strategies", f"'{name}'", ", ".join(known), "name one of these, or this node's operator to list it")
    for word in _words(job.strategy.settings):
        if _may_name_code(word) and word not in (listed or ()):
            instead = "name what is installed here, or this node's operator to list it"
            raise forbidden("strategies", f"a setting that names code, {word[:80]!r}", "what its policy lists", instead)


def _may_name_code(word: str) -> bool:
    """Whatever is loaded by name has one of these: `file.py:Class`, `package.module:Class`, a path."""
    return ":" in word or "/" in word or word.strip().endswith(".py")


def _words(value: Any) -> Iterator[str]:
    """Every text anywhere in a setting."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _words(key)
            yield from _words(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _words(one)


def _admit_stages(policy: Policy, job: Job) -> None:
    allowed = [*(known_stages() if policy.stages is None else policy.stages), ENTROPY]
    for codec in filter(None, (job.wire.up, job.wire.down, job.wire.first)):
        if len(codec) > LONGEST_CODEC:
            raise forbidden("stages", f"a codec of {len(codec)} characters", LONGEST_CODEC, "leave out what is not needed")
        for word in codec.split("|"):
            found = STAGE.fullmatch(word)
            name, settings = (found["name"], found["given"] or "") if found else (word.strip(), "")
            if name not in allowed or _may_name_code(settings):
                raise forbidden("stages", f"'{word.strip()}'", ", ".join(allowed), "name these stages only")


def _admit_paths(job: Job, own: Own) -> None:
    """What lies on this machine is its operator's to name."""
    for what, path, has in (("model", job.model.path, own.model), ("data", job.data.path, own.data)):
        if not has and not path.startswith(BUILT_IN):
            instead = f"this node's operator to start it with --{what}, or the coordinator to take {BUILT_IN}stdlib"
            raise forbidden(what, f"{what}.path = '{path}' of a job", f"what the node's operator names with --{what}", instead)


def _admit_columns(policy: Policy, job: Job) -> None:
    given = job.data.client_column
    if given != policy.client_column and (given is not None or policy.client_column is not None):
        raise forbidden(
            "client_column", f"data.client_column = '{given}'", policy.client_column or "none", "leave it to this node's policy"
        )
    if policy.columns is None:
        return
    wanted = [format.columns for format in FORMATS[job.model.task]]
    if not any(set(columns) <= set(policy.columns) for columns in wanted):
        needed = " or ".join(" + ".join(columns) for columns in wanted)
        raise forbidden(
            "columns", f"a job of {job.model.task} that needs {needed}", ", ".join(policy.columns), "train on these"
        )


def _admit_sizes(job: Job) -> None:
    """What is made as large as the job says, whatever data there is."""
    for section, setting, size, most in (
        ("data", "max_length", job.data.max_length, LONGEST_TEXT),
        ("train", "batch", job.train.batch, MOST_AT_A_TIME),
        ("train", "micro_batch", job.train.micro_batch, MOST_AT_A_TIME),
        ("model", "labels", job.model.classes, MOST_CLASSES),
    ):
        if size is not None and size > most:
            raise forbidden(setting, f"{section}.{setting} = {size}", f"at most {most}", f"lower {section}.{setting}")


def _admit_work(policy: Policy, job: Job, own: Own) -> None:
    policy.admit_steps(job.train.steps)  # 0 means by epochs: known when the examples are counted
    if policy.max_seconds is not None and job.train.steps * FASTEST > policy.max_seconds:
        lower = "lower train.steps"
        raise forbidden("max_seconds", f"{job.train.steps} steps a round", f"{policy.max_seconds:g} s", lower)
    policy.admit_rank(max([job.rank_of(own.name), *job.adapter.rank_pattern.values()]))


def _admit_privacy(policy: Policy, job: Job) -> None:
    if policy.least_noise is not None:
        noise = getattr(getattr(job, "privacy", None), "noise", None)
        given = "a job without noise" if noise is None else f"noise {noise:g}"
        if noise is None or noise < policy.least_noise:
            raise forbidden("least_noise", given, f"at least {policy.least_noise:g}", "add as much")
    if policy.end_to_end and not getattr(getattr(job, "security", None), "end_to_end", False):
        instead = "type --set security.end_to_end=true"
        raise forbidden("end_to_end", "a job whose answers anybody on the way can read", "sealed answers", instead)
