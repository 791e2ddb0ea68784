"""The coordinator with clients that need no model: each answers what the test wrote down for it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedtune.adapter import Adapter, Factors
from fedtune.base import base_hash, blueprint
from fedtune.envelope import Envelope
from fedtune.errors import RoundFailed, RunFolderError, StrategyError
from fedtune.job import Job
from fedtune.lora import first
from fedtune.payload import adapter_of, payload_of
from fedtune.peft_folder import read_adapter
from fedtune.strategy import Answer
from fedtune.wire import pack_answer, pack_ask, pack_failure, unpack_answer
from server.coordinator import RunResult, run_job
from server.records import RoundRecord
from server.watchers import Quiet
from simulations.grid import InProcessGrid

SIZES = {"ann": 1, "bob": 3, "cy": 4}  # training examples
HELD_OUT = {"ann": (4.0, 10), "bob": (1.0, 30), "cy": (2.0, 40)}  # loss, tokens
Play = Callable[..., RunResult]


@dataclass
class Scripted:
    """Stands where a trainer would. Client `i` answers with an adapter whose every number is `values[i]`.

    `odd` changes the answer of a client in a round; what it returns is sent.
    """

    job: Job
    sizes: Mapping[str, int] = field(default_factory=lambda: SIZES)
    values: Mapping[str, float] = field(default_factory=lambda: {"ann": 8.0, "bob": 16.0, "cy": 4.0})
    odd: Mapping[tuple[str, int], Callable[[Envelope], Envelope]] = field(default_factory=dict)
    hello: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    asked: list[tuple[str, int, str]] = field(default_factory=list)  # (client, round, kind)

    def __post_init__(self) -> None:
        self.like = blueprint(self.job).adapter

    @property
    def clients(self) -> Sequence[str]:
        return tuple(self.sizes)

    def answer(self, ask: Envelope, client: str) -> Envelope:
        header = {"ask": ask.header["ask"], "base": self.like.base, "client": client, "seconds": 0.5}
        if ask.header["kind"] == "hello":
            own = {"examples": self.sizes[client], "rank": self.job.rank_of(client), "scale": self.job.scale_of(client)}
            return pack_answer(Answer(), {**header, **own, **self.hello.get(client, {})})
        self.asked.append((client, ask.header["round"], ask.header["kind"]))
        change = self.odd.get((client, ask.header["round"]), lambda envelope: envelope)
        return change(pack_answer(self._answer(client, ask.header["kind"]), header))

    def _answer(self, client: str, kind: str) -> Answer:
        if kind == "evaluate":
            loss, tokens = HELD_OUT[client]
            return Answer(metrics={"loss": loss, "tokens": tokens, "token_accuracy": 0.5, "perplexity": math.exp(loss)})
        like, value = self.like, self.values[client]
        pairs = {p: Factors(torch.full_like(x.A, value), torch.full_like(x.B, value), x.scale) for p, x in like.lora.items()}
        return Answer(payload_of(Adapter(pairs)), self.sizes[client], {"loss": value, "examples": 4.0})


@pytest.fixture
def play(make_job: Callable[..., Job], tmp_path: Path) -> Play:
    """play("rounds.count=1", odd=...): the run, with those settings, of clients who answer so."""

    def _play(*overrides: str, folder: str = "run", **script: Any) -> RunResult:
        job = make_job(*overrides)
        _play.trainer = Scripted(job, **script)
        return run_job(job, InProcessGrid(_play.trainer), tmp_path / folder, Quiet())

    return _play


def numbers(folder: Path) -> list[float]:
    """All that differ in an adapter."""
    tensors = load_file(folder / "adapter_model.safetensors").values()
    return sorted({float(x) for tensor in tensors for x in tensor.unique()})


def fails(reason: str) -> Callable[[Envelope], Envelope]:
    return lambda envelope: pack_failure(reason, envelope.header)


def spoilt(envelope: Envelope) -> Envelope:
    """The same answer, its last four bytes a NaN."""
    *tensors, last = envelope.tensors
    nan = b"\x00\x00\xc0\x7f"
    return Envelope(envelope.header, (*tensors, replace(last, data=last.data[:-4] + nan)))


def test_the_adapter_is_the_mean_by_examples(play: Play) -> None:
    """(1 * 8 + 3 * 16 + 4 * 4) / 8 = 9."""
    result = play("rounds.count=1")
    assert numbers(result.adapter) == [9.0]
    provenance = json.loads((result.adapter / "fedtune.json").read_text(encoding="utf-8"))
    assert provenance["weights"] == {"ann": 1 / 8, "bob": 3 / 8, "cy": 4 / 8}
    assert (provenance["round"], provenance["strategy"]["name"]) == (1, "fedavg")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (fails("out of memory"), "out of memory"),
        (spoilt, "refused: '.*' is not finite"),
        (lambda envelope: Envelope({**envelope.header, "weight": -1}, envelope.tensors), "refused: its weight is -1"),
        (lambda envelope: Envelope({**envelope.header, "ask": "0.0"}, envelope.tensors), "refused: it answers ask 0.0"),
        (lambda envelope: Envelope({**envelope.header, "base": "x"}, envelope.tensors), "refused: .* base model x"),
        (lambda envelope: Envelope(envelope.header, envelope.tensors[1:]), "refused: a message came"),
        (lambda envelope: Envelope({}), "refused: it answers ask None"),
    ],
)
def test_the_round_goes_on_without_a_client_that_failed(
    change: Callable[[Envelope], Envelope], reason: str, play: Play
) -> None:
    """Without bob: (1 * 8 + 4 * 4) / 5 = 4.8."""
    result = play("rounds.count=1", odd={("bob", 1): change})
    assert numbers(result.adapter) == pytest.approx([4.8])
    record = result.records[1]
    assert record.answered == 2
    assert record.clients["ann"].failed is None
    assert re.match(reason, str(record.clients["bob"].failed))


def test_who_failed_in_a_round_is_asked_again_in_the_next(play: Play) -> None:
    result = play(odd={("bob", 1): fails("asleep")})
    assert numbers(result.folder / "rounds" / "0001" / "adapter") == pytest.approx([4.8])
    assert numbers(result.adapter) == [9.0]
    assert ("bob", 1, "evaluate") not in play.trainer.asked
    assert ("bob", 2, "evaluate") in play.trainer.asked


def test_a_client_whose_tensors_differ_is_left_out_of_a_sum(play: Play) -> None:
    def without_a_tensor(envelope: Envelope) -> Envelope:
        name = envelope.tensors[0].name
        roles = {key: role for key, role in envelope.header["roles"].items() if key != name}
        return Envelope({**envelope.header, "roles": roles}, envelope.tensors[1:])

    result = play("rounds.count=1", odd={("cy", 1): without_a_tensor})
    assert result.records[1].clients["cy"].failed.startswith("refused: it lacks model.layers.0.")
    assert [result.records[1].clients[client].examples for client in SIZES] == [4.0, 4.0, 0.0]
    assert numbers(result.adapter) == [14.0]  # (1 * 8 + 3 * 16) / 4


@pytest.mark.parametrize("missing", [".lora_B", ".lora_A", ""])
def test_stacking_leaves_out_who_sends_only_some_tensors(missing: str, play: Play) -> None:
    """Else FLoRA would take away this client's share of the sum so far, and put nothing in its place."""
    odd = {("cy", 2): lambda envelope: replace(envelope, **_without(envelope, missing))}
    run = play("rounds.count=2", "strategy.name=flora", "gate.max_ratio=0", odd=odd)
    without = play("rounds.count=2", "strategy.name=flora", "gate.max_ratio=0", folder="without", odd={("cy", 2): _failing})
    reason = run.records[2].clients["cy"].failed
    assert reason is not None
    assert reason.startswith("refused: it lacks model.layers.0.")
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == (
        without.adapter / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["fedex_lora", "lora_fair", "flower"])
def test_a_lower_rank_is_refused_where_factors_are_averaged_and_the_round_goes_on(name: str, play: Play) -> None:
    """These read each answer, but not of mixed ranks: an answer that cannot be averaged may not end the run."""

    def of_rank_one(envelope: Envelope) -> Envelope:
        answer = unpack_answer(envelope)
        pairs = {path: first(pair, 1) for path, pair in adapter_of(answer.payload).lora.items()}
        return pack_answer(replace(answer, payload=payload_of(Adapter(pairs))), {**envelope.header})

    result = play("rounds.count=1", f"strategy.name={name}", odd={("ann", 1): of_rank_one})
    assert "is of shape (1, 32), wanted (4, 32)" in result.records[1].clients["ann"].failed
    assert result.records[1].answered == 2


@pytest.mark.parametrize("scale", [0.0, -1.5, 1e30])
@pytest.mark.parametrize("name", ["fedavg", "lora_fair", "rolora", "fedsa_lora"])
def test_nobody_can_change_the_scale_that_all_train_at(name: str, scale: float, play: Play) -> None:
    def forged(envelope: Envelope) -> Envelope:
        scalars = {key: scale if key.endswith(".scale") else value for key, value in envelope.header["scalars"].items()}
        return replace(envelope, header={**envelope.header, "scalars": scalars})

    result = play("rounds.count=1", f"strategy.name={name}", odd={("ann", 1): forged})
    assert {pair.scale for pair in result.state.adapter.lora.values()} == {1.5}  # alpha / rank of the job


def test_clients_that_are_sent_the_same_share_one_message(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    monkeypatch.setattr("fedtune.wire.ends.pack_ask", lambda ask, *rest: packed.append(ask.kind) or pack_ask(ask, *rest))
    play("rounds.count=1", "strategy.name=flexlora", "clients.ranks.bob=2", "rounds.evaluate_every=0")
    assert packed == ["train", "train"]  # one for rank 4, one for rank 2


def _without(envelope: Envelope, ending: str) -> dict[str, Any]:
    kept = tuple(tensor for tensor in envelope.tensors if not tensor.name.endswith(ending))
    roles = {name: role for name, role in envelope.header["roles"].items() if not name.endswith(ending)}
    return {"tensors": kept, "header": {**envelope.header, "roles": roles}}


def _failing(envelope: Envelope) -> Envelope:
    return pack_failure("out of order", {key: envelope.header[key] for key in ("ask", "client")})


def test_too_few_answers_end_the_run_with_their_reasons_and_keep_what_was_done(play: Play, tmp_path: Path) -> None:
    """Half of three, rounded up, are two."""
    with pytest.raises(RoundFailed) as error:
        play(odd={("ann", 2): fails("disk broken"), ("cy", 2): fails("asleep")})
    assert str(error.value) == ("round 2: 1 of 3 clients answered, wanted 2 (rounds.quorum). ann: disk broken; cy: asleep")
    assert numbers(tmp_path / "run" / "adapter") == [9.0]
    assert (tmp_path / "run" / "spool" / "2.0").is_dir()  # for --resume
    assert len((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2  # rounds 0 and 1


def test_a_failed_evaluation_costs_no_round(play: Play) -> None:
    def only_when_evaluating(envelope: Envelope) -> Envelope:
        return envelope if envelope.tensors else pack_failure("no data", envelope.header)

    result = play("rounds.count=1", odd={("cy", 1): only_when_evaluating})
    assert numbers(result.adapter) == [9.0]
    assert "no data" in result.records[1].clients["cy"].failed
    assert result.records[1].loss == pytest.approx((10 * 4 + 30 * 1) / 40)


def test_the_held_out_loss_counts_every_token_once(play: Play) -> None:
    """(10 * 4 + 30 * 1 + 40 * 2) / 80 = 1.875, before the first round and after each."""
    records = play().records
    assert [record.round for record in records] == [0, 1, 2]
    assert [record.loss for record in records] == [1.875] * 3
    metrics = {name: records[1].metrics[name] for name in ("perplexity", "token_accuracy")}
    assert metrics == pytest.approx({"perplexity": math.exp(1.875), "token_accuracy": 0.5})


def test_the_error_of_the_aggregation_is_reported_for_each_module(play: Play) -> None:
    """Client i sends A = B = v_i everywhere, v = 8, 16, 4 with p = n_i / 7, so that every product is v_i^2 times one matrix:
    the error is |mean(v^2) - mean(v)^2| / mean(v^2) in each module."""
    record = play().records[1]
    p = [size / sum(SIZES.values()) for size in SIZES.values()]
    v = [8.0, 16.0, 4.0]
    mean, square = sum(a * b for a, b in zip(p, v, strict=True)), sum(a * b * b for a, b in zip(p, v, strict=True))
    wanted = (square - mean**2) / square
    assert len(record.layer_errors) == 14
    assert list(record.layer_errors.values()) == pytest.approx([wanted] * 14, rel=1e-6)
    assert record.metrics["aggregation_error"] == pytest.approx(wanted, rel=1e-6)
    assert not [name for name in record.metrics if "model.layers" in name]


@pytest.mark.parametrize(("every", "rounds"), [(0, []), (1, [0, 1, 2, 3]), (2, [0, 2])])
def test_evaluation_is_as_often_as_the_job_says(every: int, rounds: list[int], play: Play) -> None:
    result = play("rounds.count=3", f"rounds.evaluate_every={every}")
    asked = {round for _, round, kind in play.trainer.asked if kind == "evaluate"}
    assert sorted(asked) == rounds
    assert [record.round for record in result.records if record.loss is not None] == rounds


def test_metrics_jsonl_is_what_happened(play: Play) -> None:
    result = play()
    lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert tuple(RoundRecord.from_json(json.loads(line)) for line in lines) == result.records
    bob = result.records[1].clients["bob"]
    assert (bob.examples, bob.train_loss, bob.loss, bob.seconds) == (4.0, 16.0, 1.0, 1.0)  # half a second for each ask
    weights = 4 * play.trainer.like.parameters()
    assert weights < bob.bytes_up < weights + 8000
    assert 2 * weights < bob.bytes_down < 2 * weights + 16000  # to train and to evaluate


def drawn(play: Play, seed: int) -> list[list[str]]:
    """Who trained in each of the rounds."""
    play("rounds.count=6", "rounds.clients=2", "rounds.evaluate_every=0", f"seed={seed}", folder=f"run-{seed}")
    return [[client for client, round, _ in play.trainer.asked if round == number] for number in range(1, 7)]


def test_a_cohort_is_drawn_anew_each_round_by_the_seed_and_nobody_twice(play: Play, tmp_path: Path) -> None:
    first, other = drawn(play, 0), drawn(play, 1)
    (tmp_path / "run-0").rename(tmp_path / "before")
    assert drawn(play, 0) == first
    assert first != other
    assert all(len(set(cohort)) == 2 and cohort == sorted(cohort) for cohort in first + other)
    assert len({tuple(cohort) for cohort in first}) > 1
    assert {client for cohort in first for client in cohort} == set(SIZES)


def test_clients_outside_the_cohort_are_evaluated_all_the_same(play: Play) -> None:
    play("rounds.count=1", "rounds.clients=1")
    assert len([1 for _, round, kind in play.trainer.asked if (round, kind) == (1, "train")]) == 1
    assert len([1 for _, round, kind in play.trainer.asked if (round, kind) == (1, "evaluate")]) == 3


def test_a_cohort_larger_than_all_is_all(play: Play) -> None:
    result = play("rounds.count=1", "rounds.clients=99")
    assert numbers(result.adapter) == [9.0]


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        ({"base": "0ther"}, "bob: its base model is 0ther, wanted"),
        ({"client": "ann"}, "a client named 'ann' is already here, names must differ"),
        ({"failed": "no such file"}, "bob: no such file"),
        ({"examples": "many"}, "its hello cannot be read"),
        ({"examples": 0}, "wanted examples and rank of at least 1"),
        ({"rank": -8}, "wanted examples and rank of at least 1"),
        ({"scale": math.inf}, "and a scale above 0"),
        ({"rank": None}, "its hello cannot be read"),
        ({"client": "\ud800"}, "its hello cannot be read"),
        ({"rank": 33}, "its rank is more than 32, which no module of this model can take"),
        ({"rank": 10**400}, "its rank is more than 32"),
        ({"examples": 10**400}, r"more than 1e\+09 examples \(rounds.max_weight\)"),
    ],
)
def test_who_cannot_take_part_is_left_out_and_where_all_are_needed_the_reason_is_said(
    hello: Mapping[str, Any], reason: str, play: Play, tmp_path: Path
) -> None:
    result = play("rounds.count=1", hello={"bob": hello})
    assert list(result.records[1].clients) == ["ann", "cy"]
    assert numbers(result.adapter) == pytest.approx([4.8])
    with pytest.raises(RoundFailed, match=r"2 clients can take part, wanted 3 \(clients.count\): .*" + reason):
        play("clients.count=3", hello={"bob": hello}, folder="other")
    assert not (tmp_path / "other").exists()


def test_nobody_at_all(play: Play, tmp_path: Path) -> None:
    with pytest.raises(RoundFailed, match="0 clients can take part, wanted 1"):
        play(sizes={})
    assert not (tmp_path / "run").exists()


def test_clients_that_the_strategy_cannot_work_with_end_the_run_before_it_begins(play: Play, tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match=r"needs one rank for all clients, given .*'bob': 2.*strategy.name=flora"):
        play("clients.ranks.bob=2")
    assert not (tmp_path / "run").exists()
    assert play.trainer.asked == []


def test_a_folder_that_holds_a_run_is_refused_before_anybody_is_asked(play: Play) -> None:
    folder = play("rounds.count=1").folder
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match="already holds a run"):
        play("rounds.count=1")
    assert play.trainer.asked == []
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_what_a_node_cannot_say_or_takes_too_long_to_say_is_no_end(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that never answers: its message vanishes, and the clock stands at the deadline."""
    pull = InProcessGrid.pull_messages

    def without_bob(self: InProcessGrid, ids: Sequence[str]) -> list[Any]:
        mute = [id for id in ids if self._waiting[id].metadata.dst_node_id == 2 and play.trainer.asked]
        return pull(self, [id for id in ids if id not in mute])

    monkeypatch.setattr(InProcessGrid, "pull_messages", without_bob)
    result = play("rounds.count=1", "rounds.evaluate_every=0", "rounds.timeout=0.001")
    assert result.records[0].clients["bob"].failed == "no answer within 0.001 s"
    assert numbers(result.adapter) == pytest.approx([4.8])


def test_the_published_adapter_is_the_state_s(play: Play) -> None:
    result = play()
    published = read_adapter(result.adapter)
    assert published.base == base_hash(Path(play.trainer.job.model.path))
    for path, pair in result.state.adapter.lora.items():
        assert torch.equal(published.lora[path].A, pair.A)
        assert published.lora[path].scale == pytest.approx(pair.scale) == 6 / 4
