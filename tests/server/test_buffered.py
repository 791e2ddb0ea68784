"""Buffered rounds: what is folded, with which weight, and that nobody waits."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.base import blueprint
from fedtune.envelope import Envelope
from fedtune.errors import JobError, Refused, RoundFailed, StrategyError
from fedtune.job import Job
from fedtune.registry import strategy_from
from fedtune.strategy import Answer, ClientInfo
from server.coordinator import RunResult, run_job
from server.gatekeeper import Gatekeeper
from server.journal import Entry, Journal, read
from server.summing import able_in, why_not
from server.watchers import Quiet
from simulations.engine import simulate
from simulations.grid import InProcessGrid
from tests.server.test_late import lines, number
from tests.server.timed import Clock, Pulled, TimedGrid, fake_clock

FOUR = {"ann": 1.0, "bob": 3.0, "cy": 5.0, "dee": 7.0}
BUFFERED, NO_EVALUATION = "rounds.mode=buffered", "rounds.evaluate_every=0"
MakeJob = Callable[..., Job]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return fake_clock(monkeypatch)


def same(one: RunResult, other: RunResult) -> bool:
    pairs = [(pair, other.state.adapter.lora[path]) for path, pair in one.state.adapter.lora.items()]
    return all(pair.A.equal(twin.A) and pair.B.equal(twin.B) for pair, twin in pairs)


def test_with_everybody_in_the_buffer_it_is_the_synchronous_run_to_the_bit(make_job: MakeJob, tmp_path: Path) -> None:
    settings = ("rounds.count=3", "strategy.name=fedprox")
    job = make_job(*settings)
    whole = run_job(job, InProcessGrid(Pulled(job, FOUR, 0.3)), tmp_path / "whole", Quiet())
    job = make_job(*settings, BUFFERED, "rounds.buffer=4")
    buffered = run_job(job, InProcessGrid(Pulled(job, FOUR, 0.3)), tmp_path / "buffered", Quiet())
    assert same(whole, buffered)
    assert [record.loss for record in buffered.records] == [record.loss for record in whole.records]
    assert [record.answered for record in buffered.records] == [4, 4, 4, 4]


def test_it_ends_where_the_synchronous_run_does_but_for_what_the_clients_differ(make_job: MakeJob, tmp_path: Path) -> None:
    """Two clients move by h = 1/4 of the way to their targets m - g and m + g. In a simulation the answers come in the order of
    the asks: with a buffer of one they take turns, each one round late from the second round on. So
    x_(t+1) = x_t + h (m +- g - x_(t-1)): the error to m tends to c, -c, c ... with -c = c + h c + h g, which is
    |c| = h g / (2 + h); the rest shrinks like t / 2^t, as both roots of z^2 - z + h = 0 are 1/2. The synchronous run's error
    is m (3/4)^t."""
    rounds, h, m, g = 24, 0.25, 4.0, 3.0
    two, keys = {"ann": m - g, "bob": m + g}, (f"rounds.count={rounds}", NO_EVALUATION, "rounds.keep=1")
    job = make_job(*keys, BUFFERED)
    result = run_job(job, InProcessGrid(Pulled(job, two, h)), tmp_path / "run", Quiet())
    assert abs(number(result) - m) == pytest.approx(h * g / (2 + h), abs=1e-5)
    assert [record.metrics["staleness"] for record in result.records] == [0.0] + [1.0] * (rounds - 1)
    job = make_job(*keys)
    whole = run_job(job, InProcessGrid(Pulled(job, two, h)), tmp_path / "whole", Quiet())
    assert number(whole) == pytest.approx(m * (1 - 0.75**rounds), abs=1e-5)


def test_nobody_waits_for_the_slowest(make_job: MakeJob, tmp_path: Path, clock: Clock) -> None:
    """Three of six are at work at every moment, while one of them takes as long as all rounds together."""
    six = {f"c{i}": float(i) for i in range(6)}
    job = make_job("rounds.count=8", "rounds.clients=3", "rounds.buffer=2", "rounds.timeout=900", BUFFERED, NO_EVALUATION)
    grid = TimedGrid(clock, Pulled(job, six, 0.5), lambda client, ask: 500.0 if client == "c0" else 7.0 + int(client[1]))
    run_job(job, grid, tmp_path / "run", Quiet())
    assert clock.now < 100.0
    assert {client for client, _ in grid.pushed if client == "c0"}
    answered = Counter(line["ask"] for line in lines(tmp_path / "run", "answered"))
    assert answered == {f"{round}.0": 2 for round in range(1, 9)}
    sent, came, at_work = list[int](), 0, 0
    for line in journal(tmp_path / "run"):
        at_work += len(line.about["clients"]) if line.what == "asked" else -(line.what == "answered")
        came += line.what == "answered"
        if line.what == "asked":
            sent.append(at_work)
    assert set(sent) == {3}  # after each ask; between an answer and the next ask, two
    assert came == 16


def journal(folder: Path) -> list[Entry]:
    return read(folder / "journal.jsonl")[0]


def played_by_hand(folder: Path, targets: Mapping[str, float], rounds: int, share: float, staleness: float) -> float:
    x, sent = 0.0, dict[str, float]()
    for round in range(1, rounds + 1):
        sent[f"{round}.0"] = x
        mine = [line for line in lines(folder, "answered") if line["ask"] == f"{round}.0"]
        weights = [(1 + line["late"]["rounds"]) ** -staleness for line in mine]
        moved = [share * (targets[line["client"]] - sent[line["late"]["ask"]]) for line in mine]
        x += sum(w * d for w, d in zip(weights, moved, strict=True)) / sum(weights)
    return x


@given(
    delays=st.lists(st.floats(0.0, 50.0), min_size=20, max_size=20),
    clients=st.integers(1, 4),
    staleness=st.sampled_from([0.0, 0.5, 2.0]),
    data=st.data(),
)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_whatever_order_they_come_each_change_counts_once_and_by_its_staleness(
    delays: list[float],
    clients: int,
    staleness: float,
    data: st.DataObject,
    make_job: MakeJob,
    tmp_path_factory: pytest.TempPathFactory,
    clock: Clock,
) -> None:
    clock.now, folder, buffer = 0.0, tmp_path_factory.mktemp("run") / "run", data.draw(st.integers(1, clients))
    job = make_job(
        *("rounds.count=5", f"rounds.clients={clients}", f"rounds.buffer={buffer}", f"rounds.staleness={staleness}"),
        *(BUFFERED, NO_EVALUATION),
    )
    names = list(FOUR)
    grid = TimedGrid(clock, Pulled(job, FOUR, 0.5), lambda who, ask: delays[5 * names.index(who) + int(ask[0]) - 1])
    result = run_job(job, grid, folder, Quiet())
    assert number(result) == pytest.approx(played_by_hand(folder, FOUR, 5, 0.5, staleness), rel=1e-5)
    answered = lines(folder, "answered")
    assert Counter(line["ask"] for line in answered) == {f"{round}.0": buffer for round in range(1, 6)}
    assert len({(line["late"]["ask"], line["client"]) for line in answered}) == len(answered)


def test_evaluation_is_of_who_is_free_and_at_last_of_all(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("rounds.count=2", BUFFERED)
    clients = Pulled(job, FOUR)
    result = run_job(job, InProcessGrid(clients), tmp_path / "run", Quiet())
    evaluated = Counter(ask for _, ask in clients.asked if ask.endswith("evaluate"))
    assert evaluated == {"0.evaluate": 4, "1.evaluate": 2, "2.evaluate": 4}
    assert result.records[1].answered == 2
    assert {one.failed for one in result.records[1].clients.values()} == {None, "at work on ask 1.0"}


def test_who_fails_is_replaced_and_asked_again_in_the_next_round(make_job: MakeJob, tmp_path: Path) -> None:
    """Whoever is asked first sleeps: another fills the buffer, and who slept is drawn again."""
    job = make_job("rounds.count=6", "rounds.clients=2", "rounds.buffer=1", BUFFERED, NO_EVALUATION)
    slept = set[str]()

    def once(client: str, ask: str, times: int) -> str:
        slept.update({client} if not slept else ())
        return "asleep" if slept == {client} and ask == "1.0" else ""

    clients = Pulled(job, {"ann": 1.0, "bob": 3.0, "cy": 5.0}, failing=once)
    result = run_job(job, InProcessGrid(clients), tmp_path / "run", Quiet())
    [sleeper] = slept
    assert result.records[0].clients[sleeper].failed == "asleep"
    assert len(lines(tmp_path / "run", "answered")) == 6
    assert sleeper in {client for client, ask in clients.asked if ask != "1.0"}


def test_where_the_buffer_cannot_be_filled_the_run_stops_or_waits_as_the_job_says(
    make_job: MakeJob, tmp_path: Path, clock: Clock
) -> None:
    """Three of four are wanted by rounds.quorum; two sleep until they have been asked three times."""

    def asleep(client: str, ask: str, times: int) -> str:
        return "asleep" if client in ("ann", "bob") and times < 3 else ""

    keys = ("rounds.count=1", "rounds.buffer=4", "rounds.quorum=0.75", BUFFERED, NO_EVALUATION)
    job = make_job(*keys)
    with pytest.raises(RoundFailed, match=r"2 of 4 clients answered, wanted 3 .*ann: asleep; bob: asleep"):
        run_job(job, TimedGrid(clock, Pulled(job, FOUR, failing=asleep), lambda *_: 1.0), tmp_path / "stopped", Quiet())
    job = make_job(*keys, "rounds.without_quorum=wait")
    result = run_job(job, TimedGrid(clock, Pulled(job, FOUR, failing=asleep), lambda *_: 1.0), tmp_path / "run", Quiet())
    assert [line["seconds"] for line in lines(tmp_path / "run", "waiting")] == [5.0, 10.0]
    assert number(result) == pytest.approx(sum(FOUR.values()) / 4)


def test_taken_up_again_the_buffer_is_as_it_was_and_who_was_at_work_is_asked_anew(
    make_job: MakeJob, tmp_path: Path, clock: Clock
) -> None:
    """The crash comes in round 2, when two of its three answers are in the spool."""
    job = make_job("rounds.count=3", "rounds.buffer=3", BUFFERED, NO_EVALUATION)

    class Crash(BaseException):
        pass

    class Crashing(TimedGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            if sum(line["ask"] == "2.0" for line in lines(tmp_path / "run", "answered")) == 2:
                raise Crash
            return super().pull_messages(message_ids)

    pace = {"ann": 3.0, "bob": 5.0, "cy": 7.0, "dee": 11.0}
    crashing = Crashing(clock, Pulled(job, FOUR, 0.5), lambda client, ask: pace[client])
    with pytest.raises(Crash):
        run_job(job, crashing, tmp_path / "run", Quiet())
    before = [(line["client"], line["digest"]) for line in lines(tmp_path / "run", "answered") if line["ask"] == "2.0"]
    clients = Pulled(job, FOUR, 0.5)
    grid = TimedGrid(clock, clients, lambda client, ask: pace[client])
    result = run_job(job, grid, tmp_path / "run", Quiet(), resume=True)
    after = [(line["client"], line["digest"]) for line in lines(tmp_path / "run", "answered") if line["ask"] == "2.0"]
    assert after[:2] == before
    assert len(after) == 3
    fresh = {line["client"] for line in lines(tmp_path / "run", "answered") if line["late"]["ask"] == "2.0"}
    assert all((client, "2.0") not in clients.asked for client, _ in before if client in fresh)
    assert number(result) == pytest.approx(played_by_hand(tmp_path / "run", FOUR, 3, 0.5, 0.5), rel=1e-5)


class Crash(BaseException):
    pass


def crashing_at(grid: TimedGrid, folder: Path, what: str, ask: str, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """The process ends right after this line of the journal; of several, the one of that number."""
    write = Journal.write

    def and_die(self: Journal, said: str, **about: Any) -> None:
        write(self, said, **about)
        if sum(line["ask"] == ask for line in lines(folder, what)) == times:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", and_die)
        with pytest.raises(Crash):
            run_job(grid.clients.job, grid, folder, Quiet())


def paced(job: Job, clock: Clock, clients: type[Pulled] = Pulled) -> TimedGrid:
    pace = {"ann": 3.0, "bob": 5.0, "cy": 7.0, "dee": 11.0}
    return TimedGrid(clock, clients(job, FOUR, 0.5), lambda client, ask: pace[client])


@pytest.mark.parametrize("damage", ["one answer", "all answers", "the checkpoint"])
def test_a_closed_round_whose_answers_are_damaged_or_gone_is_open_again(
    damage: str, make_job: MakeJob, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 2 of 3 was closed. Without its checkpoint it is repeated, and its spool is gone by then."""
    job, folder = make_job("rounds.count=3", "rounds.buffer=2", BUFFERED, NO_EVALUATION), tmp_path / "run"
    what, ask = ("asked", "3.0") if damage == "the checkpoint" else ("closed", "2.0")
    crashing_at(paced(job, clock), folder, what, ask, monkeypatch)
    if damage == "the checkpoint":
        shutil.rmtree(folder / "state" / "0002")
    files = sorted((folder / "spool" / "2.0").glob("*.answer"))
    for file in files[:1] if damage == "one answer" else files:
        file.write_bytes(file.read_bytes()[:-7])
    result = run_job(job, paced(job, clock), folder, Quiet(), resume=True)
    closed = [line["answered"] for line in lines(folder, "closed") if line["ask"] == "2.0"]
    assert [len(clients) for clients in closed] == [2, 2]
    assert [record.answered for record in result.records] == [2, 2, 2]
    dropped = {note.split()[2] for note in result.records[1].notes if "is dropped: its file in the spool" in note}
    assert dropped <= {line["client"] for line in lines(folder, "answered") if line["ask"] == "2.0" and line["late"]["rounds"]}


def test_who_gave_a_damaged_answer_to_this_very_ask_gives_it_again(
    make_job: MakeJob, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In round 1 all answers are in time, so all are asked for again: the run is the same to the bit."""
    job = make_job("rounds.count=1", "rounds.buffer=2", BUFFERED, NO_EVALUATION)
    whole = run_job(job, paced(job, clock), tmp_path / "whole", Quiet())
    clock.now = 0.0
    crashing_at(paced(job, clock), tmp_path / "run", "closed", "1.0", monkeypatch)
    for file in (tmp_path / "run" / "spool").rglob("*.answer"):
        file.unlink()
    assert same(run_job(job, paced(job, clock), tmp_path / "run", Quiet(), resume=True), whole)


def test_who_was_refused_before_a_crash_was_refused(
    make_job: MakeJob, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bob's answer was; after the crash it sends a good one, and sits out all the same."""

    class Greedy(Pulled):
        def answer(self, ask: Envelope, client: str) -> Envelope:
            given = super().answer(ask, client)
            return replace(given, header={**given.header, "weight": 9.0}) if client == "bob" and given.tensors else given

    job = make_job("rounds.count=1", "rounds.buffer=2", "gate.refusals=1", "gate.sits_out=2", BUFFERED, NO_EVALUATION)
    crashing_at(paced(job, clock, Greedy), tmp_path / "run", "refused", "1.0", monkeypatch)
    run_job(job, paced(job, clock), tmp_path / "run", Quiet(), resume=True)
    assert [(line["client"], line["until"]) for line in lines(tmp_path / "run", "sits_out")] == [("bob", 3)]


def test_a_spooled_answer_that_is_refused_now_fills_no_place_of_the_buffer(
    make_job: MakeJob, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The crash comes when ann and bob have answered; then the gate is another, and refuses ann."""
    job = make_job("rounds.count=1", "rounds.buffer=2", BUFFERED, NO_EVALUATION)
    crashing_at(paced(job, clock), tmp_path / "run", "answered", "1.0", monkeypatch, times=2)
    let_in = Gatekeeper.let_in

    def strict(self: Gatekeeper, envelope: Envelope, client: ClientInfo, *more: Any) -> Answer:
        if client.id == "ann":
            raise Refused("it is too far")
        return let_in(self, envelope, client, *more)

    monkeypatch.setattr(Gatekeeper, "let_in", strict)
    run_job(job, paced(job, clock), tmp_path / "run", Quiet(), resume=True)
    [closed] = lines(tmp_path / "run", "closed")
    assert closed["answered"] == ["bob", "cy"]


def test_only_methods_whose_round_is_one_sum_can_be_buffered(make_job: MakeJob, tmp_path: Path) -> None:
    adapter, clients = blueprint(make_job()).adapter, [ClientInfo(name, 1, 4, 1.5) for name in FOUR]
    assert able_in(adapter, clients) == ["fedavg", "fedprox", "fedsa_lora", "ffa_lora", "mezo"]
    reasons = {name: why_not(strategy_from(name, {}), adapter, clients) for name in ("lora_fair", "fed_sb", "rolora", "fedsvd")}
    assert reasons["lora_fair"].startswith("it reads every single answer")
    assert reasons["fed_sb"] == "its rounds take several asks"
    assert reasons["rolora"] == "it asks for other things in other rounds"
    job = make_job(BUFFERED, "strategy.name=scaffold", "train.optimizer=sgd", "train.clip=0")
    with pytest.raises(StrategyError, match=r"'scaffold' cannot be buffered: more than weights .* these can: fedavg, fedprox"):
        run_job(job, InProcessGrid(Pulled(job, FOUR)), tmp_path / "run", Quiet())
    assert not (tmp_path / "run").exists()


def test_a_buffer_holds_no_more_than_are_at_work(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(BUFFERED, "rounds.clients=2", "rounds.buffer=3")
    with pytest.raises(JobError, match=r"rounds.buffer = 3, and 2 clients work at the same time.*--set rounds.buffer=1"):
        run_job(job, InProcessGrid(Pulled(job, FOUR)), tmp_path / "run", Quiet())


def test_with_codecs_and_real_training_clients_are_sent_the_difference_to_what_they_have(
    make_job: MakeJob, tmp_path: Path
) -> None:
    """Whoever answers late still has what it was sent then: nobody is outdated, and no ask but the first is sent whole."""
    job = make_job("rounds.count=4", "train.steps=1", "wire.preset=balanced", "compare=false", BUFFERED, NO_EVALUATION)
    result = simulate(job, tmp_path / "run", Quiet())
    assert all(
        one.failed is None or one.failed.startswith("at work") for record in result.records for one in record.clients.values()
    )
    assert {line["late"]["rounds"] for line in lines(tmp_path / "run", "answered")} > {0}
    asked = Counter((line["ask"], client) for line in lines(tmp_path / "run", "asked") for client in line["clients"])
    assert set(asked.values()) == {1}
