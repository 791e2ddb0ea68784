"""The rules of a client's policy, each by itself; tests/client/test_obedient.py tries to get around them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.admission import Own
from client.diary import Diary, Used
from client.hours import Hours
from client.patterns import is_quick
from client.policy import Policy, rules
from fedtune.errors import Forbidden, UserError
from fedtune.job import Job

MakeJob = Callable[..., Job]
ALL_OWN = Own("bob", model=True, data=True)
BASE = "0123456789abcdef" * 2


def refusal(policy: Policy, job: Job, own: Own = ALL_OWN) -> str:
    with pytest.raises(Forbidden) as refused:
        policy.admit_job(job, own)
    return str(refused.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def at(hour: int, minute: int = 0) -> datetime:
    return datetime(2026, 3, 1, hour, minute, tzinfo=UTC)


def test_a_file_with_every_rule(tmp_path: Path) -> None:
    text = f"""
strategies = ["fedavg", "flora"]
stages = ["int8"]
bases = ["{BASE}"]
columns = ["prompt", "completion"]
client_column = "ward"
max_rank = 8
max_steps = 20
max_seconds = 60
rounds_per_day = 24
hours = ["22:00-06:00"]
least_noise = 0.5
evaluation = false
end_to_end = true
"""
    policy = Policy.load(written(tmp_path, text))
    assert {line.split(" = ")[0] for line in text.split("\n") if line} == set(rules()) == set(policy.model_dump())
    assert (policy.max_steps, policy.hours, policy.evaluation) == (20, (Hours(22 * 60, 6 * 60),), False)
    assert policy.reads == ("prompt", "completion", "ward")


def test_every_rule_is_described() -> None:
    assert [rule for rule, meaning in rules().items() if len(meaning) < 10] == []


def test_the_example_has_each_rule_as_it_is_without_a_file(tmp_path: Path) -> None:
    """Its comments, read as settings, are a policy too."""
    example = (Path(__file__).parents[2] / "docs" / "policy.toml").read_text(encoding="utf-8")
    assert Policy.load(written(tmp_path, example)) == Policy()
    settings = [line.removeprefix("# ") for line in example.splitlines() if line.startswith("# ") and " = " in line]
    policy = Policy.load(written(tmp_path, "\n".join(settings)))
    assert policy.model_fields_set == set(rules())


def test_an_empty_file_forbids_as_little_as_none(tmp_path: Path) -> None:
    assert Policy.load(written(tmp_path, "")) == Policy()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("max_step = 3", r"unknown rule 'max_step', did you mean 'max_steps'\?"),
        ("zebra = 3", r"unknown rule 'zebra'; rules are strategies, stages, bases"),
        ("max_steps = 0", r"'max_steps': input should be greater than 0, given 0"),
        ("max_seconds = inf", r"'max_seconds': input should be a finite number"),
        ("bases = ['abc']", r"'bases\.0': .*, given 'abc'"),
        ("hours = ['22-06']", r"'hours\.0': wanted a time like 22:00-06:00, given '22-06'"),
        ("hours = ['24:00-06:00']", "wanted two times of a day"),
        ("hours = ['06:00-06:00']", "the whole day is 00:00-24:00"),
        ("hours = ['06:60-07:00']", "wanted two times of a day"),
        ("max_steps = ", "is not TOML"),
    ],
)
def test_what_is_written_wrong(text: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"policy\.toml.*{wanted}"):
        Policy.load(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no policy file .*leave out --policy"):
        Policy.load(tmp_path / "policy.toml")


@given(st.integers(0, 1439), st.integers(0, 1440), st.integers(0, 1439))
def test_hours_are_the_minutes_from_start_to_end(start: int, end: int, now: int) -> None:
    """Walked through minute by minute, over midnight too."""
    if start == end:
        return
    minute, inside = start, set[int]()
    while minute != end % 1440 or not inside:
        inside.add(minute)
        minute = (minute + 1) % 1440
    if end % 1440 == start:  # 00:00-24:00
        inside = set(range(1440))
    assert (at(*divmod(now, 60)) in Hours(start, end)) is (now in inside)


def test_an_ask_outside_the_hours() -> None:
    policy, diary = Policy(hours=("22:00-06:00", "12:00-13:00")), Diary(None)
    for hour in (22, 23, 0, 5, 12):
        policy.admit_ask("train", "run", 1, "1.0", diary, at(hour))
    with pytest.raises(Forbidden, match=r"^policy\.hours: given an ask at 06:00 .*, allowed 22:00-06:00, 12:00-13:00; ask the"):
        policy.admit_ask("train", "run", 1, "1.0", diary, at(6))


def test_the_rounds_of_a_day() -> None:
    policy, diary = Policy(rounds_per_day=2), Diary(None)
    for round in (1, 1, 2, 2):
        policy.admit_ask("train", "run", round, f"{round}.0", diary, at(9))
        diary.note("run", round, f"{round}.0", Used(), at(9))
    with pytest.raises(Forbidden, match=r"^policy\.rounds_per_day: given round 3 of today \(UTC\), allowed 2; ask"):
        policy.admit_ask("train", "run", 3, "3.0", diary, at(10))
    policy.admit_ask("train", "run", 2, "2.0", diary, at(10))
    policy.admit_ask("train", "run", 3, "3.0", diary, datetime(2026, 3, 2, tzinfo=UTC))


def test_evaluation_may_stay_here() -> None:
    policy = Policy(evaluation=False)
    policy.admit_ask("train", "run", 1, "1.0", Diary(None), at(9))
    with pytest.raises(Forbidden, match=r"^policy\.evaluation: .*--set rounds\.evaluate_every=0"):
        policy.admit_ask("evaluate", "run", 1, "1.0", Diary(None), at(9))


def test_strategies_by_name(make_job: MakeJob) -> None:
    policy = Policy(strategies=("flora", "fedavg"))
    policy.admit_job(make_job("strategy=flora"), ALL_OWN)
    assert refusal(policy, make_job("strategy=fedprox")).startswith(
        "policy.strategies: given 'fedprox', allowed flora, fedavg; ask the coordinator to"
    )


def test_bases_by_hash() -> None:
    Policy(bases=(BASE,)).admit_base(BASE)
    with pytest.raises(Forbidden, match=rf"^policy\.bases: given base model 0ther, allowed {BASE}; ask"):
        Policy(bases=(BASE,)).admit_base("0ther")


def test_steps_and_rank(make_job: MakeJob) -> None:
    policy = Policy(max_steps=5, max_rank=4)
    policy.admit_job(make_job("train.steps=5"), ALL_OWN)
    assert refusal(policy, make_job("train.steps=6")) == (
        "policy.max_steps: given 6 local steps a round, allowed 5; ask the coordinator to type --set train.steps=5"
    )
    assert "policy.max_rank: given rank 5, allowed 4" in refusal(policy, make_job("adapter.rank=5"))
    assert "policy.max_rank" in refusal(policy, make_job("adapter.rank_pattern={q_proj=9}"))
    assert "policy.max_rank" in refusal(policy, make_job("clients.ranks={bob=8}"))
    policy.admit_job(make_job("clients.ranks={ann=8}"), ALL_OWN)  # another's rank is not ours


@pytest.mark.parametrize(
    ("key", "most"),
    [("data.max_length", 10**6), ("train.batch", 2**16), ("train.micro_batch", 2**16), ("model.labels", 2**16)],
)
def test_sizes_have_an_end(key: str, most: int, make_job: MakeJob) -> None:
    Policy().admit_job(make_job(f"{key}={most}"), ALL_OWN)
    assert refusal(Policy(), make_job(f"{key}={most + 1}")).startswith(
        f"policy.{key.partition('.')[2]}: given {key} = {most + 1}, allowed at most {most}; ask the coordinator to"
    )


def test_codecs_are_short(make_job: MakeJob) -> None:
    """Long ones take long to read: here for hours, in spaces alone."""
    job = make_job()
    job = job.model_copy(update={"wire": job.wire.model_copy(update={"up": "a" + " " * 20_000 + "("})})
    assert refusal(Policy(), job).startswith("policy.stages: given a codec of 20002 characters, allowed 200")


QUICK = [
    "all-linear",
    "q_proj",
    r"model\.layers\.\d+\.mlp\.(up|down)_proj",
    ".*q_proj$",
    "^.*(self_attn|mlp).*(q_proj|up_proj)",
]
SLOW = [
    "(.|.)*!",
    "(a*)*b",
    "(a|b)+",
    ".*.*.*!",
    "(a|b)(a|b)(a|b)c",
    "(a|a)b",
    "(a.|ab)c",
    "(?:a)",
    "a{9}",
    "[ab]",
    "a" * 201,
    "",
]


@pytest.mark.parametrize("pattern", QUICK)
def test_patterns_of_names(pattern: str) -> None:
    assert is_quick(pattern)
    re.compile(pattern)


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_may_be_slow(pattern: str) -> None:
    assert not is_quick(pattern)


def test_the_slowest_pattern_that_is_let_in_takes_no_time() -> None:
    """As PEFT asks it, of a name of 100 letters: two runs may end at any, then come 4 x 4 words: 100^2 / 2 * 16 = 80,000."""
    name, pattern = "a" * 100, r".*.*(a|aa|aaa|aaaa)(a|aa|aaa|aaaa)\d"
    assert is_quick(pattern)
    began = time.process_time()
    assert re.match(rf"(.*\.)?({pattern})$", name) is None
    assert time.process_time() - began < 1


@given(st.text(r"ab.*+()|\d?[]{}^$-_", max_size=20))
def test_a_pattern_that_is_let_in_can_be_compiled(pattern: str) -> None:
    if is_quick(pattern):
        re.compile(pattern)


def test_targets_in_a_list_are_names(make_job: MakeJob) -> None:
    job, own = make_job("adapter.targets=['q_proj', '.*']"), ALL_OWN
    assert refusal(Policy(), job, own).startswith("policy.targets: given adapter.targets with '.*', allowed names")
    many = {f"layers.{number}.up_proj": 2 for number in range(257)}
    job = make_job()
    job = job.model_copy(update={"adapter": job.adapter.model_copy(update={"rank_pattern": many})})
    assert refusal(Policy(), job, own).startswith(
        "policy.rank_pattern: given adapter.rank_pattern with 257 entries, allowed at most"
    )


def test_columns(make_job: MakeJob) -> None:
    policy = Policy(columns=("prompt", "completion"))
    policy.admit_job(make_job(), ALL_OWN)
    assert refusal(policy, make_job("model.task=classification", "model.labels=2")) == (
        "policy.columns: given a job of classification that needs text + label, allowed prompt, completion; ask the "
        "coordinator to train on these"
    )


def test_noise_and_seals(make_job: MakeJob) -> None:
    """Of a job that knows neither, and of one that does."""
    job, own = make_job(), ALL_OWN
    assert refusal(Policy(least_noise=0.5), job).startswith(
        "policy.least_noise: given a job without noise, allowed at least 0.5"
    )
    private = job.model_copy(update={"privacy": SimpleNamespace(noise=0.4), "security": SimpleNamespace(end_to_end=False)})
    assert "given noise 0.4, allowed at least 0.5" in refusal(Policy(least_noise=0.5), private)
    assert "policy.end_to_end: " in refusal(Policy(end_to_end=True), private)
    better = job.model_copy(update={"privacy": SimpleNamespace(noise=0.5), "security": SimpleNamespace(end_to_end=True)})
    Policy(least_noise=0.5, end_to_end=True).admit_job(better, own)


def test_what_lies_on_this_machine_is_its_operator_s_to_name(make_job: MakeJob) -> None:
    Policy().admit_job(make_job(), ALL_OWN)
    assert refusal(Policy(), make_job(), Own("bob", data=True)).startswith("policy.model: given model.path = '")
    assert refusal(Policy(), make_job("data.path=/etc/x.json"), Own("bob", model=True)).startswith(
        "policy.data: given data.path = '/etc/x.json' of a job, allowed what the node's operator names with --data"
    )
    Policy().admit_job(make_job("model.path=builtin:stdlib", "data.path=builtin:stdlib"), Own("bob"))
