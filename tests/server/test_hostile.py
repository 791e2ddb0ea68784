"""One of three clients sends what is well formed and wrong. It is refused with the reason, and kept for whoever wants to look;
what the others make is the same to the bit as without it; and who does so again and again is not asked for a while."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client.trainer import Trainer
from fedtune.envelope import Envelope
from fedtune.errors import RoundFailed
from fedtune.job import Job
from fedtune.strategy import Answers, Ask, ClientInfo, ServerState
from fedtune.wire import pack_answer, pack_failure, unpack_answer, unpack_ask
from server import limits
from server.coordinator import RunResult, run_job
from server.journal import Journal, read
from server.run_folder import JOURNAL
from server.watchers import Quiet
from simulations.grid import InProcessGrid
from strategies.fedavg import FedAvg

MakeJob = Callable[..., Job]
Attack = Callable[[Envelope, Envelope], Envelope]  # ask, honest answer -> what is sent
KEYS = ["train.steps=1", "rounds.evaluate_every=0", "rounds.quorum=0.3"]
EXAMPLES = 5  # of ann, who is the attacker


class Hostile(Trainer):
    """ann attacks, or whoever is named; `asked` are the (client, round) of all asks."""

    attack: Attack
    attackers: Collection[str] = ("ann",)
    asked: list[tuple[str, int]]

    def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
        honest = super().answer(envelope, client)
        if envelope.header["kind"] == "hello":
            return honest
        self.asked.append((str(client), envelope.header["round"]))
        return self.attack(envelope, honest) if client in self.attackers else honest


@dataclass(frozen=True)
class Run:
    result: RunResult
    asked: list[tuple[str, int]]

    def adapter(self, round: int = 1) -> bytes:
        return (self.result.folder / "rounds" / f"{round:04d}" / "adapter" / "adapter_model.safetensors").read_bytes()

    def of(self, what: str) -> list[dict[str, object]]:
        return [dict(entry.about) for entry in read(self.result.folder / JOURNAL)[0] if entry.what == what]

    def rounds_of(self, client: str) -> list[int]:
        return [round for name, round in self.asked if name == client]


Play = Callable[..., Run]


def played(job: Job, folder: Path, attack: Attack, attackers: Collection[str] = ("ann",), resume: bool = False) -> Run:
    trainer = Hostile.for_simulation(job)
    trainer.attack, trainer.attackers, trainer.asked = attack, attackers, []
    return Run(run_job(job, InProcessGrid(trainer), folder, Quiet(), resume=resume), trainer.asked)


@pytest.fixture
def play(make_job: MakeJob, tmp_path: Path) -> Play:
    """play(attack, "rounds.count=1", ...): the run that ann attacks."""
    return lambda attack, *keys, folder="run", **how: played(make_job(*KEYS, *keys), tmp_path / folder, attack, **how)


@pytest.fixture(scope="module")
def without(make_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One round of bob and cy."""
    return played(make_job(*KEYS, "rounds.count=1"), tmp_path_factory.mktemp("without") / "run", fails)


def fails(ask: Envelope, honest: Envelope) -> Envelope:
    return pack_failure("asleep", honest.header)


def with_header(**changed: object) -> Attack:
    return lambda ask, honest: replace(honest, header={**honest.header, **changed})


def moved(change: Callable[[Tensor, Tensor], Tensor]) -> Attack:
    """Each tensor is replaced, by what was sent and what was trained."""

    def attack(ask: Envelope, honest: Envelope) -> Envelope:
        answer, sent = unpack_answer(honest), unpack_ask(ask).payload.tensors
        tensors = {name: change(sent[name], tensor) for name, tensor in answer.payload.tensors.items()}
        return pack_answer(replace(answer, payload=replace(answer.payload, tensors=tensors)), honest.header)

    return attack


ATTACKS: dict[str, tuple[Attack, str]] = {
    "a weight of 0": (with_header(weight=0), "its weight is 0, wanted more than 0 and at most 5 (the examples"),
    "a weight of -1": (with_header(weight=-1), "its weight is -1,"),
    "a weight of 1e308": (with_header(weight=1e308), "its weight is 1e+308,"),
    "a weight of nan": (with_header(weight=math.nan), "its weight is nan,"),
    "more examples than it has": (with_header(weight=EXAMPLES + 1), "its weight is 6,"),
    "a thousand times as far": (moved(lambda sent, ended: sent + 1000 * (ended - sent)), "(gate.max_ratio)"),
    "3e38": (moved(lambda sent, ended: torch.full_like(ended, 3e38)), "wanted at most 1e+18"),
    "not a number": (moved(lambda sent, ended: torch.full_like(ended, math.nan)), "is not finite"),
    "another base model": (with_header(base="0" * 32), "it was made on base model 0000"),
    "another round": (with_header(ask="7.0"), "it answers ask 7.0, wanted 1.0"),
    "a header beyond all bounds": (with_header(more="x" * (limits.HEADER * 2)), "its header has "),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_others_are_as_if_it_had_not_answered(name: str, play: Play, without: Run) -> None:
    attack, reason = ATTACKS[name]
    attacked = play(attack, "rounds.count=1")
    record = attacked.result.records[0]
    assert str(record.clients["ann"].failed).startswith("refused: ")
    assert reason in str(record.clients["ann"].failed)
    assert [record.clients[client].failed for client in ("bob", "cy")] == [None, None]
    assert attacked.adapter() == without.adapter()
    assert not (without.result.folder / "quarantine").exists()  # who merely failed is no attacker


def test_what_was_refused_lies_in_quarantine_and_in_the_journal(play: Play) -> None:
    run = play(ATTACKS["a thousand times as far"][0], "rounds.count=1")
    (refused,) = run.of("refused")
    file = run.result.folder / "quarantine" / str(refused["file"])
    about = json.loads(file.with_suffix(".json").read_text())
    assert (about["round"], about["ask"], about["client"]) == (1, "1.0", "ann")
    assert f"refused: {about['reason']}" == run.result.records[0].clients["ann"].failed
    with file.open("rb") as opened:
        assert Envelope.read(opened).header["client"] == "ann"


def test_its_own_answer_of_the_round_before_is_none_to_this_one(play: Play) -> None:
    kept: list[Envelope] = []

    def again(ask: Envelope, honest: Envelope) -> Envelope:
        kept.append(honest)
        return kept[0]

    run = play(again, "rounds.count=2")
    without = play(
        lambda ask, honest: honest if honest.header["round"] == 1 else fails(ask, honest), "rounds.count=2", folder="without"
    )
    assert [record.clients["ann"].failed for record in run.result.records] == [
        None,
        "refused: it answers ask 1.0, wanted 2.0",
    ]
    assert run.adapter(2) == without.adapter(2)


def test_what_is_larger_than_it_can_be_is_not_decoded(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing beside the adapter is allowed for, four adapters are: ten of float64 are not."""
    monkeypatch.setattr(limits, "SLACK", 0)
    monkeypatch.setattr("fedtune.wire.ends.ServerEnd.answer", _only_small)
    run = play(moved(lambda sent, ended: ended.double().repeat(10, 1)), "rounds.count=1")
    assert " bytes, wanted at most " in str(run.result.records[0].clients["ann"].failed)


def _only_small(self: object, envelope: Envelope, client: ClientInfo, most: int) -> object:
    assert client.id != "ann", "it was decoded"
    return unpack_answer(envelope)


SITS_OUT = ["gate.refusals=2", "gate.sits_out=1"]


def test_who_is_refused_again_and_again_is_not_asked_for_a_while(play: Play) -> None:
    """Refused in 1 and 2, out in 3; one chance in 4, out in 5; what it sends in 6 is good, and in 7 all begins anew."""
    attack = ATTACKS["a weight of 0"][0]
    run = play(lambda ask, good: good if ask.header["round"] == 6 else attack(ask, good), "rounds.count=8", *SITS_OUT)
    assert run.rounds_of("ann") == [1, 2, 4, 6, 7, 8]
    assert run.rounds_of("bob") == [1, 2, 3, 4, 5, 6, 7, 8]
    notes = [record.notes for record in run.result.records]
    assert notes[1:3] == [("ann sits out until round 3",), ("ann sits out until round 3",)]
    assert notes[0] == notes[5] == ()
    assert [(line["client"], line["after"], line["until"]) for line in run.of("sits_out")] == [
        ("ann", 2, 3),
        ("ann", 4, 5),
        ("ann", 8, 9),
    ]
    assert "ann" not in run.result.records[2].clients


def test_who_sits_out_is_not_asked_to_evaluate_either(play: Play) -> None:
    attack = ATTACKS["a weight of 0"][0]
    only_in_1 = lambda ask, good: attack(ask, good) if ask.header["round"] == 1 else good  # noqa: E731
    run = play(only_in_1, "rounds.count=2", "rounds.evaluate_every=1", "gate.refusals=1", "gate.sits_out=1")
    assert run.rounds_of("ann") == [0, 1]
    assert run.rounds_of("bob") == [0, 1, 1, 2, 2]


def test_a_run_that_is_taken_up_again_remembers_who_sits_out(play: Play) -> None:
    attack = ATTACKS["a thousand times as far"][0]
    play(attack, "rounds.count=2", *SITS_OUT)
    whole = play(attack, "rounds.count=4", *SITS_OUT, folder="whole")
    resumed = play(attack, "rounds.count=4", *SITS_OUT, resume=True)
    assert resumed.rounds_of("ann") == [4]
    assert resumed.adapter(4) == whole.adapter(4)


@pytest.mark.parametrize("name", ["a weight of 0", "a thousand times as far"])  # refused as it came; when all had come
def test_a_crash_in_the_round_wipes_no_slate(name: str, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """ann is refused in round 1, which then breaks off: it is not asked again in that round, and sits out the next."""
    attack, keys = ATTACKS[name][0], ("rounds.count=2", "gate.refusals=1", "gate.sits_out=1")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", _broken_off(Journal.write))
        with pytest.raises(KeyboardInterrupt):
            play(attack, *keys)
    resumed, whole = play(attack, *keys, resume=True), play(attack, *keys, folder="whole")
    assert resumed.rounds_of("ann") == []
    assert resumed.adapter(2) == whole.adapter(2)
    assert resumed.result.records[0].clients["ann"].failed == whole.result.records[0].clients["ann"].failed


def _broken_off(write: Callable[..., None]) -> Callable[..., None]:
    def until_closed(self: Journal, what: str, **about: object) -> None:
        write(self, what, **about)
        if what == "closed":
            raise KeyboardInterrupt

    return until_closed


def test_too_few_who_may_take_part_end_the_run_with_the_reason(play: Play) -> None:
    """ann is refused in round 1, bob in round 2: cy alone is not half of three."""
    first, attack = {"ann": 1, "bob": 2}, ATTACKS["a weight of 0"][0]
    by_turns = lambda ask, good: attack(ask, good) if first[good.header["client"]] == ask.header["round"] else good  # noqa: E731
    reason = r"^round 3: 1 of 3 clients may take part, wanted 2 .*ann sits out until round 6; bob sits out until round 7,"
    with pytest.raises(RoundFailed, match=reason):
        play(by_turns, "rounds.count=3", "rounds.quorum=0.5", "gate.refusals=1", attackers=("ann", "bob"))


@dataclass(frozen=True)
class Fragile(FedAvg):
    """Its server half cannot do with ann's answers of round 2."""

    name = "fragile"

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        number = state.scalars.get("round", 0.0) + 1
        after = yield from super().round(state, cohort)
        if number == 2:
            torch.linalg.cholesky(-torch.eye(2))
        return replace(after, scalars={"round": number})


def test_algebra_that_fails_rolls_the_round_back_and_the_run_ends_with_the_reason(play: Play, tmp_path: Path) -> None:
    """Round 2 begins three times, as rounds 2, 3 and 4, from the state after round 1; then it is given up."""
    with pytest.raises(RoundFailed, match=r"3 rounds in a row were rolled back.*LinAlgError: linalg.cholesky"):
        play(lambda ask, good: good, "rounds.count=9", f"strategy.name={__file__}:Fragile")
    rolled = [entry["round"] for entry in read(tmp_path / "run" / JOURNAL)[0] if entry.what == "rolled_back"]
    assert rolled == [2, 3, 4]
    assert (tmp_path / "run" / "adapter").resolve().parent.name == "0001"
