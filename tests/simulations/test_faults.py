"""`make faults`: a handful of its faults, that it would see what is lost, and its page."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from pathlib import Path

import pytest
from rich.console import Console

from server.journal import Entry
from simulations import faults_disk, faults_files, faults_kills, faults_messages
from simulations.faults import faults
from simulations.faults_campaign import Campaign, Hit, kill, line_of
from simulations.faults_deployment import Deployment
from simulations.faults_job import METHODS, Place
from simulations.faults_lives import Simulated, killed_at_line, lived
from simulations.faults_page import BEGIN, END, Outcome, markdown, summary, write
from simulations.faults_proxy import Proxy
from simulations.faults_seen import BY_ITSELF, RESUMED, Seen, Whole, begun_again, bits_of, lost_in, rows, seen_in

METHOD = next(iter(METHODS))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.make(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def simulated(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    return Simulated.of(METHOD, place.job(*METHODS[METHOD]), tmp_path_factory.mktemp("runs") / "of")


def test_a_few_faults_of_each_kind_cost_nothing(simulated: Simulated, place: Place) -> None:
    chance = random.Random(1)
    families = [
        faults_kills.trials(simulated, chance, full=False)[:3],
        [trial for trial in faults_files.trials(simulated, chance, full=True) if "memory" not in str(trial.args[1])][::14],  # type: ignore[attr-defined]
        faults_messages.trials(simulated, chance, full=False)[1:2],
        faults_disk.trials(simulated, place, METHODS[METHOD], chance, full=False)[:1],
    ]
    for trials in families:
        seen = [found for trial in trials if (found := trial())]
        assert seen
        assert [found for found in seen if not found.faultless] == []


def test_a_kill_that_comes_too_late_is_not_counted(simulated: Simulated) -> None:
    beyond = len(simulated.whole.entries)
    assert simulated.seen("late", [killed_at_line(beyond, "before")], "") is None


def test_other_bits_are_seen(simulated: Simulated, place: Place) -> None:
    other = Simulated("other", place.job(*METHODS[METHOD], "train.lr=0.02"), simulated.folder, simulated.whole)
    seen = other.seen("another rate", [killed_at_line(3, "after")], "")
    assert seen is not None
    assert (seen.same, seen.wrong, seen.faultless) == (False, True, False)


def test_an_error_is_seen_and_is_no_good_end(simulated: Simulated) -> None:
    def spoil(run: Path) -> bool:
        (run / "job.toml").write_text("name = 7")
        return True

    seen = simulated.seen("a job file spoilt", [killed_at_line(3, "after")], "", spoil)
    assert seen is not None
    assert not seen.well
    assert seen.ending.startswith("ended with RunFolderError")


def test_answers_that_are_missing_in_a_record_are_lost(simulated: Simulated) -> None:
    with simulated.run() as run:
        assert lived(lambda: simulated.play(run)).code == 0
        lines = (run / "metrics.jsonl").read_text().splitlines()
        record = json.loads(lines[1])
        record["clients"]["bob"]["failed"] = "its node is not connected"
        (run / "metrics.jsonl").write_text("\n".join([lines[0], json.dumps(record)]) + "\n")
        everybody = frozenset({"ann", "bob", "cy"})
        assert lost_in(run, simulated.whole) == {0: frozenset(), 1: {"bob"}, 2: everybody}  # round 2 has no record at all
        assert seen_in(run, simulated.whole, "", BY_ITSELF, True).lost == 4


def test_rounds_begun_again_are_counted_beyond_the_first_time() -> None:
    entries = [Entry("round", {"number": number}) for number in (0, 1, 1, 1, 2)] + [Entry("ended")]
    assert begun_again(entries) == {1: 2}


def test_bits_are_those_of_numbers_names_and_nothing_else(simulated: Simulated, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    assert bits_of(tmp_path) == ""
    data = bytearray((simulated.folder / "whole" / "adapter" / "adapter_model.safetensors").read_bytes())
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(data)
    assert bits_of(tmp_path) == simulated.whole.bits
    data[-1] ^= 1
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(data)
    assert bits_of(tmp_path) != simulated.whole.bits


def test_a_row_adds_up_what_was_seen_and_shows_what_was_lost() -> None:
    good, bad = Seen("a", RESUMED, True, 1, 0, True, times=2), Seen("a", "given up", False, 2, 3, False)
    [row] = rows([good, bad])
    assert row.cells() == ["a", "3", "2 ended after `--resume`; 1 **given up**", "3", "**3**", "1 equal, **1 differ**"]
    assert not row.faultless
    [row] = rows([good, Seen("a", RESUMED, True, same=False, mendable=False)])
    assert row.faultless
    assert row.cells()[-1] == "1 equal, 1 differ"


def test_the_page_is_written_between_its_marks(tmp_path: Path) -> None:
    page, outcome = (
        tmp_path / "page.md",
        Outcome(3, 120.0, {"Killed": [Seen("a", RESUMED, True, 1, 2, False, where="here")]}, {}),
    )
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(page, outcome)
    written = page.read_text()
    assert written.startswith(f"before\n{BEGIN}\n")
    assert written.endswith(f"{END}\nafter\n")
    assert "old" not in written
    assert "seed 3; 2 minutes" in written
    assert "1 faults, 0 of them a SIGKILL to a process of a deployment. Answers lost: 2. Wrong bits: 1." in written
    assert "- a, here" in written
    write(page, outcome)
    assert page.read_text() == written


def test_bits_that_nobody_has_any_more_are_told_apart_from_wrong_ones() -> None:
    unknown, gone = Seen("a", RESUMED, True), Seen("b", RESUMED, True, same=False, mendable=False)
    assert "other bits" not in summary(Outcome(0, 1.0, {"Killed": [unknown]}, {}))
    assert "Wrong bits: 0. Runs that did not end as they should: 0.** 2 runs have other bits" in summary(
        Outcome(0, 1.0, {"Killed": [unknown, gone, gone]}, {})
    )


def test_the_page_in_the_docs_has_its_marks_and_says_what_is_tried() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert page.index(BEGIN) < page.index(END)
    assert all(f"`{method.partition(',')[0]}`" in page.partition(BEGIN)[0] for method in METHODS)


class Standing(Deployment):
    """Of which nothing runs."""

    def __init__(self) -> None:
        self.clients, self.sent = ["ann", "bob"], list[tuple[str, str]]()

    def send(self, owner: str, process: str, number: int = signal.SIGKILL) -> None:  # type: ignore[override]
        self.sent.append((owner, process))


def test_faults_come_at_their_line_to_somebody_who_is_there() -> None:
    """Nobody is there: all faults are left. Each client was tried, and not the server."""
    deployment, whole = Standing(), Whole("", {}, [])
    campaign = Campaign(deployment, whole, {}, [kill("relay", "client", "asked, training")], random.Random(0), print)
    campaign._at(Entry("asked", {"ask": "1.evaluate", "clients": []}))
    assert deployment.sent == []
    campaign._at(Entry("asked", {"ask": "1.0", "clients": []}))
    assert sorted(deployment.sent) == [("ann", "relay"), ("bob", "relay")]
    assert len(campaign.left) == 1


def test_who_was_hit_is_spared_until_the_next_answer() -> None:
    deployment, whole = Standing(), Whole("", {}, [])
    deployment.clients = ["ann"]
    fault = kill("relay", "client", "state")
    fault = type(fault)(fault.words, fault.side, fault.line, lambda on, owner: True)
    campaign = Campaign(deployment, whole, {}, [fault, type(fault)("2", "client", "state", fault.do)], random.Random(0), list)
    campaign._at(Entry("state", {"round": 0}))
    assert [hit.fault.words for hit in campaign.hits] == ["SIGKILL to relay"]
    campaign._at(Entry("state", {"round": 1}))
    assert len(campaign.hits) == 1
    campaign._at(Entry("answered", {"ask": "1.0", "client": "ann"}))
    campaign._at(Entry("state", {"round": 2}))
    assert [hit.fault.words for hit in campaign.hits] == ["SIGKILL to relay", "2"]


def test_what_became_of_a_round_is_told_of_the_fault_before_its_end() -> None:
    campaign = Campaign(Standing(), Whole("", {}, []), {}, [], random.Random(0), print)
    campaign.hits = [Hit(kill("relay", "client", ""), "ann", number, "") for number in (1, 1, 4)]
    blamed = [campaign.hits.index(campaign._to_blame(round)) for round in range(6)]
    assert blamed == [0, 0, 2, 2, 2, 2]


def test_lines_of_training_and_evaluation_are_told_apart() -> None:
    told = [Entry("asked", {"ask": "3.1"}), Entry("closed", {"ask": "3.evaluate"}), Entry("state", {"round": 3})]
    assert list(map(line_of, told)) == ["asked, training", "closed, evaluation", "state"]


def test_a_network_that_is_cut_ends_connections_and_carries_on_when_it_is_whole() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Proxy("127.0.0.1", server.getsockname()[1]) as proxy:
        server.settimeout(20)

        def connect() -> tuple[socket.socket, socket.socket]:
            near = socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
            far, _ = server.accept()
            far.settimeout(20)
            return near, far

        near, far = connect()
        with near, far:
            near.sendall(b"ask")
            assert far.recv(10) == b"ask"
            proxy.break_off()
            assert near.recv(10) == b""
        proxy.heal()
        near, far = connect()
        with near, far:
            far.sendall(b"answer")
            assert near.recv(10) == b"answer"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not os.environ.get("FEDTUNE_SLOW"), reason="two minutes: FEDTUNE_SLOW=1 runs it")
def test_each_kind_of_process_is_killed_over_sockets(tmp_path: Path) -> None:
    outcome = faults(tmp_path, ["sockets"], seed=0, full=False, console=Console())
    assert outcome.faultless, markdown(outcome)
    assert sum(outcome.at.values()) == 7
