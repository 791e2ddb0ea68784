"""How a round ends before all have answered, and what becomes of those who answer later."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.envelope import Envelope
from fedtune.errors import RoundFailed
from fedtune.job import Job
from fedtune.messages import from_record
from fedtune.payload import Payload, Role
from fedtune.strategy import Ask, ClientInfo, Fold
from fedtune.wire.ends import Pending
from server.checkpoint import Checkpoints
from server.coordinator import RunResult, draw_cohort, run_job
from server.exchange import SLACK
from server.journal import read
from server.late import Awaited, UnderWay, obstacle
from server.quorum import pauses
from server.watchers import Quiet
from simulations.grid import InProcessGrid
from strategies.fedavg import FedAvg
from strategies.fedsvd import FedSVD
from tests.server.timed import Clock, Pulled, TimedGrid, fake_clock

NO_EVALUATION = "rounds.evaluate_every=0"
FOUR = {"ann": 8.0, "bob": 16.0, "cy": 4.0, "dee": 2.0}
THREE = {name: FOUR[name] for name in ("ann", "bob", "cy")}
MakeJob = Callable[..., Job]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return fake_clock(monkeypatch)


def lines(folder: Path, what: str) -> list[Mapping[str, Any]]:
    return [entry.about for entry in read(folder / "journal.jsonl")[0] if entry.what == what]


def number(result: RunResult) -> float:
    """All numbers of an adapter are the same where all clients move all by the same."""
    [value] = {float(x) for pair in result.state.adapter.lora.values() for x in pair.B.unique()}
    return value


# over-sampling


def test_too_many_are_asked_and_the_first_who_answer_count(make_job: MakeJob, tmp_path: Path, clock: Clock) -> None:
    """Three of the four, for two: bob takes longest, so the mean is of the others that were drawn."""
    job = make_job("rounds.count=1", "rounds.clients=2", "rounds.oversample=1.5", NO_EVALUATION)
    grid = TimedGrid(clock, Pulled(job, FOUR), lambda client, ask: {"bob": 50.0, "cy": 20.0}.get(client, 5.0))
    asked = sorted(client.id for client in draw_cohort(job, {name: ClientInfo(name, 1, 4) for name in FOUR}, 1))
    result = run_job(job, grid, tmp_path / "run", Quiet())
    assert len(asked) == 3
    first = sorted(asked, key=lambda client: {"bob": 50.0, "cy": 20.0}.get(client, 5.0))[:2]
    assert number(result) == pytest.approx(sum(FOUR[client] for client in first) / 2)
    [late] = set(asked) - set(first)
    assert result.records[0].clients[late].failed == "late: enough others had answered"
    assert clock.now < 50.0


def test_a_cohort_is_the_same_with_more_behind_it(make_job: MakeJob) -> None:
    clients = {f"c{i}": ClientInfo(f"c{i}", 1, 4) for i in range(9)}
    few = draw_cohort(make_job("rounds.clients=4"), clients, 7)
    more = draw_cohort(make_job("rounds.clients=4", "rounds.oversample=1.6"), clients, 7)
    assert len(more) == math.ceil(4 * 1.6) == 7
    assert {client.id for client in few} < {client.id for client in more}
    assert len(draw_cohort(make_job("rounds.clients=4", "rounds.oversample=9"), clients, 7)) == len(clients)


def test_in_a_simulation_the_first_by_id_count(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("rounds.count=1", "rounds.clients=2", "rounds.oversample=2", NO_EVALUATION)
    result = run_job(job, InProcessGrid(Pulled(job, FOUR)), tmp_path / "run", Quiet())
    assert number(result) == (FOUR["ann"] + FOUR["bob"]) / 2


def test_who_is_busy_is_drawn_only_for_a_quorum(make_job: MakeJob) -> None:
    clients = {name: ClientInfo(name, 1, 4) for name in FOUR}

    def drawn(*busy: str) -> list[str]:
        return [client.id for client in draw_cohort(make_job(), clients, 1, busy=busy)]

    assert drawn("bob") == ["ann", "cy", "dee"]
    assert drawn("bob", "cy") == ["ann", "dee"]  # half of four: enough
    assert len(drawn("bob", "cy", "dee")) == 2
    assert len(drawn(*FOUR)) == 2


# late answers


def late_job(make_job: MakeJob, *more: str) -> Job:
    return make_job("rounds.count=3", "rounds.timeout=30", "rounds.late=next_round", NO_EVALUATION, *more)


def bob_is_slow(client: str, ask: str) -> float:
    return 45.0 if (client, ask) == ("bob", "1.0") else 5.0 if ask == "1.0" else 20.0


def test_a_late_answer_counts_in_the_next_round_with_a_smaller_weight(make_job: MakeJob, tmp_path: Path, clock: Clock) -> None:
    """bob's change in round 1, half of the way from 0 to 16 for B, is 8: added to what is sent in round 2, at the weight
    1/sqrt(2) of an answer that is in time. With x_1 = (0.5*8 + 0.5*4)/2 = 3, ann and cy answer 5.5 and 3.5, bob 3 + 8 = 11."""
    job = late_job(make_job)
    clients = Pulled(job, THREE, share=0.5)
    result = run_job(job, TimedGrid(clock, clients, bob_is_slow), tmp_path / "run", Quiet())
    w = 1 / math.sqrt(2)
    second = (5.5 + 3.5 + w * 11) / (2 + w)
    third = sum(0.5 * (second + target) for target in THREE.values()) / 3
    assert number(result) == pytest.approx(third, rel=1e-6)
    [line] = lines(tmp_path / "run", "late")
    assert (line["ask"], line["client"], line["counts_in"]) == ("1.0", "bob", "2.0")
    assert [ask for client, ask in clients.asked if client == "bob"] == ["1.0", "3.0"]  # in round 2 it was busy
    assert result.records[1].clients["bob"].failed is None
    assert result.records[1].notes == ("late: bob answered ask 1.0, which counts with staleness 1",)
    assert result.records[1].clients["bob"].bytes_up > 0


def test_what_is_dropped_is_not_waited_for(make_job: MakeJob, tmp_path: Path, clock: Clock) -> None:
    job = late_job(make_job, "rounds.late=drop", "rounds.count=2")
    clients = Pulled(job, THREE, share=0.5)
    grid = TimedGrid(clock, clients, bob_is_slow)
    run_job(job, grid, tmp_path / "run", Quiet())
    assert ("bob", "2.0") in clients.asked
    assert max(grid.ttls) == 30.0 + SLACK
    assert not lines(tmp_path / "run", "late")


def test_an_answer_may_be_delivered_after_its_deadline_where_it_counts(make_job: MakeJob, tmp_path: Path, clock: Clock) -> None:
    job = late_job(make_job)
    grid = TimedGrid(clock, Pulled(job, THREE), bob_is_slow)
    run_job(job, grid, tmp_path / "run", Quiet())
    assert max(grid.ttls) == 30.0 + SLACK + 30.0


def test_of_a_method_that_reads_each_answer_late_ones_are_dropped_with_the_reason(
    make_job: MakeJob, tmp_path: Path, clock: Clock
) -> None:
    job = late_job(make_job, "strategy.name=lora_fair", "rounds.count=1")
    result = run_job(job, TimedGrid(clock, Pulled(job, THREE), bob_is_slow), tmp_path / "run", Quiet())
    [line] = lines(tmp_path / "run", "late")
    assert (line["client"], line["dropped"]) == ("bob", obstacle(Ask("train", fold=Fold.EACH), job.make_strategy()))
    assert "bob" in result.records[0].notes[0]


def test_who_is_still_at_work_is_not_asked_to_evaluate(make_job: MakeJob, tmp_path: Path, clock: Clock) -> None:
    job = late_job(make_job, "rounds.evaluate_every=1", "rounds.count=1")
    clients = Pulled(job, THREE)
    result = run_job(job, TimedGrid(clock, clients, bob_is_slow), tmp_path / "run", Quiet())
    assert ("bob", "1.evaluate") not in clients.asked
    assert result.records[1].clients["bob"].failed == "no answer within 30 s"


def test_a_late_answer_that_was_journaled_counts_after_a_crash_bit_for_bit(
    make_job: MakeJob, tmp_path: Path, clock: Clock
) -> None:
    """The crash comes in round 2, after bob's answer to ask 1.0 lay in the spool, and before the round was closed."""
    job = late_job(make_job)
    whole = run_job(job, TimedGrid(clock, Pulled(job, THREE, 0.5), bob_is_slow), tmp_path / "whole", Quiet())

    class Crash(BaseException):
        pass

    class Crashing(TimedGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            if lines(tmp_path / "run", "late"):
                raise Crash
            return super().pull_messages(message_ids)

    clock.now = 0.0
    with pytest.raises(Crash):
        run_job(job, Crashing(clock, Pulled(job, THREE, 0.5), bob_is_slow), tmp_path / "run", Quiet())
    clients = Pulled(job, THREE, 0.5)
    again = run_job(job, TimedGrid(clock, clients, bob_is_slow), tmp_path / "run", Quiet(), resume=True)
    assert ("bob", "2.0") not in clients.asked
    for path, pair in whole.state.adapter.lora.items():
        assert pair.A.equal(again.state.adapter.lora[path].A)
        assert pair.B.equal(again.state.adapter.lora[path].B)
    assert again.records[1].notes[-1] == whole.records[1].notes[-1]


class Crash(BaseException):
    pass


class Crashing(TimedGrid):
    """The process ends when this ask is to be sent."""

    last = "2.0"

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        if any(from_record(message.content).header["ask"] == self.last for message in messages):
            raise Crash
        return super().push_messages(messages)


def test_a_late_answer_whose_file_is_damaged_is_told_of(make_job: MakeJob, tmp_path: Path, clock: Clock) -> None:
    """It counted in round 2; nobody can be asked for it once more."""

    class After(Crashing):
        last = "3.0"

    job, folder = late_job(make_job), tmp_path / "run"
    with pytest.raises(Crash):
        run_job(job, After(clock, Pulled(job, THREE, 0.5), bob_is_slow), folder, Quiet())
    shutil.rmtree(folder / "state" / "0002")  # so round 2 is played again, without its spool
    again = run_job(job, TimedGrid(clock, Pulled(job, THREE, 0.5), bob_is_slow), folder, Quiet(), resume=True)
    told = "late: what bob answers to ask 1.0 is dropped: its file in the spool is damaged or gone"
    assert told in again.records[1].notes


@pytest.mark.parametrize(
    "keys", [["rounds.late=next_round"], ["rounds.late=drop"], ["rounds.mode=buffered", "rounds.late=drop"]]
)
def test_who_has_begun_a_round_ends_it_whatever_the_gate_says_by_then(
    keys: list[str], make_job: MakeJob, tmp_path: Path, clock: Clock
) -> None:
    """As if the run had been taken up with gate.sits_out=0 for a while: cy was asked in round 2, and sits out until round 6."""
    job, folder = make_job("rounds.count=3", "rounds.evaluate_every=1", "rounds.buffer=3", *keys), tmp_path / "run"
    with pytest.raises(Crash):
        run_job(job, Crashing(clock, Pulled(job, THREE), lambda client, ask: 5.0), folder, Quiet())
    checkpoints = Checkpoints(folder / "state")
    last = checkpoints.last()
    assert last is not None
    gate = {"conduct": {"refused": {"cy": 3}, "until": {"cy": 6}}, "norms": {}}
    checkpoints.write(replace(last, notes={"undone": [], "gate": gate}))
    clients = Pulled(job, THREE)
    run_job(job, TimedGrid(clock, clients, lambda client, ask: 5.0), folder, Quiet(), resume=True)
    assert [ask for client, ask in clients.asked if client == "cy"] == ["2.0", "2.evaluate"]


def test_what_was_closed_is_not_judged_by_another_gate(make_job: MakeJob, tmp_path: Path, clock: Clock) -> None:
    """Nothing passes this gate; what counted before it was made so tight does."""
    keys = ("rounds.count=1", "rounds.without_quorum=wait")
    job, folder = make_job(*keys), tmp_path / "run"

    class After(Crashing):
        last = "1.evaluate"

    with pytest.raises(Crash):
        run_job(job, After(clock, Pulled(job, THREE), lambda client, ask: 5.0), folder, Quiet())
    job = make_job(*keys, "gate.max_norm=1e-9")
    result = run_job(job, TimedGrid(clock, Pulled(job, THREE), lambda client, ask: 5.0), folder, Quiet(), resume=True)
    assert number(result) == pytest.approx(sum(THREE.values()) / 3)
    assert not lines(folder, "refused")


@given(delays=st.lists(st.floats(0.0, 70.0), min_size=9, max_size=9), staleness=st.sampled_from([0.0, 0.5, 2.0]))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_comes_when_each_change_counts_at_most_once(
    delays: list[float], staleness: float, make_job: MakeJob, tmp_path_factory: pytest.TempPathFactory, clock: Clock
) -> None:
    """With what the journal says has come, the run can be played by hand: x + sum of shares of what clients have changed."""
    clock.now, names = 0.0, list(THREE)
    folder = tmp_path_factory.mktemp("run") / "run"
    job = late_job(make_job, f"rounds.staleness={staleness}", "rounds.without_quorum=wait", "rounds.quorum=0.3")
    seconds = {(name, f"{round}.0"): delays[3 * i + round - 1] for i, name in enumerate(names) for round in (1, 2, 3)}
    result = run_job(job, TimedGrid(clock, Pulled(job, THREE, 0.5), lambda client, ask: seconds[client, ask]), folder, Quiet())
    x, sent, seen = 0.0, dict[str, float](), set[tuple[str, str]]()
    for round in (1, 2, 3):
        sent[f"{round}.0"] = x
        total = moved = 0.0
        for line in lines(folder, "answered"):
            if line["ask"] == f"{round}.0":
                late = line.get("late", {"ask": line["ask"], "rounds": 0})
                assert (late["ask"], line["client"]) not in seen
                seen.add((late["ask"], line["client"]))
                weight = (1 + late["rounds"]) ** -staleness
                total += weight
                moved += weight * 0.5 * (THREE[line["client"]] - sent[late["ask"]])
        x += moved / total
    assert number(result) == pytest.approx(x, rel=1e-5)


# a quorum


def test_the_run_waits_for_a_quorum_and_says_so(make_job: MakeJob, tmp_path: Path, clock: Clock) -> None:
    """Two of three are wanted: bob and cy fail three times, with pauses of 5, 10 and 20 s."""
    job = make_job("rounds.count=1", "rounds.without_quorum=wait", "rounds.timeout=30", NO_EVALUATION)
    failing = Pulled(job, THREE, failing=lambda client, ask, times: "asleep" if client != "ann" and times <= 3 else "")
    result = run_job(job, TimedGrid(clock, failing, lambda client, ask: 0.0), tmp_path / "run", Quiet())
    assert number(result) == pytest.approx(sum(THREE.values()) / 3)
    waited = lines(tmp_path / "run", "waiting")
    assert [line["seconds"] for line in waited] == [5.0, 10.0, 20.0]
    assert {(line["reason"], line["answered"], line["wanted"]) for line in waited} == {("bob: asleep; cy: asleep", 1, 2)}
    assert [client for client, _ in failing.asked].count("ann") == 1
    assert result.records[0].answered == 3


def test_who_does_not_answer_in_time_is_asked_the_same_again(make_job: MakeJob, tmp_path: Path, clock: Clock) -> None:
    job = make_job("rounds.count=1", "rounds.without_quorum=wait", "rounds.timeout=30", "rounds.quorum=1.0", NO_EVALUATION)
    clients = Pulled(job, THREE)
    grid = TimedGrid(clock, clients, lambda client, ask: 31.0 if client == "cy" else 0.0)
    assert number(run_job(job, grid, tmp_path / "run", Quiet())) == pytest.approx(sum(THREE.values()) / 3)
    assert clients.asked.count(("cy", "1.0")) == 1  # the same bytes: it did not begin anew
    assert grid.pushed.count(("cy", "1.0")) > 1


def test_who_is_refused_is_not_asked_again_and_where_nobody_else_is_left_the_run_stops(
    make_job: MakeJob, tmp_path: Path, clock: Clock
) -> None:
    class Greedy(Pulled):
        def answer(self, ask: Envelope, client: str) -> Envelope:
            given = super().answer(ask, client)
            return replace(given, header={**given.header, "weight": 9.0}) if client == "cy" and given.tensors else given

    job = make_job("rounds.count=1", "rounds.without_quorum=wait", "rounds.quorum=1.0", NO_EVALUATION)
    with pytest.raises(RoundFailed, match=r"2 of 3 clients answered, wanted 3 .*cy: refused: its weight is 9"):
        run_job(job, TimedGrid(clock, Greedy(job, THREE), lambda client, ask: 0.0), tmp_path / "run", Quiet())


def test_what_a_client_makes_up_is_not_written_whole_into_the_journal(make_job: MakeJob, tmp_path: Path, clock: Clock) -> None:
    """bob answers an ask with a name of 100 kB; ann and cy fail with as long a reason."""

    class Verbose(Pulled):
        def answer(self, ask: Envelope, client: str) -> Envelope:
            given = super().answer(ask, client)
            odd = client == "bob" and ask.header["kind"] == "train"
            return Envelope({**given.header, "ask": "b" * 100_000}, given.tensors) if odd else given

    job = make_job("rounds.count=1", "rounds.without_quorum=wait", NO_EVALUATION)
    clients = Verbose(job, THREE, failing=lambda client, ask, times: "x" * 100_000 if times < 2 and client != "bob" else "")
    run_job(job, TimedGrid(clock, clients, lambda client, ask: 0.0), tmp_path / "run", Quiet())
    assert lines(tmp_path / "run", "refused")
    assert lines(tmp_path / "run", "waiting")
    assert max(map(len, (tmp_path / "run" / "journal.jsonl").read_text().splitlines())) < 1_000


def test_pauses_grow_to_a_minute() -> None:
    found = pauses()
    assert [next(found) for _ in range(6)] == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


# what may count later


def test_what_is_no_sum_of_weights_cannot_count_later() -> None:
    weights, fedavg = Payload({"w": torch.zeros(1)}, {"w": Role.DENSE}), FedAvg()
    controls = Payload({"c": torch.zeros(1)}, {"c": Role.VECTOR})
    assert obstacle(Ask("train", weights, Fold.SEEN), fedavg) == ""
    assert "every single answer" in obstacle(Ask("train", weights, Fold.EACH), fedavg)
    assert "unlike things" in obstacle(Ask("train", weights, per_client={"a": weights}), fedavg)
    assert "more than weights" in obstacle(Ask("train", controls), fedavg)
    assert "something else in every round" in obstacle(Ask("train", weights), FedSVD())


def test_asks_are_awaited_for_some_rounds_and_some_time(clock: Clock) -> None:
    def one(client: str, round: int, until: float, kind: str = "train") -> Awaited:
        return Awaited(client, 1, round, f"{round}.0", Ask(kind), Pending(Ask(kind)), until)

    under_way = UnderWay(rounds=2)
    under_way.add(
        {"m1": one("ann", 1, 100.0), "m2": one("ann", 1, 100.0), "m3": one("bob", 2, 10.0), "m4": one("cy", 2, 99.0, "x")}
    )
    assert under_way.busy == {"ann": "1.0", "bob": "2.0", "cy": "2.0"}
    assert set(under_way.like(Ask("train"), "3.0")) == {"m1", "m2", "m3"}
    assert under_way.like(Ask("train"), "3.1") == {}
    under_way.lost("m2")
    assert "ann" in under_way.busy
    clock.now = 50.0
    under_way.begins(3)
    assert set(under_way.busy) == {"ann", "cy"}
    assert under_way.taken("m1") == one("ann", 1, 100.0)
    assert under_way.taken("m1") is None
    under_way.begins(5)
    assert not under_way.busy
