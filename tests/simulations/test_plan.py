"""`fedtune plan` says what a run then does: layers, bytes, memory; and in words what does not fit."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from client.costs import measured_costs
from client.trainable import TrainableModel
from fedtune.job import Job
from fedtune.layers import layers_of
from server.watchers import Quiet
from simulations import plan_round
from simulations.engine import resident_trainer, simulate
from simulations.plan import Plan, plan_job
from simulations.plan_round import ClientPlan
from simulations.plan_table import plan_table, spans, step
from strategies.fed_sb import FedSB

MakeJob = Callable[..., Job]
Command = Callable[..., tuple[int, str, str]]
PLAIN = "wire.preset=plain"
SELECTIVE = (PLAIN, "strategy=selective_layers", "rounds.evaluate_every=0", "rounds.count=1", "data.held_out=0")
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32  # numbers in one layer of the tiny model: q o, k v, mlp, norms
ADAPTER = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # in one layer's pairs of rank 4


def by_client(plan: Plan) -> dict[str, ClientPlan]:
    return {one.client: one for one in plan.clients}


def in_numbers(shares: Mapping[str, float]) -> dict[int, float]:
    """`...model.layers.1` is 1."""
    return {int(layer.rpartition(".")[2]): share for layer, share in shares.items()}


def shown(plan: Plan, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(plan_table(plan))
    return console.file.getvalue()  # type: ignore[attr-defined]


# a plan and its run


@pytest.mark.parametrize(
    "settings",
    [
        ("strategy.layers=1",),
        ("strategy.trains=adapter", "strategy.layers=1"),
        ("clients.layers={ann=1, bob='all'}", "strategy.rule=top"),
        ("strategy.rule=half", "strategy.layers=2"),
        ("strategy.rule=importance", "strategy.layers=1", "strategy.always=['norm']"),
        ("clients.memory={ann='900kB', bob='1MB'}", "strategy.layers=1"),
        ("rounds.clients=2", "strategy.layers=1"),
    ],
    ids=lambda settings: settings[-1] if len(settings) == 1 else settings[0],
)
def test_the_run_does_what_the_plan_says(make_job: MakeJob, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """The same layers, and as many bytes, but for a few digits of figures in a header."""
    job = make_job(*SELECTIVE, *settings)
    plan, run = plan_job(job, Quiet()), simulate(job, tmp_path / "run", Quiet())
    record = run.records[-1]
    planned = {client: one for client, one in by_client(plan).items() if one.layers is not None}
    assert {client: one.layers for client, one in planned.items()} == {
        client: in_numbers(shares) for client, shares in record.selected.items()
    }
    for client, one in planned.items():
        assert one.down == record.clients[client].bytes_down
        assert one.up == pytest.approx(record.clients[client].bytes_up, abs=80)


def test_nothing_trains(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainableModel, "fit", None)
    plan = plan_job(make_job(*SELECTIVE, "strategy.layers=1"), Quiet())
    assert all(one.numbers == LAYER for one in plan.clients)
    assert (plan.layers, plan.numbers) == (2, 2 * LAYER)


def test_bytes_are_those_of_what_is_sent(make_job: MakeJob) -> None:
    """Up go two scores and then the layer. Down go layer numbers, two bytes for each of 21 tensors, and three bytes of mask."""
    (one, *_) = plan_job(make_job(*SELECTIVE, "strategy.layers=1"), Quiet()).clients
    assert one.down is not None
    assert one.up is not None
    assert 0 < one.down - (2 * 20 + 3) < 600
    assert 0 < one.up - 4 * (LAYER + 2) < 1500
    (one, *_) = plan_job(make_job(*SELECTIVE, "strategy.layers=1", "strategy.trains=adapter"), Quiet()).clients
    assert one.up is not None
    assert 0 < one.up - 4 * (ADAPTER + 2) < 3000


def test_memory_is_what_the_client_measures(make_job: MakeJob) -> None:
    job = make_job(*SELECTIVE, "strategy.rule=top", "clients.layers={ann=1, bob=2, cy=1}")
    planned = by_client(plan_job(job, Quiet()))
    trainer = resident_trainer(job, Quiet())
    model = trainer.local("ann", 1).trainable("whole")
    costs = measured_costs(model, list(layers_of(model.shapes).tensors.values()))["memory"]
    assert planned["ann"].memory == pytest.approx(costs.of(1, LAYER))
    assert planned["bob"].memory == pytest.approx(costs.of(2, 2 * LAYER))
    assert planned["ann"].probe is None  # nobody probes for this rule


def test_what_fits_no_layer_is_said(make_job: MakeJob) -> None:
    job = make_job(*SELECTIVE, "clients.memory={ann='10kB'}", "clients.seconds={bob=1e-9}")
    plan = plan_job(job, Quiet())
    ann, bob, cy = plan.clients
    assert (ann.layers, ann.numbers, ann.memory) == ({}, 0, None)
    assert (set(ann.short), set(bob.short), dict(cy.short)) == ({"memory"}, {"seconds"}, {})
    text = shown(plan, 200)
    assert re.search(r"ann +none fits +–", text)
    assert re.search(r"ann trains no layer: it can afford 10.0 kB a step, and the least layer takes \d+ kB\.", text)
    assert re.search(r"bob trains no layer: it can afford 0 ms a step, and the least layer takes \d+ ms\.", text)
    assert ann.probe is None  # it keeps no activations in it
    assert re.search(r"A probe takes \d+ kB, and less on a client that declares its memory\.", text)


def test_a_client_that_cannot_answer_ends_it_in_one_line(
    job_file: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TrainableModel, "probe", probe)
    code, out, error = run_command("plan", job_file, "--set", "strategy=selective_layers")
    assert (code, out) == (1, "")
    assert error == "fedtune: client 'ann' could not answer the ask to probe: RuntimeError: out of memory\n"


# other methods


@pytest.mark.parametrize(
    ("settings", "headings"),
    [
        ((), "client examples steps rank down up evaluation"),
        (("strategy=flora", "clients.ranks={ann=2}"), "client examples steps rank down up evaluation"),
        (("strategy=fedkseed", "train.optimizer=sgd", "train.clip=0"), "client examples steps down up evaluation"),
        (("rounds.evaluate_every=0",), "client examples steps rank down up"),
    ],
)
def test_of_other_methods_it_shows_what_is_known(make_job: MakeJob, settings: tuple[str, ...], headings: str) -> None:
    plan = plan_job(make_job(PLAIN, *settings), Quiet())
    assert plan.layers is None
    lines = shown(plan).splitlines()
    assert lines[0].split() == headings.split()
    assert len(lines) == 9  # three clients and their sum, a gap, the wire, a sentence of two lines
    assert lines[4].startswith("3 clients")


def test_fedavg_sends_its_adapter(make_job: MakeJob) -> None:
    """Two layers at rank 4, and in the header the names and scales of 14 modules. Plain they are both, whatever the wire."""
    for one in plan_job(make_job(PLAIN), Quiet()).clients:
        assert one.down == pytest.approx(4 * 2 * ADAPTER, abs=4000)
        assert one.up == pytest.approx(4 * 2 * ADAPTER, abs=4000)
        assert one.evaluation == pytest.approx(4 * 2 * ADAPTER, abs=4000)
        assert one.plain == one.down + one.up
    for one in plan_job(make_job("wire.preset=tiny"), Quiet()).clients:
        assert one.plain == pytest.approx(2 * 4 * 2 * ADAPTER, abs=8000)


def test_a_lossless_codec_of_plain_words_is_counted_to_the_byte(make_job: MakeJob) -> None:
    """`int8` without entropy: a byte for each of 2 * ADAPTER numbers, and little beside it. What an evaluation has brought is
    not sent again."""
    (one, *_) = plan_job(make_job("wire.up=int8", "wire.down=int8", "wire.first=int8"), Quiet()).clients
    assert one.up is not None
    assert one.evaluation is not None
    assert 0 < one.up - 2 * ADAPTER < 0.1 * 2 * ADAPTER + 500
    assert 0 < one.evaluation - 2 * ADAPTER < 0.1 * 2 * ADAPTER + 900  # what comes up is in it
    assert one.down is not None
    assert one.down < 300
    (one, *_) = plan_job(make_job("wire.down=int8", "wire.first=int8", "rounds.evaluate_every=0"), Quiet()).clients
    assert one.down is not None
    assert 0 < one.down - 2 * ADAPTER < 0.1 * 2 * ADAPTER + 500


@pytest.mark.parametrize("preset", ["lossless", "balanced", "tiny"])
def test_the_run_sends_about_what_the_plan_says(make_job: MakeJob, tmp_path: Path, preset: str) -> None:
    """Less of it, as real updates are not normal numbers: between a third and what was said. Plain it is the same."""
    job = make_job(f"wire.preset={preset}", "rounds.count=2", "clients.names=['ann']")
    plan, run = plan_job(job, Quiet()), simulate(job, tmp_path / "run", Quiet())
    planned, record = plan.clients[0], run.records[-1].clients["ann"]
    assert planned.down is not None
    assert planned.up is not None
    assert planned.evaluation is not None
    said = planned.down + planned.up + planned.evaluation
    assert said / 3 < record.bytes_down + record.bytes_up < 1.2 * said
    assert plan.ratio is not None
    assert plan.ratio == pytest.approx((record.plain_down + record.plain_up) / said, rel=0.01)


def test_the_plan_says_what_the_wire_is(make_job: MakeJob) -> None:
    assert "\nwire: plain\n" in shown(plan_job(make_job(PLAIN), Quiet()), 200)
    own = shown(plan_job(make_job("wire.up=topk(0.1) | int8", PLAIN), Quiet()), 300)
    assert re.search(r"\nwire: plain, up topk\(0.1\) \| int8, down fp32, first fp32: about [\d.]+x smaller", own)
    assert "normal numbers" in own


def test_a_method_that_needs_every_bit_says_why(make_job: MakeJob) -> None:
    """fed_sb: all clients hold the same A and B; what comes up may lose a little."""
    plan = plan_job(make_job("strategy=fed_sb", "wire.preset=tiny"), Quiet())
    assert plan.exact == {"down": FedSB.exact_down}
    assert "down fp32 | entropy" in plan.wire
    assert f"\ndown, nothing is lost: {FedSB.exact_down}.\n" in shown(plan, 300)
    assert plan_job(make_job("strategy=fed_sb", "wire.preset=lossless"), Quiet()).exact == {}  # it loses nothing anyway


def test_a_selective_method_is_counted_through_its_codecs(make_job: MakeJob, tmp_path: Path) -> None:
    """Adapters may lose a little; random numbers in place of trained ones cost about as much."""
    own = ("strategy.trains=adapter", "strategy.layers=1", "wire.up=int8", "wire.first=int8", "clients.names=['ann']")
    job = make_job(*SELECTIVE, *own)
    plan, run = plan_job(job, Quiet()), simulate(job, tmp_path / "run", Quiet())
    one, record = plan.clients[0], run.records[-1].clients["ann"]
    assert one.up == pytest.approx(record.bytes_up, abs=80)
    assert one.plain == pytest.approx(record.plain_down + record.plain_up, abs=80)
    assert one.plain is not None
    assert one.down is not None
    assert one.up is not None
    assert plan.ratio == pytest.approx(one.plain / (one.down + one.up))


def test_of_a_large_answer_some_tensors_stand_for_the_rest(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(*SELECTIVE, "strategy.trains=adapter", "strategy.layers=2", "wire.up=int8", "wire.first=int8")
    whole = plan_job(job, Quiet()).clients[0]
    monkeypatch.setattr(plan_round, "ENOUGH", 1000)
    part = plan_job(job, Quiet()).clients[0]
    assert whole.up is not None
    assert part.up == pytest.approx(whole.up, rel=0.15)
    assert part.up != whole.up


def test_who_is_not_drawn_is_not_counted(make_job: MakeJob) -> None:
    plan = plan_job(make_job("rounds.clients=1"), Quiet())
    drawn = [one for one in plan.clients if one.down is not None]
    assert len(drawn) == 1
    lines = shown(plan).splitlines()
    assert lines[4].split()[:4] == ["1", "client", str(drawn[0].examples), str(drawn[0].steps)]


# the command


def test_the_command_prints_a_table(job_file: Path, run_command: Command) -> None:
    code, out, error = run_command("plan", job_file, "--set", "strategy=selective_layers", "--set", "strategy.layers=1")
    assert (code, error) == (0, "")
    assert out.splitlines()[0].split() == ["client", "layers", "memory", "a", "step", "down", "up"]
    assert re.search(r"^3 clients +mean 1.0 of 2 +≤ [\d.]+ kB +≤ \d+ ms +[\d.]+ (k?B) +[\d.]+ kB *$", out, re.MULTILINE)


def test_the_command_speaks_to_programs_too(job_file: Path, run_command: Command) -> None:
    words = ("--set", "strategy=selective_layers", "--set", PLAIN, "--set", "clients.memory={ann='800kB'}", "--json")
    code, out, error = run_command("plan", job_file, *words)
    given = json.loads(out)
    assert (code, error, given["layers"], given["strategy"]) == (0, "", 2, "selective_layers")
    assert (given["wire"], given["ratio"], given["exact"]) == ("plain", 1.0, {})
    ann = given["clients"][0]
    assert (ann["client"], ann["limits"], ann["layers"]) == ("ann", {"memory": 800_000.0}, {"1": 1.0})  # the other takes 847 kB


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "there is no job file nowhere"),
        (("--set", "train.lrr=1"), "unknown key 'train.lrr', did you mean 'train.lr'?"),
        (("--set", "strategy=selective_layers", "--set", "strategy.always=['hed']"), "strategy.always names 'hed'"),
        (("--set", "clients.memory={ann='lots'}"), "'clients.memory.ann'"),
        (("--set", "clients.ranks={ann=2}"), "needs one rank for all clients"),
        (("--set", "compare=true", "--set", "data.held_out=0"), "compare = true measures on held-out examples"),
    ],
)
def test_bad_input_is_refused_in_one_line(job_file: Path, run_command: Command, words: tuple[str, ...], said: str) -> None:
    code, out, error = run_command("plan", *(words if words[0] == "nowhere" else (job_file, *words)))
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("fedtune: ")
    assert said in error


# the table

LIMITED = Plan(
    "job",
    "selective_layers",
    (
        ClientPlan("first", 10, 2, None, {"memory": 5e7}, 453, 2_755_468, {3: 1.0}, 688_640, 4.25e7, 0.0814, 6.3e7),
        ClientPlan("quite-a-long-name", 10, 2, None, {"seconds": 4.0}, 500, 3, {0: 0.47, 1: 0.47, 3: 1.0}, 5, 1e9, 3.0, 6.3e7),
        ClientPlan("third", 10, 2, None, {"memory": 1e7}, 400, 500, {}, 0, None, None, 6.3e7, {"memory": 4.3e7}),
        ClientPlan("fourth", 10, 2, None),
    ),
    5,
    1000,
)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(width: int) -> None:
    lines = [line.rstrip() for line in shown(LIMITED, width).splitlines()]
    assert max(map(len, lines)) <= width
    words = [re.split(r" {2,}", line) for line in lines[:6]]
    assert words[0] == ["client", "layers", "memory", "a step", "down", "up"]
    assert words[1] == ["first", "3", "42.5 MB (85 %)", "81 ms", "453 B", "2.8 MB"]
    assert words[2] == ["quite-a-long-name", "0–1 (47 %) 3", "1.0 GB", "3.0 s (75 %)", "500 B", "3 B"]
    assert words[3] == ["third", "none fits", "–", "–", "400 B", "500 B"]
    assert words[4] == ["fourth", "not drawn", "–", "–", "–", "–"]
    assert words[5] == ["3 clients", "mean 1.0 of 5", "≤ 1.0 GB", "≤ 3.0 s", "1.4 kB", "2.8 MB"]  # (1 + 1.94 + 0) / 3 is 0.98


def test_what_is_short_is_said_in_words() -> None:
    text = shown(LIMITED, 200)
    assert "third trains no layer: it can afford 10.0 MB a step, and the least layer takes 43.0 MB.\n" in text
    assert "A probe takes 63.0 MB, and less on a client that declares its memory.\n" in text
    assert "Nobody trains layer 2 4 in this round.\n" in text


def test_of_many_only_some_are_named() -> None:
    many = tuple(
        ClientPlan(f"c{number}", 1, 1, None, {"memory": 1.0}, 1, 1, {}, 0, None, None, 9.0, {"memory": 5.0})
        for number in range(8)
    )
    text = shown(Plan("job", "selective_layers", many, 1, 1), 200)
    assert len(re.findall("trains no layer", text)) == 5
    assert "So it is with 3 further clients." in text


@given(st.dictionaries(st.integers(0, 30), st.integers(1, 100)))
def test_spans_tell_each_layer_once(percents: dict[int, int]) -> None:
    """Read back as one reads it."""
    found: dict[int, int] = {}
    for first, last, percent in re.findall(
        r"(\d+)(?:–(\d+))?(?: \((\d+) %\))?", spans({n: p / 100 for n, p in percents.items()})
    ):
        found |= dict.fromkeys(range(int(first), int(last or first) + 1), int(percent or 100))
    assert found == percents


def test_seconds_as_people_read_them() -> None:
    assert [step(seconds) for seconds in (0.0004, 0.0814, 0.9994, 0.9996, 75)] == [
        "0 ms",
        "81 ms",
        "999 ms",
        "1.0 s",
        "1 min 15 s",
    ]
