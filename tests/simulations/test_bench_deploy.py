"""The bench of deployments compares one job with itself, and counts every second of a round once."""

from __future__ import annotations

import importlib
import json
import operator
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from fedtune.base import blueprint
from fedtune.paths import app_root, base_model
from simulations.bench_deploy import Side, parts_table, ratios, rounds_table
from simulations.bench_deploy_sides import BATCH, LENGTH, STEPS, Local, config_of, job_of, write_tokens
from simulations.bench_deploy_trace import PARTS, Call, breakdown, read
from simulations.bench_deploy_trace import STEPS as PLACE
from simulations.stock_app import task
from simulations.tracing.sitecustomize import TIMED

SIMULATIONS = app_root() / "simulations"


def calls_of_a_round() -> list[Call]:
    """Of ten seconds; ann is done first, and bob's answer is the one that the round waits for."""
    ann, bob = (
        [
            Call("_pull_and_store_message", node, 1.75, 2.0),
            Call("acquire", node, 2.0, 2.25),
            Call("pull", node, 2.25, 2.5),
            Call("Answer", node, 3.0, done - 1),
            Call("fit", node, 3.25, done - 1.5),
            Call("reply", node, done - 1, done - 0.75),
            Call("_push_messages", node, 2.0, done),
        ]
        for node, done in (("ann", 7.0), ("bob", 8.0))
    )
    server = [Call("push_messages", "server", 0.5, 1.5), Call("pull_messages", "server", 7.25, 7.5)]
    return [*server, Call("pull_messages", "server", 8.5, 9.0), Call("play", "server", 0.0, 10.0), *ann, *bob]


def test_every_second_of_a_round_is_counted_once() -> None:
    """Bob's way: 0.5 s until the asks go out and 1 s after the answer is there, 1 s sending, and so on."""
    (seconds,) = breakdown(sorted(calls_of_a_round(), key=lambda call: call.ended))
    assert seconds == [1.5, 1.0, 0.25, 0.25, 0.25, 0.25, 0.5, 0.75, 3.25, 0.25, 0.75, 1.0]
    assert len(seconds) == len(PARTS)
    assert sum(seconds) == 10.0
    assert "gradient steps" in PARTS[PLACE]
    assert seconds[PLACE] == 8.0 - 1.5 - 3.25


def test_a_look_that_began_before_the_ask_was_there_waits_for_nothing() -> None:
    """It began 1.25 s early; what it finds is on its way since the asks were sent, at 1.5 s."""
    calls = [Call(c.what, c.node, 0.25, c.ended) if c.what == "_pull_and_store_message" else c for c in calls_of_a_round()]
    (seconds,) = breakdown(sorted(calls, key=lambda call: call.ended))
    assert seconds[2:4] == [0.0, 0.5]
    assert sum(seconds) == 10.0


def test_the_trainer_may_begin_before_the_supernode_is_done_with_the_ask() -> None:
    """At 3 s; what the SuperNode does until 3.1 s keeps nobody waiting."""
    calls = [Call(c.what, c.node, c.began, 3.1) if c.what == "_pull_and_store_message" else c for c in calls_of_a_round()]
    (seconds,) = breakdown(sorted(calls, key=lambda call: call.ended))
    assert seconds[3:8] == [0.5, 0.0, 0.25, 0.5, 0.75]
    assert sum(seconds) == 10.0


def test_each_round_has_its_own_calls(tmp_path: Path) -> None:
    """The second is the first once more, a minute later; lines of several processes, in any order."""
    later = [Call(c.what, c.node, c.began + 60, c.ended + 60) for c in calls_of_a_round()]
    for number, calls in enumerate(([*later, *calls_of_a_round()][::2], [*later, *calls_of_a_round()][1::2])):
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(vars(call)) + "\n" for call in calls))
    first, second = breakdown(read(tmp_path))
    assert first == second


def test_what_is_timed_is_there() -> None:
    for module, names in TIMED.items():
        for name in names:
            assert callable(operator.attrgetter(name)(importlib.import_module(module)))


ANSWERS = """
from client import trainer_pb2
from client.service import Service
assert Service(lambda ask: ask).Answer(trainer_pb2.Envelope(header_json='{}'), None).header_json == '{}'
"""


@pytest.mark.parametrize("traced", [True, False])
def test_a_process_writes_a_line_for_each_call_where_that_is_wanted(traced: bool, tmp_path: Path) -> None:
    path = os.pathsep.join([str(SIMULATIONS / "tracing"), str(app_root())])
    environment = {**os.environ, "PYTHONPATH": path, "FLWR_HOME": "ann", "FEDTUNE_TRACE": str(tmp_path) if traced else ""}
    subprocess.run([sys.executable, "-c", ANSWERS], env=environment, cwd=tmp_path, check=True)
    found = read(tmp_path)
    assert [(call.what, call.node) for call in found] == [("Answer", "ann")] * traced
    assert all(0 < call.ended - call.began < 10 for call in found)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's, about a dependency
def test_flower_takes_the_stock_app_and_all_of_its_settings(tmp_path: Path) -> None:
    app = tomllib.loads((SIMULATIONS / "stock_app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    given = config_of(tmp_path, tmp_path, rounds=3, evaluate=True)
    assert {key: type(value) for key, value in given.items()} == {key: type(value) for key, value in app["config"].items()}
    content = build_fab_from_disk(SIMULATIONS / "stock_app")
    assert all(name in content for name in (b"client_app.py", b"server_app.py", b"task.py"))


def test_both_train_the_same_numbers() -> None:
    job = job_of(rounds=1, evaluate=False)
    model = task.load_model(str(base_model()))
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained == sum(pair.A.numel() + pair.B.numel() for pair in blueprint(job).adapter.lora.values())
    own = model.peft_config["default"]
    assert (own.r, own.lora_alpha) == (job.adapter.rank_for(), job.adapter.alpha_for())
    assert (job.train.steps, job.train.batch, job.data.max_length, job.train.precision) == (STEPS, BATCH, LENGTH, "fp32")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FEDTUNE_SLOW"), reason="a quarter of a minute for a benchmark; FEDTUNE_SLOW=1 runs it")
def test_the_steps_alone(tmp_path: Path) -> None:
    write_tokens(tmp_path)
    train, held_out = task.load_data(str(tmp_path), 1, BATCH)
    assert next(iter(train)).shape == next(iter(held_out)).shape == (BATCH, LENGTH)
    assert len(train) >= STEPS
    with Local(tmp_path) as local:
        assert all(0 < seconds < 60 for seconds in local.rounds(2, evaluate=True))
    assert [process.exitcode for process in local.processes] == [0, 0]


def test_what_is_shown() -> None:
    """The first round is apart: of ours (1 + 3) / 2 = 2 s count, of the stock app's 17 s; alone it was 1.5 s or 1 s."""
    theirs = Side("stock", [20.0, 16.0, 18.0], alone=[1.0, 1.5, 9.0])
    own = Side("ours", [9.0, 1.0, 3.0], alone=[1.0, 0.5, 1.5])
    assert [(one, other) for _, one, other, _ in ratios("training", theirs, own)] == [(1, 5), (15.5, 1), (17, 1.5), (2, 1)]
    table = rounds_table("training", theirs, own)
    rows = [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]
    assert rows[0][1:] == ["20.00", "17.00", "16.00", "18.00", "15.50"]
    assert rows[1][2:] == ["1.50", "1.00", "9.00", ""]
    assert rows[2][1:] == ["9.00", "2.00", "1.00", "3.00", "1.00"]


def test_the_gradient_steps_are_not_among_the_rest() -> None:
    """Of twelve parts of 0.1 s, or 0.3 s."""
    shown = parts_table([[0.1] * 12, [0.3] * 12])
    assert list(shown.columns[1].cells) == [*["0.20"] * 12, "2.20"]
    assert "gradient steps" in list(shown.columns[0].cells)[PLACE]
